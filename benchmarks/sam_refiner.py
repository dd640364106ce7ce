#!/usr/bin/env python
"""SAM as refiner: the published way beside ours without and with its cache, in one run.

    OMP_NUM_THREADS=1 python benchmarks/sam_refiner.py
    python benchmarks/sam_refiner.py --model vit_h --size 768 --pictures 4 --repeats 5 --device cuda

The published way is composed of segment_anything's predictor and numpy: each visit embeds the
picture, brings all three masks of each component to its size and then chooses, and goes through
full-size masks class by class. "Cold" is ours at the first visit of a picture, "warm" at every
later one. All get the same points; the share of pixels with equal labels is printed. Weights are
random, which costs what SAM's own cost. On a CPU the processor's time is taken, of all threads.
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
from clouds.self_training.refiners.sam.embedding_cache import fingerprint
from clouds.self_training.refiners.sam.model import build_sam
from clouds.self_training.refiners.sam.refiner import SamOptions, SamRefiner, cached

CLASSES = 19
POINTS = 5
NO_CLASS = 255

Labels = list[npt.NDArray[np.uint8]]
Way = Callable[[], Labels]


class Visit(NamedTuple):
    """What a visit of all pictures gave; the memory in MiB above that before."""

    labels: Labels
    seconds: float
    more: float


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    cfg = get_cfg()
    node = cfg.MODEL.CLOUDS.SAM
    node.MODEL, node.WEIGHTS, node.OVERLAP = args.model, "", "published"
    node.SIZE_THRESHOLD, node.NUM_POINTS = args.larger_than, POINTS
    sam = build_sam(cfg, device)
    images, labels, seeds = pictures(args, device)
    options = SamOptions.from_config(cfg)
    with tempfile.TemporaryDirectory() as folder:
        node.CACHE_DIR = folder

        def ours(warm: bool) -> Labels:
            if not warm:
                for path in Path(folder).iterdir():
                    path.unlink()
            refiner = SamRefiner(sam, options, embed)
            return [class_map(one) for one in refiner.refine(images, labels, seeds)]

        embed = cached(cfg, sam)
        ways: dict[str, Way] = {
            "published way": lambda: published(sam, images, labels, seeds, args.larger_than),
            "ours, cold": lambda: ours(warm=False),
            "ours, warm": lambda: ours(warm=True),
        }
        sam.image_encoder.to(device)
        visits = in_turns(ways, lambda way: visit(way, device), args.repeats)
        parts = warm_parts(sam, options, embed, images, labels, seeds, args.repeats, device)
    print(
        f"SAM {args.model}, {args.pictures} pictures {args.size}x{args.size}, "
        f"{components(labels, args.larger_than)} components; {machine(device)}"
    )
    expected = visits["published way"][-1].labels
    besides = {
        name: f"{taken[-1].more:.0f} MiB more at its peak; "
        f"{100 * equal(taken[-1].labels, expected):.3f} % equal pixels"
        for name, taken in visits.items()
    }
    times = {name: [each.seconds / args.pictures for each in visits[name]] for name in visits}
    print(report(times, "s a picture", besides))
    print("warm, ms a picture: " + ", ".join(f"{k} {1000 * v:.1f}" for k, v in parts.items()))
    start = time.perf_counter()
    fingerprint(sam, args.model)
    print(f"once at the start: {time.perf_counter() - start:.2f} s to hash the encoder's weights")


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="vit_b", choices=["tiny", "vit_b", "vit_l", "vit_h"])
    parser.add_argument("--size", type=int, default=384)
    parser.add_argument("--pictures", type=int, default=2)
    parser.add_argument("--larger-than", type=int, default=2500, help="pixels of a component")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def pictures(
    args: argparse.Namespace, device: torch.device
) -> tuple[list[Tensor], list[PseudoLabel], list[int]]:
    """Smooth random colors, and label maps of as many regions as a street scene has."""
    images, labels = [], []
    for number in range(args.pictures):
        generator = np.random.default_rng(number)
        smooth = args.size / 12
        colors = ndimage.gaussian_filter(
            generator.normal(size=(3, args.size, args.size)), (0, smooth / 4, smooth / 4)
        )
        colors = 255 * (colors - colors.min()) / np.ptp(colors)
        images.append(torch.from_numpy(colors.astype(np.uint8)))
        fields = [
            ndimage.gaussian_filter(generator.normal(size=(args.size, args.size)), smooth)
            for _ in range(CLASSES)
        ]
        classes = torch.from_numpy(np.argmax(fields, axis=0).astype(np.uint8))
        labels.append(PseudoLabel(classes.to(device), torch.ones_like(classes).float().to(device)))
    return images, labels, list(range(args.pictures))


def components(labels: Sequence[PseudoLabel], larger_than: int) -> str:
    """How many components get a mask, picture by picture."""
    counts = [len(by_class(label.classes.cpu().numpy(), larger_than)) for label in labels]
    return " + ".join(map(str, counts))


# --------------------------------------------------------------- the published way


def by_class(
    classes: npt.NDArray[np.uint8], larger_than: int
) -> list[tuple[int, npt.NDArray[np.bool_]]]:
    """Class and mask of each large component: scipy labels each class's full-size mask."""
    found = []
    for kind in np.unique(classes):
        regions, count = ndimage.label(classes == kind)
        for region in range(1, count + 1):
            mask = regions == region
            if mask.sum() > larger_than:
                found.append((int(kind), mask))
    return found


