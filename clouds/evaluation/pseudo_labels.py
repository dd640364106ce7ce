"""Evaluation of the pseudo-labels of generated images: scores and panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clouds import comm
from clouds.d2 import CfgNode
from clouds.data.datasets import Datasets, DatasetSpec, generated
from clouds.data.label_space import LabelSpace
from clouds.data.reading import read_image
from clouds.data.structures import Record
from clouds.evaluation.confusion import ConfusionMatrix
from clouds.modeling.meta_arch.clouds import CLOUDS
from clouds.visualizer import Tile, draw_points, legend_of, present_ids, side_by_side

UInt8Array = npt.NDArray[np.uint8]

SCORED = ("teacher", "refined", "teacher-where-refined", "student")
"""The scored label maps: of the teacher; of the refiner, on the pixels that a refined mask covers;
of the teacher on the same pixels; the student's prediction for the clean image."""


@dataclass(frozen=True)
class PseudoLabelResult:
    """Scores on generated images whose true labels are known, in percent, and panels.

    Attributes:
        name: name of the generated dataset.
        miou: by the names in `SCORED`; nan if no true label is known.
        covered: fraction of the pixels that a refined mask covers.
        images: number of images.
        class_iou: IoU by the names in `SCORED`, then by class; nan for a class that is neither in
            the true labels nor in the scored ones.
        panels: (H, W, 3) RGB; not compared by `==`.
    """

    name: str
    miou: dict[str, float]
    covered: float
    images: int
    class_iou: dict[str, dict[str, float]] = field(default_factory=dict)
    panels: tuple[UInt8Array, ...] = field(default=(), repr=False, compare=False)

    def flat(self) -> dict[str, float]:
        """`<dataset>/<map>-mIoU`, `<dataset>/<map>-IoU-<class>`, `<dataset>/refined-covered`."""
        scores = {f"{self.name}/{name}-mIoU": value for name, value in self.miou.items()}
        for name, classes in self.class_iou.items():
            scores |= {f"{self.name}/{name}-IoU-{c}": value for c, value in classes.items()}
        return {**scores, f"{self.name}/refined-covered": self.covered}

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        return {
            "mIoU": self.miou,
            "IoU": self.class_iou,
            "covered": self.covered,
            "images": self.images,
        }


def evaluate_pseudo_labels(cfg: CfgNode, model: CLOUDS) -> tuple[PseudoLabelResult, ...]:
    """Predict pseudo-labels for images of each generated dataset in DATASETS.TRAIN, score them.

    A collective operation: every process must call it, with the model in evaluation mode; the
    images are distributed among the processes. Of each dataset TEST.GENERATED_IMAGES images with a
    true label are scored, at equal distances in the list of images, and a panel is drawn for the
    first TEST.VISUALIZED_IMAGES of them; without true labels, for as many of all images.

    Raises:
        FileNotFoundError, ValueError: a dataset or one of its files is missing or broken, or a true
            label has values outside of the label space of the training data.
    """
    names = generated(cfg.DATASETS.TRAIN)
    if not names:
        return ()
    datasets = Datasets.from_config(cfg)
    counts = cfg.TEST.GENERATED_IMAGES, cfg.TEST.VISUALIZED_IMAGES
    return tuple(_evaluate_dataset(datasets.get(name), model, *counts) for name in names)


def _evaluate_dataset(
    dataset: DatasetSpec, model: CLOUDS, num_scored: int, num_panels: int
) -> PseudoLabelResult:
    label_space, records = dataset.label_space, dataset.records()
    labeled = [record for record in records if _has_true_label(record)]
    selected = evenly_spaced(labeled, num_scored) or evenly_spaced(records, num_panels)
    matrices = {
        name: ConfusionMatrix(label_space.num_classes, label_space.ignore) for name in SCORED
    }
    covered = torch.zeros(2, dtype=torch.float64)  # covered pixels, all pixels
    panels: dict[int, UInt8Array] = {}
    for i in range(comm.get_rank(), len(selected), comm.get_world_size()):
        maps = _predict(model, dataset, selected[i], label_space.ignore, seed=i)
        _update(matrices, maps, selected[i], label_space.ignore)
        covered += torch.tensor([float(np.sum(maps.covered)), maps.covered.size])
        if i < num_panels:
            title = f"{dataset.name} · {selected[i].image.name}"
            panels[i] = _panel(maps, label_space, title)
    gathered = comm.all_gather((covered, panels))
    num_covered, num_pixels = torch.stack([counts for counts, _ in gathered]).sum(0).tolist()
    summed = {name: matrix.all_reduce() for name, matrix in matrices.items()}
    return PseudoLabelResult(
        name=dataset.name,
        miou={name: 100 * matrix.mean_iou() for name, matrix in summed.items()},
        covered=100 * num_covered / max(num_pixels, 1),
        images=len(selected),
        class_iou={
            name: dict(zip(label_space.names, (100 * matrix.iou()).tolist(), strict=True))
            for name, matrix in summed.items()
        },
        panels=merge_by_number([panels for _, panels in gathered]),
    )


