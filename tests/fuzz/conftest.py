"""Counts of the session, and what makes thousands of inputs fast."""

from __future__ import annotations

import logging
import os

import fuzzing
import pytest

from clouds.cli import command_line


@pytest.fixture
def fast_and_quiet(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_line, "own_packages", fuzzing.own_packages)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def pytest_terminal_summary(terminalreporter):
    if not fuzzing.COUNTS:
        return
    terminalreporter.section("mutated inputs")
    rows = sorted(fuzzing.COUNTS.items())
    total = [sum(counts[o] for _, counts in rows) for o in fuzzing.OUTCOMES]
    table = [(kind, *(counts[o] for o in fuzzing.OUTCOMES)) for kind, counts in rows]
    for kind, *numbers in [("kind", *fuzzing.OUTCOMES), *table, ("all", *total)]:
        terminalreporter.write_line(f"{kind:28}" + "".join(f"{n:>12}" for n in numbers))
