"""Packing of batches, and the loader in this process, with datasets that read no file."""

from __future__ import annotations

import logging
import pickle
from itertools import islice
from types import SimpleNamespace

import cv2
import pytest
import torch

from clouds.data import loader as loader_module
from clouds.data.faults import Fault, FaultLog, FaultyFilesError, Loaded
from clouds.data.loader import (
    Batch,
    Packer,
    SampleDataset,
    SampleLoader,
    collect,
    num_bytes,
    shortage,
)


def fault(name="b.png", error=None, dataset="gta5"):
    return Fault(f"/data/{name}", dataset, error or ValueError("torn"), "where it was")


class Numbers(SampleDataset):
    """Sample i is a tensor with i; `loaded` replaces some."""

    def __init__(self, length=6, **loaded):
        self.length, self.loaded = length, loaded

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return self.loaded.get(f"i{index}", Loaded(torch.tensor([index])))

    def file_of(self, index):
        return f"/data/{index}.png"


def loader_of(dataset, **options):
    return SampleLoader(dataset, **{"num_workers": 0, "batch_size": 2, **options})


# ------------------------------------------------------------------------ batches


def test_samples_and_faults_are_collected():
    a, b, c = fault("a.png"), fault("b.png"), fault("c.png")
    assert collect(Loaded(5, (a,))) == Batch(5, (a,))
    assert collect([Loaded(5, (a, b)), Loaded(6), Loaded(7, (c,))]) == Batch([5, 6, 7], (a, b, c))
    other = fault("d.png", dataset="synthia")
    lost = collect([Loaded(5, (a,)), Loaded(None, (b, c)), Loaded(7, (other,))])
    assert lost == Batch([5, None, 7], (a, b, c, other), "gta5")


def test_bytes_of_tensors_in_lists_and_dictionaries():
    image, label = torch.zeros(3, 4, 5, dtype=torch.uint8), torch.zeros(7)
    assert num_bytes(image) == 60
    assert num_bytes([{"image": image, "name": "a", "more": [label]}, {"image": image}]) == 148
    assert num_bytes("text") == num_bytes(None) == num_bytes([]) == 0


class Pinned(torch.Tensor):
    """Tells that it was pinned."""

    def pin_memory(self):
        return self + 100


def test_all_tensors_are_pinned():
    value = torch.tensor([1]).as_subclass(Pinned)
    batch = Batch([{"image": value, "name": "a"}, [value]], (fault(),), "gta5", "note")
    pinned = batch.pin_memory()
    assert pinned.samples[0]["image"].tolist() == pinned.samples[1][0].tolist() == [101]
    assert pinned.samples[0]["name"] == "a"
    assert (pinned.faults, pinned.exhausted, pinned.note) == (batch.faults, "gta5", "note")


# ------------------------------------------------------------------------ packing


@pytest.fixture
def worker(monkeypatch, tmp_path):
    """As in one of three workers, with 1 MiB of shared memory, 600,000 bytes of it free."""
    monkeypatch.setattr(loader_module, "get_worker_info", lambda: SimpleNamespace(num_workers=3))
    monkeypatch.setattr(loader_module, "SHARED_MEMORY", tmp_path)
    usage = SimpleNamespace(total=1 << 20, free=600_000)
    monkeypatch.setattr(loader_module.shutil, "disk_usage", lambda path: {tmp_path: usage}[path])


