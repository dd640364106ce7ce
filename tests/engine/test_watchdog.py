"""Processes that hang, are killed or fail, and the second Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from engine_toy import script_environment
from rank_programs import sleeping_rank_1

from clouds.engine.watchdog import place_of, shown

SCRIPT = Path(__file__).resolve().parents[1] / "rank_programs.py"
SLEEP_LINE = sleeping_rank_1.__code__.co_firstlineno + 2


def start(function, timeout, **environment):
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), function, str(timeout)],
        env={**script_environment(), **environment},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # its own process group, as in a terminal
    )


def run(function, timeout):
    process = start(function, timeout)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def test_a_rank_that_hangs_is_named_with_its_place():
    status, errors = run("sleeping_rank_1", 3)
    assert status == 1
    message = errors[errors.rindex("ProcessGroupError: ") :]
    assert "rank 0 waited for another process" in message
    assert "DIST_TIMEOUT 3 s" in message
    rows = dict(re.findall(r"^  rank (\d): (.*)$", message, re.M))
    assert f"rank_programs.py:{SLEEP_LINE} in sleeping_rank_1" in rows["1"]
    assert "comm.py" in rows["0"]
    assert "in all_gather" in rows["0"]
    assert "(this process)" in rows["0"]


@pytest.mark.slow
def test_a_slow_rank_is_waited_for_with_a_warning():
    status, errors = run("slow_rank_1", 4)
    assert status == 0, errors
    assert "no progress for 2 s; DIST_TIMEOUT is 4 s" in errors
    assert "in slow_rank_1" in errors


@pytest.mark.slow
def test_a_killed_rank_is_named_with_its_signal():
    status, errors = run("killed_rank_1", 30)
    assert status == 128 + signal.SIGKILL
    assert re.search(r"rank 1 \(process \d+\) was killed by SIGKILL", errors)
    assert "memory" in errors
    assert "rank 0" not in errors


@pytest.mark.slow
def test_the_error_that_is_shown_is_the_one_others_follow_from():
    status, errors = run("faulty_rank_1", 30)
    assert status == 1
    assert "Process 1 terminated with the following error" in errors
    assert errors.rstrip().endswith("KeyError: 'an error of the program'")


@pytest.mark.slow
def test_a_second_ctrl_c_ends_processes_that_do_not_react(tmp_path):
    process = start("deaf", 600, READY=str(tmp_path))
    end = time.monotonic() + 100
    while len([file for file in tmp_path.iterdir() if file.read_text()]) < 2:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None  # after the first, they may save
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGINT
    assert "processes that do not end in 1 s are killed" in errors
    for file in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


def test_the_place_of_a_call():
    frame = sys._getframe()
    text = shown(place_of(frame))
    assert text.startswith("engine/test_watchdog.py:")
    assert text.endswith("in test_the_place_of_a_call")
    assert shown(()) == "nowhere"
