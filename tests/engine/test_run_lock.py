"""The lock of a run's folder: live, ended and unknown holders, and several at once."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from clouds.engine.run_lock import GUARD, LOCK, RunLock, locked

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@contextlib.contextmanager
def child(action):
    """A process that calls `action` and then waits; it is killed, if it lives, and collected."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        action()
        os.write(writing, b"1")
        while True:
            signal.pause()
    os.read(reading, 1)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
        os.close(reading)
        os.close(writing)


def change(folder, **values):
    """Other values in the lock that is there."""
    path = Path(folder, LOCK)
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_lock_names_this_process_and_is_deleted(tmp_path):
    with locked(tmp_path):
        content = json.loads((tmp_path / LOCK).read_text())
        assert content["pid"] == os.getpid()
        assert content["host"] == socket.gethostname()
        with locked(tmp_path):  # the command and its trainer
            pass
        assert (tmp_path / LOCK).exists()
    assert list(tmp_path.iterdir()) == []


def test_it_is_deleted_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        print(1 / 0)
    assert list(tmp_path.iterdir()) == []


def test_a_live_process_on_this_machine(tmp_path):
    with child(lambda: RunLock(tmp_path).acquire()) as other:
        with pytest.raises(ValueError, match=rf"process {other} on .*`kill {other}`") as error:
            RunLock(tmp_path).acquire()
        assert str(tmp_path) in str(error.value) and "OUTPUT_DIR <folder>" in str(error.value)
        os.kill(other, signal.SIGKILL)
        while "State:\tZ" not in Path(f"/proc/{other}/status").read_text():  # not yet collected
            time.sleep(0.01)
        with locked(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def start_of(pid):
    """Field 22 of /proc/<pid>/stat; the process's name, field 2, is in parentheses."""
    return re.sub(r"\(.*\)", "name", Path(f"/proc/{pid}/stat").read_text()).split()[21]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(
    "values",
    [{"start": "1"}, {"boot": "before"}, {"pid": 2**22 + 7}],
    ids=["a new process with the number", "the machine was restarted", "no such process"],
)
def test_a_lock_that_was_left_behind(tmp_path, values, caplog):
    with locked(tmp_path):
        content = (tmp_path / LOCK).read_text()
    (tmp_path / LOCK).write_text(content)
    change(tmp_path, **values)
    with caplog.at_level(logging.WARNING), locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["start"] == start_of(os.getpid())
    assert re.search("run.lock: replaced; the run that left it .* has ended", caplog.text)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("values", [{"host": "elsewhere"}, {"namespace": "pid:[1]"}])
def test_another_machine_or_container(tmp_path, values):
    with locked(tmp_path):
        content = (tmp_path / LOCK).read_text()
    (tmp_path / LOCK).write_text(content)
    change(tmp_path, **values, pid=2**22 + 7)
    hour_ago = time.time() - 3600
    os.utime(tmp_path / LOCK, (hour_ago, hour_ago))
    with pytest.raises(ValueError, match="cannot be seen from this machine") as error:
        RunLock(tmp_path).acquire()
    assert re.search(r"Last sign of life 1:00:0\d ago", str(error.value))
    assert f"rm {tmp_path / LOCK}" in str(error.value)
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == 2**22 + 7
    (tmp_path / LOCK).unlink()
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"pid": 1}', '{"pid": -1}'])
def test_an_incomplete_lock(tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    with pytest.raises(ValueError, match=r"has a lock that is incomplete.*`rm .*run.lock`"):
        RunLock(tmp_path).acquire()
    assert (tmp_path / LOCK).read_text() == content


def test_a_lock_of_another_run_is_not_deleted(tmp_path):
    with locked(tmp_path):
        change(tmp_path, host="elsewhere")
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "elsewhere"


def test_a_live_run_renews_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr("clouds.engine.run_lock.HEARTBEAT_SECONDS", 0.01)
    with locked(tmp_path):
        os.utime(tmp_path / LOCK, (0, 0))
        end = time.monotonic() + 5
        while time.time() - (tmp_path / LOCK).stat().st_mtime > 60:
            assert time.monotonic() < end
            time.sleep(0.01)


def wait_for(path):
    end = time.monotonic() + 60
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.001)


@pytest.mark.parametrize("left_behind", [False, True])
def test_one_of_many_gets_it(tmp_path, left_behind):
    """Eight processes try at the same time, also to replace the same lock; one wins."""
    if left_behind:
        with locked(tmp_path):
            content = (tmp_path / LOCK).read_text()
        (tmp_path / LOCK).write_text(content)
        change(tmp_path, start="1")
    pids = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                wait_for(tmp_path / "begin")
                RunLock(tmp_path).acquire()
                (tmp_path / f"won{os.getpid()}").touch()
                wait_for(tmp_path / "end")  # a run that has ended may be replaced
            (tmp_path / f"ended{os.getpid()}").touch()
            os._exit(0)
        pids.append(pid)
    (tmp_path / "begin").touch()
    end = time.monotonic() + 60
    while len([*tmp_path.glob("won*"), *tmp_path.glob("ended*")]) < 8 and time.monotonic() < end:
        time.sleep(0.01)
    won, ended = len([*tmp_path.glob("won*")]), len([*tmp_path.glob("ended*")])
    (tmp_path / "end").touch()
    for pid in pids:
        os.waitpid(pid, 0)
    assert (won, ended) == (1, 7)


def test_a_lock_that_was_replaced_meanwhile_is_not_deleted(tmp_path, monkeypatch):
    """Between reading the lock left behind and deleting it, another process has replaced it."""
    with locked(tmp_path):
        content = (tmp_path / LOCK).read_text()
    (tmp_path / LOCK).write_text(content)
    change(tmp_path, start="1")
    left_behind = (tmp_path / LOCK).read_bytes()
    change(tmp_path, host="elsewhere")
    newer = (tmp_path / LOCK).read_bytes()
    RunLock(tmp_path)._remove(left_behind)
    assert (tmp_path / LOCK).read_bytes() == newer
    RunLock(tmp_path)._remove(newer)
    assert list(tmp_path.iterdir()) == []


def test_a_guard_is_waited_for_unless_it_was_left_behind(tmp_path, monkeypatch):
    (tmp_path / LOCK).write_bytes(b"old")
    (tmp_path / GUARD).touch()
    RunLock(tmp_path)._remove(b"old")
    assert (tmp_path / LOCK).read_bytes() == b"old" and (tmp_path / GUARD).exists()
    os.utime(tmp_path / GUARD, (0, 0))
    RunLock(tmp_path)._remove(b"old")  # of the guard
    RunLock(tmp_path)._remove(b"old")
    assert list(tmp_path.iterdir()) == []
