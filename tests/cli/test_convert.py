"""tools/convert_checkpoint.py: the written tensors, the omitted entries, the errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
from reference_files import REFERENCE
from tiny_model import tiny_config, tiny_model

from clouds.config import load_config
from clouds.engine.checkpoint import Checkpointer
from clouds.modeling.build import build_seeded

ROOT = Path(__file__).resolve().parents[2]
KEYS = REFERENCE / "official_keys.json"
needs_keys = pytest.mark.skipif(not KEYS.is_file(), reason=f"no published keys at {KEYS}")


@pytest.fixture(scope="module")
def convert():
    from clouds.cli import convert

    def run(*words):
        """Returns the exit code."""
        try:
            return convert.main([str(word) for word in words])
        except SystemExit as leaving:
            return leaving.code

    return run


@pytest.fixture
def run(tmp_path):
    """A checkpoint with entries of joint training, and the model's tensors."""
    weights = dict(tiny_model(SEED=3).state_dict())
    extra = {"sem_seg_head_ema.predictor.x": torch.ones(1), "sam.sam.y": torch.ones(1)}
    content = {"model": weights | extra, "optimizer": {"state": {}}, "iteration": 9, "clouds": {}}
    torch.save(content, tmp_path / "model_final.pth")
    return tmp_path / "model_final.pth", weights


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def families(names):
    return {re.sub(r"\.\d+(?=\.|$)", ".N", name) for name in names}


def test_to_safetensors(convert, run, tmp_path, capsys):
    path, weights = run
    assert convert(path, tmp_path / "out.safetensors") == 0
    # The file is read by the library.
    with safetensors.safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert same({name: file.get_tensor(name) for name in file.keys()}, weights)  # noqa: SIM118
    model = tiny_model()
    Checkpointer(model).load_weights(str(tmp_path / "out.safetensors"))
    assert same(dict(model.state_dict()), weights)
    text = capsys.readouterr().out
    assert f"{len(weights)} tensors" in text
    assert "left out, tensors: sem_seg_head_ema (1), sam (1)" in text
    assert "left out, other entries: clouds, iteration, optimizer" in text
    assert len(text.splitlines()) < 24


def test_to_the_published_format_and_back(convert, run, tmp_path):
    path, weights = run
    assert convert(path, tmp_path / "a.safetensors") == 0
    assert convert(tmp_path / "a.safetensors", tmp_path / "b.pth", "--to", "published") == 0
    content = torch.load(tmp_path / "b.pth", weights_only=True)
    assert list(content) == ["model"]
    assert same(content["model"], weights)


@needs_keys
@pytest.mark.parametrize("kind", ["plain", "wrapped"])
def test_names_are_those_of_published_checkpoints(convert, tmp_path, kind):
    weights = dict(tiny_model().state_dict())
    if kind == "wrapped":
        weights = {f"module.{name}": value for name, value in weights.items()}
    torch.save(weights, tmp_path / "in.pth")
    assert convert(tmp_path / "in.pth", tmp_path / "out.pth") == 0
    written = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert families(written) == families(json.loads(KEYS.read_text()))


@needs_keys
@pytest.mark.slow
def test_every_key_and_shape_of_the_published_model(convert, tmp_path):
    clip = ["MODEL.CLOUDS.CLIP_MODEL_NAME", "convnext_base"]
    random = ["MODEL.CLOUDS.CLIP_PRETRAINED_WEIGHTS", "", "MODEL.DEVICE", "cpu"]
    cfg = load_config(None, clip + random)
    torch.save({"model": build_seeded(cfg).state_dict()}, tmp_path / "in.pth")
    assert convert(tmp_path / "in.pth", tmp_path / "out.pth") == 0
    written = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    official = json.loads(KEYS.read_text())
    assert {name: list(value.shape) for name, value in written.items()} == {
        name: fact["shape"] for name, fact in official.items()
    }


def config_file(folder):
    path = folder / "tiny.yaml"
    path.write_text(tiny_config().dump())
    return path


def test_comparison_with_a_config(convert, run, tmp_path, capsys):
    path, weights = run
    config = config_file(tmp_path)
    assert convert(path, tmp_path / "a.pth", "--config-file", config) == 0
    assert same(torch.load(tmp_path / "a.pth", weights_only=True)["model"], weights)
    assert f"exactly the tensors of {config}" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["shape", "missing", "override"])
def test_weights_of_another_config(convert, run, tmp_path, wrong, capsys):
    _, weights = run
    name, override = "sem_seg_head.predictor.query_feat.weight", []
    if wrong == "shape":
        weights[name] = torch.ones(5, 32)
    elif wrong == "missing":
        del weights[name]
    else:
        override = ["MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "5"]
    torch.save(weights, tmp_path / "in.pth")
    config = config_file(tmp_path)
    words = [tmp_path / "in.pth", tmp_path / "a.pth", "--config-file", config, *override]
    assert convert(*words) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: these are not the weights of")
    assert name in text
    assert not (tmp_path / "a.pth").exists()


def test_invalid_arguments(convert, run, tmp_path, capsys):
    path, _ = run
    before = path.read_bytes()
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    for words, message in (
        ((tmp_path / "none.pth", tmp_path / "o.pth"), "none.pth' does not exist"),
        ((path, tmp_path / "o.bin"), "must end in .safetensors or .pth"),
        ((path, tmp_path / "o.pth", "--to", "clouds"), "must end in .safetensors for --to clouds"),
        ((path, path), "exists; --overwrite replaces it"),
        ((tmp_path / "other.pth", tmp_path / "o.pth"), "no tensor of the input begins with"),
    ):
        assert convert(*words) == 2
        assert message in capsys.readouterr().err
    assert path.read_bytes() == before
    assert not (tmp_path / "o.pth").exists()
    assert convert(path, path, "--overwrite") == 0
    assert list(torch.load(path, weights_only=True)) == ["model"]


def test_views_are_written_without_the_storage_of_the_tensor(convert, tmp_path):
    large = torch.zeros(1_000_000)
    weights = {"backbone.a": large[:2], "backbone.b": large[:2]}
    torch.save(weights, tmp_path / "in.pth")
    for name in ("o.pth", "o.safetensors"):
        assert convert(tmp_path / "in.pth", tmp_path / name) == 0
        assert (tmp_path / name).stat().st_size < 10_000


def test_help_as_a_command():
    command = [sys.executable, "tools/convert_checkpoint.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "IN OUT" in done.stdout


def test_weights_that_are_not_finite_are_not_converted(convert, tmp_path, capsys):
    weights = {"backbone.a": torch.tensor([1.0, torch.inf]), "void_embedding.weight": torch.ones(1)}
    torch.save(weights, tmp_path / "w.pth")
    assert convert(tmp_path / "w.pth", tmp_path / "w.safetensors") == 2
    assert "not finite: backbone.a. Its training has diverged" in capsys.readouterr().err
    assert not (tmp_path / "w.safetensors").exists()


@pytest.mark.parametrize("words", [["a.pth", "--", "--"], ["--", "--"], ["--", "a.pth"]])
def test_dashes_in_place_of_files(convert, words, capsys):
    assert convert(*words) == 2
    assert "IN" in capsys.readouterr().err
