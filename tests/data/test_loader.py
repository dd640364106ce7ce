"""Loaders whose workers run out of shared memory, hang or fail, and faulty files in training."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dataset_files import write

from clouds.config import get_cfg
from clouds.data import loader as loader_module
from clouds.data.build import build_test_loader, build_train_loader
from clouds.data.datasets import forget_listings, get_dataset
from clouds.data.faults import FaultyFilesError

NUM_IMAGES = 12
KEPT = [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11]  # without image 6, which is the faulty one


@pytest.fixture
def root(tmp_path, monkeypatch):
    forget_listings()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for i in range(NUM_IMAGES):
        write(tmp_path, "gta5", i)
    return tmp_path


@pytest.fixture
def cfg(root):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("gta5",)
    cfg.OUTPUT_DIR = str(root / "output")
    cfg.INPUT.CROP.SIZE = (16, 20)
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg


def damage(root: Path, number: int) -> Path:
    path = root / f"gta5/images/{number:05d}.png"
    path.write_bytes(path.read_bytes()[:60])
    return path


def batches(cfg, count, **options):
    return list(islice(build_train_loader(cfg, **options), count))


def names(found):
    return [[Path(sample["file_name"]).name for sample in batch] for batch in found]


def all_same(first, second):
    assert names(first) == names(second)
    return all(
        torch.equal(one[key], two[key]) and one["seed"] == two["seed"]
        for a, b in zip(first, second, strict=True)
        for one, two in zip(a, b, strict=True)
        for key in ("image", "sem_seg")
    )


# ------------------------------------------------------------------------ shared memory
SCRIPT = """
import shutil, sys
from itertools import islice
from types import SimpleNamespace
import torch
from clouds.config import get_cfg
from clouds.data.build import build_train_loader
if sys.argv[1] == "late":  # there seems to be enough when it is checked
    shutil.disk_usage = lambda path: SimpleNamespace(total=2**40, free=2**40)
cfg = get_cfg()
cfg.DATASETS.TRAIN, cfg.INPUT.CROP.SIZE, cfg.SOLVER.IMS_PER_BATCH = ("gta5",), (256, 256), 4
found = []
for cfg.DATALOADER.NUM_WORKERS in (0, 2):
    found.append([s for b in islice(build_train_loader(cfg), 8) for s in b])
for one, two in zip(*found, strict=True):
    assert torch.equal(one["image"], two["image"]) and one["file_name"] == two["file_name"]
print("the same")
"""


def with_shared_memory(size: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run SCRIPT with a /dev/shm of its own, or skip the test where that is not allowed."""
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "-", sys.executable]
    return subprocess.run(
        [*command, "-c", SCRIPT, *arguments], capture_output=True, text=True, timeout=60
    )


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
@pytest.mark.parametrize(
    ("size", "when", "message"),
    [
        # a batch is 4 x 256 x 256 x (3 + 1) bytes = 1 MiB, and 2 workers hold 2 each
        ("2m", "early", "of 2.0 MiB free, but 2 workers x 2 batches of 1.0 MiB take 4.0 MiB"),
        ("2m", "late", "no shared memory for a batch (unable to allocate"),
    ],
)
def test_a_shared_memory_that_is_too_small_does_not_hang(root, size, when, message):
    done = with_shared_memory(size, when)
    assert done.stdout == "the same\n", done.stderr
    assert message in done.stderr
    assert "--shm-size" in done.stderr
    assert "DATALOADER.NUM_WORKERS" in done.stderr


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_no_shared_memory_at_all_is_an_error(root):
    done = with_shared_memory("4k", "early")
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert "the 2 loader processes cannot be started: [Errno 28]" in message
    assert "--shm-size" in message


def test_batches_through_pipes_are_the_same(cfg, monkeypatch, caplog):
    alone = batches(cfg, 6)
    free = SimpleNamespace(total=64 << 20, free=100)
    monkeypatch.setattr(loader_module.shutil, "disk_usage", lambda path: free)
    cfg.DATALOADER.NUM_WORKERS = 2
    assert all_same(alone, batches(cfg, 6))
    assert caplog.text.count("workers x 2 batches") == 1  # told once


# ------------------------------------------------------------------------ workers that hang or fail
@pytest.fixture
def fifo(root):
    """A FIFO that takes the place of an image after the images were listed: reading it waits."""
    get_dataset("gta5").records()
    path = root / "gta5/images/00007.png"
    path.unlink()
    os.mkfifo(path)
    yield path
    path.unlink()


