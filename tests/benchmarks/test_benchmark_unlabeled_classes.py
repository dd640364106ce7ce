"""The table of benchmarks/unlabeled_classes.py, from results by hand, and its commands."""

from __future__ import annotations

import sys
from pathlib import Path

from clouds.config import load_config

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import unlabeled_classes  # noqa: E402


def result(miou, *terrain):
    others = {"truck": 8.0, "train": None}
    datasets = {str(i): {"IoU": {"terrain": t, **others}} for i, t in enumerate(terrain)}
    next(iter(datasets.values()))["IoU"]["train"] = 2.0
    return {"mean": {"mIoU": miou}, "datasets": datasets}


def test_a_row_of_two_seeds():
    """Terrain: means 20 and 30 over datasets, so 25, with a deviation of 5 sqrt(2)."""
    row = unlabeled_classes.row("x", [result(10.0, 15.0, 25.0), result(14.0, 30.0, None)])
    assert row == ["x", "12.0 ± 2.8", "25.0 ± 7.1", "8.0 ± 0.0", "2.0 ± 0.0", "10.0, 14.0"]


def test_settings_are_configs_that_differ_in_what_they_say():
    configs = {n: load_config("demo/warmup", o) for n, o in unlabeled_classes.SETTINGS.items()}
    told = [(c.DATASETS.TRAIN, c.MODEL.MASK_FORMER.UNLABELED_CLASSES) for c in configs.values()]
    both = ("gta5", "synthia")
    assert told == [(("gta5",), "ignore"), (both, "ignore"), (both, "absent")]
