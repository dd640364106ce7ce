#!/usr/bin/env python
"""Time of each corruption of the datasets cityscapes_c_<corruption>_<severity>, one image each.

    OMP_NUM_THREADS=1 python benchmarks/corruptions.py
    OMP_NUM_THREADS=1 python benchmarks/corruptions.py --severity 5 --image 512 1024

Processor time of all threads of this process, the median of --repeats, after one call that is not
counted, in which glass_blur is compiled. The image is random; evaluation needs this time in
addition to reading it, in the worker processes of the loader.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import torch
from tabulate import tabulate

from clouds.data.corruption import CORRUPTIONS, SEVERITIES, Corruption

sys.path.insert(0, str(Path(__file__).parent))
from in_turns import machine, parser_of, seconds_of
from profiler_data import random_image


def main(words: Sequence[str] | None = None) -> None:
    args = parse(words)
    cv2.setNumThreads(0)
    device = torch.device("cpu")
    image, _ = random_image((args.image[0], args.image[1]), 0)
    rows = []
    for name in CORRUPTIONS:
        corrupt = Corruption(name, args.severity)
        corrupt(image)
        seconds = [seconds_of(lambda: corrupt(image), device) for _ in range(args.repeats)]  # noqa: B023 - called at once
        rows.append([name, 1000 * statistics.median(seconds)])
    height, width = args.image
    print(f"severity {args.severity}, {height}x{width}; {machine(device)}")
    print(tabulate(rows, ["corruption", "ms"], floatfmt=".0f", tablefmt="github"))


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--image", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), default=[1024, 2048])
    add("--severity", type=int, choices=SEVERITIES, default=3)
    add("--repeats", type=int, default=3)
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
