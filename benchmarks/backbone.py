#!/usr/bin/env python
"""The frozen backbone alone, one pass over a batch: ours beside open_clip's layers, in one run.

    OMP_NUM_THREADS=1 python benchmarks/backbone.py
    OMP_NUM_THREADS=1 python benchmarks/backbone.py --clip RN50 --amp --compile

The published way feeds channels first and gives every feature so; ours has the channels last from
end to end. Features are compared before anything is timed. On a CPU the processor's time is taken,
of all threads: what other programs take of it does not count. Weights are random.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from in_turns import machine, parser_of, report, timed
from torch import Tensor

from clouds.modeling.backbone.clip import CLIP
from clouds.modeling.backbone.open_clip_models import create_clip

SEED = 0
TOLERANCE = 1e-4
"""Of float32 features, relative to the largest of a map."""

Features = dict[str, Tensor]


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    torch.manual_seed(SEED)
    ours = CLIP(clip_model=create_clip(args.clip), model_name=args.clip).to(device)
    plain = copy.deepcopy(ours)
    plain.clip_model.visual.to(memory_format=torch.contiguous_format)
    images = torch.randn(args.images, 3, args.size, args.size, device=device)
    ways: dict[str, Callable[[], Features]] = {
        "published way": lambda: published(plain, images),
        "ours": lambda: ours(images),
    }
    compare(ways["published way"](), ways["ours"]())
    if args.amp:
        ways["published way, bf16"] = lambda: in_half(lambda: published(plain, images), device)
        ways["ours, bf16"] = lambda: in_half(lambda: ours(images), device)
    if args.compile:
        compiled = torch.compile(ours)
        ways["ours, compiled"] = lambda: compiled(images)
        if args.amp:
            ways["ours, bf16, compiled"] = lambda: in_half(lambda: compiled(images), device)
    times = timed(ways, args.repeats, device, untimed=1)
    print(f"{args.clip}, {args.images} images of {args.size}; {machine(device)}")
    print(report(times))


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--clip", default="convnext_base")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--size", type=int, default=384, help="of an image, a multiple of 32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true", help="also under bf16 autocast")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    return parser.parse_args()


@torch.no_grad()
def published(clip: CLIP, images: Tensor) -> Features:
    """The layers of CLIP's image encoder, features with the channels first."""
    features = clip._convnext(images) if clip.is_convnext else clip._resnet(images)
    return {name: feature.contiguous() for name, feature in features.items()}


def in_half(way: Callable[[], Features], device: torch.device) -> Features:
    with torch.autocast(device.type, torch.bfloat16):
        return way()


def compare(expected: Features, got: Features) -> None:
    for name, feature in expected.items():
        worst = (got[name] - feature).abs().max() / feature.abs().max()
        assert worst < TOLERANCE, f"{name} differs by {worst}"


if __name__ == "__main__":
    main()
