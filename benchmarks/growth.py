#!/usr/bin/env python
"""How the cost of our step grows: with crop size, batch, generated images and components.

    OMP_NUM_THREADS=1 python benchmarks/growth.py
    OMP_NUM_THREADS=1 python benchmarks/growth.py --clip clouds_tiny --sam tiny --size 96
    python benchmarks/growth.py --clip convnext_large_d_320 --size 768 --sam vit_h --device cuda \
        --dtype bfloat16 --repeats 10

Each row is our step of `step.py` with SAM's embeddings cached. The options are those of that
script, except for those that select an implementation, a phase or the teacher's own label. A row
differs from the requested step in the quantity of its table. Clipping, the optimizer and the rest,
a tenth of a second, have no column.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parent))
import step
from in_turns import machine, silence_all_but_peaks
from profiler import OPTIMIZER, REST
from published_step import Labels

CLASSES = 19
SIZES = (2 / 3, 1, 4 / 3, 2)
"""Sides of a crop as multiples of --size."""
IMAGES = (1, 2, 4, 8)
GENERATED = (0, 1, 2, 4)
COMPONENTS = ((1, 5), (2, 5), (4, 5), (5, 8))
"""Rows and columns of rectangles in the label of a generated image."""
PARTS = tuple(part for part in step.PARTS if part not in (OPTIMIZER, REST))
FIXED = ("--only", "--phase", "--teacher-label")
"""Options of step.py that this script sets."""

Row = list[str | float]


def main(words: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if words is None else words)
    given = [word for word in words if word.split("=")[0] in FIXED]
    if given:
        raise SystemExit(f"growth.py sets {', '.join(FIXED)} itself; leave out {', '.join(given)}")
    args = step.parse(words, __doc__)
    torch.set_num_threads(args.threads)
    print(
        f"{args.source} labelled and {args.generated} generated images of {args.size}x{args.size}, "
        f"CLIP {args.clip}, SAM {args.sam}, {args.dtype}; "
        f"{machine(torch.device(args.device))}\n"
    )
    for title, rows in (
        ("crop", sizes(words)),
        ("labelled", labelled(words)),
        ("generated", generated(words)),
        ("components", components(words)),
    ):
        print(tabulate(list(rows), [title, "s", *PARTS, "MiB more"], floatfmt=".3f"), flush=True)
        print()


def sizes(words: Sequence[str]) -> Iterator[Row]:
    """By side of a crop, pixels."""
    asked = step.parse(words).size
    for share in SIZES:
        size = 32 * round(asked * share / 32)
        with built([*words, "--size", str(size)]) as (args, parts):
            yield row(args, parts, str(size), args.source, args.generated)


def labelled(words: Sequence[str]) -> Iterator[Row]:
    """By labelled images of a step of source pre-training."""
    more = ["--phase", "warmup", "--source", str(max(IMAGES))]
    with built([*words, *more]) as (args, parts):
        for count in IMAGES:
            yield row(args, parts, str(count), count, 0)


def generated(words: Sequence[str]) -> Iterator[Row]:
    """By generated images in addition to the labelled ones."""
    with built([*words, "--generated", str(max(GENERATED))]) as (args, parts):
        for count in GENERATED:
            yield row(args, parts, str(count), args.source, count)


def components(words: Sequence[str]) -> Iterator[Row]:
    """By components of each generated image."""
    with built([*words, "--larger-than", "0"]) as (args, parts):
        for rows, columns in COMPONENTS:
            parts.given = [rectangles(args.size, rows, columns)] * args.generated
            yield row(args, parts, str(rows * columns), args.source, args.generated)


@contextlib.contextmanager
def built(words: Sequence[str]) -> Iterator[tuple[argparse.Namespace, step.Parts]]:
    """Options, batch and model; SAM's cache is deleted afterwards."""
    args = step.parse(["--only", "ours", *words])
    with tempfile.TemporaryDirectory() as folder:
        yield args, step.Parts(args, step.config(args, Path(folder)), torch.device(args.device))


def rectangles(size: int, rows: int, columns: int) -> Labels:
    """A label of rows x columns rectangles; adjacent ones, also at corners, differ in class."""
    row, column = (np.arange(size) * n // size for n in (rows, columns))
    return ((row[:, None] * columns + column) % CLASSES).astype(np.uint8)


def row(args: argparse.Namespace, parts: step.Parts, title: str, source: int, images: int) -> Row:
    """Medians of a step on `source` labelled and `images` generated images."""
    batch = parts.labelled[:source] + parts.generated[:images]
    ours = parts.ours
    if ours.refiner is not None:
        ours.refiner.given = parts.given[:images]
    way = {title: lambda clock: ours(batch, clock)}
    untimed = args.untimed or bool(images)  # else the time of SAM's encoder would be included
    (taken,) = step.measure(way, untimed, args.repeats, torch.device(args.device)).values()
    seconds = [one.cpu if args.device == "cpu" else one.wall for one in taken]
    return [
        title,
        statistics.median(seconds),
        *(statistics.median(one.parts[part] for one in taken) for part in PARTS),
        statistics.median(one.more for one in taken),
    ]


if __name__ == "__main__":
    silence_all_but_peaks()
    main()
