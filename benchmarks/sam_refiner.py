#!/usr/bin/env python
"""SAM as refiner: the published algorithm against ours without and with its cache, in one run.

    OMP_NUM_THREADS=1 python benchmarks/sam_refiner.py
    python benchmarks/sam_refiner.py --model vit_h --size 768 --images 4 --repeats 5 --device cuda

The published algorithm is composed of segment_anything's predictor and numpy: each time it embeds
the image, resizes all three masks of each component before it selects one, and computes full-size
masks class by class. "Cold" is ours the first time it refines an image, "warm" every later time.
All get the same points; the share of pixels with equal labels is printed. Weights are random, which
does not change the time. On a CPU the time is the CPU time of all threads of this process.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from in_turns import Peak, Span, in_turns, machine, parser_of, report, seconds_of
from scipy import ndimage
from torch import Tensor

from clouds.config import get_cfg
from clouds.self_training.refiners.base import PseudoLabel, RefinedLabel
from clouds.self_training.refiners.sam.backends import cached_embedder
from clouds.self_training.refiners.sam.embedding_cache import fingerprint
from clouds.self_training.refiners.sam.model import build_sam
from clouds.self_training.refiners.sam.predictor import PointPredictor
from clouds.self_training.refiners.sam.refiner import SamOptions, SamRefiner

NUM_CLASSES = 19
NUM_POINTS = 5
IGNORE = 255

Labels = list[npt.NDArray[np.uint8]]
Variant = Callable[[], Labels]


class Measured(NamedTuple):
    """Labels of all images, seconds, and the peak of memory above that before in MiB."""

    labels: Labels
    seconds: float
    more: float


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    cfg = get_cfg()
    node = cfg.MODEL.CLOUDS.SAM
    node.MODEL, node.WEIGHTS, node.OVERLAP = args.model, "", "published"
    node.SIZE_THRESHOLD, node.NUM_POINTS = args.larger_than, NUM_POINTS
    sam = build_sam(cfg, device)
    images, labels, seeds = make_inputs(args, device)
    options = SamOptions.from_config(cfg)
    with tempfile.TemporaryDirectory() as folder:
        node.CACHE_DIR = folder

        def ours(warm: bool) -> Labels:
            if not warm:
                for path in Path(folder).iterdir():
                    path.unlink()
            refiner = SamRefiner(embed, PointPredictor(sam), options)
            return [class_map(one) for one in refiner.refine(images, labels, seeds)]

        embed = cached_embedder(cfg, sam)
        variants: dict[str, Variant] = {
            "published algorithm": lambda: published(sam, images, labels, seeds, args.larger_than),
            "ours, cold": lambda: ours(warm=False),
            "ours, warm": lambda: ours(warm=True),
        }
        sam.image_encoder.to(device)
        results = in_turns(variants, lambda variant: measure(variant, device), args.repeats)
        parts = warm_parts(sam, options, embed, images, labels, seeds, args.repeats, device)
    print(
        f"SAM {args.model}, {args.images} images {args.size}x{args.size}, "
        f"{count_components(labels, args.larger_than)} components; {machine(device)}"
    )
    expected = results["published algorithm"][-1].labels
    besides = {
        name: f"peak {taken[-1].more:.0f} MiB more; "
        f"{100 * equal_pixels(taken[-1].labels, expected):.3f} % equal pixels"
        for name, taken in results.items()
    }
    times = {
        name: [each.seconds / args.images for each in taken] for name, taken in results.items()
    }
    print(report(times, "s per image", besides))
    print("warm, ms per image: " + ", ".join(f"{k} {1000 * v:.1f}" for k, v in parts.items()))
    start = time.perf_counter()
    fingerprint(sam, args.model)
    print(f"once at the start: {time.perf_counter() - start:.2f} s to hash the encoder's weights")


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="vit_b", choices=["tiny", "vit_b", "vit_l", "vit_h"])
    parser.add_argument("--size", type=int, default=384)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument(
        "--larger-than",
        type=int,
        default=2500,
        help="pixels; larger components get a mask",
    )
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def make_inputs(
    args: argparse.Namespace, device: torch.device
) -> tuple[list[Tensor], list[PseudoLabel], list[int]]:
    """Smooth random colors, and label maps with about as many regions as street scenes have."""
    images, labels = [], []
    for number in range(args.images):
        generator = np.random.default_rng(number)
        smooth = args.size / 12
        colors = ndimage.gaussian_filter(
            generator.normal(size=(3, args.size, args.size)), (0, smooth / 4, smooth / 4)
        )
        colors = 255 * (colors - colors.min()) / np.ptp(colors)
        images.append(torch.from_numpy(colors.astype(np.uint8)))
        fields = [
            ndimage.gaussian_filter(generator.normal(size=(args.size, args.size)), smooth)
            for _ in range(NUM_CLASSES)
        ]
        classes = torch.from_numpy(np.argmax(fields, axis=0).astype(np.uint8))
        labels.append(PseudoLabel(classes.to(device), torch.ones_like(classes).float().to(device)))
    return images, labels, list(range(args.images))


def count_components(labels: Sequence[PseudoLabel], larger_than: int) -> str:
    """Number of components with a mask, image by image."""
    counts = [len(large_components(label.classes.cpu().numpy(), larger_than)) for label in labels]
    return " + ".join(map(str, counts))


# --------------------------------------------------------------- the published algorithm


def large_components(
    classes: npt.NDArray[np.uint8], larger_than: int
) -> list[tuple[int, npt.NDArray[np.bool_]]]:
    """Class and full-size mask of each large component; scipy labels the mask of each class."""
    components = []
    for number in np.unique(classes):
        regions, count = ndimage.label(classes == number)
        for region in range(1, count + 1):
            mask = regions == region
            if mask.sum() > larger_than:
                components.append((int(number), mask))
    return components


@torch.no_grad()
def published(
    sam: Any,
    images: Sequence[Tensor],
    labels: Sequence[PseudoLabel],
    seeds: Sequence[int],
    larger_than: int,
) -> Labels:
    """segment_anything's predictor for each image, the rest in numpy."""
    from segment_anything import SamPredictor

    predictor = SamPredictor(sam)
    results = []
    for image, label, seed in zip(images, labels, seeds, strict=True):
        classes = label.classes.cpu().numpy()
        components = large_components(classes, larger_than)
        generator = np.random.default_rng(seed)
        points = []
        for _, mask in components:
            pixels = np.argwhere(mask)
            points.append(pixels[generator.choice(len(pixels), NUM_POINTS, replace=False)][:, ::-1])
        resized = predictor.transform.apply_image(image.permute(1, 2, 0).numpy())
        image_tensor = (
            torch.from_numpy(resized).to(label.classes.device).permute(2, 0, 1).contiguous()
        )
        predictor.set_torch_image(image_tensor[None], classes.shape)
        coordinates = predictor.transform.apply_coords(np.stack(points), classes.shape)
        masks, ious, _ = predictor.predict_torch(
            torch.from_numpy(coordinates).float().to(image_tensor.device),
            torch.ones(len(points), NUM_POINTS, device=image_tensor.device),
        )
        best = masks[torch.arange(len(masks)), ious.argmax(1)].cpu().numpy()
        best = best & ~(best.sum(0) > 1)
        result = np.full(classes.shape, IGNORE, np.uint8)
        numbers = np.array([number for number, _ in components])
        for number in np.unique(numbers):
            result[best[numbers == number].any(axis=0)] = number
        results.append(result)
    return results