@pytest.mark.parametrize("training", [True, False])
def test_a_worker_that_hangs_is_named_with_its_files(cfg, fifo, monkeypatch, training):
    dataset = get_dataset("gta5")
    monkeypatch.setattr(
        type(dataset), "records", lambda self: [*records_of(fifo)] if self.name == "gta5" else []
    )
    monkeypatch.setattr(type(dataset), "gaps", lambda self, listing: [])
    cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.TIMEOUT = 2, 2
    found = build_train_loader(cfg) if training else build_test_loader(dataset, keep, 2, timeout=2)
    with pytest.raises(TimeoutError) as error:
        list(islice(found, NUM_IMAGES))
    text = str(error.value)
    assert str(fifo) in text
    assert "within 2 s" in text
    assert "DATALOADER.TIMEOUT" in text
    if not training:  # sample 7 is the fourth of worker 1
        assert "worker 1 of 2" in text
        assert "batch 7" in text


def records_of(path):
    """Records of all images, with `path` whatever it is."""
    from clouds.data.datasets.builtin import get_description
    from clouds.data.structures import Domain, Record

    label_format = next(f for f in get_description("gta5").label_formats if f.suffix == ".png")
    return [
        Record(
            path.with_name(f"{i:05d}.png"),
            path.parents[1] / f"labels/{i:05d}.png",
            Domain.SOURCE,
            "gta5",
            label_format,
        )
        for i in range(NUM_IMAGES)
    ]


def keep(image, label, dataset):
    return image, label


class LockedError(Exception):
    """Can be pickled, but not unpickled: it needs two arguments."""

    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


def test_errors_of_workers_that_cannot_be_sent_arrive(root):
    def fail(image, label, dataset):
        raise LockedError("one", "two")

    with pytest.raises(RuntimeError, match="LockedError: one and two") as error:
        list(build_test_loader(get_dataset("gta5"), fail, 1, timeout=20))
    assert "00000.png" in str(error.value.__cause__)
    assert "in fail" in str(error.value.__cause__)


def test_samples_of_workers_that_cannot_be_sent_are_an_error(root, monkeypatch):
    monkeypatch.setattr(
        "clouds.data.build.EvaluationMapper.__call__", lambda self, record: threading.Lock()
    )
    with pytest.raises(TypeError, match=r"cannot pickle '_thread\.lock'"):
        list(build_test_loader(get_dataset("gta5"), keep, 1, timeout=20))


# ------------------------------------------------------------------------ faulty files
def test_a_faulty_file_stops_training_by_default(cfg, root):
    path = damage(root, 6)
    for cfg.DATALOADER.NUM_WORKERS in (0, 2):
        with pytest.raises(ValueError) as error:
            batches(cfg, 6)
        assert str(error.value).startswith(f"{path}: cannot be read as an image")
        assert "Traceback" not in str(error.value)
    assert not Path(cfg.OUTPUT_DIR).exists()


def test_a_skipped_file_is_replaced_by_a_function_of_the_seed(cfg, root, caplog):
    whole = batches(cfg, 9)
    path = damage(root, 6)
    cfg.DATALOADER.FAULTY = "skip"
    alone = batches(cfg, 9)
    faulty = f"{6:05d}.png"
    count = 0
    for before, after in zip(whole, alone, strict=True):
        for one, two in zip(before, after, strict=True):
            assert one["seed"] == two["seed"]
            if Path(one["file_name"]).name == faulty:
                count += 1
                assert Path(two["file_name"]).name in [f"{i:05d}.png" for i in KEPT]
            else:
                assert torch.equal(one["image"], two["image"])
                assert one["file_name"] == two["file_name"]
    assert count == 3  # once in each of 9 x 4 / 12 epochs

    cfg.DATALOADER.NUM_WORKERS = 2
    assert all_same(alone, batches(cfg, 9))
    assert all_same(alone[4:], batches(cfg, 5, start_iteration=4))
    shares = [batches(cfg, 9, rank=rank, world_size=2) for rank in (0, 1)]
    assert all_same(alone, [a + b for a, b in zip(*shares, strict=True)])
    assert f"skipped the faulty file {path} of gta5" in caplog.text


