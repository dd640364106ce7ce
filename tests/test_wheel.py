"""The built wheel: it holds configs, prompts and entry points, and works without the checkout."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the files under version control."""
    pytest.importorskip("setuptools", minversion="70.1")
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("needs a git checkout")
    source = tmp_path_factory.mktemp("source")
    folders = ("clouds", "configs", "projects", "prompts")
    for name in listed.stdout.split("\0"):
        if name and (ROOT / name).is_file() and ("/" not in name or name.split("/")[0] in folders):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    output = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(output)]
    command = [sys.executable, "-m", "pip", "wheel", str(source), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = output.glob("*.whl")
    return file


def files(folder):
    top = ROOT / folder
    return {p.relative_to(ROOT).as_posix() for p in top.rglob("*") if p.is_file()}


def test_it_holds_configs_prompts_and_modules(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"clouds/{name}" for name in files("configs") | files("prompts")} <= names
    assert {"clouds/__main__.py", "clouds/py.typed", "street_renderer/demo.py"} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {
        "clouds",
        "clouds_dgss",
        "street_models",
        "street_renderer",
    }


def test_its_entry_points(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("entry_points.txt")]
        parser = configparser.ConfigParser()
        parser.read_string(archive.read(name).decode())
    assert dict(parser["console_scripts"]) == {"clouds": "clouds.cli.main:main"}
    assert set(parser["clouds.commands"]) == {"demo", "make-demo-data"}
    assert set(parser["clouds.generators"]) == {"procedural"}
    assert {"street_clip", "street_sam"} <= set(parser["clouds.weights"])


@pytest.mark.slow
def test_it_works_without_the_checkout(wheel, tmp_path):
    installed = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(installed)
    environment = os.environ | {"PYTHONPATH": str(installed), "CLOUDS_D2": "embedded"}

    def run(*words):
        command = [sys.executable, "-m", "clouds", *words]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    shown = run("list-config", "test.slide.crop", "--config-file", "configs/demo/warmup.yaml")
    assert shown.startswith("TEST.SLIDE.CROP_SIZE\n    value: ")
    assert run("check-prompts", "street_scenes").startswith("street_scenes: 335 prompts")
    assert "usage: python -m clouds demo" in run("demo", "--help")
