"""Short names of configs and prompts that come with the package."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

import clouds
from clouds.config import load_config
from clouds.generation.prompts import read_prompts
from clouds.resources import ABLATIONS, CONFIGS, PROMPTS, find, near_names, short_names

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [
        "warmup/gta_rn50",
        "warmup/gta_rn50.yaml",
        "configs/warmup/gta_rn50.yaml",
        "configs/warmup/gta_rn50",
        "./configs/warmup/gta_rn50.yaml",
    ],
)
def test_a_config_outside_of_the_checkout(elsewhere, name):
    assert find(CONFIGS, name) == ROOT / "configs/warmup/gta_rn50.yaml"
    assert load_config(name) == load_config(ROOT / "configs/warmup/gta_rn50.yaml")


def test_short_names_are_the_files():
    done = subprocess.run(
        ["find", "configs", "-name", "*.yaml"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = {line.removeprefix("configs/").removesuffix(".yaml") for line in done.stdout.split()}
    ablations = {name for name in files if name.startswith("ablations/")}
    assert set(short_names(CONFIGS)) == files - ablations
    assert {f"ablations/{name}" for name in short_names(ABLATIONS)} == ablations != set()
    assert short_names(PROMPTS) == ["street_scenes"]


def test_a_file_of_the_working_directory_comes_first(elsewhere):
    (elsewhere / "warmup").mkdir()
    (elsewhere / "warmup/gta_rn50.yaml").write_text(yaml.dump({"SEED": 41}))
    assert load_config("warmup/gta_rn50.yaml").SEED == 41
    assert load_config("warmup/gta_rn50").SEED == 0  # no such file


def test_a_folder_is_no_config(elsewhere):
    (elsewhere / "demo/warmup").mkdir(parents=True)  # such as an OUTPUT_DIR
    assert find(CONFIGS, "demo/warmup") == ROOT / "configs/demo/warmup.yaml"


@pytest.mark.parametrize("name", ["../configs/base", "/configs/base.yaml", "none", "warmup"])
def test_what_is_no_name_stays_as_it_is(elsewhere, name):
    assert find(CONFIGS, name) == Path(name)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("warmup/gta_rn51", "warmup/gta_rn50"),
        ("gta_convnext_large", "joint/gta_convnext_large"),
        ("configs/demo/warmpu.yaml", "demo/warmup"),
    ],
)
def test_a_wrong_name_lists_the_near_ones(elsewhere, name, near):
    assert near in near_names(CONFIGS, name)
    for read in (load_config, clouds.build):
        with pytest.raises(FileNotFoundError, match=near) as error:
            read(name)
        assert f"Config file {name} does not exist" in str(error.value)


def test_prompts(elsewhere):
    lines = (ROOT / "prompts/street_scenes.txt").read_text().splitlines()
    written = [line for line in lines if line.strip() and not line.startswith("#")]
    for name in ("street_scenes", "street_scenes.txt", "prompts/street_scenes.txt"):
        assert read_prompts(name) == written
    with pytest.raises(FileNotFoundError, match=r"street_scene does not exist.*: street_scenes\."):
        read_prompts("street_scene")


def test_an_installation_without_the_files_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("clouds.resources._PACKAGE", tmp_path / "clouds")
    (tmp_path / "configs").mkdir()  # of something else: there is no pyproject.toml
    with pytest.raises(FileNotFoundError, match=r"has no configs.*Install CLOUDS again"):
        find(CONFIGS, "demo/warmup")