def _has_true_label(record: Record) -> bool:
    return record.label is not None and not record.approximate_label


def evenly_spaced(records: Sequence[Record], count: int) -> list[Record]:
    """At most `count` records, at equal distances in the list."""
    count = min(count, len(records))
    return [records[(2 * i + 1) * len(records) // (2 * count)] for i in range(count)]


def merge_by_number(parts: Sequence[Mapping[int, UInt8Array]]) -> tuple[UInt8Array, ...]:
    """The panels of all processes, in the order of their numbers."""
    panels = {number: panel for part in parts for number, panel in part.items()}
    return tuple(panels[number] for number in sorted(panels))


@dataclass(frozen=True)
class _LabelMaps:
    """A generated image and its label maps, (H, W) uint8 train ids.

    Attributes:
        image: (H, W, 3) RGB, without augmentation.
        teacher: pseudo-label of the teacher.
        refined: pseudo-label of the refiner; the ignore value outside of `covered`.
        covered: bool (H, W), pixels in a refined mask.
        student: prediction of the student.
        truth: true label; None: not known.
        points: (M, 2), point prompts of the refiner, (x, y) in pixels; None: it uses none.
    """

    image: UInt8Array
    teacher: UInt8Array
    refined: UInt8Array
    covered: npt.NDArray[np.bool_]
    student: UInt8Array
    truth: UInt8Array | None
    points: npt.NDArray[np.float32] | None


def _predict(
    model: CLOUDS, dataset: DatasetSpec, record: Record, ignore: int, seed: int
) -> _LabelMaps:
    """The label maps of teacher, refiner and student for one image."""
    assert model.pseudo_labeler is not None
    image = read_image(record.image)
    clean = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    teacher = model.predict_pseudo_labels([clean])[0]
    if not teacher.confidence.isfinite().all():
        raise ValueError(
            f"{record.image}: the teacher's scores are not finite, so there are no pseudo-labels. "
            "Its weights have diverged; use an earlier checkpoint."
        )
    refined = model.pseudo_labeler.refine([clean], [teacher], [seed])[0]
    covered, points = refined.covered, refined.points
    return _LabelMaps(
        image=image,
        teacher=_to_array(teacher.classes),
        refined=_to_array(refined.class_map().masked_fill(~covered, ignore)),
        covered=covered.cpu().numpy(),
        student=_to_array(model.segment([{"image": clean, "file_name": str(record.image)}])[0]),
        truth=dataset.read_label(record) if _has_true_label(record) else None,
        points=None if points is None else points.flatten(0, 1).cpu().numpy(),
    )


def _update(
    matrices: Mapping[str, ConfusionMatrix], maps: _LabelMaps, record: Record, ignore: int
) -> None:
    """Add the pixels of one image to the confusion matrix of each label map in `SCORED`."""
    if maps.truth is None:
        return
    truth_where_refined = np.where(maps.covered, maps.truth, np.uint8(ignore))
    pairs = {
        "teacher": (maps.teacher, maps.truth),
        # uncovered pixels are not counted; any valid class will do
        "refined": (np.where(maps.covered, maps.refined, np.uint8(0)), truth_where_refined),
        "teacher-where-refined": (maps.teacher, truth_where_refined),
        "student": (maps.student, maps.truth),
    }
    for name, (prediction, label) in pairs.items():
        try:
            matrices[name].update(torch.from_numpy(prediction), torch.from_numpy(label))
        except ValueError as error:
            raise ValueError(f"{record.image}: {error}") from error


def _panel(maps: _LabelMaps, label_space: LabelSpace, title: str) -> UInt8Array:
    """Image with point prompts; labels of teacher, refiner and student; true label if known."""
    label_maps = {"teacher": maps.teacher, "refined": maps.refined, "student": maps.student}
    if maps.truth is not None:
        label_maps["true label"] = maps.truth
    tiles = [
        Tile("clean image", maps.image)
        if maps.points is None
        else Tile("clean image, points", draw_points(maps.image, maps.points))
    ]
    tiles += [Tile(name, label_space.colorize(label)) for name, label in label_maps.items()]
    legend = legend_of(label_space, present_ids(label_maps.values()))
    return side_by_side(tiles, title=title, legend=legend, tile_width=360)


def _to_array(label_map: Tensor) -> UInt8Array:
    return label_map.cpu().numpy().astype(np.uint8)
