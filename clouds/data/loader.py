"""A DataLoader that does not wait for ever, and whose errors name what they are about.

Worker processes pack a batch before they send it. So an error in packing, such as a full shared
memory, is raised in the main process; torch packs in a thread of the worker, whose errors are lost
while the main process waits.
"""

from __future__ import annotations

import logging
import pickle
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from clouds.data.faults import Fault, FaultLog, FaultyFilesError, Loaded
from clouds.messages import format_examples

logger = logging.getLogger(__name__)

PREFETCH = 2
"""Batches that each worker holds ready."""

SHARED_MEMORY = Path("/dev/shm")
"""Where Linux keeps the memory in which workers hand over batches."""

_MIB = 1 << 20


@dataclass(frozen=True)
class Batch:
    """Samples, and what is to be reported with them.

    Attributes:
        samples: one sample, or a list.
        faults: of the files that were tried before.
        exhausted: a dataset that had no file for a sample, which is None; empty: there is none.
        note: for the log.
    """

    samples: Any
    faults: tuple[Fault, ...] = ()
    exhausted: str = ""
    note: str = ""

    def pin_memory(self) -> Batch:
        """With pinned samples; called by torch's DataLoader."""
        return replace(self, samples=_pinned(self.samples))


@dataclass(frozen=True)
class PackedBatch:
    """A `Batch` as bytes; they refer to shared memory, or hold the samples."""

    data: bytes

    def unpack(self) -> Batch:
        """The batch; possible once."""
        batch: Batch = pickle.loads(self.data)
        return batch

    def pin_memory(self) -> Batch:
        """The batch with pinned samples; called by torch's DataLoader."""
        return self.unpack().pin_memory()


def collect(loaded: Loaded | Sequence[Loaded]) -> Batch:
    """The batch of what a dataset has returned: one sample, or a list."""
    if isinstance(loaded, Loaded):
        return Batch(loaded.sample, loaded.faults)
    exhausted = [one.faults[-1].dataset for one in loaded if one.sample is None]
    return Batch(
        [one.sample for one in loaded],
        tuple(fault for one in loaded for fault in one.faults),
        exhausted[0] if exhausted else "",
    )


class Packer:
    """Collects and packs batches in a worker: in shared memory, or in bytes if that is too small.

    The choice is made at the first batch, by the memory that all batches of all workers take, and
    again if shared memory cannot be had later.
    """

    def __init__(self) -> None:
        self.shared: bool | None = None

    def __call__(self, loaded: Loaded | Sequence[Loaded]) -> PackedBatch:
        batch, note = collect(loaded), ""
        if self.shared is None:
            note = shortage(num_bytes(batch.samples))
            self.shared = not note
        if self.shared:
            try:
                return PackedBatch(bytes(ForkingPickler.dumps(batch)))
            except (OSError, RuntimeError) as error:
                self.shared = False
                note = f"no shared memory for a batch ({error}): {_ADVICE}"
        return PackedBatch(pickle.dumps(replace(batch, note=note), protocol=5))


_ADVICE = (
    "this worker sends its batches through pipes instead, which is slower. Give the container more "
    "shared memory (docker run --shm-size 8g), or set DATALOADER.NUM_WORKERS lower, or to 0"
)


def shortage(batch_bytes: int) -> str:
    """Why the shared memory is too small for batches of this size; empty: it is not."""
    info = get_worker_info()
    if info is None or not SHARED_MEMORY.is_dir():
        return ""
    usage = shutil.disk_usage(SHARED_MEMORY)
    needed = batch_bytes * PREFETCH * info.num_workers
    if needed <= usage.free:
        return ""
    return (
        f"{SHARED_MEMORY} has {usage.free / _MIB:.1f} of {usage.total / _MIB:.1f} MiB free, but "
        f"{info.num_workers} workers x {PREFETCH} batches of {batch_bytes / _MIB:.1f} MiB take "
        f"{needed / _MIB:.1f} MiB: {_ADVICE}"
    )


def num_bytes(samples: Any) -> int:
    """Bytes of all tensors in nested lists and dictionaries."""
    if isinstance(samples, torch.Tensor):
        return samples.nbytes
    if isinstance(samples, Mapping):
        return sum(num_bytes(value) for value in samples.values())
    if isinstance(samples, list):
        return sum(num_bytes(value) for value in samples)
    return 0


def _pinned(samples: Any) -> Any:
    """A copy of nested lists and dictionaries whose tensors are pinned."""
    if isinstance(samples, torch.Tensor):
        return samples.pin_memory()
    if isinstance(samples, Mapping):
        return {key: _pinned(value) for key, value in samples.items()}
    return [_pinned(value) for value in samples] if isinstance(samples, list) else samples


