"""The fuzzers' own parts: what counts as a traceback, and the number of inputs."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path

import pytest
from fuzzing import ACCEPTED, COUNTS, REFUSED, SLOW_INPUTS, Attempts, mutate

from clouds.generation.prompts import read_prompts


@pytest.fixture
def attempt():
    yield Attempts("toy")
    del COUNTS["toy"]


def test_outcomes(attempt, tmp_path):
    assert attempt(lambda: 3) == (ACCEPTED, 3)
    outcome, message = attempt(lambda: read_prompts(tmp_path / "no.txt"), "no.txt")
    assert outcome == REFUSED
    assert message.startswith(f"prompt file {tmp_path}/no.txt does not exist")
    assert COUNTS["toy"] == Counter(accepted=1, refused=1)


def test_tracebacks(attempt, tmp_path):
    with pytest.raises(ZeroDivisionError):
        attempt(lambda: 1 // 0)
    with pytest.raises(ValueError, match="invalid literal"):
        attempt(lambda: int("x"))
    with pytest.raises(AssertionError, match=r"names none of \('other.txt',\)"):
        attempt(lambda: read_prompts(tmp_path / "no.txt"), "other.txt")
    assert COUNTS["toy"] == Counter(traceback=3)


def test_mutations():
    half = 1 << 15
    assert mutate(b"abcd", [(0, half, 0, ord("x"))]) == b"abxd"
    assert mutate(b"abcd", [(1, half, 0, 0)]) == b"ab"
    assert mutate(b"abcd", [(2, half, 1, 0)]) == b"abd"
    assert mutate(b"abcd", [(3, half, 1, 1)]) == b"abcccd"
    assert mutate(b"abcd", [(4, half, 0, 0)]) == b"ab\0cd"
    assert mutate(b"abcd", [(5, half, 0, 1)]) == b"abad"
    assert mutate(b"abcd", [(6, half, 0, 1)]) == b"abad"
    assert mutate(b"abcd", [(7, half, 1, 0)]) == b"ab\0d"
    assert mutate(b"abcd", [(0, half, 0, ord("x")), (1, half, 0, 0)]) == b"ab"


def test_the_slow_tests_have_100_000_inputs():
    for path in Path(__file__).parent.glob("test_*.py"):
        importlib.import_module(path.stem)
    assert sum(SLOW_INPUTS.values()) >= 100_000
