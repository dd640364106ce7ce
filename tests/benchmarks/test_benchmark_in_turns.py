"""benchmarks/in_turns.py: measurements equal known durations and amounts of memory."""

from __future__ import annotations

import logging
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import in_turns  # noqa: E402

CPU = torch.device("cpu")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak")


class HandClock:
    """A clock that is set by hand."""

    def __init__(self):
        self.shown = 100.0

    def __call__(self):
        return self.shown


@pytest.mark.parametrize(("device", "counted"), [("cpu", 2.0), ("meta", 7.0)])
def test_seconds_of_a_span_depend_on_the_device(device, counted):
    cpu, wall = HandClock(), HandClock()
    with in_turns.Span(torch.device(device), cpu, wall) as span:
        cpu.shown += 2
        wall.shown += 7
    cpu.shown = wall.shown = 1000.0  # no effect after the context
    assert (span.cpu, span.wall, span.seconds) == (2.0, 7.0, counted)


def test_sleeping_takes_no_processor_time():
    with in_turns.Span(CPU) as span:
        time.sleep(0.2)
    assert span.wall >= 0.2
    assert span.seconds == span.cpu < 0.1


def test_implementations_alternate_and_untimed_rounds_are_dropped():
    called = []

    def take(way):
        called.append(way)
        return f"{way}{len(called)}"

    taken = in_turns.in_turns({"a": "A", "b": "B"}, take, rounds=2, untimed=1)
    assert called == ["A", "B"] * 3
    assert taken == {"a": ["A3", "A5"], "b": ["B4", "B6"]}


def test_timed_returns_the_seconds_of_each_round(monkeypatch):
    clock = HandClock()

    def lasting(*seconds):
        left = iter(seconds)
        return lambda: setattr(clock, "shown", clock.shown + next(left))

    span = in_turns.Span
    monkeypatch.setattr(in_turns, "Span", lambda device: span(device, clock, clock))
    ways = {"slow": lasting(9, 4, 6), "fast": lasting(9, 1, 2)}
    assert in_turns.timed(ways, 2, CPU, untimed=1) == {"slow": [4, 6], "fast": [1, 2]}


def test_a_report_has_median_spread_and_ratio_to_the_first():
    times = {"theirs": [8.0, 2.0, 5.0], "ours": [0.5, 4.0, 2.0]}
    lines = in_turns.report(times, "ms", {"theirs": "large", "ours": "small"}).splitlines()
    numbers = [[float(n) for n in re.findall(r"\d+\.\d+", line)] for line in lines]
    assert numbers == [[5.0, 2.0, 8.0, 1.0], [2.0, 0.5, 4.0, 2.5]]
    assert lines[0].startswith("theirs:") and lines[1].startswith("  ours:")
    assert "ms" in lines[0] and lines[0].endswith("; large") and lines[1].endswith("; small")
    assert in_turns.report({"a": [0.00123456]}).count("0.001235") == 3


def mebibytes(count):
    """An array of `count` MiB, whose pages are resident since they are written."""
    return np.ones(count * 2**20, np.uint8)


@LINUX
def test_peak_of_arrays_that_are_freed():
    with in_turns.Peak(CPU) as peak:
        ones = mebibytes(200)
        del ones
        ones = mebibytes(100)
    assert peak.more == pytest.approx(200, abs=10)
    assert peak.total > peak.more
    assert ones.size


@LINUX
def test_a_larger_earlier_peak_has_no_effect():
    ones = mebibytes(500)
    del ones
    with in_turns.Peak(CPU) as peak:
        mebibytes(200)
    assert peak.more == pytest.approx(200, abs=10)


@LINUX
def test_memory_allocated_before_is_not_included():
    held = mebibytes(200)
    with in_turns.Peak(CPU) as peak:
        mebibytes(50)
    assert peak.more == pytest.approx(50, abs=10)
    assert peak.total > 250
    assert held.size


@LINUX
def test_small_blocks_freed_before_have_no_effect():
    """The allocator keeps such blocks unless it is told to return them."""
    pieces = many_pieces()
    last = (
        pieces.pop()
    )  # at the end of the heap, so the memory before it is not returned automatically
    del pieces
    with in_turns.Peak(CPU) as peak:
        pieces = many_pieces()
    assert len(pieces) == 10_000
    assert peak.more == pytest.approx(10_000 * 20_000 / 2**20, abs=10)
    assert last


def many_pieces():
    return [b"x" * (20_000 + i % 2) for i in range(10_000)]


def test_only_warnings_of_peaks_are_enabled():
    names = ("clouds", "part_clock")
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        in_turns.silence_all_but_peaks()
        assert not logging.getLogger("clouds.modeling").isEnabledFor(logging.WARNING)
        assert logging.getLogger("part_clock").isEnabledFor(logging.WARNING)
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def test_description_of_the_machine():
    assert in_turns.machine(CPU) == f"cpu, {torch.get_num_threads()} threads, torch " + str(
        torch.__version__
    )
