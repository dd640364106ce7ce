"""What is in the label files of a dataset: pixels and images per class, and labels of no use."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import numpy.typing as npt

from clouds.data.datasets import DatasetSpec, Listing
from clouds.data.label_space import LabelSpace
from clouds.data.labels import MAX_RAW_ID, LabelFormat, RawLabel, read_label
from clouds.data.structures import Record
from clouds.messages import format_examples

logger = logging.getLogger(__name__)

SAMPLE = 50  # labels that are read before training and evaluation
_THREADS = 4

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LabelCounts:
    """Content of one label file.

    Attributes:
        record: the image and its label.
        raw: (MAX_RAW_ID + 1,) number of pixels of each raw id.
        pixels: (256,) number of pixels of each train id.
    """

    record: Record
    raw: Counts
    pixels: Counts

    @classmethod
    def of(cls, record: Record, raw: RawLabel) -> LabelCounts | None:
        """Counts of the raw ids (H, W) of a label; None if it has undefined ones."""
        assert record.label_format is not None  # checked by Record
        ids = record.label_format.ids
        if ids.unknown_ids(raw):
            return None
        counts = np.bincount(raw.ravel(), minlength=MAX_RAW_ID + 1)  # defined ids are no greater
        train_ids = ids.apply(np.arange(MAX_RAW_ID + 1, dtype=np.uint16)[None])[0]
        pixels = np.bincount(train_ids, counts, minlength=256).astype(np.int64)
        return cls(record, counts, pixels)


@dataclass
class LabelStatistics:
    """Counts over label files.

    Attributes:
        label_space: of the train ids.
        num_labels: number of files.
        pixels: (C,) pixels of each class.
        images: (C,) files in which each class occurs.
        num_pixels: pixels of all files, ignored ones included.
        without_class: files of which every pixel is ignored, as text.
        raw: (MAX_RAW_ID + 1,) pixels of each raw id, by the suffix of their format.
        formats: the formats, by suffix.
    """

    label_space: LabelSpace
    num_labels: int = 0
    num_pixels: int = 0
    without_class: list[str] = field(default_factory=list)
    raw: dict[str, Counts] = field(default_factory=dict)
    formats: dict[str, LabelFormat] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pixels: Counts = np.zeros(self.label_space.num_classes, np.int64)
        self.images: Counts = np.zeros(self.label_space.num_classes, np.int64)

    def add(self, counts: LabelCounts) -> None:
        """Add a file."""
        pixels = counts.pixels[: self.label_space.num_classes]
        self.num_labels += 1
        self.num_pixels += int(counts.pixels.sum())
        self.pixels += pixels
        self.images += pixels > 0
        if not pixels.any():
            self.without_class.append(str(counts.record.label))
        label_format = counts.record.label_format
        assert label_format is not None  # checked by Record
        self.formats[label_format.suffix] = label_format
        self.raw[label_format.suffix] = counts.raw + self.raw.get(label_format.suffix, 0)

    def has_no_class(self) -> bool:
        """Whether there are files, and every pixel of all of them is ignored."""
        return 0 < self.num_labels == len(self.without_class)

    def errors(self, complete: bool) -> list[str]:
        """What makes the labels useless, a sentence each; `complete`: all labels were added."""
        found = [text for is_error, text in self._train_ids() if is_error]
        if self.has_no_class() and complete:
            found.append(
                f"all {self.num_labels} labels have ignored pixels only, such as "
                f"{format_examples(self.without_class, 3)}. Are they labels of this dataset?"
            )
        return found

    def warnings(self, complete: bool) -> list[str]:
        """What may be wrong with the labels, or is of no use; `complete` as of `errors`."""
        found = [text for is_error, text in self._train_ids() if not is_error]
        if self.without_class and not (self.has_no_class() and complete):
            found.append(
                f"{len(self.without_class)} of {self.num_labels} opened labels have ignored pixels "
                f"only: {format_examples(self.without_class, 3)}."
            )
        return found

    def _train_ids(self) -> Iterator[tuple[bool, str]]:
        """Formats whose files seem to contain train ids: whether this is certain, and a sentence.

        It is asked of formats most of whose classes have ids that are no train ids. Certain: half
        of the train ids occur and no other id.
        """
        num_classes = self.label_space.num_classes
        for suffix, label_format in self.formats.items():
            raw_ids = [raw for raws in label_format.ids.raw_ids.values() for raw in raws]
            others = [raw for raw in raw_ids if raw >= num_classes]
            present = np.flatnonzero(self.raw[suffix][:255])
            if 2 * len(others) <= len(raw_ids) or len(present) < 2 or present[-1] >= num_classes:
                continue
            is_certain = 2 * len(present) >= num_classes
            yield (
                is_certain,
                f"the labels *{suffix} {'contain' if is_certain else 'may contain'} train ids: no "
                f"id is above {present[-1]}, but most classes of the {label_format.ids.name} are "
                f"above {num_classes - 1}. Labels that were converted to train ids must be named "
                "*_labelTrainIds.png"
                + (f" (opened: {self.num_labels})." if is_certain else "; otherwise ignore this."),
            )


def spread(records: Sequence[Record], count: int | None) -> Sequence[Record]:
    """`count` of them (None: all), from the first to the last in even steps."""
    if count is None or count >= len(records):
        return records
    return [records[i * (len(records) - 1) // max(1, count - 1)] for i in range(count)]


_checked: dict[tuple[str, bool], Listing] = {}
"""Listing of each dataset whose labels have been checked, by its name and `need_class`."""


def check_labels(dataset: DatasetSpec, need_class: bool, num_labels: int = SAMPLE) -> None:
    """Read some labels of a dataset and log what may be wrong; once per listing.

    Labels that cannot be read, or have undefined ids, are no part of it: reading them in training
    or evaluation names them.

    Args:
        dataset: its records exist.
        need_class: labels without any class are an error, otherwise a warning. For the error, all
            labels are read if no sampled one has a class.
        num_labels: number of labels to read, spread evenly over the dataset.

    Raises:
        ValueError: see `need_class`; or the labels contain train ids where others are expected.
    """
    listing = dataset.listing()
    if _checked.get((dataset.name, need_class)) is listing:
        return
    labeled = [record for record in listing.records if record.label is not None]
    statistics = LabelStatistics(dataset.label_space)
    sample = spread(labeled, num_labels)
    for counts in read_counts(sample):
        statistics.add(counts)
    if need_class and statistics.has_no_class() and len(sample) < len(labeled):
        logger.info("%s: none of %d labels has a class; reading all", dataset.name, len(sample))
        names = {record.image for record in sample}
        for counts in read_counts(record for record in labeled if record.image not in names):
            statistics.add(counts)
            if not statistics.has_no_class():
                break
    errors = statistics.errors(complete=need_class)
    if errors:
        raise ValueError("\n".join(f"dataset {dataset.name}: {error}" for error in errors))
    for warning in statistics.warnings(complete=need_class):
        logger.warning("%s: %s", dataset.name, warning)
    _checked[dataset.name, need_class] = listing


def read_counts(records: Iterable[Record]) -> Iterator[LabelCounts]:
    """Counts of the labels that can be read, in order, a few in memory at a time."""
    records = iter(records)
    with ThreadPoolExecutor(_THREADS) as pool:
        while block := list(islice(records, 4 * _THREADS)):
            yield from (counts for counts in pool.map(_counts, block) if counts is not None)


def _counts(record: Record) -> LabelCounts | None:
    assert record.label is not None and record.label_format is not None
    try:
        raw = read_label(record.label, record.label_format)
    except (OSError, ValueError) as error:
        logger.debug("%s is not counted: %s", record.label, error)
        return None
    return LabelCounts.of(record, raw)
