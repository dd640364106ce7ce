"""tools/cache_sam.py: training does not run SAM's image encoder afterwards."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from dataset_files import random_image, write
from dataset_files import save as save_image
from tiny_sam_models import save

from clouds.cli import cache_sam as tool
from clouds.config import load_config
from clouds.data.build import build_train_loader
from clouds.data.datasets import forget_listings
from clouds.data.structures import Domain
from clouds.device import autocast
from clouds.self_training.refiners import build_refiner

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools/cache_sam.py"
NUM_IMAGES = 5
ENTRY = 64 + 2 * 64 * 8 * 8  # bytes of an embedding of the tiny SAM


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    """Joint training on one source and two generated datasets, five images in total."""
    forget_listings()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for i in range(2):
        write(tmp_path, "gta5", i)
    for i in range(NUM_IMAGES):
        folder = tmp_path / "stable_diffusion" / ("x" if i < 3 else "y")
        save_image(folder / "images" / f"{i}.png", random_image(i, (24, 32 + i)))
    sam = {"MODEL": "tiny", "WEIGHTS": "", "CACHE_DIR": str(tmp_path / "cache")}
    path = tmp_path / "joint.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "MODEL": {"DEVICE": "cpu", "CLOUDS": {"SAM": sam}},
                "DATASETS": {"TRAIN": ["gta5", "sd_x", "sd_y"]},
                "INPUT": {"CROP": {"SIZE": [16, 20]}},
                "SOLVER": {"IMS_PER_BATCH": 7},
                "DATALOADER": {"NUM_WORKERS": 0},
            }
        )
    )
    return path


def run(capsys, config_file, *overrides):
    tool.main(["--config-file", str(config_file), *map(str, overrides)])
    return capsys.readouterr()


def error_of(capsys, *argv):
    """The error message of a run that exits with status 2."""
    with pytest.raises(SystemExit) as exit_info:
        tool.main([*map(str, argv)])
    assert exit_info.value.code == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def train(cfg, num_batches):
    """Numbers of different clean images and of computed embeddings in batches of training."""
    refiner = build_refiner(cfg, "cpu")
    views = set()
    for batch in islice(build_train_loader(cfg), num_batches):
        clean = [s["clean_image"] for s in batch if s["domain"] is Domain.GENERATED]
        views |= {(tuple(image.shape), image.numpy().tobytes()) for image in clean}
        with autocast(cfg, torch.device("cpu")):
            refiner.embed(clean)
    return len(views), refiner.embed.computed


@pytest.mark.parametrize("amp", [False, True])
def test_training_computes_no_embedding_afterwards(amp, capsys, config_file, tmp_path):
    amp = ["SOLVER.AMP.ENABLED", str(amp)]
    output = run(capsys, config_file, *amp).out
    cache = tmp_path / "cache"
    assert len(files(cache)) == 2 * NUM_IMAGES
    assert "10 of 10 views" in output and "10 of them computed now" in output
    assert f"MODEL.CLOUDS.SAM.CACHE_DIR {cache}" in output
    assert f"computed in {'bfloat16' if amp[1] == 'True' else 'float32'}" in output
    assert train(load_config(config_file, amp), 30) == (2 * NUM_IMAGES, 0)
    # training with an empty cache writes the same embeddings
    empty_cache = ["MODEL.CLOUDS.SAM.CACHE_DIR", str(tmp_path / "empty")]
    assert train(load_config(config_file, [*amp, *empty_cache]), 30) == (
        2 * NUM_IMAGES,
        2 * NUM_IMAGES,
    )
    assert files(tmp_path / "empty") == files(cache)
    other = ["SOLVER.AMP.ENABLED", str(amp[1] == "False")]
    assert train(load_config(config_file, other), 30) == (2 * NUM_IMAGES, 2 * NUM_IMAGES)


@pytest.mark.parametrize("refiner", ["sam", "regions"])
def test_a_sam_of_transformers_and_regions(refiner, capsys, config_file, tmp_path):
    overrides = ["MODEL.CLOUDS.SAM.MODEL", save("sam2", tmp_path / "sam2")]
    overrides += ["MODEL.CLOUDS.REFINER", refiner, "MODEL.CLOUDS.REGIONS.POINTS_PER_SIDE", "2"]
    assert "10 of them computed now" in run(capsys, config_file, *overrides).out
    masks = list((tmp_path / "cache").glob("segments/*.npe"))
    assert len(masks) == (2 * NUM_IMAGES if refiner == "regions" else 0)
    assert train(load_config(config_file, overrides), 30) == (2 * NUM_IMAGES, 0)


def test_without_flips_there_is_one_view(capsys, config_file, tmp_path):
    output = run(capsys, config_file, "INPUT.FLIP", "False").out
    assert "5 of 5 views" in output
    assert len(files(tmp_path / "cache")) == NUM_IMAGES


def test_a_second_run_computes_only_missing_and_broken_embeddings(capsys, config_file, tmp_path):
    run(capsys, config_file)
    before = files(tmp_path / "cache")
    names = sorted(before)
    (tmp_path / "cache" / names[0]).unlink()
    (tmp_path / "cache" / names[1]).write_bytes(before[names[1]][:100])
    output = run(capsys, config_file).out
    assert "10 of 10 views" in output and "2 of them computed now" in output
    assert files(tmp_path / "cache") == before
    assert "0 of them computed now" in run(capsys, config_file).out


def test_the_size_of_the_folder_is_reported(capsys, config_file, tmp_path):
    output = run(capsys, config_file).out
    number = float(re.search(r"the folder has 10 embeddings, (\S+) GiB", output).group(1))
    size = sum(len(data) for data in files(tmp_path / "cache").values())
    assert size == 10 * ENTRY
    assert number == pytest.approx(size / 2**30, rel=5e-3)


def environment():
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow  # starts torchrun, like the slow tests of tests/engine/test_launch.py
def test_images_are_distributed_among_two_processes(capsys, config_file, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(TOOL), "--config-file", str(config_file)],
        env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "10 of 10 views" in done.stdout and "10 of them computed now" in done.stdout
    run(capsys, config_file, "MODEL.CLOUDS.SAM.CACHE_DIR", tmp_path / "single")
    assert files(tmp_path / "cache") == files(tmp_path / "single")


def test_a_full_disk_is_an_error(capsys, config_file, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ENTRY // 2, limits[1]))
    try:
        with pytest.raises(SystemExit) as exit_info:
            tool.main(["--config-file", str(config_file)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert exit_info.value.code == 2
    assert "0 of 10 views" in capsys.readouterr().out
    assert files(tmp_path / "cache") == {}


def test_too_little_disk_space_is_reported_before(capsys, config_file, monkeypatch):
    usage = type("Usage", (), {"free": 3 * ENTRY})
    monkeypatch.setattr(tool.shutil, "disk_usage", lambda folder: usage)
    assert "the embeddings may need" in run(capsys, config_file).err
    assert "the embeddings may need" not in run(capsys, config_file).err  # all are cached


def test_a_cache_folder_in_the_home_directory(capsys, config_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    output = run(capsys, config_file, "MODEL.CLOUDS.SAM.CACHE_DIR", "~/sam cache").out
    assert len(files(tmp_path / "home/sam cache")) == 2 * NUM_IMAGES
    assert f"MODEL.CLOUDS.SAM.CACHE_DIR '{tmp_path}/home/sam cache' and" in output


# ------------------------------------------------------------------ user errors


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("MODEL.CLOUDS.SAM.CACHE_DIR", ""), "MODEL.CLOUDS.SAM.CACHE_DIR is empty"),
        (("MODEL.CLOUDS.REFINER", "superpixel"), "does not use SAM"),
        (("MODEL.CLOUDS.SAM.ENABLED", "False"), "does not use SAM"),
        (("DATASETS.TRAIN", "('gta5',)"), "has no generated dataset"),
        (("DATASETS.TRAIN", "('gta5', 'sd_z')"), "sd_z"),
        (("MODEL.CLOUDS.SAM.WEIGHTS", "gone.pth"), "there is no file gone.pth"),
        (("MODEL.CLOUDS.SAM.CACHE_DIRS", "x"), "CACHE_DIR"),
        (("SEED",), "KEY VALUE"),
        (("SEED", "1", "--num-gpus", "2"), "comes after KEY VALUE"),
    ],
)
def test_user_errors(capsys, config_file, overrides, message):
    assert message in error_of(capsys, "--config-file", config_file, *overrides)


def test_a_folder_that_cannot_be_created(capsys, config_file):
    folder = config_file / "cache"
    text = error_of(capsys, "--config-file", config_file, "MODEL.CLOUDS.SAM.CACHE_DIR", folder)
    assert text.startswith("error: MODEL.CLOUDS.SAM.CACHE_DIR: cannot make the folder")
    assert text.count("\n") == 1


def test_a_broken_image_is_reported(capsys, config_file, tmp_path):
    (tmp_path / "stable_diffusion/y/images/4.png").write_bytes(b"torn")
    text = error_of(capsys, "--config-file", config_file)
    assert "4.png" in text
    assert len(files(tmp_path / "cache")) == 8  # the embeddings before it are kept


def test_no_config(capsys, tmp_path):
    assert "--config-file" in error_of(capsys)
    assert "no.yaml" in error_of(capsys, "--config-file", tmp_path / "no.yaml")


def test_the_embeddings_of_a_changed_image_are_computed_again(capsys, config_file, tmp_path):
    run(capsys, config_file)
    save_image(tmp_path / "stable_diffusion/x/images/0.png", random_image(77, (24, 32)))
    assert "2 of them computed now" in run(capsys, config_file).out
    assert len(files(tmp_path / "cache")) == 12


def test_help_is_quick():
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(TOOL), "--help"], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0 and "--num-gpus" in done.stdout
    assert time.monotonic() - start < 3
