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
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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

CLASSES = ("terrain", "truck", "train")
"""Those that the rendered synthia does not label."""


def main() -> None:
    args = parse()
    runs = [(name, seed) for seed in args.seeds for name in SETTINGS]
    with ThreadPoolExecutor(args.processes) as pool:
        results = dict(zip(runs, pool.map(lambda run: train(args, *run), runs), strict=True))
    rows = [row(name, [results[name, seed] for seed in args.seeds]) for name in SETTINGS]
    print(tabulate(rows, ["", "mIoU", *CLASSES, "mIoU of each seed"]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/unlabeled_classes"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of every run")
    return parser.parse_args()


def train(args: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Train with one setting and seed, unless that is done; returns its results.json."""
    folder: Path = args.output / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"
    results = folder / "results.json"
    if not results.is_file():
        command = [sys.executable, "-m", "clouds", "train", "--config-file", "demo/warmup"]
        command += ["--resume", "OUTPUT_DIR", str(folder), "SEED", str(seed)]
        command += ["MODEL.DEVICE", "cpu", *SETTINGS[name], *args.opts]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name}, seed {seed}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    content: dict[str, Any] = json.loads(results.read_text())
    return content


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


def summary(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


if __name__ == "__main__":
    main()
