#!/usr/bin/env python
"""From mask logits to a class map: ours beside the plain formula, in one run.

    OMP_NUM_THREADS=1 python benchmarks/evaluation.py
    OMP_NUM_THREADS=1 python benchmarks/evaluation.py --label 720 1280
    python benchmarks/evaluation.py --device cuda --repeats 50

The plain formula stretches all masks to the image, squashes them, sums them weighted by the
classes' probabilities, stretches the scores to the label and takes the best class. It is called as
published code calls it, one step after the other, every result kept until the next is there. What
the network does before is left out here; tools/benchmark.py shows its share of an evaluation.

Class maps are compared first. Then both are timed in turns: on a CPU by the time of all threads
of the process, so that what other programs take does not count. Memory is what a fresh process
needs more at its peak than before the call (the resident set; on a GPU what torch allocates).
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from clouds.config import get_cfg
from clouds.modeling.inference.semantic import SemanticMap

CLASSES, STRIDE, SEED = 19, 4, 0
CELL = 96
"""Side of what a query claims, pixels."""
CONFIDENT = 8.0
"""Logit far inside a mask."""

Size = tuple[int, int]
Way = Callable[[Tensor, Tensor, Size, Size, int], Tensor]


def plain(
    probabilities: Tensor, mask_logits: Tensor, image: Size, label: Size, masks_at_once: int
) -> Tensor:
    """The formula, as it is written down."""
    masks = F.interpolate(mask_logits[None], image, mode="bilinear", align_corners=False)[0]
    masks = masks.sigmoid()
    scores = torch.einsum("qc,qhw->chw", probabilities, masks)
    del masks
    scores = F.interpolate(scores[None], label, mode="bilinear", align_corners=False)[0]
    return scores.argmax(0)


def ours(
    probabilities: Tensor, mask_logits: Tensor, image: Size, label: Size, masks_at_once: int
) -> Tensor:
    return SemanticMap(probabilities, mask_logits, image, image, masks_at_once).classes(label)


WAYS: dict[str, Way] = {"plain formula": plain, "ours": ours}


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    made = outputs(args)
    with torch.no_grad():
        before, after = (way(*made) for way in WAYS.values())
        equal = (before == after).double().mean().item()
        del before, after
        times: dict[str, list[float]] = {name: [] for name in WAYS}
        for _ in range(args.repeats):  # in turns: what disturbs the machine disturbs each
            for name, way in WAYS.items():
                times[name].append(seconds(way, made, device))
    memory = {name: peak_in_a_process_of_its_own(name, args) for name in WAYS}
    print(
        f"{args.queries} queries, image {args.image[0]}x{args.image[1]}, label "
        f"{args.label[0]}x{args.label[1]}, MASKS_AT_ONCE {args.masks_at_once}; "
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    slowest, largest = statistics.median(times["plain formula"]), memory["plain formula"]
    for name, taken in times.items():
        median = statistics.median(taken)
        print(
            f"{name:>14}: {median:.4f} s ({min(taken):.4f} to {max(taken):.4f}), "
            f"{slowest / median:.2f} x as fast; at the peak {memory[name] / 2**20:.0f} MiB, "
            f"{memory[name] / largest:.1%}"
        )
    print(f"equal pixels: {equal:.5%}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = {"type": int, "nargs": 2, "metavar": ("HEIGHT", "WIDTH"), "default": [1024, 2048]}
    parser.add_argument("--image", help="multiples of 32", **size)
    parser.add_argument("--label", help="size of the class map", **size)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--masks-at-once", type=int, default=get_cfg().TEST.MASKS_AT_ONCE)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def outputs(args: argparse.Namespace) -> tuple[Tensor, Tensor, Size, Size, int]:
    """Masks with soft outlines and a lot of doubt, each query's class likelier than others."""
    generator = torch.Generator().manual_seed(SEED)
    image, label = tuple(args.image), tuple(args.label)
    cells = [max(2, side // CELL) for side in image]
    coarse = torch.randn(args.queries, *cells, generator=generator) * CONFIDENT - CONFIDENT / 2
    mask_logits = F.interpolate(
        coarse[None], [side // STRIDE for side in image], mode="bicubic", align_corners=False
    )[0]
    class_logits = 3 * torch.randn(args.queries, CLASSES + 1, generator=generator)
    probabilities = class_logits.softmax(-1)[:, :-1].contiguous()
    device = torch.device(args.device)
    return probabilities.to(device), mask_logits.to(device), image, label, args.masks_at_once


def seconds(way: Way, made: tuple[Tensor, Tensor, Size, Size, int], device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    synchronize(device)
    start = clock()
    way(*made)
    synchronize(device)
    return clock() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_in_a_process_of_its_own(name: str, args: argparse.Namespace) -> int:
    """Bytes; the peak of the resident set never falls again within a process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak, (name, args))


def peak(name: str, args: argparse.Namespace) -> int:
    device = torch.device(args.device)
    made = outputs(args)
    small = argparse.Namespace(**vars(args) | {"image": [64, 96], "label": [32, 48]})
    with torch.no_grad():
        WAYS[name](*outputs(small))  # libraries load code and buffers of their own
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            held = torch.cuda.memory_allocated(device)
            WAYS[name](*made)
            return torch.cuda.max_memory_allocated(device) - held
        held = resident()
        WAYS[name](*made)
        return resident() - held


def resident() -> int:
    """The largest resident set so far, bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: what rusage knows there is in part the parent process's
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


if __name__ == "__main__":
    main()
