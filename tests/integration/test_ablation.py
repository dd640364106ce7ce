"""`clouds ablate` with real training runs, started as users start it."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time

import dataset_files
import pytest
from tiny_model import tiny_config

pytestmark = pytest.mark.slow

SETTINGS = {
    "DATALOADER__NUM_WORKERS": 0,
    "DATASETS__TRAIN": ("gta5",),
    "DATASETS__TEST": ("cityscapes_val",),
    "INPUT__SCALE_RANGE": (1.0, 1.0),
    "INPUT__CROP__SIZE": (64, 96),
    "SOLVER__IMS_PER_BATCH": 2,
    "SOLVER__MAX_ITER": 4,
    "SOLVER__CHECKPOINT_PERIOD": 1,
    "TEST__SHORT_SIDE": 32,
    "TEST__EVAL_PERIOD": 2,
}
TEXT = """
config: {folder}/base.yaml
output: {folder}/out
seeds: [3]
settings:
  base:
  fast: {{SOLVER.BASE_LR: 1e-3}}
metrics: {{mIoU: mean/mIoU, accuracy: "*/pixel-accuracy"}}
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    root = tmp_path / "datasets"
    for i in range(2):
        dataset_files.write(root, "gta5", i, (64, 96))
        dataset_files.write(root, "cityscapes_val", i, (64, 96))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    (tmp_path / "base.yaml").write_text(tiny_config(**SETTINGS).dump())
    (tmp_path / "a.yaml").write_text(TEXT.format(folder=tmp_path))
    return [sys.executable, "-m", "clouds", "ablate", str(tmp_path / "a.yaml")]


def run(command):
    return subprocess.run(command, capture_output=True, text=True)


def test_interrupted_then_continued(command, tmp_path):
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    first = tmp_path / "out/base/seed_3"
    while not (first / "last_checkpoint").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 143 and "the same command goes on" in output
    done = run(command)
    assert done.returncode == 0, done.stdout + done.stderr
    folders = [tmp_path / f"out/{name}/seed_3" for name in ("base", "fast")]
    base, fast = (json.loads((folder / "results.json").read_text()) for folder in folders)
    assert [r["seed"] for r in (base, fast)] == [3, 3]
    lines = list(csv.DictReader((tmp_path / "out/table.csv").read_text().splitlines()))
    assert float(lines[2]["mean"]) == fast["mean"]["mIoU"]
    assert float(lines[2]["difference"]) == fast["mean"]["mIoU"] - base["mean"]["mIoU"]
    assert "resuming at iteration" in (folders[0] / "log.txt").read_text()
    assert "0 of 2 runs are to do" in run(command).stdout
    changed = run([*command, "SOLVER.MAX_ITER", "5"])
    assert changed.returncode == 2
    assert "base, seed 3 has now: SOLVER.MAX_ITER: 4 -> 5" in changed.stderr
