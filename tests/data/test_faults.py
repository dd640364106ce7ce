"""Faults of files: what is sent between processes, and the file in which they are counted."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from clouds.data.faults import Fault, FaultLog, FaultyFilesError


class TwoArgumentsError(ValueError):
    """Can be pickled, but not unpickled."""

    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


def fault_of(error, name="/data/a.png"):
    try:
        raise error
    except Exception as raised:
        return Fault.of(Path(name), "gta5", raised)


def test_an_error_that_can_be_sent_is_kept():
    error = OSError(5, "Input/output error")
    fault = fault_of(error)
    assert (fault.file, fault.dataset, fault.error) == ("/data/a.png", "gta5", error)
    assert fault.where.startswith("while the sample of /data/a.png was made:\nTraceback")
    assert fault.where.endswith("OSError: [Errno 5] Input/output error\n")
    assert fault.of_file


@pytest.mark.parametrize(
    "error",
    [TwoArgumentsError("one", "two"), ValueError(lambda: 0), type("Local", (OSError,), {})("x")],
)
def test_an_error_that_cannot_be_sent_becomes_its_text(error):
    fault = fault_of(error)
    sent = pickle.loads(pickle.dumps(fault))
    for received in (fault.error, sent.error):
        assert type(received) is RuntimeError
        assert str(received) == f"{type(error).__name__}: {error}"
    assert not fault.of_file
    with pytest.raises(RuntimeError) as raised:
        sent.throw()
    assert str(raised.value.__cause__) == fault.where


def lines_of(path):
    return [json.loads(line) for line in path.read_text("ascii").splitlines()]


def test_faults_are_appended_and_counted_once(tmp_path, caplog):
    path = tmp_path / "new/folder/faulty_files.json"
    log = FaultLog(path, 3, resumed=False)
    assert log.files() == {}
    assert not path.parent.exists()
    first, second = fault_of(ValueError("torn"), "/data/ä.png"), fault_of(OSError("gone"))
    again = fault_of(ValueError("otherwise torn"), "/data/ä.png")
    log.add([first, again, second], 7)
    assert log.files() == {"/data/ä.png": "torn", "/data/a.png": "gone"}
    assert list(log.files()) == ["/data/ä.png", "/data/a.png"]
    assert lines_of(path) == [
        {"file": "/data/ä.png", "dataset": "gta5", "batch": 7, "error": "torn"},
        {"file": "/data/a.png", "dataset": "gta5", "batch": 7, "error": "gone"},
    ]
    assert caplog.messages == [
        "skipped the faulty file /data/ä.png of gta5 in batch 7: torn",
        "skipped the faulty file /data/a.png of gta5 in batch 7: gone",
    ]


def test_entries_of_other_processes_count_and_those_of_earlier_runs_do_not(tmp_path):
    path = tmp_path / "faulty_files.json"
    FaultLog(path, 9, resumed=False).add([fault_of(ValueError("x"), "/data/old.png")], 0)
    new, resumed = (FaultLog(path, 9, resumed) for resumed in (False, True))
    assert list(new.files()) == []
    assert list(resumed.files()) == ["/data/old.png"]
    new.add([fault_of(ValueError("y"), "/data/b.png")], 1)
    assert list(new.files()) == ["/data/b.png"]
    assert list(resumed.files()) == ["/data/old.png", "/data/b.png"]
    path.unlink()
    assert list(new.files()) == list(resumed.files()) == []


def test_the_file_is_read_again_only_if_it_has_changed(tmp_path, monkeypatch):
    log = FaultLog(tmp_path / "faulty_files.json", 9, resumed=False)
    log.add([fault_of(ValueError("x"))], 0)
    expected = dict(log.files())
    monkeypatch.setattr(Path, "read_bytes", lambda path: 1 / 0)
    assert log.files() == expected


def test_the_limit_is_the_number_that_is_allowed(tmp_path):
    path = tmp_path / "faulty_files.json"
    log = FaultLog(path, 60, resumed=False)
    log.add([fault_of(ValueError(f"torn {i}"), f"/data/{i:02}.png") for i in range(60)], 0)
    with pytest.raises(FaultyFilesError) as error:
        log.add([fault_of(ValueError("torn"), "/data/60.png")], 1)
    first, second = str(error.value).split("\n  ")
    assert first == (
        "61 files of the training data are faulty, and DATALOADER.MAX_FAULTY allows 60. Correct or "
        f"remove them (all are in {path}), or allow more:"
    )
    shown = [f"/data/{i:02}.png: torn {i}" for i in range(50)]
    assert second == ", ".join(shown) + " and 11 more"


def test_incomplete_lines_are_skipped_and_told(tmp_path, caplog):
    path = tmp_path / "faulty_files.json"
    faulty = ['{"file": "/a', '{"file": "/a"}', "[1]", "\udcff"]
    whole = '{"file": "/b", "error": "torn"}'
    path.write_text("\n".join([*faulty, whole, ""]), "utf-8", "surrogateescape")
    assert FaultLog(path, 9, resumed=True).files() == {"/b": "torn"}
    assert caplog.messages == [
        f"{path}: skipped an incomplete line: {line.encode('utf-8', 'surrogateescape')!r}"
        for line in faulty
    ]


@pytest.mark.parametrize("torn", ["{", '{"file": "/data/a.png", "err'])
def test_an_entry_after_a_torn_one_is_a_line_of_its_own(tmp_path, torn):
    path = tmp_path / "faulty_files.json"
    path.write_text(torn)  # the disk was full
    log = FaultLog(path, 9, resumed=True)
    log.add([fault_of(ValueError("torn"), "/data/b.png")], 3)
    log.add([fault_of(ValueError("torn"), "/data/c.png")], 4)
    assert list(log.files()) == ["/data/b.png", "/data/c.png"]
    assert path.read_text().count("\n") == 3
