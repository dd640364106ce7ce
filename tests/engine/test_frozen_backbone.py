"""Checkpoints that leave the frozen backbone out, and weights with another adapter."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from joint_samples import source
from run_files import losses, resume, saved, train_until
from tiny_adapter import FROZEN, move_adapter, vit_model_config

import clouds
from clouds.config import ConfigError, problems
from clouds.engine import Trainer
from clouds.engine.checkpoint import Checkpointer
from clouds.engine.frozen_backbone import ENTRY, frozen_names
from clouds.engine.initial_weights import build_and_load
from clouds.engine.launch import launch
from clouds.modeling.build import build_on_meta, build_seeded
from clouds.weights_io import read_checkpoint

ONLY = {"SOLVER__CHECKPOINT_ADAPTERS_ONLY": True}
SETTINGS = {
    "SOLVER__IMS_PER_BATCH": 1,
    "SOLVER__MAX_ITER": 4,
    "SOLVER__CHECKPOINT_PERIOD": 2,
    "SOLVER__BASE_LR": 1e-3,
    "SOLVER__BACKBONE_MULTIPLIER": 1.0,
    "DATASETS__TEST": (),
    "TEST__SHORT_SIDE": 64,
}


def backbone_file(folder, seed=5):
    """A file of timm's with weights of the tests' backbone."""
    path = folder / f"backbone{seed}.pth"
    if not path.exists():
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = timm.create_model("test_vit", img_size=64, patch_size=16, num_classes=0)
        torch.save(model.state_dict(), path)
    return str(path)


def config(folder, adapter, **settings):
    own = {"MODEL__BACKBONE__WEIGHTS": backbone_file(folder)}
    return vit_model_config(adapter, **(SETTINGS | own | settings))


def trainer(cfg):
    def samples(start):
        return ([source(i, 64, 64)] for i in itertools.count(start))

    return Trainer(cfg, loader=samples)


def trained(folder, name, adapter, **settings):
    cfg = config(folder, adapter, OUTPUT_DIR=str(folder / name), **settings)
    run = trainer(cfg)
    run.train()
    return run


@pytest.mark.parametrize("adapter", FROZEN)
def test_outputs_are_those_of_the_whole_checkpoint(tmp_path, adapter):
    run = trained(tmp_path, "only", adapter, **ONLY)
    marks = run.checkpointer.provenance
    Checkpointer(run.model, str(tmp_path / "whole"), provenance=marks).save("model_final")
    file, whole_file = (tmp_path / name / "model_final.pth" for name in ("only", "whole"))
    kept, all_weights = (saved(tmp_path / name)["model"] for name in ("only", "whole"))
    trains = {n for n, p in run.model.named_parameters() if p.requires_grad}
    assert trains | {"criterion.empty_weight"} == set(kept)
    assert all(torch.isfinite(value).all() for value in kept.values())
    assert all(torch.equal(kept[k], all_weights[k]) for k in kept)
    assert file.stat().st_size < whole_file.stat().st_size

    image = source(9, 64, 96)["image"].permute(1, 2, 0).numpy()
    scores = [clouds.load(path)(image).scores for path in (file, whole_file)]
    assert np.array_equal(scores[0], scores[1])


@pytest.mark.parametrize("adapter", ["soma", "rein"])
def test_resuming_is_exact(tmp_path, adapter):
    reference = trained(tmp_path, "reference", adapter, **ONLY)
    cfg = config(tmp_path, adapter, OUTPUT_DIR=str(tmp_path / "run"), **ONLY)
    train_until(trainer(cfg), 3)
    run = trainer(cfg)
    resume(run)
    assert losses(tmp_path / "run") == losses(tmp_path / "reference")
    ours, theirs = run.model.state_dict(), reference.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_new_run_starts_from_such_a_file(tmp_path):
    first = trained(tmp_path, "first", "soma", **ONLY)
    path = str(tmp_path / "first" / "model_final.pth")
    second = trainer(
        config(tmp_path, "soma", OUTPUT_DIR=str(tmp_path / "second"), MODEL__WEIGHTS=path)
    )
    second.resume_or_load(resume=False)
    ours, theirs = second.model.state_dict(), first.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_without_weights_of_the_backbone_loading_stops(tmp_path):
    trained(tmp_path, "run", "rein", **ONLY)
    path = str(tmp_path / "run" / "model_final.pth")
    cfg = config(tmp_path, "rein", MODEL__BACKBONE__WEIGHTS="")
    with pytest.raises(ValueError, match=r"leaves the frozen backbone out, and MODEL\.BACKBONE\."):
        build_and_load(cfg, path)
    with pytest.raises(ValueError, match=r"leaves the frozen backbone out, and MODEL\.BACKBONE\."):
        clouds.load(
            path,
            overrides=["MODEL.BACKBONE.WEIGHTS", "", "SOLVER.CHECKPOINT_ADAPTERS_ONLY", "False"],
        )
    cfg.MODEL.WEIGHTS = path
    with pytest.raises(ValueError, match=r"leaves the frozen backbone out, and MODEL\.BACKBONE\."):
        trainer(cfg).resume_or_load(resume=False)


def test_other_weights_of_the_backbone_are_refused(tmp_path):
    trained(tmp_path, "run", "rein", **ONLY)
    path = str(tmp_path / "run" / "model_final.pth")
    other = config(tmp_path, "rein", MODEL__BACKBONE__WEIGHTS=backbone_file(tmp_path, seed=6))
    with pytest.raises(ValueError, match=r"trained over other weights.*\d+ of \d+ tensors differ"):
        build_and_load(other, path)
    entries = read_checkpoint(path)
    entries[ENTRY] = dict.fromkeys(entries[ENTRY], "x")
    torch.save(entries, path)
    with pytest.raises(ValueError, match=r"entry 'frozen_backbone' .* is damaged"):
        build_and_load(config(tmp_path, "rein"), path)


def test_a_file_that_lacks_some_frozen_tensors_is_incomplete(tmp_path):
    model = build_seeded(config(tmp_path, "rein"))
    weights = dict(model.state_dict())
    weights.pop("backbone.transformer.blocks.3.mlp.fc1.weight")
    with pytest.raises(ValueError, match=r"(?s)of another model.*only in the model \(1\)"):
        Checkpointer(model).load_model("a.pth", weights)


def test_what_is_left_out_must_be_frozen_and_have_weights():
    def messages(adapter, **settings):
        return "\n".join(problems(vit_model_config(adapter, **(ONLY | settings))))

    assert "MODEL.BACKBONE.WEIGHTS names none" in messages("rein")
    assert messages("rein", MODEL__BACKBONE__WEIGHTS="pretrained") == ""
    assert "this one trains" in messages("full", MODEL__BACKBONE__WEIGHTS="pretrained")
    clip = {"MODEL__BACKBONE__NAME": "CLIP", "MODEL__CLOUDS__CLIP_PRETRAINED_WEIGHTS": ""}
    assert "CLIP_PRETRAINED_WEIGHTS names none" in messages("rein", **clip)
    assert issubclass(ConfigError, ValueError)


SIZES = {"rein": 2_990_081, "soma": 4_718_592 + 147_456, "recycle": 14_155_776}
"""Trained numbers of the backbone at ViT-L, see foundation_models."""


@pytest.mark.parametrize("adapter", SIZES)
def test_size_of_the_backbone_in_a_file_at_vit_large(adapter):
    cfg = vit_model_config("none", MODEL__BACKBONE__TIMM_NAME="vit_large_patch14_dinov2")
    cfg.MODEL.BACKBONE.ADAPTER.NAME = adapter
    cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES = 100
    cfg.MODEL.MASK_FORMER.HIDDEN_DIM = 256
    model = build_on_meta(cfg)
    frozen = frozen_names(model)
    sizes = {n: v.numel() for n, v in model.backbone.state_dict().items()}
    kept = sum(size for name, size in sizes.items() if f"backbone.{name}" not in frozen)
    assert kept == SIZES[adapter]
    assert kept < 0.05 * sum(sizes.values())


# ------------------------------------------------------------- another adapter


def test_weights_with_an_adapter_that_the_model_has_not(tmp_path):
    for adapter in ("lora", "rein"):
        weights = build_seeded(config(tmp_path, adapter)).state_dict()
        if adapter == "rein":  # with the head's own queries, it is complete otherwise
            plain = build_seeded(config(tmp_path, "none")).state_dict()
            weights = {**plain, **weights}
        model = build_seeded(config(tmp_path, "none"))
        with pytest.raises(ValueError, match=r"(?s)an adapter that the model has not.*merge"):
            Checkpointer(model).load_model("a.pth", weights)


def test_both_starts_of_soma_do_not_read_each_others_files(tmp_path):
    weights = build_seeded(config(tmp_path, "soma")).state_dict()
    start = {"MODEL__BACKBONE__ADAPTER__SOMA__START": "published"}
    model = build_seeded(config(tmp_path, "soma", **start))
    with pytest.raises(ValueError, match="of another model"):
        Checkpointer(model).load_model("a.pth", weights)


@pytest.mark.parametrize("adapter", ["soma", "recycle"])
def test_an_adapter_starts_from_loaded_weights(tmp_path, adapter):
    """A network that was trained as a whole gets an adapter: outputs are the same at first."""
    plain = build_seeded(config(tmp_path, "full")).eval()
    move_adapter(plain)
    cfg = config(tmp_path, adapter)
    model = build_seeded(cfg).eval()
    Checkpointer(model, partial=True).load_model("a.pth", plain.state_dict())
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = model.backbone(image), plain.backbone(image)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-5)
    name = "transformer.blocks.3.mlp.fc1.weight"
    assert not torch.equal(model.backbone.state_dict()[name], plain.backbone.state_dict()[name])


# --------------------------------------------------------------- two processes


def train_in_a_process(folder, adapter):
    """Three iterations; a parameter that trains and gets no gradient is an error in the second."""
    torch.set_num_threads(1)
    settings = {"SOLVER__IMS_PER_BATCH": 2, "SOLVER__MAX_ITER": 3}
    cfg = config(Path(folder), adapter, OUTPUT_DIR=str(Path(folder, "run")), **settings)
    trainer(cfg).train()


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [*FROZEN, "full"])
def test_two_processes_have_no_unused_parameters(tmp_path, adapter):
    backbone_file(tmp_path)
    launch(train_in_a_process, (str(tmp_path), adapter), num_gpus=2, device="cpu")
    assert saved(tmp_path / "run")["iteration"] == 2
