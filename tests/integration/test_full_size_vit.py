"""SoMA's recipe at its own size with random weights: one training step on this CPU.

As a script, it does so in a process of its own and prints what it took as JSON:

    python tests/integration/test_full_size_vit.py OUTPUT_DIR
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
from dataset_files import random_image, save

ROOT = Path(__file__).resolve().parents[2]
LIMIT_GIB = 16.0


def step(output_dir):
    """One training step on a crop of 512x512."""
    from clouds.config import load_config
    from clouds.engine import Trainer

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from part_clock import PeakMemory

    settings = {
        "OUTPUT_DIR": output_dir,
        "MODEL.DEVICE": "cpu",
        "MODEL.BACKBONE.WEIGHTS": "",
        "DATASETS.TEST": "()",
        "DATALOADER.NUM_WORKERS": 0,
        "SOLVER.IMS_PER_BATCH": 1,
        "SOLVER.CHECKPOINT_ADAPTERS_ONLY": False,
    }
    cfg = load_config("papers/soma_gta", [word for pair in settings.items() for word in pair])
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    memory = PeakMemory(trainer.device)
    trained = {
        n: float(p.detach().double().abs().sum()) for n, p in trainer.model.named_parameters()
    }
    batch = next(iter(trainer.batches))
    memory.reset()
    started = perf_counter()
    done = trainer.train_step(0, batch, started)
    changed = [
        name
        for name, p in trainer.model.named_parameters()
        if float(p.detach().double().abs().sum()) != trained[name]
    ]
    backbone = [p for n, p in trainer.model.named_parameters() if n.startswith("backbone.")]
    found = {
        "seconds": perf_counter() - started,
        "peak_gib": memory.gib(),
        "losses": done.losses,
        "grad_norm": done.grad_norm,
        "trained_in_backbone": sum(p.numel() for p in backbone if p.requires_grad),
        "changed_in_backbone": [name for name in changed if name.startswith("backbone.")],
    }
    print(json.dumps(found))


@pytest.mark.slow
def test_one_step_of_soma(tmp_path, capsys):
    labels = np.random.default_rng(0).choice(np.array([7, 11, 21, 23], np.uint8), (8, 8))
    save(tmp_path / "gta5/images/0.png", random_image(0, (1024, 1024)))
    save(tmp_path / "gta5/labels/0.png", np.kron(labels, np.ones((128, 128), np.uint8)))
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "DETECTRON2_DATASETS": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "output")],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(
            f"\nSoMA on DINOv2-L, random weights: training step of 1 x 512x512 "
            f"{found['seconds']:.0f} s, peak {found['peak_gib']:.2f} GiB"
        )
    assert found["peak_gib"] < LIMIT_GIB
    # the updates, and the biases of the adapted layers, of blocks 8 to 23
    assert found["trained_in_backbone"] == 4_718_592 + 147_456
    assert found["changed_in_backbone"]
    assert all(".blocks." in name for name in found["changed_in_backbone"])
    assert len(found["losses"]) == 30
    assert all(math.isfinite(loss) and loss > 0 for loss in found["losses"].values())
    assert math.isfinite(found["grad_norm"]) and found["grad_norm"] > 0


if __name__ == "__main__":
    step(sys.argv[1])
