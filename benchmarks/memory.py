#!/usr/bin/env python
"""Which recipe fits which card: the estimate of SOLVER.MEMORY_GIB for several configs.

    python benchmarks/memory.py joint/gta_convnext_large papers/rein_gta --cards 24 80
    python benchmarks/memory.py --measure

The first form prints the estimate of a step in one process with the whole batch, in float32 and in
bf16, and for each card the parts (SOLVER.ACCUMULATE) and, where needed, the activation
checkpointing that fit. Nothing is allocated; the figures are estimates, not measurements.

The second form compares the estimate with peak memory that is measured: the resident memory of this
process in a step of source pre-training on a CPU, a ConvNeXt-base and small images (--size,
--images), minus the memory before the model is built. A CPU has other kernels: on it ConvNeXt
stores less, and the masks of one image are compared at a time.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tabulate import tabulate

import clouds.modeling  # noqa: F401 - registers what configs name
from clouds.config import load_config
from clouds.config.config import with_value
from clouds.d2 import CfgNode
from clouds.engine import Trainer
from clouds.engine.memory import GIB, USABLE, estimate, fit_to_memory

sys.path.insert(0, str(Path(__file__).parent))
import step
from in_turns import Peak, parser_of, silence_all_but_peaks

Row = list[str | float]


def main(words: Sequence[str] | None = None) -> None:
    args = parse(words)
    if args.measure:
        estimated, measured = compare(args.size, args.images)
        print(f"estimated {estimated:.0f} MiB, measured {measured:.0f} MiB on a CPU")
        return
    rows = []
    for name in args.configs:
        rows += rows_of(name, args.cards, args.settings)
        print(*rows[-2:], sep="\n", file=sys.stderr, flush=True)
    head = ["config", "images", "type", "step, GiB", *(f"{card:g} GB" for card in args.cards)]
    print(tabulate(rows, head, floatfmt=".1f", tablefmt="github"))
    print(f"\nEstimates. A card is used up to {USABLE:.0%} of its GiB.")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("configs", nargs="*", metavar="CONFIG", help="paths or short names")
    add("--cards", nargs="+", type=float, default=[24, 80], metavar="GB", help="memory of GPUs")
    add("--settings", nargs="+", default=[], metavar="KEY VALUE", help="overrides of the configs")
    add("--measure", action="store_true", help="compare with a measured step on this CPU")
    add("--size", type=int, default=256, help="with --measure: side of a crop, pixels")
    add("--images", type=int, default=4, help="with --measure: images of a step")
    args = parser.parse_args(words)
    if bool(args.configs) == args.measure:
        parser.error("name configs, or give --measure")
    return args


def rows_of(name: str, cards: Sequence[float], settings: Sequence[str]) -> list[Row]:
    """A row in float32 and one in bf16."""
    rows = []
    for half in (False, True):
        fixed = ["MODEL.DEVICE", "cpu", "SOLVER.AMP.ENABLED", half, *settings]
        cfg = load_config(name, fixed)
        row: Row = [name, str(cfg.SOLVER.IMS_PER_BATCH), "bf16" if half else "float32"]
        whole = estimate(cfg).total / GIB
        choices = ["yes" if whole <= USABLE * card else choice(cfg, card) for card in cards]
        rows.append([*row, whole, *choices])
    return rows


def choice(cfg: CfgNode, card: float) -> str:
    """What is chosen for a card, in words."""
    try:
        chosen = fit_to_memory(with_value(cfg, "SOLVER.MEMORY_GIB", card))
    except ValueError:
        return "no"
    parts = chosen.SOLVER.ACCUMULATE
    words = "yes" if parts == cfg.SOLVER.ACCUMULATE else f"in {parts} parts"
    before = cfg.MODEL.BACKBONE.ACTIVATION_CHECKPOINTING
    checkpointing = chosen.MODEL.BACKBONE.ACTIVATION_CHECKPOINTING and not before
    return f"{words}, checkpointing" if checkpointing else words


def compare(size: int, images: int, clip: str = "convnext_base") -> tuple[float, float]:
    """Estimated and measured peak of a step of source pre-training, MiB."""
    device = torch.device("cpu")
    torch.set_num_threads(1)
    words = ["--clip", clip, "--size", str(size), "--source", str(images), "--phase", "warmup"]
    args = step.parse([*words, "--generated", "0"])
    cfg = step.config(args, Path("output"))
    estimated = estimate(cfg).total / 2**20
    batch = [step.source_sample(seed, size) for seed in range(images)]
    torch.zeros(64, 64).mm(torch.zeros(64, 64))  # libraries allocate their own
    with Peak(device) as peak:
        trainer = Trainer(cfg, loader=lambda _: itertools.repeat([]))
        for number in range(2):
            trainer.train_step(number, batch, time.perf_counter())
    return estimated, peak.more


if __name__ == "__main__":
    logging.getLogger("clouds").setLevel(logging.ERROR)
    silence_all_but_peaks()
    main()
