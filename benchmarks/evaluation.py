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
of the process, so that what other programs take does not count. Memory is what the comparison's
call needs more at its peak than just before (the resident set; on a GPU what torch allocates).
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
    small = outputs(argparse.Namespace(**vars(args) | {"image": [64, 96], "label": [32, 48]}))
    found: dict[str, Tensor] = {}
    memory: dict[str, float] = {}
    with torch.no_grad():
        for name, way in WAYS.items():
            way(*small)  # libraries load code and buffers of their own
            with Peak(device) as peak:
                found[name] = way(*made)
            memory[name] = peak.more
        before, after = found.values()
        equal = (before == after).double().mean().item()
        del before, after, found
        ways = {name: lambda way=way: way(*made) for name, way in WAYS.items()}
        times = timed(ways, args.repeats, device)
    print(
        f"{args.queries} queries, image {args.image[0]}x{args.image[1]}, label "
        f"{args.label[0]}x{args.label[1]}, MASKS_AT_ONCE {args.masks_at_once}; {machine(device)}"
    )
    largest = memory["plain formula"]
    besides = {
        name: f"at the peak {more:.0f} MiB more, {more / largest:.1%}"
        for name, more in memory.items()
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


if __name__ == "__main__":
    main()
