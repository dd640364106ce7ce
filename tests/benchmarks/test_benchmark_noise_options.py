"""The table of benchmarks/noise_options.py, from results by hand, and its commands."""

from __future__ import annotations

import sys
from pathlib import Path

from clouds.config import load_config
from clouds.data.label_space import CITYSCAPES_19

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import noise_options  # noqa: E402


def result(miou, accuracies, *poles, teacher=20.0):
    others = {"traffic light": 8.0, "rider": None, "bicycle": 2.0}
    datasets = {
        str(i): {"IoU": {"pole": pole, **others}, "pixel-accuracy": accuracy}
        for i, (pole, accuracy) in enumerate(zip(poles, accuracies, strict=True))
    }
    labels = {"sd_demo": {"mIoU": {"teacher": teacher}}}
    return {"mean": {"mIoU": miou}, "datasets": datasets, "pseudo-labels": labels}


def test_a_row_of_two_seeds():
    """Rare classes: means of 5, 8, 2, 11, 8, 2 and of 17, 8, 2, 8, 2."""
    results = [
        result(10.0, (60.0, 70.0), 5.0, 11.0),
        result(14.0, (70.0, 80.0), 17.0, None, teacher=24.0),
    ]
    row = noise_options.row("x", results)
    assert row == ["x", "12.0 ± 2.8", "70.0 ± 7.1", "6.7 ± 1.0", "22.0 ± 2.8", "10.0, 14.0"]
    without = {**results[0], "pseudo-labels": {}}
    assert noise_options.row("x", [without])[4] == "-"


def test_settings_are_configs_that_differ():
    configs = {n: load_config("demo/joint", list(o)) for n, o in noise_options.SETTINGS.items()}
    assert len({cfg.dump() for cfg in configs.values()}) == len(configs)
    assert configs["published"].dump() == load_config("demo/joint", []).dump()
    combined = configs["DAFormer's loop, dice 0"]
    assert combined.INPUT.CLASS_MIXING and combined.MODEL.CLOUDS.ITERATION_UPDATE == 1
    assert combined.MODEL.CLOUDS.PSEUDO_LABEL.DICE_WEIGHT == 0
    assert set(noise_options.RARE) <= set(CITYSCAPES_19.names)
