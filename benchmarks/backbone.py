#!/usr/bin/env python
"""The forward pass of the frozen backbone: ours against open_clip's layers, in one run.

    OMP_NUM_THREADS=1 python benchmarks/backbone.py
    OMP_NUM_THREADS=1 python benchmarks/backbone.py --clip RN50 --amp --compile

The published code computes channels first; ours is channels last from end to end. Features are
compared before the timing. On a CPU the time is the CPU time of all threads of this process.
Weights are random.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from in_turns import machine, parser_of, report, timed, without_tf32
from torch import Tensor

from clouds.modeling.backbone.clip import CLIP
from clouds.modeling.backbone.open_clip_models import create_clip

SEED = 0
TOLERANCE = 1e-4
"""Largest difference of float32 features, relative to the largest value of a map."""

Features = dict[str, Tensor]


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    ours, plain = make(args.clip, device)
    images = torch.randn(args.images, 3, args.size, args.size, device=device)
    variants: dict[str, Callable[[], Features]] = {
        "published code": lambda: published(plain, images),
        "ours": lambda: ours(images),
    }
    with without_tf32():
        compare(variants["published code"](), variants["ours"]())
    if args.amp:
        variants["published code, bf16"] = lambda: in_bf16(lambda: published(plain, images), device)
        variants["ours, bf16"] = lambda: in_bf16(lambda: ours(images), device)
    if args.compile:
        compiled = torch.compile(ours)
        variants["ours, compiled"] = lambda: compiled(images)
        if args.amp:
            variants["ours, bf16, compiled"] = lambda: in_bf16(lambda: compiled(images), device)
    times = timed(variants, args.repeats, device, untimed=1)
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


def make(clip: str, device: torch.device) -> tuple[CLIP, CLIP]:
    """Ours, and a copy for `published`, with the same random weights."""
    torch.manual_seed(SEED)
    ours = CLIP(clip_model=create_clip(clip), model_name=clip).to(device)
    plain = copy.deepcopy(ours)
    plain.clip_model.visual.to(memory_format=torch.contiguous_format)
    return ours, plain


@torch.no_grad()
def published(clip: CLIP, images: Tensor) -> Features:
    """The layers of CLIP's image encoder, channels first."""
    features = clip._convnext(images) if clip.is_convnext else clip._resnet(images)
    return {name: feature.contiguous() for name, feature in features.items()}


def in_bf16(variant: Callable[[], Features], device: torch.device) -> Features:
    with torch.autocast(device.type, torch.bfloat16):
        return variant()


def compare(expected: Features, actual: Features) -> None:
    for name, feature in expected.items():
        worst = (actual[name] - feature).abs().max() / feature.abs().max()
        assert worst < TOLERANCE, f"{name} differs by {worst}"


if __name__ == "__main__":
    main()