# -------------------------------------------------------------------- measuring


def class_map(refined: RefinedLabel) -> npt.NDArray[np.uint8]:
    return refined.class_map().cpu().numpy()


def equal_pixels(ours: Labels, others: Labels) -> float:
    return min(float((a == b).mean()) for a, b in zip(ours, others, strict=True))


def measure(variant: Variant, device: torch.device) -> Measured:
    with Peak(device) as peak, Span(device) as span:
        labels = variant()
    return Measured(labels, span.seconds, peak.more)


def warm_parts(
    sam: Any,
    options: SamOptions,
    embed: Any,
    images: Sequence[Tensor],
    labels: Sequence[PseudoLabel],
    seeds: Sequence[int],
    repeats: int,
    device: torch.device,
) -> dict[str, float]:
    """Seconds per image of hashing it, of reading its cache entry, and of the rest."""
    embeddings = embed(images)
    rest = SamRefiner(lambda _: embeddings, PointPredictor(sam), options)

    def each(function: Callable[[], object]) -> float:
        taken = [seconds_of(function, device) for _ in range(max(repeats, 3))]
        return statistics.median(taken) / len(images)

    hashing = each(lambda: [embed.key(image) for image in images])
    return {
        "hash": hashing,
        "read": each(lambda: embed(images)) - hashing,
        "points, masks, overlaps": each(lambda: rest.refine(images, labels, seeds)),
    }


if __name__ == "__main__":
    main()
