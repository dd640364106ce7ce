"""Compute SAM's image embeddings of all generated images before training.

For every SAM that MODEL.CLOUDS.SAM.MODEL names, and the refiners sam, sam_text and regions.

Computes the embeddings of each image of the generated datasets in DATASETS.TRAIN and, with
INPUT.FLIP, of the flipped image, and writes them to MODEL.CLOUDS.SAM.CACHE_DIR. Training with the
same SAM, cache folder and SOLVER.AMP then does not run SAM's image encoder. Without this command,
training fills the cache in its first epochs. Existing embeddings are kept: after an interruption,
the same command resumes.

With torchrun or --num-gpus the images are distributed among processes, GPUs, and machines with a
shared file system.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from clouds.cli.command_line import (
    USER_ERROR,
    add_overrides,
    given_overrides,
    new_parser,
    user_errors_in_one_line,
)

if TYPE_CHECKING:
    import torch

    from clouds.d2 import CfgNode
    from clouds.data.structures import Record
    from clouds.self_training.refiners.sam.embedding_cache import CachedEmbedder, EmbeddingCache

SAM_REFINERS = ("sam", "sam_text", "regions")
STOPPED = "stopped; run the same command again to resume"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser("cache-sam", __doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML config")
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        metavar="N",
        help="GPUs of this machine; with `MODEL.DEVICE cpu`, CPU processes",
    )
    add_overrides(parser, "MODEL.CLOUDS.SAM.CACHE_DIR /fast/sam_cache")
    args = parser.parse_args(argv)
    args.opts = given_overrides(parser, args.opts)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, read the config and run in all processes."""
    args = parse(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    with user_errors_in_one_line(stopped=STOPPED):
        from clouds.config import load_config
        from clouds.engine.launch import check_launch, launch

        cfg = load_config(args.config_file, args.opts)
        check_config(cfg)
        check_launch(args.num_gpus, 1, 0, "auto", cfg.MODEL.DEVICE)
    # device "cpu" selects the gloo backend: the only communication is the sum of counts at the end
    launch(run, (cfg,), num_gpus=args.num_gpus, device="cpu", timeout=cfg.DIST_TIMEOUT)


def check_config(cfg: CfgNode) -> None:
    """Raise ValueError if the config has no cache folder, no SAM or no generated dataset."""
    from clouds.data.datasets import generated

    node = cfg.MODEL.CLOUDS
    if not node.SAM.CACHE_DIR:
        raise ValueError(
            "MODEL.CLOUDS.SAM.CACHE_DIR is empty. Set it to the cache folder after all flags, "
            "MODEL.CLOUDS.SAM.CACHE_DIR /fast/sam_cache, and set it in training, too."
        )
    if node.REFINER not in SAM_REFINERS or not node.SAM.ENABLED:
        raise ValueError(
            f"this config does not use SAM: MODEL.CLOUDS.REFINER is {node.REFINER!r}, "
            f"MODEL.CLOUDS.SAM.ENABLED {node.SAM.ENABLED}"
        )
    if not generated(cfg.DATASETS.TRAIN):
        raise ValueError(
            f"DATASETS.TRAIN, {tuple(cfg.DATASETS.TRAIN)}, has no generated dataset "
            "(sd_<folder>). Use the config of a joint training."
        )


def run(cfg: CfgNode) -> None:
    """Compute and write the embeddings of the images of this process."""
    with user_errors_in_one_line(stopped=STOPPED):
        from clouds import comm
        from clouds.device import autocast, resolve_device
        from clouds.self_training.refiners.base import build_refiner
        from clouds.self_training.refiners.sam.embedding_cache import precision

        rank, world_size = comm.get_rank(), comm.get_world_size()
        device = comm.device_of_process(resolve_device(cfg.MODEL.DEVICE))
        records = generated_records(cfg)
        refiner: Any = build_refiner(cfg, device)  # one of SAM_REFINERS, with a cache
        embed: CachedEmbedder = refiner.embed
        total = len(records) * (1 + cfg.INPUT.FLIP)
        if rank == 0:
            warn_of_space(embed.cache, total)
        with autocast(cfg, device):  # as in training: the cache key depends on the precision
            computed_in = str(precision(device)).removeprefix("torch.")
            num_done = fill(refiner, records[rank::world_size], cfg.INPUT.FLIP, rank)
        counts = comm.all_gather((num_done, embed.computed))
        if rank == 0:
            all_done, all_computed = map(sum, zip(*counts, strict=True))
            report(embed.cache, total, all_done, all_computed, computed_in)
        stop_if_failed(embed.cache)


def generated_records(cfg: CfgNode) -> list[Record]:
    """The images of all generated training datasets; raises as `DatasetSpec.records`."""
    from clouds.data.datasets import Datasets, generated

    names = dict.fromkeys(generated(cfg.DATASETS.TRAIN))
    datasets = Datasets.from_config(cfg)
    return [record for name in names for record in datasets.get(name).records()]


def warn_of_space(cache: EmbeddingCache, num_views: int) -> None:
    """Warn if the free disk space may not be enough for all embeddings."""
    missing = num_views * cache.entry_bytes - cache.size()[1]
    free = shutil.disk_usage(cache.folder).free
    if missing > free:
        print(
            f"warning: {cache.folder} has {gib(free)} GiB of free disk space, but the embeddings "
            f"may need {gib(missing)} GiB",
            file=sys.stderr,
        )


def fill(refiner: Any, records: Sequence[Record], flip: bool, rank: int) -> int:
    """Compute the missing embeddings, with a progress bar on rank 0.

    Returns:
        The number of views whose embedding is in the cache.
    """
    from tqdm import tqdm

    num_done = 0
    with tqdm(
        desc="embedding", total=len(records) * (1 + flip), unit="view", disable=rank != 0
    ) as bar:
        for view in views(records, flip):
            refiner.fill_cache([view])
            if refiner.embed.cache.failure is not None:
                break
            num_done += 1
            bar.update()
    return num_done


def views(records: Sequence[Record], flip: bool) -> Iterator[torch.Tensor]:
    """The images without augmentation as training sees them: uint8 (3, H, W), also flipped."""
    from clouds.data.dataset_mapper import read_generated_image, to_tensor

    for record in records:
        image = read_generated_image(record)
        yield to_tensor(image)
        if flip:
            yield to_tensor(image[:, ::-1])


def report(
    cache: EmbeddingCache, total: int, num_done: int, computed: int, computed_in: str
) -> None:
    """Print the number and size of the embeddings, and the options that use them in training."""
    count, size = cache.size()
    print(
        f"{num_done} of {total} views are in {cache.folder}, {computed} of them computed now; "
        f"the folder has {count} embeddings, {gib(size)} GiB"
    )
    if num_done == total:
        print(
            f"Train with MODEL.CLOUDS.SAM.CACHE_DIR {shlex.quote(str(cache.folder))} and the same "
            f"SOLVER.AMP; the embeddings were computed in {computed_in}"
        )


def stop_if_failed(cache: EmbeddingCache) -> None:
    """Exit with an error if entries could not be written; the reason was logged before."""
    if cache.failure is not None:
        raise SystemExit(USER_ERROR)


def gib(size: float) -> str:
    """Bytes in GiB, with three digits."""
    return f"{size / 2**30:.3g}"
