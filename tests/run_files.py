"""Reading the files of a run, and interrupting one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch


def losses(folder):
    """Iteration -> its losses by name, from metrics.json."""
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
    """Train, and raise KeyboardInterrupt in that iteration."""
    step = trainer.train_step

    def interrupt(number, *rest):
        if number == iteration:
            raise KeyboardInterrupt
        return step(number, *rest)

    trainer.train_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def resume(trainer):
    """Resume from the newest checkpoint, and train."""
    trainer.resume_or_load(resume=True)
    return trainer.train()
