"""Results of an evaluation: scores, a table, results.json with their provenance, per_image.json.

All scores are in percent. nan: the score is not defined, because the class is not in the dataset's
label set or is neither labeled nor predicted. Means over classes are taken without nan; the mean
over datasets is nan if the score of any dataset is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from tabulate import tabulate
from torch import nn

from clouds.d2 import CfgNode
from clouds.data.label_space import LabelSpace
from clouds.environment import provenance
from clouds.evaluation.anomaly import AnomalyResult
from clouds.evaluation.confusion import ConfusionMatrix
from clouds.evaluation.corruptions import CorruptionScores
from clouds.evaluation.evaluated_weights import hash_file, hash_model, selection_of
from clouds.evaluation.image_scores import ImageScore
from clouds.evaluation.metrics import is_summary
from clouds.evaluation.pseudo_labels import PseudoLabelResult
from clouds.evaluation.results_file import IMAGE_SCORES_FILE, RESULTS_FILE
from clouds.files import atomic_write
from clouds.weights_io import read_checkpoint

UInt8Array = npt.NDArray[np.uint8]

PACKAGES = (
    "torchvision", "open_clip_torch", "timm", "numpy", "pillow", "opencv-python-headless",
    "imagecorruptions-imaug", "scikit-image", "scipy",
)  # fmt: skip
"""Packages that affect the scores; results.json has their versions besides that of torch."""

VISUALIZATIONS = "visualizations"
"""Folder of the panels, in OUTPUT_DIR."""


@dataclass(frozen=True)
class DatasetResult:
    """Scores on one dataset, in percent.

    Attributes:
        name: name of the dataset.
        class_names: of the dataset's label space, by train id.
        iou: intersection over union of each class, by train id; nan for classes that are not in
            the dataset's label set.
        miou: mean of `iou`.
        subset_miou: additional means over a subset of the classes, by the number of classes in
            the subset: 16 for the classes of SYNTHIA. None: not requested for this evaluation.
            Published tables use either mean; their numbers are not comparable.
        pixel_accuracy: fraction of the counted pixels that is predicted correctly.
        mean_accuracy: mean over the classes of the fraction of their pixels that is predicted
            correctly.
        images: number of images.
        seconds: wall-clock time of the evaluation, including data loading and scoring.
        unmapped_classes: classes of the dataset that the label space of the model does not have;
            their pixels do not count.
        unscored_classes: classes of the model that the dataset does not have; predicted, they are
            wrong.
        confusion: pixels by label (rows) and prediction (columns), by train id.
        image_scores: of each image, in the order of the dataset.
        metrics: scores of TEST.METRICS, by name.
        panels: image, label and prediction side by side, (H, W, 3) RGB; not compared by `==`.
    """

    name: str
    class_names: tuple[str, ...]
    iou: tuple[float, ...]
    miou: float
    subset_miou: dict[int, float | None]
    pixel_accuracy: float
    mean_accuracy: float
    images: int
    seconds: float
    unmapped_classes: tuple[str, ...] = ()
    unscored_classes: tuple[str, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()
    image_scores: tuple[ImageScore, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    panels: tuple[UInt8Array, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def from_confusion(
        cls,
        name: str,
        label_space: LabelSpace,
        confusion: ConfusionMatrix,
        classes: Sequence[int],
        *,
        subsets: Mapping[int, Sequence[int] | None] | None = None,
        images: int = 0,
        seconds: float = 0.0,
        unmapped_classes: Sequence[str] = (),
        image_scores: Sequence[ImageScore] = (),
        metrics: Mapping[str, float] | None = None,
        panels: Sequence[UInt8Array] = (),
    ) -> DatasetResult:
        """Compute the scores from the counts over all images of a dataset.

        Args:
            classes: train ids in the dataset's label set.
            subsets: train ids for `subset_miou`, by their number; a value of None: not requested.
            unmapped_classes, image_scores, metrics: see the attributes.
        """
        iou = torch.full((confusion.num_classes,), torch.nan, dtype=torch.float64)
        iou[list(classes)] = confusion.iou(classes)
        subset_miou = {
            size: None
            if subset is None
            else 100 * confusion.mean_iou([c for c in subset if c in classes])
            for size, subset in (subsets or {}).items()
        }
        return cls(
            name=name,
            class_names=label_space.names,
            iou=tuple((100 * iou).tolist()),
            miou=100 * confusion.mean_iou(classes),
            subset_miou=subset_miou,
            pixel_accuracy=100 * confusion.pixel_accuracy(),
            mean_accuracy=100 * confusion.mean_accuracy(classes),
            images=images,
            seconds=seconds,
            unmapped_classes=tuple(unmapped_classes),
            unscored_classes=tuple(
                name for i, name in enumerate(label_space.names) if i not in classes
            ),
            confusion=tuple(map(tuple, confusion.counts.cpu().tolist())),
            image_scores=tuple(image_scores),
            metrics=dict(metrics or {}),
            panels=tuple(panels),
        )

    @property
    def images_per_second(self) -> float:
        """Images per second; nan if `seconds` is 0."""
        return self.images / self.seconds if self.seconds > 0 else math.nan

    @cached_property
    def class_iou(self) -> dict[str, float]:
        """Intersection over union by class name."""
        return dict(zip(self.class_names, self.iou, strict=True))

    def scores(self) -> dict[str, float]:
        """All scores by name: mIoU, mIoU-16 (if requested), accuracies, IoU-<class>, metrics."""
        subsets = {
            f"mIoU-{size}": value for size, value in self.subset_miou.items() if value is not None
        }
        accuracies = {"pixel-accuracy": self.pixel_accuracy, "mean-accuracy": self.mean_accuracy}
        per_class = {f"IoU-{name}": value for name, value in self.class_iou.items()}
        return {"mIoU": self.miou, **subsets, **accuracies, **per_class, **self.metrics}

    def note_on_classes(self) -> str:
        """The classes that are scored, where those of dataset and model differ; else empty."""
        if not self.unmapped_classes:
            return ""
        scored = [name for name in self.class_names if name not in self.unscored_classes]
        note = (
            f"{self.name} is scored on {len(scored)} classes: {', '.join(scored)}. Not classes of "
            f"the model, so their pixels do not count: {', '.join(self.unmapped_classes)}."
        )
        if self.unscored_classes:
            note += f" Not in {self.name}: {', '.join(self.unscored_classes)}."
        return note

    def to_dict(self) -> dict[str, Any]:
        """Numbers and strings for JSON; None in place of nan."""
        values: dict[str, Any] = plain(
            {
                "mIoU": self.miou,
                **{f"mIoU-{size}": value for size, value in self.subset_miou.items()},
                "pixel-accuracy": self.pixel_accuracy,
                "mean-accuracy": self.mean_accuracy,
                **self.metrics,
                "IoU": self.class_iou,
                "unmapped-classes": list(self.unmapped_classes),
                "unscored-classes": list(self.unscored_classes),
                "images": self.images,
                "seconds": self.seconds,
                "images-per-second": self.images_per_second,
                "confusion-matrix": self.confusion,
            }
        )
        return values


@dataclass(frozen=True)
class Results:
    """Scores on several datasets under one protocol.

    Attributes:
        protocol: name of the protocol (TEST.PROTOCOL).
        datasets: in the order of the evaluation.
        pseudo_labels: in joint training, one for each generated dataset.
        anomaly_sets: one for each of TEST.ANOMALY_SETS.
    """

    protocol: str
    datasets: tuple[DatasetResult, ...]
    pseudo_labels: tuple[PseudoLabelResult, ...] = ()
    anomaly_sets: tuple[AnomalyResult, ...] = ()

    @property
    def mean_miou(self) -> float:
        """Mean of the datasets' mIoU; nan if any of them is nan."""
        return _mean([result.miou for result in self.datasets])

    @property
    def mean_subset_miou(self) -> dict[int, float | None]:
        """Mean of the datasets' `subset_miou`, by size; None if a dataset has no such score."""
        sizes = dict.fromkeys(size for result in self.datasets for size in result.subset_miou)
        means: dict[int, float | None] = {}
        for size in sizes:
            values = [result.subset_miou.get(size) for result in self.datasets]
            numbers = [value for value in values if value is not None]
            means[size] = _mean(numbers) if len(numbers) == len(values) else None
        return means

    @property
    def mean_metrics(self) -> dict[str, float]:
        """Mean over the datasets of each of `metrics` but those of one class."""
        names = dict.fromkeys(n for r in self.datasets for n in r.metrics if is_summary(n))
        return {n: _mean([r.metrics.get(n, math.nan) for r in self.datasets]) for n in names}

    @property
    def corruptions(self) -> CorruptionScores | None:
        """The scores of corrupted images; None: there are none."""
        return CorruptionScores.of({result.name: result.miou for result in self.datasets})

    @cached_property
    def panels(self) -> dict[str, UInt8Array]:
        """Panels by name, `<dataset>/<number>`."""
        results: list[DatasetResult | PseudoLabelResult] = [*self.datasets, *self.pseudo_labels]
        return {f"{r.name}/{i}": panel for r in results for i, panel in enumerate(r.panels)}

    def without_score(self) -> list[str]:
        """Names of the datasets whose mIoU is nan."""
        return [result.name for result in self.datasets if math.isnan(result.miou)]

    def flat(self) -> dict[str, float]:
        """All scores by name: `<dataset>/mIoU`, `<dataset>/IoU-road`, …, `mean/mIoU`.

        Includes scores that are nan, so that the names are the same at each evaluation of a run.
        """
        flat = {f"{r.name}/{k}": value for r in self.datasets for k, value in r.scores().items()}
        means = self.mean_subset_miou.items()
        flat["mean/mIoU"] = self.mean_miou
        flat |= {f"mean/mIoU-{size}": value for size, value in means if value is not None}
        flat |= {f"mean/{name}": value for name, value in self.mean_metrics.items()}
        for labels in self.pseudo_labels:
            flat |= labels.flat()
        for anomalies in self.anomaly_sets:
            flat |= anomalies.flat()
        return flat

    def table(self) -> str:
        """Classes as rows, datasets as columns, in percent; notes on scores that are nan.

        Classes of different label spaces that have the same name share a row. A cell is empty if
        the class is not in the label space of the dataset.
        """
        class_rows, summary_rows = self._class_rows(), self._summary_rows()
        header = ["IoU in %", *(r.name for r in self.datasets), "mean"]
        columns = len(header) if len(self.datasets) > 1 else len(header) - 1
        text = tabulate(
            [row[:columns] for row in [*class_rows, *summary_rows]],
            header[:columns],
            "simple",
            stralign="right",
            disable_numparse=True,
            colalign=("left",),
        )
        lines = text.split("\n")
        lines.insert(2 + len(class_rows), lines[1])  # a rule between the classes and their means
        for name in self.without_score():
            lines.append(f"{name} has no mIoU: none of its classes is labeled or predicted in it.")
        lines += [note for result in self.datasets if (note := result.note_on_classes())]
        for labels in self.pseudo_labels:
            scores = ", ".join(f"{name} {_percent(v)}" for name, v in labels.miou.items())
            lines.append(
                f"{labels.name} ({labels.images} images), mIoU: {scores}; "
                f"{_percent(labels.covered)} % of the pixels are in refined masks."
            )
        lines += [result.line() for result in self.anomaly_sets]
        if self.corruptions is not None:
            lines += ["", self.corruptions.table()]
        return "\n".join(lines)

    def _class_rows(self) -> list[list[str]]:
        names = dict.fromkeys(name for result in self.datasets for name in result.class_names)
        columns = [{n: _percent(v) for n, v in r.class_iou.items()} for r in self.datasets]
        return [[name, *(column.get(name, "") for column in columns)] for name in names]

    def _summary_rows(self) -> list[list[str]]:
        rows: dict[str, list[float | None]] = {
            "mIoU": [*(r.miou for r in self.datasets), self.mean_miou]
        }
        for size, mean in self.mean_subset_miou.items():
            values = [r.subset_miou.get(size) for r in self.datasets]
            if any(value is not None for value in values):
                rows[f"mIoU ({size} classes)"] = [*values, mean]
        rows["pixel accuracy"] = [r.pixel_accuracy for r in self.datasets]
        rows["mean accuracy"] = [r.mean_accuracy for r in self.datasets]
        for name, mean in self.mean_metrics.items():
            rows[name] = [*(r.metrics.get(name) for r in self.datasets), mean]
        images = ["images", *(str(r.images) for r in self.datasets)]
        return [*([name, *map(_percent, values)] for name, values in rows.items()), images]

    def to_dict(self) -> dict[str, Any]:
        """Numbers and strings for JSON; None in place of nan."""
        means = {f"mIoU-{size}": value for size, value in self.mean_subset_miou.items()}
        return {
            "unit": "percent",
            "protocol": self.protocol,
            "mean": plain({"mIoU": self.mean_miou, **means, **self.mean_metrics}),
            "datasets": {result.name: result.to_dict() for result in self.datasets},
            "pseudo-labels": {r.name: plain(r.to_dict()) for r in self.pseudo_labels},
            "anomaly-sets": {r.name: plain(r.to_dict()) for r in self.anomaly_sets},
            "corruptions": None if self.corruptions is None else plain(self.corruptions.to_dict()),
        }

    def image_scores(self) -> dict[str, Any]:
        """Scores of single images for JSON, by dataset; None in place of nan."""
        datasets = {
            result.name: [
                {"file": s.file, "mIoU": s.miou, "pixel-accuracy": s.pixel_accuracy}
                for s in result.image_scores
            ]
            for result in self.datasets
        }
        return {"unit": "percent", "datasets": plain(datasets)}


