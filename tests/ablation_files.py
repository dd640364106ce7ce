"""Fixtures: an ablation of two settings and seeds, whose runs take milliseconds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

FAKE = Path(__file__).with_name("fake_train.py")

TEXT = """
config: demo/warmup
output: {folder}/out
baseline: slow
seeds: [0, 1]
settings:
  slow: {{SOLVER.BASE_LR: 0.02}}
  fast:
    SOLVER: {{BASE_LR: 0.03}}
"""


@pytest.fixture
def fake_train(monkeypatch):
    """Runs of ablations are those of fake_train.py."""
    from clouds.ablation import plan

    command = plan.Run.command

    def fake(self, num_gpus=1):
        return [sys.executable, str(FAKE), *command(self, num_gpus)[4:]]

    monkeypatch.setattr(plan.Run, "command", fake)


@pytest.fixture
def ablation_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT.format(folder=tmp_path))
    return path
