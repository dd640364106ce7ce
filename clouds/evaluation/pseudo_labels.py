"""What teacher, refiner and student make of generated images, in numbers and in pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clouds import comm
from clouds.d2 import CfgNode
from clouds.data.datasets import DatasetSpec, generated, get_dataset
from clouds.data.label_space import CITYSCAPES_19, IGNORE
from clouds.data.reading import read_image
from clouds.data.structures import Record
from clouds.evaluation.confusion import ConfusionMatrix
from clouds.visualizer import Tile, mark_points, side_by_side

if TYPE_CHECKING:
    from clouds.modeling.meta_arch.clouds import CLOUDS

UInt8Array = npt.NDArray[np.uint8]

SCORED = ("teacher", "refined", "teacher-where-refined", "student")
"""What is scored: the teacher's label; the refined one where a refined mask covers the picture; the
teacher's on those same pixels; the student's prediction of the clean picture."""


@dataclass(frozen=True)
class PseudoLabelResult:
    """Scores on the generated images whose true labels are known, in percent, and panels.

    Attributes:
        name: the generated dataset.
        miou: by the names in `SCORED`; nan where no true label is known.
        covered: share of the pixels that a refined mask covers.
        images: how many were looked at.
        pictures: panels, (H, W, 3) RGB; part of no comparison.
    """

    name: str
    miou: dict[str, float]
    covered: float
    images: int
    pictures: tuple[UInt8Array, ...] = field(default=(), repr=False, compare=False)

    def flat(self) -> dict[str, float]:
        """`<dataset>/<what>-mIoU`, and `<dataset>/refined-covered`."""
        scores = {f"{self.name}/{what}-mIoU": value for what, value in self.miou.items()}
        return {**scores, f"{self.name}/refined-covered": self.covered}


def inspect_pseudo_labels(cfg: CfgNode, model: CLOUDS) -> tuple[PseudoLabelResult, ...]:
    """Label some images of each generated dataset of DATASETS.TRAIN anew, score and draw them.

    To be called by every process, with the model in evaluation mode; the images are shared out.
    Evenly spaced images are taken: TEST.GENERATED_IMAGES of those that have a true label are
    scored, the first TEST.PICTURES of all are drawn.
    """
    return tuple(
        _inspect(get_dataset(name), model, cfg.TEST.GENERATED_IMAGES, cfg.TEST.PICTURES)
        for name in generated(cfg.DATASETS.TRAIN)
    )


def _inspect(dataset: DatasetSpec, model: CLOUDS, scored: int, drawn: int) -> PseudoLabelResult:
    records = dataset.records()
    labelled = [record for record in records if record.label is not None]
    chosen = _spread(labelled, scored) or _spread(records, drawn)
    counts = {what: ConfusionMatrix(CITYSCAPES_19.num_classes) for what in SCORED}
    covered = torch.zeros(2, dtype=torch.float64)
    pictures: dict[int, UInt8Array] = {}
    for number in range(comm.get_rank(), len(chosen), comm.get_world_size()):
        seen = _look(model, dataset, chosen[number], number)
        seen.count(counts)
        covered += torch.tensor([float(np.sum(seen.refined != IGNORE)), seen.refined.size])
        if number < drawn:
            pictures[number] = seen.panel()
    shares = comm.all_gather((covered, pictures))
    inside, pixels = torch.stack([share for share, _ in shares]).sum(0).tolist()
    return PseudoLabelResult(
        name=dataset.name,
        miou={
            what: 100 * matrix.all_reduce().mean_iou(dataset.classes_present)
            for what, matrix in counts.items()
        },
        covered=100 * inside / max(pixels, 1),
        images=len(chosen),
        pictures=tuple(
            picture for _, picture in sorted(p for _, part in shares for p in part.items())
        ),
    )


def _spread(records: Sequence[Record], wanted: int) -> list[Record]:
    """Evenly spaced ones."""
    count = min(wanted, len(records))
    return [records[(2 * i + 1) * len(records) // (2 * count)] for i in range(count)]


@dataclass(frozen=True)
class _Seen:
    """One picture and all its labels: (H, W) train ids, 255 where there is none."""

    title: str
    image: UInt8Array
    teacher: UInt8Array
    refined: UInt8Array
    student: UInt8Array
    truth: UInt8Array | None
    points: npt.NDArray[np.float32] | None

    def count(self, counts: dict[str, ConfusionMatrix]) -> None:
        """Add its pixels to the counts of everything in `SCORED`."""
        if self.truth is None:
            return
        where_refined = np.where(self.refined == IGNORE, np.uint8(IGNORE), self.truth)
        refined = np.where(self.refined == IGNORE, np.uint8(0), self.refined)
        pairs = {
            "teacher": (self.teacher, self.truth),
            "refined": (refined, where_refined),
            "teacher-where-refined": (self.teacher, where_refined),
            "student": (self.student, self.truth),
        }
        for what, (prediction, label) in pairs.items():
            counts[what].update(torch.from_numpy(prediction), torch.from_numpy(label))

    def panel(self) -> UInt8Array:
        """Clean picture with points, teacher's, refined, student's and true label in a row."""
        image = self.image if self.points is None else mark_points(self.image, self.points)
        maps = {"teacher": self.teacher, "refined": self.refined, "student": self.student}
        if self.truth is not None:
            maps["true label"] = self.truth
        caption = "clean image" if self.points is None else "clean image, points"
        tiles = [Tile(caption, image)]
        tiles += [Tile(name, CITYSCAPES_19.colorize(classes)) for name, classes in maps.items()]
        present = np.unique(np.concatenate([np.unique(classes) for classes in maps.values()]))
        return side_by_side(tiles, title=self.title, legend=present.tolist(), tile_width=360)


def _look(model: CLOUDS, dataset: DatasetSpec, record: Record, seed: int) -> _Seen:
    """Label one picture in every way."""
    assert model.self_training is not None
    image = read_image(record.image)
    clean = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    label = model.teach([clean])[0]
    refined = model.self_training.refine([clean], [label], [seed])[0]
    points = refined.points
    return _Seen(
        title=f"{dataset.name} · {record.image.name}",
        image=image,
        teacher=_map(label.classes),
        refined=_map(refined.class_map()),
        student=_map(model.segment([{"image": clean}])[0]),
        truth=None if record.label is None else dataset.read_label(record),
        points=None if points is None else points.flatten(0, 1).cpu().numpy(),
    )


def _map(classes: Tensor) -> UInt8Array:
    return classes.cpu().numpy().astype(np.uint8)
