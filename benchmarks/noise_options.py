#!/usr/bin/env python
"""Joint training of the demo with each option against noise in pseudo-labels, over several seeds.

    make demo
    DETECTRON2_DATASETS=datasets/demo python benchmarks/noise_options.py --processes 2

`make demo` makes the data and the weights of source pre-training, which each run starts from
(MODEL.WEIGHTS of configs/demo/joint.yaml). A run is on one thread. The table has mIoU and pixel
accuracy, means over the unseen domains, the mean IoU of rare classes, and the mIoU of the teacher's
labels of generated images where their true labels are known, as means and standard deviations over
the seeds. A run that has a results.json is not repeated; one that was interrupted is resumed.
Choose settings on other seeds than the ones that are reported.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from street_renderer.seeded_runs import SeededRuns, Setting, new_parser, summary
from tabulate import tabulate

PSEUDO_LABEL = "MODEL.CLOUDS.PSEUDO_LABEL."
EVERY_STEP = ("MODEL.CLOUDS.ITERATION_UPDATE", "1", "MODEL.CLOUDS.EMA_WARM_START", "True")
QUALITY = (PSEUDO_LABEL + "QUALITY_THRESHOLD", "0.968")
RARE_CLASSES = (
    *("DATASETS.RARE_CLASS_SAMPLING.ENABLED", "True"),
    # rendered images have a tenth of GTA5's pixels
    *("DATASETS.RARE_CLASS_SAMPLING.MIN_PIXELS", "100"),
)
MIXING = ("INPUT.CLASS_MIXING", "True")
MASKING = (
    *("MODEL.CLOUDS.MASKED_CONSISTENCY.RATIO", "0.7"),
    *("MODEL.CLOUDS.MASKED_CONSISTENCY.BLOCK_SIZE", "16"),
)
NO_DICE = (PSEUDO_LABEL + "DICE_WEIGHT", "0.0")
BALANCED = (
    *(PSEUDO_LABEL + "ASSIGNMENT", "sinkhorn"),
    *(PSEUDO_LABEL + "MIN_CONFIDENCE", "0.95"),
    *("MODEL.CLOUDS.TEACHER_FLIP", "True"),
)

SETTINGS: dict[str, tuple[str, ...]] = {
    "source alone": ("DATASETS.TRAIN", "('gta5',)"),
    "published": (),
    "rare-class sampling": RARE_CLASSES,
    "class mixing": (*MIXING, *QUALITY),
    "masked consistency": (*MASKING, *QUALITY),
    "teacher every step": EVERY_STEP,
    "flip-averaged teacher": ("MODEL.CLOUDS.TEACHER_FLIP", "True"),
    "balanced assignment": BALANCED,
    "image filter": (PSEUDO_LABEL + "MIN_IMAGE_CONFIDENCE", "0.95"),
    "dice 0": NO_DICE,
    "class loss 1.25": (PSEUDO_LABEL + "MAX_CLASS_LOSS", "1.25"),
    "class loss 3": (PSEUDO_LABEL + "MAX_CLASS_LOSS", "3.0"),
    "boundary weights": (PSEUDO_LABEL + "BOUNDARY_WEIGHT", "3.0"),
    "DAFormer's loop": (*RARE_CLASSES, *MIXING, *QUALITY, *EVERY_STEP),
    "DAFormer's loop, dice 0": (*RARE_CLASSES, *MIXING, *QUALITY, *EVERY_STEP, *NO_DICE),
}
"""Overrides of the config, by the name of the row."""

RUNS = SeededRuns({name: Setting("demo/joint", opts) for name, opts in SETTINGS.items()})

RARE = ("pole", "traffic light", "rider", "bicycle")
"""Classes on which the demo's joint training fails."""

COLUMNS = ("", "mIoU", "accuracy", "rare classes", "teacher's labels", "mIoU of each seed")


def main() -> None:
    args = parse()
    rows = [row(name, results) for name, results in RUNS.results(args, args.only).items()]
    print(tabulate(rows, COLUMNS))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__, "output/noise_options")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--opts", nargs="+", default=[], help="KEY VALUE, overrides of every run")
    return parser.parse_args(argv)


def row(name: str, results: Sequence[dict[str, Any]]) -> list[str]:
    """Means and standard deviations over seeds, percent."""
    mious = [result["mean"]["mIoU"] for result in results]
    accuracies = [
        statistics.mean(dataset["pixel-accuracy"] for dataset in result["datasets"].values())
        for result in results
    ]
    rare = [statistics.mean(rare_ious(result)) for result in results]
    teachers = [
        labels["mIoU"]["teacher"]
        for result in results
        for labels in result["pseudo-labels"].values()
        if labels["mIoU"]["teacher"] is not None
    ]
    return [
        name,
        *(summary(values) for values in (mious, accuracies, rare, teachers)),
        ", ".join(f"{value:.1f}" for value in mious),
    ]


def rare_ious(result: dict[str, Any]) -> Iterator[float]:
    """IoU, percent, of each rare class in each dataset where it is defined."""
    for dataset in result["datasets"].values():
        yield from (dataset["IoU"][c] for c in RARE if dataset["IoU"][c] is not None)


if __name__ == "__main__":
    main()
