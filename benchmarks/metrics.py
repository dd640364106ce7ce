#!/usr/bin/env python
"""Milliseconds per image of the scores beyond mIoU (TEST.METRICS), beside the confusion matrix.

    OMP_NUM_THREADS=1 python benchmarks/metrics.py
    python benchmarks/metrics.py --device cuda --repeats 50

The prediction is that of random blocks. The network, and the confidence itself, are not part of it.
On a CPU the time is the CPU time of all threads of this process, and OpenCV has one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import cv2
import torch
from in_turns import machine, parser_of, timed

from clouds.data.label_space import CITYSCAPES_19
from clouds.evaluation.confusion import ConfusionMatrix
from clouds.evaluation.metrics import METRICS

CELL = 32


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--size", type=int, nargs=2, default=[1024, 2048], metavar=("H", "W"))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(0)
    height, width = args.size
    coarse = torch.randint(0, 19, (2, height // CELL, width // CELL), generator=generator)
    label, other = coarse.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2).to(torch.uint8)
    correct = torch.rand(label.shape, generator=generator) < 0.9
    prediction = torch.where(correct, label, other).to(device)
    label = label.to(device)
    confidence = torch.rand(label.shape, generator=generator).to(device)
    matrix = ConfusionMatrix(19)
    calls: dict[str, Callable[[], None]] = {"mIoU": lambda: matrix.update(prediction, label)}
    for name, build in METRICS.items():
        metric = build(CITYSCAPES_19)
        calls[name] = lambda metric=metric: metric.update(prediction, label, confidence)
    print(f"{height}x{width}, 19 classes; {machine(device)}\n| scores | ms |\n|---|---:|")
    for name, seconds in timed(calls, args.repeats, device, untimed=1).items():
        print(f"| {name} | {1000 * median(seconds):.0f} |")


if __name__ == "__main__":
    main()