def test_shared_memory_must_hold_two_batches_of_each_worker(worker, tmp_path, monkeypatch):
    assert shortage(100_000) == ""
    assert shortage(100_001).startswith(
        f"{tmp_path} has 0.6 of 1.0 MiB free, but 3 workers x 2 batches of 0.1 MiB take 0.6 MiB: "
        "this worker sends its batches through pipes instead, which is slower. "
    )
    monkeypatch.setattr(loader_module, "SHARED_MEMORY", tmp_path / "none")  # not Linux
    assert shortage(10**9) == ""
    monkeypatch.setattr(loader_module, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(loader_module, "get_worker_info", lambda: None)  # no worker
    assert shortage(10**9) == ""


def loaded_bytes(count):
    return [Loaded(torch.arange(count, dtype=torch.uint8), (fault(),))]


def test_batches_that_fit_go_through_shared_memory(worker):
    packer = Packer()
    for _ in range(2):
        packed = packer(loaded_bytes(100))
        assert packer.shared
        assert bytes(range(100)) not in packed.data
        batch = packed.unpack()
        assert batch.samples[0].tolist() == list(range(100))
        assert batch.samples[0].is_shared()
        assert (batch.note, batch.faults[0].file) == ("", "/data/b.png")


def test_batches_that_do_not_fit_are_sent_as_bytes_with_one_note(worker):
    packer = Packer()
    first, second = packer(loaded_bytes(100_001)), packer(loaded_bytes(100))
    assert packer.shared is False
    assert len(first.data) > 100_000
    assert bytes(range(100)) in second.data
    assert first.unpack().note.startswith(str(loader_module.SHARED_MEMORY))
    assert second.unpack().note == ""
    batch = second.unpack()
    assert batch.samples[0].tolist() == list(range(100))
    assert batch.faults[0].file == "/data/b.png"


def test_a_shared_memory_that_fails_later_is_told(worker, monkeypatch):
    packer = Packer()
    packer(loaded_bytes(10))

    def full(batch):
        raise RuntimeError("unable to allocate")

    monkeypatch.setattr(loader_module.ForkingPickler, "dumps", full)
    batch = packer(loaded_bytes(10)).unpack()
    assert batch.note.startswith(
        "no shared memory for a batch (unable to allocate): this worker sends its batches through "
    )
    assert batch.samples[0].tolist() == list(range(10))
    assert packer(loaded_bytes(10)).unpack().note == ""


# ------------------------------------------------------------------------ loaders


def test_batches_in_order_without_the_global_generator():
    before = torch.random.get_rng_state()
    assert [[t.item() for t in batch] for batch in loader_of(Numbers())] == [[0, 1], [2, 3], [4, 5]]
    assert [t.item() for t in loader_of(Numbers(), batch_size=None)] == list(range(6))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("workers", "persistent", "expected"), [(0, True, False), (1, True, True), (2, False, False)]
)
def test_settings_of_workers(workers, persistent, expected):
    loader = loader_of(Numbers(), num_workers=workers, timeout=3, persistent=persistent)
    assert loader.persistent_workers is expected
    assert loader.timeout == (3 if workers else 0)
    assert loader.prefetch_factor == (2 if workers else None)
    assert isinstance(loader.collate_fn, Packer) == bool(workers)
    assert loader.batch_size == 2
    defaults = loader_of(Numbers(), num_workers=1)
    assert defaults.persistent_workers
    assert (defaults.timeout, defaults.first_batch) == (0, 0)
    assert loader_of(Numbers()).timeout == 0


def test_workers_use_one_thread_each():
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(2)
        loader_of(Numbers(), num_workers=1).worker_init_fn(0)
        assert cv2.getNumThreads() == 1
    finally:
        cv2.setNumThreads(before)


def test_a_worker_sends_what_this_process_loads():
    found = [torch.cat(batch).tolist() for batch in loader_of(Numbers(), num_workers=1, timeout=60)]
    assert found == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("error", [ValueError("torn"), TypeError("of the program")])
def test_the_first_fault_is_raised(error, tmp_path):
    log = None if isinstance(error, ValueError) else FaultLog(tmp_path / "f", 9, False)
    loader = loader_of(Numbers(i3=Loaded(None, (fault("3.png", error),))), fault_log=log)
    assert loader.num_faulty == 0
    batches = iter(loader)
    assert [t.item() for t in next(batches)] == [0, 1]
    with pytest.raises(type(error), match=str(error)) as raised:
        next(batches)
    assert str(raised.value.__cause__) == "where it was"


