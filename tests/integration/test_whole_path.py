"""Painted data to a trained and evaluated CLOUDS model, by the commands and in this process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_files import losses, resume, saved, train_until

from clouds.config import load_config
from clouds.engine import Trainer
from clouds.engine.launch import launch
from clouds.modeling.build import build_seeded

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "configs/demo/warmup.yaml"
SMALL = """
    MODEL.SEM_SEG_HEAD.CONVS_DIM 32 MODEL.SEM_SEG_HEAD.MASK_DIM 32 MODEL.MASK_FORMER.HIDDEN_DIM 32
    MODEL.MASK_FORMER.DEC_LAYERS 3 MODEL.MASK_FORMER.NUM_OBJECT_QUERIES 24
    MODEL.MASK_FORMER.TRAIN_NUM_POINTS 128 INPUT.CROP.SIZE (64,96) INPUT.SCALE_RANGE (0.4,0.6)
    DATALOADER.NUM_WORKERS 0 SOLVER.IMS_PER_BATCH 4 SOLVER.MAX_ITER 6 SOLVER.CHECKPOINT_PERIOD 3
    SOLVER.WARMUP_ITERS 0 LOG_PERIOD 1 TEST.SHORT_SIDE 64 TEST.VISUALIZED_IMAGES 1
""".split()


def tool(name, *words, data):
    environment = os.environ | {
        "DETECTRON2_DATASETS": str(data),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "projects/street_renderer")]),
    }
    command = [sys.executable, ROOT / "tools" / name, *words]
    return subprocess.run(
        [str(word) for word in command], env=environment, capture_output=True, text=True, cwd=ROOT
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("painted")
    names = ("gta5", "cityscapes_val", "bdd_val", "mapillary_val")
    words = ("--output", folder, "--datasets", *names, "--train", 8, "--val", 2)
    made = tool("make_demo_data.py", *words, "--size", 128, 256, "--workers", 1, data=folder)
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Folder and console of a whole run by the command."""
    folder = tmp_path_factory.mktemp("run")
    words = ("--config-file", DEMO, *SMALL, "OUTPUT_DIR", folder)
    done = tool("train_net.py", *words, data=data)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout + done.stderr


def config(folder, *overrides):
    return load_config(DEMO, [*SMALL, "OUTPUT_DIR", str(folder), *overrides])


def test_a_run_leaves_what_the_readme_promises(trained):
    folder, console = trained
    for name in ("log.txt", "config.yaml", "metrics.json", "model_final.pth", "results.json"):
        assert (folder / name).is_file(), name
    assert list((folder / "visualizations").glob("*/*.png"))
    assert list(folder.rglob("events.out.tfevents*"))
    results = json.loads((folder / "results.json").read_text())
    assert set(results["datasets"]) == {"cityscapes_val", "bdd_val", "mapillary_val"}
    assert "cityscapes_val" in console and "img/s" in console
    assert len(losses(folder)) == 6
    assert len(next(iter(losses(folder).values()))) >= 3 * 3  # three predictions, three losses each


def test_eval_only_repeats_the_final_scores(trained, data, tmp_path):
    folder, _ = trained
    overrides = (*SMALL, "OUTPUT_DIR", tmp_path, "MODEL.WEIGHTS", folder / "model_final.pth")
    words = ("--config-file", DEMO, "--eval-only", *overrides)
    done = tool("train_net.py", *words, data=data)
    assert done.returncode == 0, done.stderr
    (evaluated,) = (tmp_path / "eval").iterdir()
    again, first = (json.loads((f / "results.json").read_text()) for f in (evaluated, folder))
    for name, scores in first["datasets"].items():
        assert again["datasets"][name]["mIoU"] == pytest.approx(scores["mIoU"], abs=1e-9)


def test_a_broken_off_run_goes_on_bit_for_bit(trained, data, tmp_path, monkeypatch):
    whole, _ = trained
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data))
    torch.set_num_threads(1)
    cfg = config(tmp_path, "DATASETS.TEST", "()")
    train_until(Trainer(cfg), 4)
    resume(Trainer(cfg))
    assert losses(tmp_path) == losses(whole)
    for name, tensor in saved(whole)["model"].items():
        assert torch.equal(tensor, saved(tmp_path)["model"][name]), name


def train_frozen(folder, data):
    """What each process does."""
    os.environ["DETECTRON2_DATASETS"] = data
    torch.set_num_threads(1)
    # SGD, since Adam makes full steps of gradients that are nothing but rounding: those of biases
    # in front of a norm, and of the attention's key biases.
    # Points all at random: where the least certain ones are taken, a rounding error swaps points.
    points = ("MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO", "0")
    sgd = (*points, "SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", "1e-3")
    overrides = ("DATASETS.TEST", "()", "MODEL.BACKBONE.FREEZE", "True", *sgd)
    Trainer(config(folder, *overrides)).train()


def test_two_processes_train_as_one(data, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data))
    whole, shared = tmp_path / "one", tmp_path / "two"
    train_frozen(whole, str(data))
    launch(train_frozen, (str(shared), str(data)), num_gpus=2, device="cpu")
    one, two = losses(whole), losses(shared)
    assert one.keys() == two.keys()
    for iteration, expected in one.items():
        for name, value in expected.items():
            assert two[iteration][name] == pytest.approx(value, rel=1e-5), (iteration, name)
    before = build_seeded(config(whole)).state_dict()
    moved = 0.0
    for name, tensor in saved(whole)["model"].items():
        moved = max(moved, float((tensor - before[name]).abs().max()))
        torch.testing.assert_close(saved(shared)["model"][name], tensor, rtol=1e-5, atol=1e-5)
    assert moved > 1e-3  # so equality to 1e-5 says something


def test_build_from_python_segments(trained, data):
    import clouds

    folder, _ = trained
    overrides = [*SMALL, "OUTPUT_DIR", str(folder)]
    model = clouds.build(DEMO, overrides, weights=folder / "model_final.pth")
    assert not model.training
    image = torch.randint(0, 256, (3, 70, 90), dtype=torch.uint8)
    (labels,) = model.segment([{"image": image}])
    assert labels.shape == (70, 90) and labels.dtype == torch.uint8 and labels.max() < 19


def test_check_datasets_finds_the_painted_data_whole(data):
    names = ("gta5", "cityscapes_val", "bdd_val", "mapillary_val")
    done = tool("check_datasets.py", "--full", "--datasets", *names, data=data)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^(gta5|\w+_val) +ok +", done.stdout, re.M)) == 4


@pytest.mark.slow
def test_trivial_baselines_print_a_row_each(data):
    done = tool("trivial_baselines.py", "--config-file", DEMO, "--pixels", 2000, data=data)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| constant", "| color"))]
    assert len(rows) == 2
    for row in rows:
        *scores, mean = (float(cell) for cell in row.strip("|").split("|")[1:])
        assert len(scores) == 3 and mean == pytest.approx(sum(scores) / 3, abs=0.11)
