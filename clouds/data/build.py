"""The endless training stream and the test loader.

What a training batch holds is a function of the config and the batch's number alone: neither the
number of worker processes, nor the number of ranks, nor where a run was broken off has a part in
it. Position p of the stream is slot p % P of epoch p // P. An epoch has P places, for each dataset
its factor times as many as it has pictures, in an order that SEED and the epoch give; the sample's
own seed comes from SEED, epoch and place. Where all factors are 1, places are pictures.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from clouds.data.dataset_mapper import EvaluationMapper, GeneratedMapper, Prepare, SourceMapper
from clouds.data.datasets import DatasetSpec, get_dataset
from clouds.data.structures import Domain, EvalSample, Record, TrainSample

if TYPE_CHECKING:
    from clouds.d2 import CfgNode

logger = logging.getLogger(__name__)

IndexArray = npt.NDArray[np.int64]

Visit = tuple[int, int]
"""Index of a picture, and the seed of this visit to it."""

TrainMapper = Callable[[Record, int], TrainSample]
"""Record and seed -> sample."""


def sample_seed(seed: int, epoch: int, place: int) -> int:
    """The seed of the visit at one place of an epoch, in [0, 2**63)."""
    words = np.random.SeedSequence([seed, epoch, place]).generate_state(1, np.uint64)
    return int(words[0]) >> 1


@dataclass(frozen=True)
class Part:
    """One dataset's part in an epoch.

    Attributes:
        size: number of its pictures, at least 1.
        factor: how often a picture comes up in an epoch, on average, greater than 0.
    """

    size: int
    factor: float = 1.0

    @property
    def places(self) -> int:
        """How many places of an epoch are its own: the same number in every epoch."""
        return max(1, round(self.factor * self.size))

    def pictures(self, rng: np.random.Generator) -> IndexArray:
        """(places,): which picture is at which place.

        Each has floor(factor) places; as many as are left over go to pictures drawn anew.
        """
        everyone = np.tile(np.arange(self.size), floor(self.factor))
        more = rng.choice(self.size, self.places - len(everyone), replace=False)
        return np.concatenate([everyone, more])


@dataclass(frozen=True)
class Mixture:
    """How the pictures of several datasets make up an epoch.

    Attributes:
        parts: the datasets'; pictures and places are numbered through all of them, in order.
        seed: SEED of the config.
    """

    parts: tuple[Part, ...]
    seed: int

    @property
    def places(self) -> int:
        """The length of an epoch."""
        return sum(part.places for part in self.parts)

    def visits(self, epoch: int) -> tuple[IndexArray, IndexArray]:
        """The epoch's places in the order in which they are visited, and the picture at each."""
        pictures, first = [], 0
        for number, part in enumerate(self.parts):
            # a spawn key, because a third word of entropy is a place's seed
            source = np.random.SeedSequence([self.seed, epoch], spawn_key=(number,))
            pictures.append(first + part.pictures(np.random.default_rng(source)))
            first += part.size
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, epoch]))
        order = rng.permutation(self.places)
        return order, np.concatenate(pictures)[order]


