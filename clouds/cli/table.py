"""The table of commands of the library."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command of the library.

    Attributes:
        module: its module, with `main(argv)`, which returns an exit status or None.
        summary: what it does, in one line.
        examples: command lines; the last part of its --help.
    """

    module: str
    summary: str
    examples: tuple[str, ...]


COMMANDS = {
    "train": Command(
        "clouds.cli.train",
        "train a model and evaluate it",
        (
            "clouds train --config-file warmup/gta_convnext_large",
            "clouds train --config-file warmup/gta_convnext_large --resume",
            "clouds train --config-file warmup/gta_convnext_large --num-gpus 8 SOLVER.BASE_LR 2e-5",
            "torchrun --nproc-per-node 8 -m clouds train --config-file warmup/gta_convnext_large",
        ),
    ),
    "eval": Command(
        "clouds.cli.eval",
        "evaluate a checkpoint on the test datasets of a config",
        (
            "clouds eval --config-file warmup/gta_convnext_large "
            "MODEL.WEIGHTS output/model_final.pth",
        ),
    ),
    "report": Command(
        "clouds.cli.report",
        "write one HTML file about a run, or several side by side",
        (
            "clouds report output/demo/joint",
            "clouds report output/demo/warmup output/demo/joint --output compared.html",
        ),
    ),
    "predict": Command(
        "clouds.cli.predict",
        "predict the classes of images and videos with a checkpoint",
        (
            "clouds predict --weights output/model_final.pth --input photos --output predictions",
            "clouds predict --weights published.pth --config-file warmup/gta_convnext_large "
            "--input 'frames/*.png' drive.mp4 --save overlay --output predictions",
            "clouds predict --weights text_head.pth --classes 'road, tuk-tuk, dog' --input a.jpg "
            "--output predictions TEST.SHORT_SIDE 512",
            "clouds predict --weights model_final.pth --input bravo --output submission --bravo",
        ),
    ),
    "ablate": Command(
        "clouds.cli.ablate",
        "train several settings with several seeds, and compare them in a table",
        (
            "clouds ablate components",
            "clouds ablate demo_noise --seeds 10 11 --only 'class mixing' --jobs 2",
            "clouds ablate mine.yaml --cluster slurm --job-options timeout_min=1440 "
            "slurm_partition=gpu",
        ),
    ),
    "compare": Command(
        "clouds.cli.compare",
        "compare runs that exist in a table",
        (
            "clouds compare output/a output/b",
            "clouds compare --group sam=output/a0,output/a1 --group none=output/b0,output/b1 "
            "--baseline none --save table.tex",
        ),
    ),
    "generate": Command(
        "clouds.cli.generate",
        "generate unlabeled training images from prompts",
        (
            "clouds generate --output datasets/stable_diffusion/gta",
            "clouds generate --generator procedural --height 256 --width 512 --count 300 "
            "--output datasets/demo/stable_diffusion/demo",
            "torchrun --nproc-per-node 8 -m clouds generate --output datasets/stable_diffusion/gta",
        ),
    ),
    "write-prompts": Command(
        "clouds.cli.write_prompts",
        "write prompts of street scenes with a language model",
        (
            "clouds write-prompts --model Qwen/Qwen2.5-7B-Instruct --output more.txt --count 500 "
            "--quota 50 --avoid street_scenes",
        ),
    ),
    "check-prompts": Command(
        "clouds.cli.check_prompts",
        "count what the prompts of a file cover, and find repeated ones",
        (
            "clouds check-prompts street_scenes",
            "clouds check-prompts mine.txt --strict --at-least 5",
        ),
    ),
    "check-data": Command(
        "clouds.cli.check_data",
        "show which datasets exist, and whether they are complete and valid",
        (
            "clouds check-data",
            "clouds check-data --datasets gta5 bdd_val --full",
            "clouds check-data --descriptions campus.yaml --full --classes",
        ),
    ),
    "describe-dataset": Command(
        "clouds.cli.describe_dataset",
        "write a first description of a dataset of one's own, from its files",
        (
            "clouds describe-dataset campus/images campus/labels",
            "clouds describe-dataset images labels --name campus --output data/campus.yaml "
            "--sample 0",
        ),
    ),
    "list-config": Command(
        "clouds.cli.list_config",
        "print the config keys: default, meaning, allowed values",
        (
            "clouds list-config solver.clip",
            "clouds list-config --config-file warmup/gta_convnext_large SOLVER.MAX_ITER 1000",
        ),
    ),
    "list-parameters": Command(
        "clouds.cli.list_parameters",
        "count the parameters that a config trains, without weights",
        (
            "clouds list-parameters --config-file warmup/gta_convnext_large",
            "clouds list-parameters --config-file warmup/gta_convnext_large --json "
            "MODEL.BACKBONE.NAME ViT MODEL.BACKBONE.ADAPTER.NAME rein",
        ),
    ),
    "convert": Command(
        "clouds.cli.convert",
        "convert a checkpoint to safetensors, or to a .pth of the published code",
        (
            "clouds convert model_final.pth weights.safetensors",
            "clouds convert weights.safetensors for_published_code.pth",
        ),
    ),
    "export": Command(
        "clouds.cli.export",
        "export a checkpoint: ONNX, torch.export, safetensors, model card",
        (
            "clouds export --weights output/model_final.pth --output exported",
            "clouds export --weights published.pth --config-file warmup/gta_convnext_large "
            "--output exported --format onnx safetensors --licence cc-by-nc-4.0",
        ),
    ),
    "cache-sam": Command(
        "clouds.cli.cache_sam",
        "compute SAM's image embeddings of all generated images before training",
        (
            "clouds cache-sam --config-file joint/gta_convnext_large "
            "MODEL.CLOUDS.SAM.CACHE_DIR /fast/sam_cache",
        ),
    ),
    "baselines": Command(
        "clouds.cli.baselines",
        "evaluate two baselines without a neural network",
        ("clouds baselines --config-file demo/warmup",),
    ),
}
"""Name -> command, in the order of a project: train, data, config, the rest."""
