"""Training samples of records: mapping, replacement of faulty files, sampling and mixing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from clouds.data.class_mixing import draw_source, mix_classes
from clouds.data.faults import Fault, Loaded
from clouds.data.loader import SampleDataset
from clouds.data.rare_class_sampling import RareClassSampling
from clouds.data.structures import (
    Domain,
    Draw,
    PartlyLabelledSample,
    Record,
    TrainSample,
    sample_rng,
)

SampleIndex = tuple[int, int]
"""Index of an image, and the seed of this sample of it."""

TrainMapper = Callable[[Record, int], TrainSample]
"""Record and seed -> sample."""


@dataclass(frozen=True)
class TrainingDataset(SampleDataset):
    """Maps indices of `records` and seeds to samples, by the mapper of a record's domain.

    Attributes:
        records: all images.
        mappers: by domain.
        max_faulty: number of faulty files that are skipped; None: the first one is an error.
        partly_labelled: names of datasets whose samples get `partly_labelled`.
        rare_classes: draws other images of labelled datasets; None: those of the index are taken.
        mixed_sources: labelled images, one of which is mixed into each generated one; empty: none.
    """

    records: Sequence[Record]
    mappers: Mapping[Domain, TrainMapper]
    max_faulty: int | None = None
    partly_labelled: frozenset[str] = frozenset()
    rare_classes: RareClassSampling | None = None
    mixed_sources: Sequence[Record] = ()

    def __getitem__(self, index: SampleIndex) -> Loaded:
        image, seed = index
        record = self.records[image]
        loaded = self._load(record, seed)
        if loaded.sample is None or not self.mixed_sources or record.domain is Domain.SOURCE:
            return loaded
        source = self._load(*draw_source(self.mixed_sources, seed))
        faults = (*loaded.faults, *source.faults)
        if source.sample is None:
            return Loaded(None, faults)
        return Loaded(mix_classes(loaded.sample, source.sample), faults)

    def _load(self, record: Record, seed: int) -> Loaded:
        faults: list[Fault] = []
        if self.rare_classes is not None:
            record = self.rare_classes.draw(record, seed)
        for choice in self._choices(record, seed):
            try:
                return Loaded(self._sample(choice, seed), tuple(faults))
            except Exception as error:
                faults.append(Fault.of(choice.image, choice.dataset, error))
                if not faults[-1].of_file:
                    break
        return Loaded(None, tuple(faults))

    def _sample(self, record: Record, seed: int) -> TrainSample:
        sample = self.mappers[record.domain](record, seed)
        if record.dataset not in self.partly_labelled:
            return sample
        return cast("PartlyLabelledSample", {**sample, "partly_labelled": True})

    def _choices(self, record: Record, seed: int) -> Iterator[Record]:
        """`record`, and those that replace it if it is faulty: of the same dataset, by the seed."""
        yield record
        if self.max_faulty is None:
            return
        others = [r for r in self.records if r.dataset == record.dataset and r != record]
        rng = sample_rng(seed, Draw.REPLACEMENT)
        # with one more than are allowed, the limit is exceeded in any case
        yield from (others[i] for i in rng.permutation(len(others))[: self.max_faulty])

    def file_of(self, index: SampleIndex) -> str:
        return str(self.records[index[0]].image)
