"""The published recipe at its own size: one training step and one evaluation on this CPU.

As a script, it does both in a process of its own and prints what they took as JSON:

    python tests/integration/test_full_size.py OUTPUT_DIR
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "warmup" / "gta_convnext_large.yaml"
LIMIT_GIB = 16.0


def step_and_evaluate(output_dir):
    """One training step on two crops of 768x768, one evaluation of a picture of 1024x2048."""
    from clouds.config import load_config
    from clouds.engine import Trainer

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from part_clock import PeakMemory

    settings = {
        "OUTPUT_DIR": output_dir,
        "MODEL.DEVICE": "cpu",
        "MODEL.CLOUDS.CLIP_PRETRAINED_WEIGHTS": "",
        "DATASETS.TEST": "('cityscapes_val',)",
        "DATALOADER.NUM_WORKERS": 0,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.AMP.ENABLED": False,
        "TEST.VISUALIZED_IMAGES": 0,
    }
    cfg = load_config(CONFIG, [word for pair in settings.items() for word in pair])
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    memory = PeakMemory(trainer.device)
    found = {"parameters": sum(p.numel() for p in trainer.model.parameters())}

    before = sums(trainer.model)
    batch = next(iter(trainer.batches))
    found["peak_gib_of_building"] = memory.gib()
    memory.reset()
    started = perf_counter()
    step = trainer.train_step(0, batch, started)
    found["step"] = {
        "seconds": perf_counter() - started,
        "peak_gib": memory.gib(),
        "crops": [list(sample["image"].shape) for sample in batch],
        "losses": step.losses,
        "grad_norm": step.grad_norm,
    }
    changed = [name for name, value in sums(trainer.model).items() if value != before[name]]
    found["changed"] = {part: sum(n.startswith(part) for n in changed) for part in PARTS}

    memory.reset()
    started = perf_counter()
    (result,) = trainer.evaluate().datasets
    found["evaluation"] = {
        "seconds": perf_counter() - started,
        "peak_gib": memory.gib(),
        "images": result.images,
        "miou": result.miou,
        "pixel_accuracy": result.pixel_accuracy,
    }
    print(json.dumps(found))


def sums(model):
    """Name of each parameter -> the sum of its values."""
    return {name: float(p.detach().double().sum()) for name, p in model.named_parameters()}


PARTS = ("backbone", "sem_seg_head", "void_embedding")


def paint(root, name, size, *counts):
    command = [sys.executable, str(ROOT / "tools" / "make_demo_data.py"), "--output", str(root)]
    command += ["--datasets", name, "--size", *map(str, size), *map(str, counts)]
    subprocess.run(command, check=True, capture_output=True, env=environment(root))


def environment(root):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "DETECTRON2_DATASETS": str(root)}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "wait4"), reason="needs os.wait4 to ask for peak memory")
def test_one_step_and_one_evaluation_of_the_published_recipe(tmp_path, capsys):
    root = tmp_path / "datasets"
    paint(root, "gta5", (1052, 1914), "--train", 2)
    paint(root, "cityscapes_val", (1024, 2048), "--val", 1)
    command = [sys.executable, __file__, str(tmp_path / "output")]
    with (tmp_path / "errors.txt").open("w+") as errors:
        process = subprocess.Popen(
            command, env=environment(root), stdout=subprocess.PIPE, stderr=errors, text=True
        )
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stdout.close()
        errors.seek(0)
        assert process.returncode == 0, errors.read()[-4000:]
    found = json.loads(output.splitlines()[-1])
    step, evaluation = found["step"], found["evaluation"]
    # The system's own count begins anew where the script's does, so it is that of the evaluation.
    told = usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    assert told == pytest.approx(evaluation["peak_gib"], rel=0.05)
    peak = max(found["peak_gib_of_building"], step["peak_gib"], told)
    with capsys.disabled():
        print(
            f"\nfull size, {found['parameters'] / 1e6:.0f} M parameters: training step of 2 x "
            f"768x768 {step['seconds']:.0f} s, peak {step['peak_gib']:.2f} GiB; evaluation of "
            f"1024x2048 {evaluation['seconds']:.0f} s, peak {evaluation['peak_gib']:.2f} GiB"
        )
    assert peak < LIMIT_GIB
    # ConvNeXt-L is 196 M parameters alone
    assert found["parameters"] > 196e6
    assert step["crops"] == [[3, 768, 768]] * 2
    # class, mask and dice losses of ten predictions
    assert len(step["losses"]) == 30
    assert all(math.isfinite(loss) and loss > 0 for loss in step["losses"].values())
    assert math.isfinite(step["grad_norm"]) and step["grad_norm"] > 0
    assert found["changed"]["sem_seg_head"] > 100
    assert found["changed"]["backbone"] == found["changed"]["void_embedding"] == 0
    assert evaluation["images"] == 1
    assert 0 <= evaluation["miou"] <= 100 and 0 <= evaluation["pixel_accuracy"] <= 100


if __name__ == "__main__":
    step_and_evaluate(sys.argv[1])