@torch.no_grad()
def published(
    sam: Any,
    images: Sequence[Tensor],
    labels: Sequence[PseudoLabel],
    seeds: Sequence[int],
    larger_than: int,
) -> Labels:
    """segment_anything's predictor for each picture at each visit, the rest in numpy."""
    from segment_anything import SamPredictor

    predictor = SamPredictor(sam)
    results = []
    for image, label, seed in zip(images, labels, seeds, strict=True):
        classes = label.classes.cpu().numpy()
        found = by_class(classes, larger_than)
        drawn = np.random.default_rng(seed)
        points = []
        for _, mask in found:
            pixels = np.argwhere(mask)
            points.append(pixels[drawn.choice(len(pixels), POINTS, replace=False)][:, ::-1])
        resized = predictor.transform.apply_image(image.permute(1, 2, 0).numpy())
        fed = torch.from_numpy(resized).to(label.classes.device).permute(2, 0, 1).contiguous()
        predictor.set_torch_image(fed[None], classes.shape)
        coordinates = predictor.transform.apply_coords(np.stack(points), classes.shape)
        masks, ious, _ = predictor.predict_torch(
            torch.from_numpy(coordinates).float().to(fed.device),
            torch.ones(len(points), POINTS, device=fed.device),
        )
        best = masks[torch.arange(len(masks)), ious.argmax(1)].cpu().numpy()
        best = best & ~(best.sum(0) > 1)
        result = np.full(classes.shape, NO_CLASS, np.uint8)
        for kind in np.unique([kind for kind, _ in found]):
            of_kind = [mask for (other, _), mask in zip(found, best, strict=True) if other == kind]
            result[np.any(of_kind, axis=0)] = kind
        results.append(result)
    return results


# -------------------------------------------------------------------- measuring


def class_map(refined: RefinedLabel) -> npt.NDArray[np.uint8]:
    return refined.class_map().cpu().numpy()


def equal(ours: Labels, others: Labels) -> float:
    return min(float((a == b).mean()) for a, b in zip(ours, others, strict=True))


def visit(way: Way, device: torch.device) -> Visit:
    with Peak(device) as peak, Span(device) as span:
        labels = way()
    return Visit(labels, span.seconds, peak.more)


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
    """Seconds a picture of hashing it, of reading its entry and of all the rest."""
    embeddings = embed(images)
    rest = SamRefiner(sam, options, lambda _: embeddings)

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
