"""benchmarks/in_turns.py: what a measurement says is what happened."""

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
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts a peak anew")


class HandClock:
    """Shows what it was set to."""

    def __init__(self):
        self.shown = 100.0

    def __call__(self):
        return self.shown


@pytest.mark.parametrize(("device", "counted"), [("cpu", 2.0), ("meta", 7.0)])
def test_a_span_has_both_clocks_and_the_device_says_which_counts(device, counted):
    cpu, wall = HandClock(), HandClock()
    with in_turns.Span(torch.device(device), cpu, wall) as span:
        cpu.shown += 2
        wall.shown += 7
    cpu.shown = wall.shown = 1000.0  # what comes later does not count
    assert (span.cpu, span.wall, span.seconds) == (2.0, 7.0, counted)


def test_waiting_is_no_time_of_the_processor():
    with in_turns.Span(CPU) as span:
        time.sleep(0.2)
    assert span.wall >= 0.2
    assert span.seconds == span.cpu < 0.1


def test_ways_take_turns_and_the_first_rounds_do_not_count():
    called = []

    def take(way):
        called.append(way)
        return f"{way}{len(called)}"

    taken = in_turns.in_turns({"a": "A", "b": "B"}, take, rounds=2, untimed=1)
    assert called == ["A", "B"] * 3
    assert taken == {"a": ["A3", "A5"], "b": ["B4", "B6"]}


def test_timed_gives_the_seconds_of_every_round(monkeypatch):
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
    """Ones of so many MiB: their pages are written, so they are resident."""
    return np.ones(count * 2**20, np.uint8)


@LINUX
def test_a_peak_is_what_was_added_and_freed_again():
    with in_turns.Peak(CPU) as peak:
        ones = mebibytes(200)
        del ones
        ones = mebibytes(100)
    assert peak.more == pytest.approx(200, abs=10)
    assert peak.total > peak.more
    assert ones.size


@LINUX
def test_a_larger_peak_before_hides_nothing():
    ones = mebibytes(500)
    del ones
    with in_turns.Peak(CPU) as peak:
        mebibytes(200)
    assert peak.more == pytest.approx(200, abs=10)


@LINUX
def test_what_is_held_already_does_not_count():
    held = mebibytes(200)
    with in_turns.Peak(CPU) as peak:
        mebibytes(50)
    assert peak.more == pytest.approx(50, abs=10)
    assert peak.total > 250
    assert held.size


@LINUX
def test_small_pieces_freed_before_hide_nothing():
    """The allocator keeps such for itself, where it is not asked to give them back."""
    pieces = many_pieces()
    last = pieces.pop()  # at the heap's end, so what lies before it is not given back by itself
    del pieces
    with in_turns.Peak(CPU) as peak:
        pieces = many_pieces()
    assert len(pieces) == 10_000
    assert peak.more == pytest.approx(10_000 * 20_000 / 2**20, abs=10)
    assert last


def many_pieces():
    return [b"x" * (20_000 + i % 2) for i in range(10_000)]


def test_without_warnings_of_weights_but_with_those_of_a_peak():
    names = ("clouds", "clouds.engine.benchmark")
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        in_turns.silence_all_but_peaks()
        assert not logging.getLogger("clouds.modeling").isEnabledFor(logging.WARNING)
        assert logging.getLogger("clouds.engine.benchmark").isEnabledFor(logging.WARNING)
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def test_the_machine_is_named():
    assert in_turns.machine(CPU) == f"cpu, {torch.get_num_threads()} threads, torch " + str(
        torch.__version__
    )