def test_faults_are_logged_with_the_number_of_their_batch(tmp_path, caplog):
    faults = (fault("3.png"), fault("7.png"))
    log = FaultLog(tmp_path / "f", 9, False)
    loader = loader_of(Numbers(i3=Loaded(torch.tensor([9]), faults)), fault_log=log, first_batch=40)
    batches = [[t.item() for t in batch] for batch in loader]
    assert batches == [[0, 1], [2, 9], [4, 5]]
    assert loader.num_faulty == 2
    assert [m.split(": ")[0] for m in caplog.messages] == [
        f"skipped the faulty file /data/{i}.png of gta5 in batch 41" for i in (3, 7)
    ]


def test_no_file_is_left(tmp_path):
    faults = tuple(fault(f"{i}.png") for i in range(60))
    log = FaultLog(tmp_path / "f", 99, False)
    replaced = Loaded(torch.tensor([0]), (fault("0.png", dataset="synthia"),))
    loader = loader_of(Numbers(i1=Loaded(None, faults), i2=replaced), fault_log=log, batch_size=3)
    with pytest.raises(FaultyFilesError) as error:
        next(iter(loader))
    names = ", ".join(f"/data/{i}.png" for i in range(50))
    assert str(error.value) == (
        f"no image of gta5 is left in place of faulty ones: {names} and 11 more. Correct these "
        "files, or remove the dataset from DATASETS.TRAIN."
    )


def test_one_note_is_logged(caplog):
    loader = loader_of(Numbers())
    for note in ("", "first %s", "first %s", "second"):
        loader._report(Batch([], note=note), 0)
    assert caplog.record_tuples == [("clouds.data.loader", logging.WARNING, "first %s")]


class Late(Numbers):
    """The error that torch raises when a worker is late, for an index."""

    def __getitem__(self, index):
        if index == 4:
            raise RuntimeError("DataLoader timed out after 3 seconds")
        if index == 9:
            raise RuntimeError("another error")
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ("batch_size", "number", "files"),
    [
        (2, 2, "/data/4.png, /data/5.png"),
        (None, 4, "/data/4.png"),
        (20, 0, ", ".join(f"/data/{i}.png" for i in range(16)) + " and 4 more"),
    ],
)
def test_a_late_batch_names_its_worker_and_files(batch_size, number, files):
    loader = loader_of(Late(20), batch_size=batch_size, first_batch=40)
    batches = iter(loader)
    list(islice(batches, number))  # in this process, where no worker can be late
    loader.__dict__["num_workers"], loader.__dict__["timeout"] = 3, 2.5
    with pytest.raises(TimeoutError) as error:
        next(batches)
    assert str(error.value) == (
        f"loader worker {number % 3} of 3 has not delivered batch {40 + number} within 2.5 s. It "
        f"reads {files}. Check that these files, and the disk they are on, can be read; for slow "
        "disks set DATALOADER.TIMEOUT higher (seconds; 0: no limit)."
    )


def test_other_errors_stay_as_they_are():
    with pytest.raises(RuntimeError, match="another error"):
        list(loader_of(Late(10), sampler=[9]))
    assert pickle.loads(pickle.dumps(fault())).file == "/data/b.png"


def test_workers_that_cannot_be_started(monkeypatch):
    loader = loader_of(Numbers(), num_workers=2)

    def no_memory(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loader_module.DataLoader, "__iter__", no_memory)
    with pytest.raises(OSError) as error:
        iter(loader)
    assert error.value.errno == 28
    assert error.value.strerror == (
        "the 2 loader processes cannot be started: [Errno 28] No space left on device. Set "
        "DATALOADER.NUM_WORKERS lower, or to 0; in a container, give it more shared memory "
        "(docker run --shm-size 8g)"
    )
