"""Zero-shot accuracy of Street-CLIP on object crops of the demo's unseen looks.

    python -m street_models.evaluate_clip

renders images of the looks with a seed of its own, cuts one crop per class out of each, and prints
the top-1 accuracy among the 19 classes, per look and class, and what classes are mistaken for.
With `--record COMMAND` it writes the record of the weights, which the library checks them against.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import cv2
import torch
from street_renderer.dataset_writer import Recipe, render_sample
from torch import Tensor

from clouds.cli.command_line import user_errors_in_one_line
from clouds.data.label_space import CITYSCAPES_19
from clouds.files import atomic_write
from clouds.modeling.backbone.open_clip_models import create_clip
from street_models.records import without_record, write_record
from street_models.scenes import UInt8Array
from street_models.weight_files import STREET_CLIP
from street_models.zero_shot import MODEL_NAME, ObjectCrops, classify, confusion, mean_accuracy

UNSEEN = ("cityscapes_val", "bdd_val", "mapillary_val")
SHORT_SIDE = 160
"""The demo's `TEST.SHORT_SIDE`, pixels."""
_RENDERED = (256, 512)
_CONFUSED = 2
"""Number of wrong classes that are printed per class."""


def evaluation_scenes(
    name: str, seed: int, count: int
) -> Iterator[tuple[UInt8Array, UInt8Array, UInt8Array]]:
    """Images (H, W, 3), labels and instances (H, W) of a rendered dataset.

    The shorter side has `SHORT_SIDE` pixels, as in the demo's evaluation.
    """
    recipe = Recipe.of(name, seed, _RENDERED)
    for index in range(count):
        scene = render_sample(recipe, index)
        scale = SHORT_SIDE / min(scene.label.shape)
        size = round(scene.label.shape[1] * scale), round(scene.label.shape[0] * scale)
        yield (
            cv2.resize(scene.image, size, interpolation=cv2.INTER_AREA),
            cv2.resize(scene.label, size, interpolation=cv2.INTER_NEAREST),
            cv2.resize(scene.instances.astype("uint8"), size, interpolation=cv2.INTER_NEAREST),
        )


def report(tables: dict[str, Tensor]) -> str:
    """Top-1 per look, and per class what it is mistaken for, in percent of its crops."""
    lines = [
        f"{name}: top-1 {mean_accuracy(table):.1f} % (mean over classes), "
        f"{100 * int(table.diagonal().sum()) / int(table.sum()):.1f} % of {int(table.sum())} crops"
        for name, table in tables.items()
    ]
    table = torch.stack(list(tables.values())).sum(0)
    lines.append(f"mean of the looks: {mean_of(tables):.1f} %")
    for number, name in enumerate(CITYSCAPES_19.names):
        row = table[number].clone()
        if not (total := int(row.sum())):
            continue
        right = 100 * int(row[number]) / total
        row[number] = 0
        wrong = [
            f"{CITYSCAPES_19.names[c]} {100 * int(row[c]) / total:.0f}"
            for c in row.argsort(descending=True)[:_CONFUSED].tolist()
            if row[c]
        ]
        lines.append(f"  {name:14} {right:5.1f} %  of {total:4d}   {', '.join(wrong)}")
    return "\n".join(lines)


def mean_of(tables: dict[str, Tensor]) -> float:
    """Mean of the looks' accuracies, percent."""
    return sum(mean_accuracy(table) for table in tables.values()) / len(tables)


def scores_of(tables: dict[str, Tensor]) -> dict[str, float]:
    """Accuracy per look, and `mean`, percent."""
    scores = {name: round(mean_accuracy(table), 2) for name, table in tables.items()}
    return {**scores, "mean": round(mean_of(tables), 2)}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="street_models.evaluate_clip", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--weights", default=str(STREET_CLIP))
    parser.add_argument("--images", type=int, default=40, help="per look")
    parser.add_argument("--seed", type=int, default=1000, help="of the rendered images")
    parser.add_argument("--json", type=Path, help="file to write the accuracies to")
    parser.add_argument(
        "--record", metavar="COMMAND", help="write the record of the weights that COMMAND made"
    )
    args = parser.parse_args(arguments)
    if args.images < 1:
        parser.error(f"--images is {args.images}; at least 1 is needed")
    return args


def measure(weights: str, images: int, seed: int) -> dict[str, Tensor]:
    """Confusion (19, 19) of each unseen look; see `confusion`."""
    model = create_clip(MODEL_NAME, weights).eval()
    tables = {}
    for name in UNSEEN:
        crops = ObjectCrops.of(evaluation_scenes(name, seed, images), seed)
        tables[name] = confusion(crops.classes, classify(model, crops.images))
    return tables


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    args = parse_arguments(arguments)
    cv2.setNumThreads(1)
    weights = Path(args.weights)
    with (
        user_errors_in_one_line(),
        nullcontext() if args.record is None else without_record(weights),
    ):
        tables = measure(args.weights, args.images, args.seed)
        print(report(tables))
        scores = scores_of(tables)
        if args.json is not None:
            with atomic_write(args.json) as file:
                file.write(json.dumps(scores, indent=2).encode())
        if args.record is not None:
            evaluation = {"images": args.images, "seed": args.seed, "top1": scores}
            write_record(weights, args.record, evaluation)


if __name__ == "__main__":
    main()