class VisitSampler(Sampler[list[Visit]]):
    """Yields one rank's visits of batch after batch, without end.

    The global batch i is positions i * batch_size to (i + 1) * batch_size of the stream; rank r
    of W takes the r-th of W equal runs of it, so that the ranks' shares, one after the other,
    are the batch that a single process takes.
    """

    def __init__(
        self,
        mixture: Mixture,
        batch_size: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`start`: number of the first batch."""
        self.mixture = mixture
        self.batch_size = batch_size
        self.start = start
        self.share = batch_size // world_size
        self.offset = rank * self.share

    def __iter__(self) -> Iterator[list[Visit]]:
        epoch, length = -1, self.mixture.places
        places = pictures = np.empty(0, np.int64)
        batch = self.start
        while True:
            first = batch * self.batch_size + self.offset
            visits = []
            for position in range(first, first + self.share):
                if position // length != epoch:
                    epoch = position // length
                    places, pictures = self.mixture.visits(epoch)
                slot = position % length
                seed = sample_seed(self.mixture.seed, epoch, int(places[slot]))
                visits.append((int(pictures[slot]), seed))
            yield visits
            batch += 1


@dataclass(frozen=True)
class VisitDataset(Dataset[TrainSample]):
    """Visits to samples.

    Attributes:
        records: all pictures to train on.
        mappers: what makes a sample of a record, by the record's domain.
    """

    records: Sequence[Record]
    mappers: Mapping[Domain, TrainMapper]

    def __getitem__(self, visit: Visit) -> TrainSample:
        index, seed = visit
        record = self.records[index]
        return self.mappers[record.domain](record, seed)


def build_train_loader(
    cfg: CfgNode, start_iteration: int = 0, rank: int = 0, world_size: int = 1
) -> Iterable[list[TrainSample]]:
    """The endless stream of one rank's training batches.

    Args:
        cfg: DATASETS.TRAIN and its factors, INPUT, SEED, SOLVER.IMS_PER_BATCH and DATALOADER
            count.
        start_iteration: number of the first batch; the ones before it are not read.
        rank: number of this process.
        world_size: how many processes there are.

    Returns:
        An iterable over lists of IMS_PER_BATCH / world_size samples. A batch may hold source
        images only, or generated ones only.

    Raises:
        FileNotFoundError: a dataset, or half of it, is not there.
        ValueError: no dataset or one unknown, one that is not for training, generated images
            without a source or unlike their manifest, no image, an image without label, or a
            batch that cannot be shared out evenly.
    """
    batch_size = cfg.SOLVER.IMS_PER_BATCH
    if batch_size % world_size:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {batch_size}, which {world_size} processes cannot share "
            f"evenly; take a multiple of {world_size}"
        )
    mappers: dict[Domain, TrainMapper] = {
        Domain.SOURCE: SourceMapper.from_config(cfg),
        Domain.GENERATED: GeneratedMapper.from_config(cfg),
    }
    datasets = _training_datasets(cfg.DATASETS.TRAIN, mappers)
    records = [_training_records(dataset) for dataset in datasets]
    parts = [
        Part(len(pictures), factor)
        for pictures, factor in zip(records, _factors(cfg, datasets), strict=True)
    ]
    _log_mixture(datasets, parts)
    sampler = VisitSampler(
        Mixture(tuple(parts), cfg.SEED), batch_size, start_iteration, rank, world_size
    )
    return DataLoader(
        VisitDataset([record for pictures in records for record in pictures], mappers),
        batch_sampler=sampler,
        pin_memory=torch.cuda.is_available() and cfg.MODEL.DEVICE != "cpu",
        **_worker_options(cfg.DATALOADER.NUM_WORKERS),
    )


def _training_datasets(
    names: Sequence[str], mappers: Mapping[Domain, TrainMapper]
) -> list[DatasetSpec]:
    datasets = [get_dataset(name) for name in names]
    if not datasets:
        raise ValueError("DATASETS.TRAIN is empty: name at least one dataset to train on")
    for dataset in datasets:
        if dataset.domain not in mappers:
            raise ValueError(
                f"DATASETS.TRAIN holds {dataset.name}, a {dataset.domain.value} dataset; "
                f"training takes {' and '.join(domain.value for domain in mappers)} datasets"
            )
    if all(dataset.domain is Domain.GENERATED for dataset in datasets):
        raise ValueError(
            f"DATASETS.TRAIN holds generated images only: {', '.join(names)}. They have no labels; "
            "add the labelled source that the warm-up was trained on, such as gta5"
        )
    return datasets


def _training_records(dataset: DatasetSpec) -> list[Record]:
    records = dataset.records()
    if not records:
        raise ValueError(f"there is no image to train on in {dataset.name}")
    listing = dataset.listing()
    gaps = dataset.manifest_gaps(listing)
    if gaps:
        raise ValueError("\n".join(f"dataset {dataset.name}: {gap}" for gap in gaps))
    if dataset.row.manifest and listing.manifest is None:
        logger.info(
            "%s has no %s: its %d images are taken as they are",
            dataset.name,
            dataset.root.absolute() / dataset.row.manifest,
            len(records),
        )
    return records


def _factors(cfg: CfgNode, datasets: Sequence[DatasetSpec]) -> list[float]:
    if cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler":
        return [1.0] * len(datasets)
    factors = {
        Domain.SOURCE: cfg.DATASETS.SOURCE_FACTOR,
        Domain.GENERATED: cfg.DATASETS.TARGET_FACTOR,
    }
    return [factors[dataset.domain] for dataset in datasets]


def _log_mixture(datasets: Sequence[DatasetSpec], parts: Sequence[Part]) -> None:
    """Say what joint training mixes, and how."""
    if all(dataset.domain is Domain.SOURCE for dataset in datasets):
        return
    total = sum(part.places for part in parts)
    shares = [
        f"{dataset.name} {part.places} ({part.places / total:.1%}) from {part.size} images"
        for dataset, part in zip(datasets, parts, strict=True)
    ]
    logger.info("an epoch has %d places: %s", total, ", ".join(shares))


class RecordDataset(Dataset[EvalSample]):
    """One rank's share of a dataset's pictures, as evaluation samples."""

    def __init__(self, records: Sequence[Record], mapper: EvaluationMapper) -> None:
        self.records = records
        self.mapper = mapper

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> EvalSample:
        return self.mapper(self.records[index])


def build_test_loader(
    dataset: DatasetSpec,
    prepare: Prepare,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[EvalSample]:
    """A rank's share of a dataset, one sample at a time, in order.

    Rank r of W gets pictures r, r + W, r + 2W, ...; every picture goes to exactly one rank.

    Args:
        dataset: what to evaluate on.
        prepare: the protocol's; see `Prepare`. It must be picklable when there are workers and
            the platform does not fork.
        num_workers: loader processes; 0: in this one.
        rank: number of this process.
        world_size: how many processes there are.

    Returns:
        A sized iterable over `EvalSample`; its samples have a `label` where the dataset has one.

    Raises:
        FileNotFoundError, ValueError: as `DatasetSpec.records`.
    """
    share = dataset.records()[rank::world_size]
    return DataLoader(
        RecordDataset(share, EvaluationMapper(prepare)),
        batch_size=None,
        # an empty share needs no process
        **_worker_options(min(num_workers, len(share)), persistent=False),
    )


def _worker_options(workers: int, persistent: bool = True) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "collate_fn": _as_it_is,
        "worker_init_fn": _start_worker,
        "persistent_workers": persistent and workers > 0,
        # the loader draws a number from it at each start; the global one must not notice
        "generator": torch.Generator(),
    }


def _as_it_is(samples: Any) -> Any:
    return samples


def _start_worker(worker_id: int) -> None:
    # the processes are the parallelism; threads in each of them would only compete
    cv2.setNumThreads(0)
