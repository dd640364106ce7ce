"""Results of an evaluation: numbers, a table to read, and a file that says where they come from.

All scores here are in percent. nan means that there is no such score: a class that the dataset
does not have, or that is neither labelled nor predicted in it. It is left out of means over
classes, but never of the mean over datasets.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property, lru_cache
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
from clouds.data.label_space import CITYSCAPES_19
from clouds.environment import provenance
from clouds.evaluation.confusion import ConfusionMatrix
from clouds.evaluation.pseudo_labels import PseudoLabelResult
from clouds.files import written_whole

UInt8Array = npt.NDArray[np.uint8]

PACKAGES = ("torchvision", "open_clip_torch", "timm", "numpy", "pillow", "opencv-python-headless")
"""Packages with a part in the numbers, whose versions are written down beside torch's."""


@dataclass(frozen=True)
class DatasetResult:
    """Scores on one dataset, in percent.

    Attributes:
        name: the dataset.
        iou: intersection over union of each of the 19 classes, in the order of their train ids;
            nan for classes that the dataset does not have.
        miou: mean of `iou`.
        miou16: mean over SYNTHIA's 16 classes alone, where that is asked for. Published tables mix
            the two means; they are different numbers.
        pixel_accuracy: share of the scored pixels that is right.
        mean_accuracy: mean over the classes of the share of their pixels that is right.
        images: how many were scored.
        seconds: wall-clock time that took, loading and scoring included.
        pictures: panels of image, label and prediction, (H, W, 3) RGB; part of no comparison.
    """

    name: str
    iou: tuple[float, ...]
    miou: float
    miou16: float | None
    pixel_accuracy: float
    mean_accuracy: float
    images: int
    seconds: float
    pictures: tuple[UInt8Array, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def from_confusion(
        cls,
        name: str,
        confusion: ConfusionMatrix,
        classes: Sequence[int],
        *,
        sixteen: Sequence[int] | None = None,
        images: int = 0,
        seconds: float = 0.0,
        pictures: Sequence[UInt8Array] = (),
    ) -> DatasetResult:
        """Scores that follow from counts.

        Args:
            name: the dataset.
            confusion: counts over all its images.
            classes: train ids in the dataset's label set.
            sixteen: train ids for `miou16`; None: none is asked for.
            images: how many were scored.
            seconds: how long it took.
            pictures: panels, (H, W, 3) RGB.
        """
        iou = torch.full((confusion.num_classes,), torch.nan, dtype=torch.float64)
        iou[list(classes)] = confusion.iou(classes)
        shared = None if sixteen is None else [c for c in sixteen if c in classes]
        return cls(
            name=name,
            iou=tuple((100 * iou).tolist()),
            miou=100 * confusion.mean_iou(classes),
            miou16=None if shared is None else 100 * confusion.mean_iou(shared),
            pixel_accuracy=100 * confusion.pixel_accuracy(),
            mean_accuracy=100 * confusion.mean_accuracy(classes),
            images=images,
            seconds=seconds,
            pictures=tuple(pictures),
        )

    @property
    def images_per_second(self) -> float:
        """Images scored in a second, nan when no time passed."""
        return self.images / self.seconds if self.seconds > 0 else math.nan

    def scores(self) -> dict[str, float]:
        """Every score by name: mIoU, mIoU-16 (if any), accuracies, IoU-<class> for each class."""
        named = {"mIoU": self.miou}
        if self.miou16 is not None:
            named["mIoU-16"] = self.miou16
        named["pixel-accuracy"] = self.pixel_accuracy
        named["mean-accuracy"] = self.mean_accuracy
        return named | {f"IoU-{c}": v for c, v in zip(CITYSCAPES_19.names, self.iou, strict=True)}


@dataclass(frozen=True)
class Results:
    """Scores on several datasets by one protocol.

    Attributes:
        protocol: name of the protocol (TEST.PROTOCOL).
        datasets: in the order in which they were asked for.
        pseudo_labels: in joint training, one for each generated dataset.
    """

    protocol: str
    datasets: tuple[DatasetResult, ...]
    pseudo_labels: tuple[PseudoLabelResult, ...] = ()

    @property
    def mean_miou(self) -> float:
        """Mean of the datasets' mIoU; nan when that of any of them is."""
        return _mean([result.miou for result in self.datasets])

    @property
    def mean_miou16(self) -> float | None:
        """Mean of their 16-class mIoU; None where that was not asked for."""
        values = [r.miou16 for r in self.datasets if r.miou16 is not None]
        return _mean(values) if values and len(values) == len(self.datasets) else None

    @cached_property
    def pictures(self) -> dict[str, UInt8Array]:
        """Panels by name, `<dataset>/<number>`."""
        panels = {result.name: result.pictures for result in self.datasets}
        panels |= {result.name: result.pictures for result in self.pseudo_labels}
        return {
            f"{name}/{i}": picture
            for name, pictures in panels.items()
            for i, picture in enumerate(pictures)
        }

    def without_score(self) -> list[str]:
        """Names of the datasets whose mIoU is nan."""
        return [result.name for result in self.datasets if math.isnan(result.miou)]

    def flat(self) -> dict[str, float]:
        """Every score by one name: `<dataset>/mIoU`, `<dataset>/IoU-road`, …, `mean/mIoU`.

        Scores that are nan are in it, so that a name is there at each evaluation or at none.
        """
        flat = {
            f"{r.name}/{name}": value for r in self.datasets for name, value in r.scores().items()
        }
        flat["mean/mIoU"] = self.mean_miou
        if self.mean_miou16 is not None:
            flat["mean/mIoU-16"] = self.mean_miou16
        for labels in self.pseudo_labels:
            flat |= labels.flat()
        return flat

    def table(self) -> str:
        """Classes as rows, datasets as columns, in percent; says which dataset has no score."""
        per_class = [
            [name, *(_percent(result.iou[i]) for result in self.datasets)]
            for i, name in enumerate(CITYSCAPES_19.names)
        ]
        several = len(self.datasets) > 1
        means: dict[str, list[float | None]] = {
            "mIoU": [*(r.miou for r in self.datasets), self.mean_miou],
            "mIoU (16 classes)": [*(r.miou16 for r in self.datasets), self.mean_miou16],
            "pixel accuracy": [r.pixel_accuracy for r in self.datasets],
            "mean accuracy": [r.mean_accuracy for r in self.datasets],
        }
        if all(value is None for value in means["mIoU (16 classes)"]):
            del means["mIoU (16 classes)"]
        summary = [[name, *map(_percent, values)] for name, values in means.items()]
        summary.append(["images", *(str(r.images) for r in self.datasets)])
        header = ["IoU in %", *(r.name for r in self.datasets), "mean"]
        columns = len(header) if several else len(header) - 1
        rows = [row[:columns] for row in [*per_class, *summary]]
        text = tabulate(
            rows,
            header[:columns],
            "simple",
            stralign="right",
            disable_numparse=True,
            colalign=("left",),
        )
        lines = text.split("\n")
        lines.insert(2 + len(per_class), lines[1])  # a rule between the classes and their means
        for name in self.without_score():
            lines.append(f"{name} has no mIoU: none of its classes is labelled or predicted in it.")
        for labels in self.pseudo_labels:
            scores = ", ".join(f"{what} {_percent(v)}" for what, v in labels.miou.items())
            lines.append(
                f"{labels.name} ({labels.images} images), mIoU: {scores}; "
                f"{_percent(labels.covered)} % of the pixels are in refined masks."
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON; None stands for nan."""
        return {
            "unit": "percent",
            "protocol": self.protocol,
            "mean": _plain({"mIoU": self.mean_miou, "mIoU-16": self.mean_miou16}),
            "datasets": {
                r.name: _plain(
                    {
                        "mIoU": r.miou,
                        "mIoU-16": r.miou16,
                        "pixel-accuracy": r.pixel_accuracy,
                        "mean-accuracy": r.mean_accuracy,
                        "IoU": dict(zip(CITYSCAPES_19.names, r.iou, strict=True)),
                        "images": r.images,
                        "seconds": r.seconds,
                        "images-per-second": r.images_per_second,
                    }
                )
                for r in self.datasets
            },
            "pseudo-labels": {
                r.name: _plain({"mIoU": r.miou, "covered": r.covered, "images": r.images})
                for r in self.pseudo_labels
            },
        }


def describe_run(
    cfg: CfgNode, model: nn.Module, *, weights: str | None = None, iteration: int | None = None
) -> dict[str, Any]:
    """Where numbers come from, as plain values for JSON.

    Args:
        cfg: the run's config.
        model: what was evaluated; its parameters and buffers are hashed.
        weights: file that its weights were read from; None: MODEL.WEIGHTS, which a run that
            trained has only started from.
        iteration: training iteration after which it was evaluated, if it is in training.
    """
    file = cfg.MODEL.WEIGHTS if weights is None else weights
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "iteration": iteration,
        "seed": cfg.SEED,
        "weights": {
            "file": file or None,
            "sha256": hash_file(file) if file and Path(file).is_file() else None,
            "model_sha256": hash_model(model),
        },
        "versions": {**provenance(), **{name: _version(name) for name in PACKAGES}},
        "config": _plain(cfg),
    }


def write_results(results: Results, run: Mapping[str, Any], folder: str | Path) -> Path:
    """Write results.json and the panels, each file whole or not at all.

    Args:
        results: what was measured.
        run: of `describe_run`.
        folder: is made when it is not there; panels go to its `pictures/<dataset>/<number>.png`.

    Returns:
        The JSON file.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    for name, picture in results.pictures.items():
        path = folder / "pictures" / f"{name}.png"
        with written_whole(path, "wb") as file:
            Image.fromarray(picture).save(file, "PNG")
    content = {**results.to_dict(), **run}
    path = folder / "results.json"
    with written_whole(path, "w") as file:
        json.dump(content, file, indent=2, allow_nan=False)
    return path


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal; kept until the file changes."""
    path = Path(path).resolve()
    status = path.stat()
    return _hash_file(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=16)
def _hash_file(path: Path, modified: int, size: int) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def hash_model(model: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and values of a model's state, in hexadecimal."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _percent(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.1f}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _plain(value: Any) -> Any:
    """Dicts, lists, strings and finite numbers in place of config nodes, tuples and nan."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
