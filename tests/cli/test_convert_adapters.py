"""`clouds convert` with adapters: mmsegmentation's names, and merging."""

from __future__ import annotations

import pytest
import timm
import torch
from tiny_adapter import LOW_RANK, images, move_adapter, vit_model_config

import clouds
from clouds.cli import convert
from clouds.engine.checkpoint import Checkpointer
from clouds.engine.initial_weights import build_and_load
from clouds.modeling.build import build_seeded
from clouds.weights_io import read_checkpoint

PUBLISHED_START = {"MODEL__BACKBONE__ADAPTER__SOMA__START": "published"}


@pytest.fixture
def backbone_file(tmp_path):
    """A file of timm's with weights of the tests' backbone."""
    torch.manual_seed(5)
    model = timm.create_model("test_vit", img_size=64, patch_size=16, num_classes=0)
    torch.save(model.state_dict(), tmp_path / "backbone.pth")
    return str(tmp_path / "backbone.pth")


def save_config(folder, cfg, name="config.yaml"):
    path = folder / name
    path.write_text(cfg.dump())
    return str(path)


def trained_model(cfg):
    """A model whose adapter and head are not those of the start."""
    model = build_seeded(cfg).eval()
    move_adapter(model)
    return model


def run(*arguments):
    assert convert.main([str(word) for word in arguments]) == 0


def outputs(model):
    with torch.no_grad():
        predictions, _ = model.predict(images(1, 64, 64))
    return predictions.final


@pytest.mark.parametrize("adapters_only", [True, False])
@pytest.mark.parametrize("name", ["rein", "soma"])
def test_files_of_mmsegmentation_there_and_back(
    tmp_path, backbone_file, capsys, name, adapters_only
):
    settings = {"MODEL__BACKBONE__WEIGHTS": backbone_file} | PUBLISHED_START
    cfg = vit_model_config(name, **settings)
    model = trained_model(cfg)
    Checkpointer(model, str(tmp_path), adapters_only=adapters_only).save("model")
    run(tmp_path / "model.pth", tmp_path / "mmseg.pth", "--to", "mmseg")
    published = torch.load(tmp_path / "mmseg.pth", weights_only=True)["state_dict"]
    first = "backbone.reins.scale"
    if name == "soma":
        first = "backbone.model.blocks.5.attn.k.lora_A.weight"
        assert published[first].shape == (4, 64)
    assert first in published and "decode_head.cls_embed.weight" in published
    assert not any(key.startswith(("sem_seg_head", "backbone.transformer")) for key in published)

    loaded = build_and_load(cfg, str(tmp_path / "mmseg.pth")).eval()
    for ours, theirs in zip(outputs(loaded), outputs(model), strict=True):
        assert torch.equal(ours, theirs)
    config_file = save_config(tmp_path, cfg)
    run(tmp_path / "mmseg.pth", tmp_path / "back.safetensors", "--config-file", config_file)
    back = read_checkpoint(tmp_path / "back.safetensors")["model"]
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in back.items())
    trains = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains <= set(back) <= set(state)
    assert "frozen backbone left out" in capsys.readouterr().out
    segmenter = clouds.load(tmp_path / "mmseg.pth", config_file, device="cpu")
    assert torch.equal(outputs(segmenter.model)[1], outputs(model)[1])


def test_a_published_file_of_soma_is_not_read_beside_the_rest_of_the_weights(
    tmp_path, backbone_file
):
    own = {"MODEL__BACKBONE__WEIGHTS": backbone_file}
    model = trained_model(vit_model_config("soma", **(own | PUBLISHED_START)))
    Checkpointer(model, str(tmp_path), adapters_only=True).save("model")
    run(tmp_path / "model.pth", tmp_path / "mmseg.pth", "--to", "mmseg")
    with pytest.raises(ValueError, match=r"(?s)of another model.*updates\.soma_added\.lora_A"):
        build_and_load(vit_model_config("soma", **own), str(tmp_path / "mmseg.pth"))


@pytest.mark.parametrize("adapters_only", [True, False])
@pytest.mark.parametrize("name", LOW_RANK)
def test_merged_weights_are_those_of_a_model_without_adapter(
    tmp_path, backbone_file, capsys, name, adapters_only
):
    own = {"MODEL__BACKBONE__WEIGHTS": backbone_file}
    cfg = vit_model_config(name, **own)
    model = trained_model(cfg)
    Checkpointer(model, str(tmp_path), adapters_only=adapters_only).save("model")
    arguments = ("--config-file", save_config(tmp_path, cfg), "--merge-adapters")
    run(tmp_path / "model.pth", tmp_path / "merged.safetensors", *arguments)
    assert "MODEL.BACKBONE.ADAPTER.NAME none" in capsys.readouterr().out
    plain = build_and_load(
        vit_model_config("none", MODEL__BACKBONE__WEIGHTS=""),
        str(tmp_path / "merged.safetensors"),
    ).eval()
    x = images(1, 64, 64)
    with torch.no_grad():
        ours, theirs = plain.backbone(x), model.backbone(x)
        frozen = build_seeded(vit_model_config("none", **own)).backbone.eval()(x)
    for key, value in theirs.items():
        assert (ours[key] - value).abs().max() <= 1e-5 * value.abs().max()
    assert (frozen["res5"] - theirs["res5"]).abs().max() > 1e-3 * theirs["res5"].abs().max()
    file = tmp_path / "model.pth"
    merged = clouds.load(file, save_config(tmp_path, cfg), device="cpu", merge_adapters=True)
    assert merged.model.state_dict().keys() == plain.state_dict().keys()
    assert all(
        torch.equal(value, plain.state_dict()[key])
        for key, value in merged.model.state_dict().items()
    )


def test_what_cannot_be_merged(tmp_path, backbone_file, capsys):
    cfg = vit_model_config("rein", MODEL__BACKBONE__WEIGHTS=backbone_file)
    Checkpointer(build_seeded(cfg), str(tmp_path)).save("model")
    words = [str(tmp_path / "model.pth"), str(tmp_path / "out.safetensors"), "--merge-adapters"]
    with pytest.raises(SystemExit):
        convert.main(words)
    assert "--merge-adapters needs --config-file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        convert.main([*words, "--config-file", save_config(tmp_path, cfg)])
    assert "has no adapter that can be merged" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()
