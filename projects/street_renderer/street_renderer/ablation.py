"""The rows of the demo's tables, and their results as Markdown and JSON.

The first rows are the paper's ablation: joint training against training on the source alone for as
many iterations, from the same weights of source pre-training.
"""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from clouds.files import atomic_write
from street_renderer.seeded_runs import THREADS, Setting, summary

WARMUP, JOINT = "demo/warmup", "demo/joint"
FROZEN = "frozen CLIP"

ROWS: Mapping[str, Setting] = {
    FROZEN: Setting(WARMUP, folder="warmup"),
    "source alone": Setting(JOINT, ("DATASETS.TRAIN", "('gta5',)"), FROZEN, folder="source"),
    "generated": Setting(JOINT, ("MODEL.CLOUDS.REFINER", "none"), FROZEN),
    "joint": Setting(JOINT, (), FROZEN),
}
"""What `make demo` trains."""

TITLES: Mapping[str, str] = {
    FROZEN: "source pre-training, frozen CLIP",
    "source alone": "+ as many iterations on the source alone",
    "generated": "+ generated images, labels of the teacher",
    "joint": "+ generated images, labels refined by SAM",
}

FURTHER_ROWS: Mapping[str, Setting] = {
    "trained random": Setting(
        WARMUP,
        ("MODEL.CLOUDS.CLIP_PRETRAINED_WEIGHTS", "", "MODEL.BACKBONE.FREEZE", "False"),
    ),
}
"""What `--full` trains besides."""

PSEUDO_LABELS = ("teacher", "refined", "student")
"""Label maps of generated images that are scored."""

Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""results.json of each seed, by the name of the row."""


def mious(results: Sequence[Mapping[str, Any]]) -> list[float]:
    """mIoU of each seed, mean over the unseen domains, percent."""
    return [result["mean"]["mIoU"] for result in results]


def label_scores(results: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """mIoU of a label map of the generated images in each seed, percent; empty: there is none."""
    scores = [
        labels["mIoU"][name] for result in results for labels in result["pseudo-labels"].values()
    ]
    return [score for score in scores if score is not None]


def accuracies(results: Sequence[Mapping[str, Any]]) -> list[float]:
    """Pixel accuracy of each seed, mean over the unseen domains, percent."""
    return [
        statistics.mean(dataset["pixel-accuracy"] for dataset in result["datasets"].values())
        for result in results
    ]


def table(results: Results) -> str:
    """Means and standard deviations over the seeds as a Markdown table, percent."""
    head = ["", "mIoU", "each seed", "pixel accuracy", *(f"labels: {n}" for n in PSEUDO_LABELS)]
    return tabulate(list(_table_rows(results)), head, "pipe", disable_numparse=True)


def _table_rows(results: Results) -> Iterator[list[str]]:
    for name, runs in results.items():
        scores = mious(runs)
        yield [
            TITLES.get(name, name),
            summary(scores),
            ", ".join(f"{score:.1f}" for score in scores),
            summary(accuracies(runs)),
            *(summary(label_scores(runs, label)) for label in PSEUDO_LABELS),
        ]


def record(results: Results, seeds: Sequence[int], command: str, processes: int) -> dict[str, Any]:
    """Every run as JSON values, with what they depend on."""
    first = next(iter(results.values()))[0]
    return {
        "unit": "percent",
        "command": command,
        "threads": THREADS,
        "processes": processes,
        "machine": machine(),
        "versions": first["versions"],
        "rows": _by_seed({name: mious(runs) for name, runs in results.items()}, seeds),
        "pixel accuracy": _by_seed({n: accuracies(runs) for n, runs in results.items()}, seeds),
        "labels of generated images": {
            label: _by_seed({n: label_scores(runs, label) for n, runs in results.items()}, seeds)
            for label in PSEUDO_LABELS
        },
    }


def _by_seed(rows: Mapping[str, Sequence[float]], seeds: Sequence[int]) -> dict[str, Any]:
    """Values of each row by the seed; rows without values are left out."""
    return {
        name: {str(seed): round(value, 2) for seed, value in zip(seeds, values, strict=True)}
        for name, values in rows.items()
        if values
    }


def machine() -> str:
    """Name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write(results: Results, content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write street_world.json and street_world.md, each file atomically; returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "street_world.json": json.dumps(content, indent=2) + "\n",
        "street_world.md": table(results) + "\n",
    }
    for name, text in texts.items():
        with atomic_write(folder / name, "w") as file:
            file.write(text)
    return [folder / name for name in texts]
