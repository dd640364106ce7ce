"""What a run leaves on disk, and how to break one off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch


def losses(folder):
    """Iteration -> every loss of it, from metrics.json."""
    records = [json.loads(line) for line in Path(folder, "metrics.json").read_text().splitlines()]
    return {
        r["iteration"]: {k: v for k, v in r.items() if "loss" in k}
        for r in records
        if "loss_ce" in r
    }


def saved(folder):
    """The final checkpoint."""
    return torch.load(Path(folder, "model_final.pth"), weights_only=True)


def train_until(trainer, iteration):
    """Train, and break off in the midst of that iteration as Ctrl-C would."""
    step = trainer.iteration

    def break_off(number, *rest):
        if number == iteration:
            raise KeyboardInterrupt
        return step(number, *rest)

    trainer.iteration = break_off
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