def describe_run(
    cfg: CfgNode, model: nn.Module, *, weights: str | None = None, iteration: int | None = None
) -> dict[str, Any]:
    """The provenance of results, for JSON.

    Args:
        cfg: config of the run.
        model: the evaluated model; its parameters and buffers are hashed.
        weights: file of the evaluated weights; None: MODEL.WEIGHTS, which for a run that trained
            is the file of the initial weights.
        iteration: training iteration after which the model was evaluated; None: not in training.

    Raises:
        ValueError: the file cannot be read, see `read_checkpoint`.
    """
    file = cfg.MODEL.WEIGHTS if weights is None else weights
    exists = bool(file) and Path(file).is_file()
    # in training the evaluated weights are no longer those of the file
    evaluated = read_checkpoint(file, mmap=True) if exists and iteration is None else {}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "iteration": iteration,
        "seed": cfg.SEED,
        "weights": {
            "file": file or None,
            "sha256": hash_file(file) if exists else None,
            "model_sha256": hash_model(model),
        },
        "selection": selection_of(evaluated),
        "versions": {**provenance(), **{name: _version(name) for name in PACKAGES}},
        "config": plain(cfg),
    }


def write_results(results: Results, run: Mapping[str, Any], folder: str | Path) -> Path:
    """Write results.json, per_image.json and `visualizations/<dataset>/<number>.png`, atomically.

    Args:
        run: as returned by `describe_run`.
        folder: output folder, created if it does not exist.

    Returns:
        Path of results.json.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    for name, panel in results.panels.items():
        path = folder / VISUALIZATIONS / f"{name}.png"
        with atomic_write(path, "wb") as file:
            Image.fromarray(panel).save(file, "PNG")
    with atomic_write(folder / IMAGE_SCORES_FILE, "w") as file:
        json.dump(results.image_scores(), file, allow_nan=False)
    path = folder / RESULTS_FILE
    with atomic_write(path, "w") as file:
        file.write(
            _rows_on_lines(json.dumps({**results.to_dict(), **run}, indent=2, allow_nan=False))
        )
    return path


def _rows_on_lines(text: str) -> str:
    """Indented JSON with each list of whole numbers on one line, such as a row of a matrix."""
    return re.sub(r"\[\n\s*(-?\d+(?:,\n\s*-?\d+)*)\n\s*\]", _on_one_line, text)


def _on_one_line(found: re.Match[str]) -> str:
    return f"[{', '.join(found[1].replace(',', ' ').split())}]"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _percent(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.1f}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def plain(value: Any) -> Any:
    """Convert config nodes to dicts, tuples to lists, and nan and infinity to None."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
