#!/usr/bin/env python
"""Two labelled sources, one without terrain, truck and train: scores with and without its labels.

    clouds make-demo-data --output datasets/multi --train 500 --val 40 --show-unlabelled \
        --datasets gta5 synthia cityscapes_val bdd_val mapillary_val
    DETECTRON2_DATASETS=datasets/multi python benchmarks/unlabeled_classes.py --processes 2

Trains the demo's source pre-training (configs/demo/warmup.yaml) on rendered gta5 alone, and on gta5
and synthia with MODEL.MASK_FORMER.UNLABELED_CLASSES 'ignore' and 'absent', for as many iterations
each, with each seed, on one thread per run. Then it prints mIoU and the IoU of the classes that
synthia lacks, means over the unseen domains. A run that has a results.json is not repeated; one
that was interrupted is resumed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

from street_renderer.seeded_runs import SeededRuns, Setting, new_parser, summary
from tabulate import tabulate

SETTINGS = {
    "gta5": ["DATASETS.TRAIN", "('gta5',)"],
    "gta5 and synthia, ignore": ["DATASETS.TRAIN", "('gta5', 'synthia')"],
    "gta5 and synthia, absent": [
        *("DATASETS.TRAIN", "('gta5', 'synthia')"),
        *("MODEL.MASK_FORMER.UNLABELED_CLASSES", "absent"),
    ],
}
"""Overrides of the config, by the name of the row."""

RUNS = SeededRuns({name: Setting("demo/warmup", opts) for name, opts in SETTINGS.items()})

CLASSES = ("terrain", "truck", "train")
"""Those that the rendered synthia does not label."""


def main() -> None:
    args = parse()
    rows = [row(name, results) for name, results in RUNS.results(args, list(SETTINGS)).items()]
    print(tabulate(rows, ["", "mIoU", *CLASSES, "mIoU of each seed"]))


def parse() -> argparse.Namespace:
    parser = new_parser(__doc__, "output/unlabeled_classes")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of every run")
    return parser.parse_args()


def row(name: str, results: Sequence[dict[str, Any]]) -> list[str]:
    """Means and standard deviations over seeds, percent."""
    mious = [result["mean"]["mIoU"] for result in results]
    classes = [[class_iou(result, c) for result in results] for c in CLASSES]
    return [
        name,
        *(summary(values) for values in (mious, *classes)),
        ", ".join(f"{value:.1f}" for value in mious),
    ]


def class_iou(result: dict[str, Any], name: str) -> float:
    """IoU of a class, percent: the mean over the datasets where it is defined."""
    scores = [dataset["IoU"][name] for dataset in result["datasets"].values()]
    return statistics.mean(score for score in scores if score is not None)


if __name__ == "__main__":
    main()
