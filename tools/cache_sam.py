#!/usr/bin/env python
r"""Compute SAM's image embeddings of all generated images before training.

    python tools/cache_sam.py --config-file configs/joint/gta_convnext_large.yaml \
        MODEL.CLOUDS.SAM.CACHE_DIR /fast/sam_cache
    python tools/cache_sam.py --config-file … --num-gpus 8 MODEL.CLOUDS.SAM.CACHE_DIR …
    torchrun --nproc-per-node 8 tools/cache_sam.py --config-file … MODEL.CLOUDS.SAM.CACHE_DIR …

Both views of each image, as painted and flipped (where INPUT.FLIP), of all generated datasets in
DATASETS.TRAIN go to MODEL.CLOUDS.SAM.CACHE_DIR; training with the same SAM, the same folder and
the same SOLVER.AMP then never runs SAM's image encoder. Without this tool training fills the folder
in its first epochs. What is there already is not computed again, so a run that was stopped goes on
where it was.
torchrun, or --num-gpus, shares the images among processes and GPUs, and among machines if all of
them see the folder.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from command_line import USER_ERROR, refuse_late_flags, user_errors_in_one_line

if TYPE_CHECKING:
    import torch

    from clouds.d2 import CfgNode
    from clouds.data.structures import Record
    from clouds.self_training.refiners.sam.embedding_cache import CachedEmbedder, EmbeddingCache

# Nothing heavy is imported up here: --help and a mistyped flag answer at once.

STOPPED = "stopped; the same command goes on from here"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML config")
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        metavar="N",
        help="GPUs of this machine; with `MODEL.DEVICE cpu`, CPU processes",
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="config overrides, after all flags: MODEL.CLOUDS.SAM.CACHE_DIR /fast/sam_cache",
    )
    args = parser.parse_args(argv)
    refuse_late_flags(parser, args.opts)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, read the config, and run in as many processes as asked for."""
    args = parse(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    with user_errors_in_one_line(stopped=STOPPED):
        from clouds.config import load_config
        from clouds.engine.launch import check_launch, launch

        cfg = load_config(args.config_file, args.opts)
        check_config(cfg)
        check_launch(args.num_gpus, 1, 0, "auto", cfg.MODEL.DEVICE)
    # The processes only add up numbers at the end, so gloo is enough on GPUs too.
    launch(run, (cfg,), num_gpus=args.num_gpus, device="cpu")


def check_config(cfg: CfgNode) -> None:
    """Raise ValueError if there is nothing to compute, or no place for it."""
    from clouds.data.datasets import generated

    node = cfg.MODEL.CLOUDS
    if not node.SAM.CACHE_DIR:
        raise ValueError(
            "MODEL.CLOUDS.SAM.CACHE_DIR is empty. Name the folder to fill after all flags, "
            "MODEL.CLOUDS.SAM.CACHE_DIR /fast/sam_cache, and name it in training, too."
        )
    if node.REFINER != "sam" or not node.SAM.ENABLED:
        raise ValueError(
            f"this config does not use SAM: MODEL.CLOUDS.REFINER is {node.REFINER!r}, "
            f"MODEL.CLOUDS.SAM.ENABLED {node.SAM.ENABLED}"
        )
    if not generated(cfg.DATASETS.TRAIN):
        raise ValueError(
            f"DATASETS.TRAIN, {tuple(cfg.DATASETS.TRAIN)}, holds no generated dataset "
            "(sd_<folder>). Name the config of joint training."
        )


def run(cfg: CfgNode) -> None:
    """What each process does."""
    with user_errors_in_one_line(stopped=STOPPED):
        from clouds import comm
        from clouds.device import autocast, resolve_device
        from clouds.self_training.refiners.sam.embedding_cache import precision
        from clouds.self_training.refiners.sam.model import build_sam
        from clouds.self_training.refiners.sam.refiner import cached

        rank, world_size = comm.get_rank(), comm.get_world_size()
        device = comm.device_of_process(resolve_device(cfg.MODEL.DEVICE))
        records = pictures(cfg)
        embed = cached(cfg, build_sam(cfg, device))
        total = len(records) * (1 + cfg.INPUT.FLIP)
        if rank == 0:
            warn_of_space(embed.cache, total)
        with autocast(cfg, device):  # as in training: the precision is part of an entry's key
            computed_in = str(precision(device)).removeprefix("torch.")
            done = fill(embed, records[rank::world_size], cfg.INPUT.FLIP, rank)
        counts = comm.all_gather((done, embed.computed))
        if rank == 0:
            report(embed.cache, total, *map(sum, zip(*counts, strict=True)), computed_in)
        stop_if_failed(embed.cache)


def pictures(cfg: CfgNode) -> list[Record]:
    """All generated pictures that training sees; raises as `DatasetSpec.records`."""
    from clouds.data.datasets import generated, get_dataset

    names = dict.fromkeys(generated(cfg.DATASETS.TRAIN))
    return [record for name in names for record in get_dataset(name).records()]


def warn_of_space(cache: EmbeddingCache, views: int) -> None:
    """Say before hours of work that its result will not fit."""
    needed = views * cache.entry_bytes
    there = cache.size()[1]
    free = shutil.disk_usage(cache.folder).free
    if needed - there > free:
        print(
            f"warning: {cache.folder} has {gib(free)} GiB left, but up to {gib(needed - there)} "
            "may be needed",
            file=sys.stderr,
        )


def fill(embed: CachedEmbedder, records: Sequence[Record], flip: bool, rank: int) -> int:
    """Compute what is missing, under a progress bar; returns how many views have their entry."""
    from tqdm import tqdm

    done = 0
    with tqdm(
        desc="embedding", total=len(records) * (1 + flip), unit="view", disable=rank != 0
    ) as bar:
        for view in views(records, flip):
            embed([view])
            if embed.cache.failure is not None:
                break
            done += 1
            bar.update()
    return done


def views(records: Sequence[Record], flip: bool) -> Iterator[torch.Tensor]:
    """The clean views that training has of generated pictures."""
    from clouds.data.dataset_mapper import read_painted, to_tensor

    for record in records:
        painted = read_painted(record)
        yield to_tensor(painted)
        if flip:
            yield to_tensor(painted[:, ::-1])


def report(cache: EmbeddingCache, total: int, done: int, computed: int, computed_in: str) -> None:
    """Say what there is now, and which training it is for."""
    count, size = cache.size()
    print(
        f"{done} of {total} views are in {cache.folder}, {computed} of them computed now; "
        f"the folder holds {count} embeddings, {gib(size)} GiB"
    )
    if done == total:
        print(
            f"Train with MODEL.CLOUDS.SAM.CACHE_DIR {cache.folder} and the same SOLVER.AMP: these "
            f"were computed in {computed_in}"
        )


def stop_if_failed(cache: EmbeddingCache) -> None:
    """Exit with an error if entries could not be written; the log has said why."""
    if cache.failure is not None:
        raise SystemExit(USER_ERROR)


def gib(size: float) -> str:
    """Bytes in GiB, three digits."""
    return f"{size / 2**30:.3g}"


if __name__ == "__main__":
    main(sys.argv[1:])
