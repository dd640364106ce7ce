"""The endless training loader and the test loader.

A training batch is a function of the config and the number of the batch alone: it does not depend
on the number of worker processes or ranks, nor on where a run was interrupted. Position p of the
stream is position p % L of epoch p // L, where L is the length of an epoch. The order of an epoch
is given by SEED and the epoch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Sampler

from clouds.data.dataset_mapper import (
    EvaluationMapper,
    GeneratedMapper,
    Prepare,
    SourceMapper,
    check_given_labels,
    trains_on_given_labels,
)
from clouds.data.datasets import Datasets, DatasetSpec
from clouds.data.faults import REPORT, Fault, FaultLog, Loaded
from clouds.data.held_out import split
from clouds.data.label_statistics import check_labels
from clouds.data.loader import SampleDataset, SampleLoader
from clouds.data.rare_class_sampling import RareClassSampling, build_rare_class_sampling
from clouds.data.structures import Domain, Record, TrainSample
from clouds.data.training_dataset import SampleIndex, TrainingDataset, TrainMapper

if TYPE_CHECKING:
    from clouds.d2 import CfgNode

logger = logging.getLogger(__name__)

IndexArray = npt.NDArray[np.int64]


def sample_seed(seed: int, epoch: int, number: int) -> int:
    """The seed of sample `number` of an epoch before shuffling, in [0, 2**63)."""
    words = np.random.SeedSequence([seed, epoch, number]).generate_state(1, np.uint64)
    return int(words[0]) >> 1


@dataclass(frozen=True)
class DatasetWeight:
    """Share of one dataset in an epoch.

    Attributes:
        num_images: number of its images, at least 1.
        factor: mean number of samples of an image in an epoch, greater than 0.
    """

    num_images: int
    factor: float = 1.0

    @property
    def num_samples(self) -> int:
        """Number of its samples in every epoch."""
        return max(1, round(self.factor * self.num_images))

    def draw_images(self, rng: np.random.Generator) -> IndexArray:
        """(num_samples,): the image of each sample.

        Each image occurs floor(factor) times; the remaining samples are of random images, drawn
        without replacement.
        """
        repeated = np.tile(np.arange(self.num_images), floor(self.factor))
        remaining = self.num_samples - len(repeated)
        return np.concatenate([repeated, rng.choice(self.num_images, remaining, replace=False)])


@dataclass(frozen=True)
class WeightedMixture:
    """Composition of an epoch from several datasets.

    Attributes:
        weights: one per dataset. Images and samples are numbered through all of them, in order.
        seed: SEED of the config.
    """

    weights: tuple[DatasetWeight, ...]
    seed: int

    @property
    def epoch_length(self) -> int:
        """Number of samples in an epoch."""
        return sum(weight.num_samples for weight in self.weights)

    def epoch_samples(self, epoch: int) -> tuple[IndexArray, IndexArray]:
        """The samples of an epoch in shuffled order.

        Returns:
            (epoch_length,) number of each sample before shuffling, and index of its image.
        """
        images, first = [], 0
        for number, weight in enumerate(self.weights):
            # a spawn key, because a third word of entropy is the number of a sample
            source = np.random.SeedSequence([self.seed, epoch], spawn_key=(number,))
            images.append(first + weight.draw_images(np.random.default_rng(source)))
            first += weight.num_images
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, epoch]))
        order = rng.permutation(self.epoch_length)
        return order, np.concatenate(images)[order]


@dataclass(frozen=True)
class WeightedTrainingSampler(Sampler[list[SampleIndex]]):
    """Endless sampler of one rank's share of each batch.

    The global batch i is positions i * batch_size to (i + 1) * batch_size of the stream; rank r
    of W takes the r-th of W equal runs of it, so that the shares of the ranks, one after the
    other, are the batch of a single process. `start` is the number of the first batch.
    """

    mixture: WeightedMixture
    batch_size: int
    start: int = 0
    rank: int = 0
    world_size: int = 1

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        epoch, length = -1, self.mixture.epoch_length
        numbers = images = np.empty(0, np.int64)
        share = self.batch_size // self.world_size
        for batch in count(self.start):
            first = batch * self.batch_size + self.rank * share
            indices = []
            for position in range(first, first + share):
                if position // length != epoch:
                    epoch = position // length
                    numbers, images = self.mixture.epoch_samples(epoch)
                i = position % length
                seed = sample_seed(self.mixture.seed, epoch, int(numbers[i]))
                indices.append((int(images[i]), seed))
            yield indices


def check_batch_size(batch_size: int, world_size: int, accumulate: int = 1) -> None:
    """Raise ValueError if processes, or the parts of SOLVER.ACCUMULATE, cannot share it evenly."""
    if batch_size % world_size:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {batch_size}, which {world_size} processes cannot share "
            f"evenly; choose a multiple of {world_size}"
        )
    share = batch_size // world_size
    if share % accumulate:
        raise ValueError(
            f"SOLVER.ACCUMULATE is {accumulate}, but each process has {share} images of a batch "
            f"(SOLVER.IMS_PER_BATCH {batch_size}), which is no multiple of it; choose a divisor of "
            f"{share}"
        )


def build_train_loader(
    cfg: CfgNode,
    start_iteration: int = 0,
    rank: int = 0,
    world_size: int = 1,
    mappers: Mapping[Domain, TrainMapper] | None = None,
) -> Iterable[list[TrainSample]]:
    """The endless training loader of one rank.

    Args:
        cfg: DATASETS.TRAIN and its factors, INPUT, SEED, SOLVER.IMS_PER_BATCH and DATALOADER are
            used.
        start_iteration: number of the first batch; the ones before it are not read.
        rank, world_size: number of this process, and of all.
        mappers: replace the mapper of a domain, for example to add augmentations; see
            `dataset_mapper`.

    Returns:
        An iterable over lists of IMS_PER_BATCH / world_size samples. A batch may contain source
        images only, or generated ones only. With DATALOADER.FAULTY skip, a faulty file is
        replaced by one of the same dataset, chosen by the sample's seed, and reported in
        OUTPUT_DIR/faulty_files.json. Iterating raises as `SampleLoader`.

    Raises:
        FileNotFoundError: a dataset, or its folder of images or labels, does not exist.
        ValueError: no dataset, an unknown one or one that is not for training, generated images
            without a source or different from their manifest, no image, an image without label,
            or a batch that cannot be shared evenly.
    """
    batch_size = cfg.SOLVER.IMS_PER_BATCH
    check_batch_size(batch_size, world_size)
    domains = dict.fromkeys((Domain.SOURCE, Domain.GENERATED, *(mappers or {})))
    datasets = _training_datasets(cfg, domains)
    records = [_training_records(dataset, cfg) for dataset in datasets]
    rare_classes = build_rare_class_sampling(cfg, datasets, records)
    all_records = [record for images in records for record in images]
    factors = zip(records, _factors(cfg, datasets), strict=True)
    weights = tuple(DatasetWeight(len(images), factor) for images, factor in factors)
    _log_mixture(datasets, weights)
    _log_classes(datasets)
    mixture = WeightedMixture(weights, cfg.SEED)
    max_faulty = cfg.DATALOADER.MAX_FAULTY if cfg.DATALOADER.FAULTY == "skip" else None
    return SampleLoader(
        TrainingDataset(
            all_records,
            _mappers(cfg, rare_classes, mappers or {}),
            max_faulty,
            partly_labelled(datasets, trains_on_given_labels(cfg)),
            rare_classes,
            [r for r in all_records if r.domain is Domain.SOURCE and cfg.INPUT.CLASS_MIXING],
        ),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        timeout=cfg.DATALOADER.TIMEOUT,
        fault_log=_fault_log(cfg, max_faulty, start_iteration > 0),
        first_batch=start_iteration,
        batch_sampler=WeightedTrainingSampler(
            mixture, batch_size, start_iteration, rank, world_size
        ),
        pin_memory=torch.cuda.is_available() and cfg.MODEL.DEVICE != "cpu",
    )


def _mappers(
    cfg: CfgNode,
    rare_classes: RareClassSampling | None,
    replacements: Mapping[Domain, TrainMapper],
) -> dict[Domain, TrainMapper]:
    return {
        Domain.SOURCE: SourceMapper.from_config(cfg, rare_classes),
        Domain.GENERATED: GeneratedMapper.from_config(cfg),
        **replacements,
    }


def partly_labelled(datasets: Sequence[DatasetSpec], given: bool = False) -> frozenset[str]:
    """Names of the labelled datasets that lack a class which another of `datasets` labels.

    In their images, unlabelled pixels may be of such a class. It is empty for one dataset.
    Generated datasets are labelled ones if they are trained on `given` labels.
    """
    labelled = [d for d in datasets if given or d.domain is Domain.SOURCE]
    classes = {c for d in labelled for c in d.classes_present}
    return frozenset(d.name for d in labelled if classes - set(d.classes_present))


def _fault_log(cfg: CfgNode, max_faulty: int | None, resumed: bool) -> FaultLog | None:
    if max_faulty is None:
        return None
    return FaultLog(Path(cfg.OUTPUT_DIR, REPORT), max_faulty, resumed)


def check_training_data(cfg: CfgNode) -> None:
    """Raise what `build_train_loader` and `check_labels` raise about DATASETS.TRAIN."""
    domains = dict.fromkeys((Domain.SOURCE, Domain.GENERATED))
    given = trains_on_given_labels(cfg)
    for dataset in _training_datasets(cfg, domains):
        _training_records(dataset, cfg)
        if dataset.domain is Domain.SOURCE or given:
            check_labels(dataset, need_class=True)


def _training_datasets(
    cfg: CfgNode, mappers: Mapping[Domain, TrainMapper | None]
) -> list[DatasetSpec]:
    known, names = Datasets.from_config(cfg), cfg.DATASETS.TRAIN
    datasets = [known.get(name) for name in names]
    if not datasets:
        raise ValueError("DATASETS.TRAIN is empty: name at least one dataset to train on")
    for dataset in datasets:
        if dataset.domain not in mappers:
            raise ValueError(
                f"DATASETS.TRAIN contains {dataset.name}, a {dataset.domain.value} dataset; "
                f"training uses {' and '.join(domain.value for domain in mappers)} datasets"
            )
    if all(dataset.domain is Domain.GENERATED for dataset in datasets):
        raise ValueError(
            f"DATASETS.TRAIN contains generated images only: {', '.join(names)}. They have no "
            "labels; add the labelled source that the warm-up was trained on, such as gta5"
        )
    return datasets


def _training_records(dataset: DatasetSpec, cfg: CfgNode) -> list[Record]:
    records = dataset.records()
    if not records:
        raise ValueError(f"there is no image to train on in {dataset.name}")
    check_given_labels(records, trains_on_given_labels(cfg))
    if dataset.domain is Domain.SOURCE:
        records, held_out = split(records, cfg.DATASETS.SOURCE_VAL_FRACTION, dataset.name)
        if held_out:
            logger.info("%s: %d images are held out", dataset.name, len(held_out))
    listing = dataset.listing()
    gaps = dataset.manifest_gaps(listing)
    if gaps:
        raise ValueError("\n".join(f"dataset {dataset.name}: {gap}" for gap in gaps))
    if dataset.manifest and listing.manifest is None:
        logger.info(
            "%s has no %s: its %d images are used without checks",
            dataset.name,
            dataset.root.absolute() / dataset.manifest,
            len(records),
        )
    return records


def _factors(cfg: CfgNode, datasets: Sequence[DatasetSpec]) -> list[float]:
    if cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler":
        return [1.0] * len(datasets)
    if cfg.DATASETS.FACTORS:
        return list(cfg.DATASETS.FACTORS)
    factors = {
        Domain.SOURCE: cfg.DATASETS.SOURCE_FACTOR,
        Domain.GENERATED: cfg.DATASETS.TARGET_FACTOR,
    }
    return [factors[dataset.domain] for dataset in datasets]


def _log_mixture(datasets: Sequence[DatasetSpec], weights: Sequence[DatasetWeight]) -> None:
    """Log the composition of an epoch of several datasets."""
    if len(datasets) == 1:
        return
    total = sum(weight.num_samples for weight in weights)
    shares = [
        f"{dataset.name} {weight.num_samples} ({weight.num_samples / total:.1%}) from "
        f"{weight.num_images} images"
        for dataset, weight in zip(datasets, weights, strict=True)
    ]
    logger.info("an epoch has %d samples: %s", total, ", ".join(shares))


def _log_classes(datasets: Sequence[DatasetSpec]) -> None:
    """Log the classes whose pixels do not count, and those that no dataset labels."""
    labelled = [dataset for dataset in datasets if dataset.domain is Domain.SOURCE]
    for dataset in labelled:
        if dataset.unmapped_classes:
            logger.warning(
                "%s: pixels of the classes %s do not count, since the training label space %s does "
                "not have them (DATASETS.CLASS_MAP gives them another name)",
                dataset.name,
                ", ".join(dataset.unmapped_classes),
                dataset.label_space.name,
            )
    present = {c for dataset in labelled for c in dataset.classes_present}
    names = labelled[0].label_space.names
    absent = [name for c, name in enumerate(names) if c not in present]
    if absent:
        sources = ", ".join(dataset.name for dataset in labelled)
        logger.warning("no image of %s has a label of: %s", sources, ", ".join(absent))


@dataclass(frozen=True)
class RecordDataset(SampleDataset):
    """Evaluation samples of a list of records."""

    records: Sequence[Record]
    mapper: EvaluationMapper

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Loaded:
        record = self.records[index]
        try:
            return Loaded(self.mapper(record))
        except Exception as error:
            return Loaded(None, (Fault.of(record.image, record.dataset, error),))

    def file_of(self, index: int) -> str:
        return str(self.records[index].image)


def build_test_loader(
    dataset: DatasetSpec,
    prepare: Prepare,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    timeout: float = 0,
    records: Sequence[Record] | None = None,
) -> SampleLoader:
    """One rank's share of a dataset, one sample at a time, in order.

    Rank r of W gets images r, r + W, r + 2W, ...; every image goes to exactly one rank.

    Args:
        dataset: the evaluated dataset.
        prepare: preparation of the evaluation protocol. It must be picklable when there are
            workers and the platform does not fork.
        num_workers: number of loader processes; 0: load in this process.
        rank, world_size: number of this process, and of all.
        timeout: seconds to wait for a worker's next sample; 0: without limit.
        records: its images to evaluate on; None: all.

    Returns:
        An iterable over `EvalSample`; iterating raises as `SampleLoader`.

    Raises:
        FileNotFoundError, ValueError: as `DatasetSpec.records`.
    """
    share = (dataset.records() if records is None else records)[rank::world_size]
    return SampleLoader(
        RecordDataset(share, EvaluationMapper(prepare)),
        batch_size=None,
        # an empty share needs no worker
        num_workers=min(num_workers, len(share)),
        timeout=timeout,
        persistent=False,
    )
