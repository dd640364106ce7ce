"""Rare-class sampling of labelled images.

Hoyer et al., DAFormer: Improving Network Architectures and Training Strategies for Domain-Adaptive
Semantic Segmentation, CVPR 2022, section 3.3.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from clouds import comm
from clouds.data.datasets import DatasetSpec
from clouds.data.label_statistics import read_counts
from clouds.data.structures import Domain, Draw, Record, sample_rng
from clouds.files import atomic_write

if TYPE_CHECKING:
    from clouds.d2 import CfgNode

logger = logging.getLogger(__name__)

MAX_CROPS = 10
"""Crops that are drawn until one has enough pixels of the class; the last is taken in any case."""

PixelCounts = npt.NDArray[np.int64]
"""(N, C), pixels of each class in each of N labels."""


def class_probabilities(
    pixels: npt.NDArray[np.int64], temperature: float
) -> npt.NDArray[np.float64]:
    """Probabilities of classes: the softmax of (1 - f) / temperature, f the share of the pixels.

    pixels: (K,).
    """
    logits = (1 - pixels / pixels.sum()) / temperature
    weights = np.exp(logits - logits.max())
    probabilities: npt.NDArray[np.float64] = weights / weights.sum()
    return probabilities


@dataclass(frozen=True)
class RareClasses:
    """What is drawn from one dataset.

    Attributes:
        records: its images.
        classes: K train ids.
        probabilities: (K,), of the classes.
        images: per class, indices of the records that have enough pixels of it.
    """

    records: Sequence[Record]
    classes: tuple[int, ...]
    probabilities: npt.NDArray[np.float64]
    images: tuple[npt.NDArray[np.int64], ...]

    @classmethod
    def from_counts(
        cls, records: Sequence[Record], counts: PixelCounts, temperature: float, min_pixels: int
    ) -> RareClasses:
        """Classes that no image has `min_pixels` pixels of are not drawn.

        Raises:
            ValueError: there is no class left.
        """
        enough = counts >= min_pixels
        classes = np.flatnonzero(enough.any(0))
        if not len(classes):
            raise ValueError(
                f"no image of {records[0].dataset} has {min_pixels} pixels of a class, the number "
                "in DATASETS.RARE_CLASS_SAMPLING.MIN_PIXELS; the most are "
                f"{counts.max(initial=0)}. Set it lower."
            )
        return cls(
            records,
            tuple(int(c) for c in classes),
            class_probabilities(counts.sum(0)[classes], temperature),
            tuple(np.flatnonzero(enough[:, c]) for c in classes),
        )


@dataclass(frozen=True)
class RareClassSampling:
    """Draws a class, and then an image that has it, for each sample of a labelled dataset.

    Attributes:
        datasets: by name.
        min_crop_pixels: pixels of the class that a crop should have.
    """

    datasets: Mapping[str, RareClasses]
    min_crop_pixels: float

    def draw(self, record: Record, seed: int) -> Record:
        """The record in place of `record`, of the same dataset; itself if it is not labelled."""
        if record.domain is not Domain.SOURCE:
            return record
        dataset, index, rng = self._draw(record.dataset, seed)
        images = dataset.images[index]
        return dataset.records[int(images[rng.integers(len(images))])]

    def draw_class(self, dataset: str, seed: int) -> int:
        """The train id that `draw` chooses the image by."""
        classes, index, _ = self._draw(dataset, seed)
        return classes.classes[index]

    def _draw(self, dataset: str, seed: int) -> tuple[RareClasses, int, np.random.Generator]:
        """A dataset, the index of the class that is drawn, and the generator that drew it."""
        classes, rng = self.datasets[dataset], sample_rng(seed, Draw.RARE_CLASS)
        return classes, int(rng.choice(len(classes.classes), p=classes.probabilities)), rng


def build_rare_class_sampling(
    cfg: CfgNode, datasets: Sequence[DatasetSpec], records: Sequence[Sequence[Record]]
) -> RareClassSampling | None:
    """By DATASETS.RARE_CLASS_SAMPLING; None if it is off. A collective operation.

    The pixels of the classes in all labels are counted once, and kept in
    OUTPUT_DIR/class_statistics_<dataset>.json.

    Args:
        cfg: the config.
        datasets: of DATASETS.TRAIN.
        records: of each.

    Raises:
        ValueError: see `RareClasses.from_counts`.
    """
    node = cfg.DATASETS.RARE_CLASS_SAMPLING
    if not node.ENABLED:
        return None
    classes = {}
    for dataset, images in zip(datasets, records, strict=True):
        if dataset.domain is not Domain.SOURCE:
            continue
        file = Path(cfg.OUTPUT_DIR, f"class_statistics_{dataset.name}.json")
        counts = count_pixels(images, dataset.label_space.num_classes, file)
        rare = RareClasses.from_counts(images, counts, node.TEMPERATURE, node.MIN_PIXELS)
        _log(dataset, rare)
        classes[dataset.name] = rare
    return RareClassSampling(classes, node.MIN_CROP_RATIO * node.MIN_PIXELS)


def _log(dataset: DatasetSpec, rare: RareClasses) -> None:
    shares = [
        f"{dataset.label_space.names[c]} {share:.1%} ({len(images)} images)"
        for c, share, images in zip(rare.classes, rare.probabilities, rare.images, strict=True)
    ]
    logger.info("%s: rare-class sampling draws %s", dataset.name, ", ".join(shares))


def count_pixels(records: Sequence[Record], num_classes: int, file: Path) -> PixelCounts:
    """Pixels of each class in each label: from `file` if it is about these labels, else counted.

    Every process must call it; they share the labels. A label that cannot be read has none.
    """
    key = _key(records, num_classes)
    cached = comm.all_gather(_read_file(file, key) if comm.is_main_process() else None)[0]
    if cached is not None:
        return cached
    logger.info("counting the pixels of each class in %d labels", len(records))
    share = records[comm.get_rank() :: comm.get_world_size()]
    found = {c.record.image: c.pixels[:num_classes] for c in read_counts(share)}
    everywhere = {k: v for part in comm.all_gather(found) for k, v in part.items()}
    nothing = np.zeros(num_classes, np.int64)
    counts = np.stack([everywhere.get(record.image, nothing) for record in records])
    if comm.is_main_process():
        with atomic_write(file, "w") as stream:
            json.dump({"labels": key, "pixels": counts.tolist()}, stream)
    return counts


def _key(records: Sequence[Record], num_classes: int) -> str:
    """Hash of what the counts follow from: the label files and their ids."""
    digest = hashlib.sha256(str(num_classes).encode())
    for record in records:
        assert record.label is not None and record.label_format is not None
        status = record.label.stat()
        ids = sorted(record.label_format.ids.raw_ids.items())
        digest.update(f"{record.label}\0{status.st_size}\0{status.st_mtime_ns}\0{ids}\n".encode())
    return digest.hexdigest()


def _read_file(file: Path, key: str) -> PixelCounts | None:
    """The counts in `file`; None if there is none, or it is damaged or about other labels."""
    try:
        content = json.loads(file.read_text())
        counts = np.array(content["pixels"], np.int64)
        matches = content["labels"] == key
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged and counted anew: %s", file, error)
        return None
    return counts if matches else None
