"""The endless training stream and the test loader.

What a training batch holds is a function of the config and the batch's number alone: neither the
number of worker processes, nor the number of ranks, nor where a run was broken off has a part in
it. Position p of the stream is slot p % N of epoch p // N, over N pictures in an order that SEED
and the epoch give; the sample's own seed comes from SEED, epoch and the picture's index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from clouds.data.datasets import DatasetSpec, get_dataset
from clouds.data.mappers.evaluation import EvaluationMapper, Prepare
from clouds.data.mappers.source import SourceMapper
from clouds.data.sample import Domain, EvalSample, Record, TrainSample

if TYPE_CHECKING:
    from clouds.d2 import CfgNode

Visit = tuple[int, int]
"""Epoch, and index of a picture."""

TrainMapper = Callable[[Record, int], TrainSample]
"""Record and seed -> sample."""


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """The seed of one visit to one picture, in [0, 2**63)."""
    words = np.random.SeedSequence([seed, epoch, index]).generate_state(1, np.uint64)
    return int(words[0]) >> 1


class VisitSampler(Sampler[list[Visit]]):
    """Yields one rank's visits of batch after batch, without end.

    The global batch i is positions i * batch_size to (i + 1) * batch_size of the stream; rank r
    of W takes the r-th of W equal runs of it, so that the ranks' shares, one after the other,
    are the batch that a single process takes.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`size`: number of pictures; `start`: number of the first batch."""
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.share = batch_size // world_size
        self.offset = rank * self.share

    def __iter__(self) -> Iterator[list[Visit]]:
        epoch, order = -1, np.empty(0, np.int64)
        batch = self.start
        while True:
            first = batch * self.batch_size + self.offset
            visits = []
            for position in range(first, first + self.share):
                if position // self.size != epoch:
                    epoch = position // self.size
                    order = self._order(epoch)
                visits.append((epoch, int(order[position % self.size])))
            yield visits
            batch += 1

    def _order(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, epoch]))
        return rng.permutation(self.size)


@dataclass(frozen=True)
class VisitDataset(Dataset[TrainSample]):
    """Visits to samples.

    Attributes:
        records: all pictures to train on.
        mappers: what makes a sample of a record, by the record's domain.
        seed: SEED of the config.
    """

    records: Sequence[Record]
    mappers: Mapping[Domain, TrainMapper]
    seed: int

    def __getitem__(self, visit: Visit) -> TrainSample:
        epoch, index = visit
        record = self.records[index]
        return self.mappers[record.domain](record, sample_seed(self.seed, epoch, index))


def build_train_loader(
    cfg: CfgNode, start_iteration: int = 0, rank: int = 0, world_size: int = 1
) -> Iterable[list[TrainSample]]:
    """The endless stream of one rank's training batches.

    Args:
        cfg: DATASETS.TRAIN, INPUT, SEED, SOLVER.IMS_PER_BATCH, DATALOADER.NUM_WORKERS count.
        start_iteration: number of the first batch; the ones before it are not read.
        rank: number of this process.
        world_size: how many processes there are.

    Returns:
        An iterable over lists of IMS_PER_BATCH / world_size samples.

    Raises:
        FileNotFoundError: a dataset, or half of it, is not there.
        ValueError: no dataset or one unknown, one that is not for training, no image, an image
            without label, or a batch that cannot be shared out evenly.
    """
    batch_size = cfg.SOLVER.IMS_PER_BATCH
    if batch_size % world_size:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {batch_size}, which {world_size} processes cannot share "
            f"evenly; take a multiple of {world_size}"
        )
    mappers: dict[Domain, TrainMapper] = {Domain.SOURCE: SourceMapper.from_config(cfg)}
    records = _training_records(cfg.DATASETS.TRAIN, mappers)
    sampler = VisitSampler(len(records), batch_size, cfg.SEED, start_iteration, rank, world_size)
    workers = cfg.DATALOADER.NUM_WORKERS
    return DataLoader(
        VisitDataset(records, mappers, cfg.SEED),
        batch_sampler=sampler,
        pin_memory=torch.cuda.is_available() and cfg.MODEL.DEVICE != "cpu",
        **_worker_options(workers),
    )


def _training_records(names: Sequence[str], mappers: Mapping[Domain, TrainMapper]) -> list[Record]:
    datasets = [get_dataset(name) for name in names]
    if not datasets:
        raise ValueError("DATASETS.TRAIN is empty: name at least one dataset to train on")
    for dataset in datasets:
        if dataset.domain not in mappers:
            raise ValueError(
                f"DATASETS.TRAIN holds {dataset.name}, a {dataset.domain.value} dataset; "
                f"training takes {' and '.join(domain.value for domain in mappers)} datasets"
            )
    records = [record for dataset in datasets for record in dataset.records()]
    if not records:
        raise ValueError(f"there is no image to train on in {', '.join(names)}")
    return records


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
