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
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from clouds.modeling.backbones.clip import CLIP
from clouds.modeling.backbones.open_clip_model import create_clip

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
    for way in ways.values():
        way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):  # in turns: what disturbs the machine disturbs each
        for name, way in ways.items():
            times[name].append(seconds(way, device))
    print(
        f"{args.clip}, {args.images} images of {args.size}; {device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    before = statistics.median(times["published way"])
    for name, taken in times.items():
        median = statistics.median(taken)
        spread = f"{min(taken):.3f} to {max(taken):.3f}"
        print(f"{name:>22}: {median:.3f} s ({spread}), {before / median:.2f} x")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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


def seconds(way: Callable[[], Features], device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    synchronize(device)
    start = clock()
    way()
    synchronize(device)
    return clock() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(expected: Features, got: Features) -> None:
    for name, feature in expected.items():
        worst = (got[name] - feature).abs().max() / feature.abs().max()
        assert worst < TOLERANCE, f"{name} differs by {worst}"


if __name__ == "__main__":
    main()
