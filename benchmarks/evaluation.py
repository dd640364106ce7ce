#!/usr/bin/env python
"""From mask logits to a class map: ours against the plain formula, in one run.

    OMP_NUM_THREADS=1 python benchmarks/evaluation.py
    OMP_NUM_THREADS=1 python benchmarks/evaluation.py --label 720 1280
    python benchmarks/evaluation.py --device cuda --repeats 50

The plain formula resizes all masks to the image, applies the sigmoid, sums them weighted by the
class probabilities, resizes the scores to the label and takes the argmax. As in the published code,
each result is kept until the next one exists. The network is not part of it; tools/benchmark.py
shows its share of an evaluation.

Class maps are compared first. Then both are timed in turns; on a CPU the time is the CPU time of
all threads of this process. Memory is the peak of the comparison's call above the memory just
before it (the resident set; on a GPU torch's allocations).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from in_turns import Peak, machine, parser_of, report, timed
from torch import Tensor
from torch.nn import functional as F

from clouds.config import get_cfg
from clouds.modeling.postprocessing import SemanticMap

NUM_CLASSES, STRIDE, SEED = 19, 4, 0
CELL = 96
"""Side of a query's region, pixels."""
CONFIDENT = 8.0
"""Logit inside a mask, far from its outline."""

Size = tuple[int, int]
Variant = Callable[[Tensor, Tensor, Size, Size, int], Tensor]


def plain(
    probabilities: Tensor, mask_logits: Tensor, image: Size, label: Size, masks_at_once: int
) -> Tensor:
    """The formula step by step."""
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


VARIANTS: dict[str, Variant] = {"plain formula": plain, "ours": ours}


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    inputs = make_inputs(args)
    small = make_inputs(argparse.Namespace(**vars(args) | {"image": [64, 96], "label": [32, 48]}))
    class_maps: dict[str, Tensor] = {}
    memory: dict[str, float] = {}
    with torch.no_grad():
        for name, variant in VARIANTS.items():
            variant(*small)  # libraries allocate code and buffers at the first call
            with Peak(device) as peak:
                class_maps[name] = variant(*inputs)
            memory[name] = peak.more
        expected, actual = class_maps.values()
        equal = (expected == actual).double().mean().item()
        del expected, actual, class_maps
        calls = {name: lambda call=call: call(*inputs) for name, call in VARIANTS.items()}
        times = timed(calls, args.repeats, device)
    print(
        f"{args.queries} queries, image {args.image[0]}x{args.image[1]}, label "
        f"{args.label[0]}x{args.label[1]}, MASKS_AT_ONCE {args.masks_at_once}; {machine(device)}"
    )
    largest = memory["plain formula"]
    besides = {
        name: f"peak {more:.0f} MiB more, {more / largest:.1%}" for name, more in memory.items()
    }
    print(report(times, besides=besides))
    print(f"equal pixels: {equal:.5%}")


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    size = {"type": int, "nargs": 2, "metavar": ("HEIGHT", "WIDTH"), "default": [1024, 2048]}
    parser.add_argument("--image", help="multiples of 32", **size)
    parser.add_argument("--label", help="size of the class map", **size)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--masks-at-once", type=int, default=get_cfg().TEST.MASKS_AT_ONCE)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def make_inputs(args: argparse.Namespace) -> tuple[Tensor, Tensor, Size, Size, int]:
    """Smooth masks with many uncertain pixels, and random class probabilities."""
    generator = torch.Generator().manual_seed(SEED)
    image, label = tuple(args.image), tuple(args.label)
    cells = [max(2, side // CELL) for side in image]
    coarse = torch.randn(args.queries, *cells, generator=generator) * CONFIDENT - CONFIDENT / 2
    mask_logits = F.interpolate(
        coarse[None], [side // STRIDE for side in image], mode="bicubic", align_corners=False
    )[0]
    class_logits = 3 * torch.randn(args.queries, NUM_CLASSES + 1, generator=generator)
    probabilities = class_logits.softmax(-1)[:, :-1].contiguous()
    device = torch.device(args.device)
    return probabilities.to(device), mask_logits.to(device), image, label, args.masks_at_once


if __name__ == "__main__":
    main()
