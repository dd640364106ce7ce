"""CLIP's weights are fetched after the other checks, and only if no checkpoint brings them."""

from __future__ import annotations

import logging

import dataset_files
import open_clip
import pytest
import torch
from tiny_model import CONVNEXT, tiny_config, tiny_model

import clouds
from clouds.config import get_cfg
from clouds.engine import Trainer
from clouds.evaluation import check_test_data
from clouds.modeling.backbone import open_clip_models
from clouds.modeling.build import build_seeded

TAG = "published"


@pytest.fixture
def fetches(monkeypatch, tmp_path):
    """open_clip knows a tag of the tiny model that it cannot download; lists the attempts.

    With `fetches.file`, the download succeeds with that file.
    """

    class Attempts(list):
        file = None

    attempts = Attempts()

    def download(config):
        attempts.append(config["name"])
        if attempts.file is None:
            raise RuntimeError("no network")
        return attempts.file

    open_clip_models._register_own_configs()
    monkeypatch.setattr(open_clip, "download_pretrained", download)
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: [TAG])
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: {"name": name})
    return attempts


@pytest.fixture
def data(tmp_path, monkeypatch):
    for name in ("gta5", "cityscapes_val"):
        dataset_files.write(tmp_path / "data", name, 0, (48, 64))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))


def config(tmp_path, **settings):
    base = {
        "OUTPUT_DIR": str(tmp_path / "out"),
        "MODEL__CLOUDS__CLIP_PRETRAINED_WEIGHTS": TAG,
        "DATASETS__TRAIN": ("gta5",),
        "DATASETS__TEST": ("cityscapes_val",),
        "DATALOADER__NUM_WORKERS": 0,
        "INPUT__CROP__SIZE": (64, 64),
        "SOLVER__IMS_PER_BATCH": 1,
        "SOLVER__MAX_ITER": 1,
        "TEST__SHORT_SIDE": 32,
    }
    return tiny_config(**(base | settings))


def checkpoint(tmp_path, without="nothing", seed=3):
    """A file of another model's weights, without those that begin so; path and its tensors."""
    weights = dict(tiny_model(SEED=seed).state_dict())
    kept = {name: value for name, value in weights.items() if not name.startswith(without)}
    torch.save({"model": kept}, tmp_path / "weights.pth")
    return str(tmp_path / "weights.pth"), kept


def assert_has(model, weights):
    state = model.state_dict()
    assert all(torch.equal(state[name].cpu(), value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"DATASETS__TRAIN": ("synthia",)}, "dataset synthia: no folder"),
        ({"DATASETS__TRAIN": ("gta5", "sd_x")}, "dataset sd_x: no folder"),
        ({"DATASETS__TEST": ("bdd_val",)}, "dataset bdd_val: no folder"),
        ({"MODEL__WEIGHTS": "none.pth"}, "'none.pth' does not exist"),
        ({"MODEL__WEIGHTS": __file__}, "cannot be read"),
        ({"OUTPUT_DIR": f"{__file__}/out"}, "cannot be written"),
        ({}, f"'{TAG}' of CLIP {CONVNEXT} are not on this machine"),
    ],
)
def test_what_is_quickly_checked_comes_first(tmp_path, data, fetches, settings, words):
    with pytest.raises((ValueError, OSError), match=words):
        Trainer(config(tmp_path, **settings))
    assert len(fetches) == (0 if settings else 1)


def test_a_complete_checkpoint_needs_no_download(tmp_path, data, fetches, caplog):
    path, weights = checkpoint(tmp_path)
    cfg = config(tmp_path, MODEL__WEIGHTS=path)
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        trainer = Trainer(cfg)
        with pytest.raises(RuntimeError, match="resume_or_load"):
            trainer.evaluate()
        trainer.resume_or_load(resume=False)
    assert "random" not in caplog.text
    assert_has(trainer.model, weights)
    trainer.train()
    resumed = Trainer(config(tmp_path, SOLVER__MAX_ITER=2))
    assert resumed.resume_or_load(resume=True) == 1
    assert_has(resumed.model, {k: v for k, v in weights.items() if k.startswith("backbone.")})
    (tmp_path / "a.yaml").write_text(cfg.dump())
    assert_has(clouds.build(tmp_path / "a.yaml"), weights)
    assert fetches == []


def test_a_new_run_beside_an_old_checkpoint_fetches(tmp_path, data, fetches):
    (tmp_path / "out").mkdir()
    path, _ = checkpoint(tmp_path)
    (tmp_path / "out/model_final.pth").write_bytes((tmp_path / "weights.pth").read_bytes())
    (tmp_path / "out/last_checkpoint").write_text("model_final.pth")
    trainer = Trainer(config(tmp_path))
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
        trainer.resume_or_load(resume=False, overwrite=True)
    trainer = Trainer(config(tmp_path, MODEL__WEIGHTS=path))
    attempts = len(fetches)
    trainer.resume_or_load(resume=False)
    assert len(fetches) == attempts == 1


@pytest.mark.parametrize("without", ["backbone.", "backbone.clip_model.visual.trunk.stem"])
def test_a_partial_file_needs_the_download(tmp_path, data, fetches, without):
    path, weights = checkpoint(tmp_path, without)
    cfg = config(tmp_path, MODEL__WEIGHTS=path, MODEL__WEIGHTS_PARTIAL=True)
    (tmp_path / "a.yaml").write_text(cfg.dump())
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
        clouds.build(tmp_path / "a.yaml")
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
        Trainer(cfg).resume_or_load(resume=False)
    # where it can be had: the file's tensors, and CLIP's own for the others
    clip = tiny_model(SEED=9).backbone.clip_model.state_dict()
    torch.save(clip, tmp_path / "clip.pt")
    fetches.file = str(tmp_path / "clip.pt")
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    expected = {f"backbone.clip_model.{name}": value for name, value in clip.items()} | weights
    for model in (clouds.build(tmp_path / "a.yaml"), trainer.model):
        assert_has(model, expected)


def test_a_file_without_a_tensor_is_an_error(tmp_path, data, fetches):
    path, _ = checkpoint(tmp_path, "backbone.clip_model.visual.trunk.stem")
    with pytest.raises(ValueError, match="another model"):
        Trainer(config(tmp_path, MODEL__WEIGHTS=path)).resume_or_load(resume=False)
    assert fetches == []


def test_other_weights_are_the_same_with_and_without_the_download(tmp_path, fetches):
    torch.save(tiny_model(SEED=9).backbone.clip_model.state_dict(), tmp_path / "clip.pt")
    fetches.file = str(tmp_path / "clip.pt")
    fetched = build_seeded(config(tmp_path))
    skipped = build_seeded(config(tmp_path), skip_pretrained=True)
    assert len(fetches) == 1
    other = {k: v for k, v in fetched.state_dict().items() if not k.startswith("backbone.")}
    assert len(other) > 50
    assert_has(skipped, other)


def test_test_data_is_checked_by_name(data):
    check_test_data(get_cfg(), ("cityscapes_val",))
    with pytest.raises(ValueError, match="more than once"):
        check_test_data(get_cfg(), ("cityscapes_val", "cityscapes_val"))
    with pytest.raises(ValueError, match="empty"):
        check_test_data(get_cfg(), ())