def test_skipped_files_are_named_and_counted_once_over_resumes_and_processes(cfg, root):
    first, second = damage(root, 2), damage(root, 6)
    cfg.DATALOADER.FAULTY = "skip"
    training = build_train_loader(cfg)
    found = iter(training)
    list(islice(found, 6))
    assert training.num_faulty == 2
    report = Path(cfg.OUTPUT_DIR, "faulty_files.json")
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert {line["file"] for line in lines} == {str(first), str(second)}
    assert all("cannot be read" in line["error"] and 0 <= line["batch"] < 3 for line in lines)
    assert len(lines) == 2

    third = damage(root, 9)
    other_process = iter(build_train_loader(cfg, 6, rank=1, world_size=2))
    list(islice(other_process, 6))
    assert len(build_train_loader(cfg, 12).fault_log.files()) == 3
    assert training.num_faulty == 3
    assert str(third) in report.read_text()
    assert build_train_loader(cfg).num_faulty == 0  # a run from the beginning counts its own


@pytest.mark.parametrize("workers", [0, 1])
def test_faulty_files_whose_name_is_not_utf8(cfg, root, workers, escaped_logs):
    name = os.fsdecode(b"a\xff.png")
    for folder in ("images", "labels"):
        (root / "gta5" / folder / name).write_text("text")
    cfg.DATALOADER.FAULTY, cfg.DATALOADER.NUM_WORKERS = "skip", workers
    training = build_train_loader(cfg)
    found = list(islice(training, 9))
    (file,) = training.fault_log.files()
    assert os.fsencode(file).endswith(b"/gta5/images/a\xff.png")
    assert all(name not in sample["file_name"] for batch in found for sample in batch)
    report = Path(cfg.OUTPUT_DIR, "faulty_files.json").read_text("utf-8")
    assert json.loads(report)["file"] == file
    cfg.DATALOADER.MAX_FAULTY = 0
    Path(cfg.OUTPUT_DIR, "faulty_files.json").unlink()
    with pytest.raises(FaultyFilesError, match="a\udcff"):
        list(islice(build_train_loader(cfg), 9))


@pytest.mark.parametrize("workers", [0, 2])
def test_more_faulty_files_than_allowed_end_training(cfg, root, workers):
    paths = [damage(root, number) for number in (1, 4, 8)]
    cfg.DATALOADER.FAULTY, cfg.DATALOADER.NUM_WORKERS = "skip", workers
    cfg.DATALOADER.MAX_FAULTY = 3
    batches(cfg, 6)
    Path(cfg.OUTPUT_DIR, "faulty_files.json").unlink()
    cfg.DATALOADER.MAX_FAULTY = 2
    with pytest.raises(FaultyFilesError, match=r"3 files.*MAX_FAULTY allows 2") as error:
        batches(cfg, 6)
    assert all(f"{path}: " in str(error.value) for path in paths)


def test_no_file_is_left_for_a_faulty_one(cfg, root):
    for number in range(NUM_IMAGES):
        damage(root, number)
    cfg.DATALOADER.FAULTY, cfg.DATALOADER.MAX_FAULTY = "skip", 100
    with pytest.raises(FaultyFilesError, match=r"no image of gta5 is left.*00000\.png"):
        batches(cfg, 1)


def test_faults_of_the_program_are_not_skipped(cfg, monkeypatch):
    def wrong(self, record, seed):
        raise TypeError("an error in an augmentation")

    monkeypatch.setattr("clouds.data.build.SourceMapper.__call__", wrong)
    cfg.DATALOADER.FAULTY = "skip"
    for cfg.DATALOADER.NUM_WORKERS in (0, 1):
        with pytest.raises(TypeError, match="an error in an augmentation") as error:
            batches(cfg, 1)
        assert "in wrong" in str(error.value.__cause__)


def test_a_torn_report_is_read_as_far_as_it_goes(cfg, root, caplog):
    damage(root, 6)
    cfg.DATALOADER.FAULTY = "skip"
    batches(cfg, 4)
    report = Path(cfg.OUTPUT_DIR, "faulty_files.json")
    report.write_bytes(report.read_bytes() + b'{"file": "/a')
    with caplog.at_level(logging.WARNING):
        assert build_train_loader(cfg, 4).num_faulty == 1
    assert "skipped an incomplete line" in caplog.text
