"""The pages of docs/extend, followed literally: their files are written, their commands run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from engine_toy import script_environment
from test_docs import code_blocks

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "extend"
SHELL = 'python() { "$PYTHON" "$@"; }\nclouds() { "$PYTHON" -m clouds "$@"; }\n'

pytestmark = pytest.mark.slow


def follow(page, folder):
    """Write the files of a page into a folder, and run its other blocks there, in order."""
    for block in code_blocks((PAGES / page).read_text()):
        name = re.match(r"# (\w+\.py)\n", block)
        if name:
            (folder / name[1]).write_text(block)
        else:
            run(block, folder)


def run(block, folder):
    environment = script_environment() | {
        "PYTHON": sys.executable,
        "DETECTRON2_DATASETS": "datasets/demo",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-ec", SHELL + block],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def losses(run_folder):
    lines = (run_folder / "metrics.json").read_text().splitlines()
    return {key for line in lines for key in json.loads(line) if "loss" in key}


def score(run_folder):
    return json.loads((run_folder / "results.json").read_text())["mean"]["mIoU"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    follow("index.md", folder)
    return folder / "datasets"


@pytest.fixture
def folder(data, tmp_path):
    (tmp_path / "datasets").symlink_to(data)
    return tmp_path


@pytest.mark.parametrize(
    "page, output",
    [
        ("backbone.md", "resnet18"),
        ("adapter.md", "scale"),
        ("refiner.md", "smoothed"),
        ("generator.md", "casts"),
        ("loss.md", "entropy"),
    ],
)
def test_the_page_can_be_followed(page, output, folder):
    follow(page, folder)
    assert 0 <= score(folder / "output" / output) <= 100
    expected = {"loss_entropy"} if page == "loss.md" else set()
    assert expected <= losses(folder / "output" / output)
    log = (folder / "output" / output / "log.txt").read_text()
    parameters = re.search(r"built \w+ on cpu: (\d+) parameters, (\d+) of them train", log)
    total, trained = int(parameters[1]), int(parameters[2])
    if page == "adapter.md":
        assert trained < total / 2  # the backbone is frozen, adapter and head train
    if page == "backbone.md":
        assert total > 11_000_000  # ResNet-18 without its classifier has 11.2 million
