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
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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

RARE = ("pole", "traffic light", "rider", "bicycle")
"""Classes on which the demo's joint training fails."""

COLUMNS = ("", "mIoU", "accuracy", "rare classes", "teacher's labels", "mIoU of each seed")


def main() -> None:
    args = parse()
    runs = [(name, seed) for seed in args.seeds for name in args.only]
    with ThreadPoolExecutor(args.processes) as pool:
        results = dict(zip(runs, pool.map(lambda run: train(args, *run), runs), strict=True))
    rows = [row(name, [results[name, seed] for seed in args.seeds]) for name in args.only]
    print(tabulate(rows, COLUMNS))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/noise_options"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--opts", nargs="+", default=[], help="KEY VALUE, overrides of every run")
    return parser.parse_args(argv)


def train(args: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Train with one setting and seed, unless that is done; returns its results.json."""
    words = "".join(c if c.isalnum() else "_" for c in name)
    folder: Path = args.output / f"{words}_{seed}"
    results = folder / "results.json"
    if not results.is_file():
        command = [sys.executable, "-m", "clouds", "train", "--config-file", "demo/joint"]
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


def summary(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


if __name__ == "__main__":
    main()