class SampleDataset(Dataset[Loaded]):
    """A dataset that returns faults instead of raising, and names the file of an index."""

    def file_of(self, index: Any) -> str:
        """The image file of an index."""
        raise NotImplementedError


class SampleLoader(DataLoader[Any]):
    """Yields the samples of a dataset: one after the other, or lists of them.

    Args:
        dataset: the samples.
        num_workers: number of worker processes; 0: load in this process.
        timeout: seconds to wait for a worker's next batch; 0: without limit.
        persistent: keep the workers for the next iteration over the loader.
        fault_log: files that were skipped; None: the first fault is raised.
        first_batch: number of the first batch in messages.
        options: further arguments of torch's DataLoader.

    Raises:
        OSError: while iterating: the workers cannot be started.
        TimeoutError: while iterating: no batch came in time; it names the worker and the files.
        FaultyFilesError: while iterating: more files are faulty than allowed.
        Exception: while iterating: what the dataset raised; the cause tells where.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        *,
        num_workers: int,
        timeout: float = 0,
        persistent: bool = True,
        fault_log: FaultLog | None = None,
        first_batch: int = 0,
        **options: Any,
    ) -> None:
        if num_workers > 0:
            options |= {"timeout": timeout, "prefetch_factor": PREFETCH}
        super().__init__(
            dataset,
            num_workers=num_workers,
            collate_fn=Packer() if num_workers > 0 else collect,
            worker_init_fn=init_worker,
            persistent_workers=persistent and num_workers > 0,
            # the loader draws a number at each start, which must not come from the global generator
            generator=torch.Generator(),
            **options,
        )
        self.fault_log, self.first_batch = fault_log, first_batch
        self._notes: set[str] = set()

    @property
    def num_faulty(self) -> int:
        """Number of files that were skipped."""
        return len(self.fault_log.files()) if self.fault_log else 0

    def __iter__(self) -> Any:
        try:
            iterator = super().__iter__()
        except OSError as error:
            raise OSError(
                error.errno,
                f"the {self.num_workers} loader processes cannot be started: {error}. Set "
                "DATALOADER.NUM_WORKERS lower, or to 0; in a container, give it more shared memory "
                "(docker run --shm-size 8g)",
            ) from error
        return self._batches(iterator)

    def _batches(self, iterator: Iterator[Batch | PackedBatch]) -> Iterator[Any]:
        try:
            for number in count():
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
                if isinstance(batch, PackedBatch):
                    batch = batch.unpack()
                self._report(batch, self.first_batch + number)
                yield batch.samples
        except Exception as error:
            # left to the garbage collector, torch waits 5 seconds for each worker
            if isinstance(iterator, _MultiProcessingDataLoaderIter):
                iterator._shutdown_workers()
                self._iterator = None
            if isinstance(error, RuntimeError) and "timed out" in str(error):
                raise TimeoutError(self._late(number)) from error
            raise

    def _report(self, batch: Batch, number: int) -> None:
        if batch.note and not self._notes:
            logger.warning("%s", batch.note)
            self._notes.add(batch.note)
        for fault in batch.faults:
            if self.fault_log is None or not fault.of_file:
                fault.throw()
        if batch.faults and self.fault_log is not None:
            self.fault_log.add(batch.faults, number)
            if batch.exhausted:
                files = format_examples([fault.file for fault in batch.faults], 50)
                raise FaultyFilesError(
                    f"no image of {batch.exhausted} is left in place of faulty ones: "
                    f"{files}. Correct these files, or remove the dataset from DATASETS.TRAIN."
                )

    def _late(self, number: int) -> str:
        """The error for the batch that is `number`-th of this iteration."""
        sampler = self.sampler if self.batch_sampler is None else self.batch_sampler
        index = next(islice(iter(sampler), number, None))
        dataset = self.dataset
        assert isinstance(dataset, SampleDataset)
        files = [dataset.file_of(i) for i in (index if isinstance(index, list) else [index])]
        return (
            f"loader worker {number % self.num_workers} of {self.num_workers} has not delivered "
            f"batch {self.first_batch + number} within {self.timeout:g} s. It reads "
            f"{format_examples(files, 16)}. Check that these files, and the disk they are on, can "
            "be read; for slow disks set DATALOADER.TIMEOUT higher (seconds; 0: no limit)."
        )


def init_worker(worker_id: int) -> None:
    """Called at the start of each worker."""
    # the workers run in parallel; threads in each of them would compete for the cores
    cv2.setNumThreads(0)
