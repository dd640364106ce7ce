"""`clouds export`: the folder, its config and card, and that `clouds.load` opens it again."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from tiny_adapter import move_adapter, vit_model_config
from tiny_checkpoint import block_image, save_checkpoint
from tiny_model import tiny_config

from clouds import load
from clouds.cli import export as command
from clouds.cli.main import main
from clouds.engine.checkpoint import Checkpointer
from clouds.export import FORMATS, export
from clouds.export.folder import config_text, portable_config
from clouds.modeling.build import build_seeded


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("run"))[0]


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "tiny"
    done = export(checkpoint, folder, ["safetensors"])
    assert done.folder == folder and done.merged == 0 and not done.checks
    return folder


def labels_and_scores(segmenter):
    result = segmenter(block_image(50, 70))
    assert len(np.unique(result.labels)) > 1
    return result.labels, result.scores


def test_load_opens_the_folder_with_equal_outputs(checkpoint, exported):
    assert {p.name for p in exported.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    before, after = labels_and_scores(load(checkpoint)), labels_and_scores(load(exported))
    assert np.array_equal(before[0], after[0]) and np.array_equal(before[1], after[1])


def test_the_config_has_the_classes_and_no_paths_of_this_machine(exported, checkpoint):
    content = json.loads((exported / "config.json").read_text())
    assert content["id2label"]["0"] == "road" and len(content["id2label"]) == 19
    assert content["label_colors"][0] == [128, 64, 128]  # of Cityscapes
    assert str(checkpoint.parent) not in (exported / "config.json").read_text()
    assert content["config"]["OUTPUT_DIR"] == "./output"


def test_numbers_that_json_lacks_are_kept(tmp_path):
    cfg = tiny_config(SOLVER__CLIP_GRADIENTS__CLIP_VALUE=float("inf"), SOLVER__BASE_LR=1e-5)
    cfg.MODEL.BACKBONE.WEIGHTS = "/home/me/vit.pth"
    content = json.loads(config_text(portable_config(cfg, False), build_seeded(cfg).label_space))
    assert content["config"]["SOLVER"]["CLIP_GRADIENTS"]["CLIP_VALUE"] == "inf"
    assert content["config"]["SOLVER"]["BASE_LR"] == 1e-5
    assert content["config"]["MODEL"]["BACKBONE"]["WEIGHTS"] == ""


def test_adapters_are_merged(tmp_path):
    cfg = vit_model_config("lora", OUTPUT_DIR=str(tmp_path), TEST__SHORT_SIDE=64, DATASETS__TEST=())
    model = build_seeded(cfg)
    move_adapter(model.backbone)
    checkpointer = Checkpointer(model, str(tmp_path), provenance={"config": cfg.dump()})
    checkpointer.save("model_final", iteration=0)
    path = tmp_path / "model_final.pth"
    done = export(path, tmp_path / "merged", ["safetensors"])
    assert done.merged == 6 * 4  # blocks of the ViT, each with qkv, proj and two layers of the MLP
    segmenter = load(tmp_path / "merged")
    assert segmenter.cfg.MODEL.BACKBONE.ADAPTER.NAME == "none"
    image = block_image(64, 96)
    difference = segmenter(image).scores - load(path)(image).scores
    assert 0 < np.abs(difference).max() < 1e-5
    assert "low-rank, merged into 24 weights" in (tmp_path / "merged" / "README.md").read_text()


def results_file(folder, digest, **settings):
    row = {"mIoU": 41.256, "IoU": {"road": 41.256}, "images": 500}
    content = {"protocol": "native", "datasets": {"cityscapes_val": row, "bdd_val": row}}
    content |= {"weights": {"sha256": digest}, "config": {"TEST": settings}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(content))


def test_the_card_has_the_scores_of_these_weights_alone(checkpoint, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(checkpoint, run)
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    results_file(run, digest)
    results_file(run / "average", "0" * 64)
    done = export(run / "model_final.pth", tmp_path / "a", ["safetensors"], licence="cc-by-4.0")
    text = (tmp_path / "a" / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    header = yaml.safe_load(header)
    assert done.scores == 1 and header["license"] == "cc-by-4.0"
    (index,) = header["model-index"]
    assert [one["dataset"]["name"] for one in index["results"]] == ["cityscapes_val", "bdd_val"]
    assert index["results"][0]["metrics"][0]["value"] == 41.256
    assert body.count("41.26") == 2 and "gta5" in body and "clouds_tiny" in body
    results_file(run, "0" * 64)
    assert export(run / "model_final.pth", tmp_path / "b", ["safetensors"]).scores == 0
    text = (tmp_path / "b" / "README.md").read_text()
    assert "no results.json of exactly these weights" in text and "Not stated" in text


def test_results_that_do_not_say_of_which_weights_are_refused(checkpoint, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(checkpoint, run)
    for weights, others in (({"protocol": "native"}, {"sha256": "0"}), (None, {}), ({}, {})):
        results_file(run, "0" * 64)
        content = json.loads((run / "results.json").read_text())
        (run / "results.json").write_text(json.dumps(content | others | {"weights": weights}))
        with pytest.raises(ValueError, match="does not say which weights it is of"):
            export(run / "model_final.pth", tmp_path / "x", ["safetensors"])


def test_the_card_names_settings_of_evaluations_that_the_config_has_not(checkpoint, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(checkpoint, run)
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    same = load(checkpoint).cfg.TEST.SHORT_SIDE
    results_file(run, digest, SHORT_SIDE=same)
    results_file(run / "eval/other", digest, SHORT_SIDE=same + 32, EVAL_PERIOD=7)
    export(run / "model_final.pth", tmp_path / "x", ["safetensors"])
    text = (tmp_path / "x" / "README.md").read_text()
    rows = [[c.strip() for c in line.split("|")[1:4]] for line in text.splitlines()]
    found = [row[2] for row in rows if row[:2] == ["bdd_val", "native"]]
    assert found == ["–", f"TEST.SHORT_SIDE {same + 32}"]


def test_the_output_may_be_the_working_directory(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export(checkpoint, ".", ["safetensors"]).folder == tmp_path
    assert (tmp_path / "model.safetensors").is_file()


def test_the_card_says_how_the_weights_were_chosen(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "selection": "Chosen on the test data."}, tmp_path / "model_best.pth")
    export(tmp_path / "model_best.pth", tmp_path / "x", ["safetensors"])
    assert "Chosen on the test data." in (tmp_path / "x" / "README.md").read_text()


def test_the_card_is_valid_for_the_hub(exported):
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard.load(exported / "README.md")
    assert card.data.library_name == "clouds"
    assert card.data.pipeline_tag == "image-segmentation"


def test_a_folder_is_replaced_only_if_an_export_wrote_it(checkpoint, exported, tmp_path):
    with pytest.raises(ValueError, match="--overwrite"):
        export(checkpoint, exported, ["safetensors"])
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="no export wrote it"):
        export(checkpoint, mine, ["safetensors"], overwrite=True)
    assert (mine / "thesis.tex").exists()
    (mine / "config.json").write_text('{"model_type": "bert"}')  # as many libraries name theirs
    with pytest.raises(ValueError, match="no export wrote it"):
        export(checkpoint, mine, ["safetensors"], overwrite=True)
    assert (mine / "thesis.tex").exists()
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    (copy / "model.onnx").write_text("old")
    export(checkpoint, copy, ["safetensors"], overwrite=True)
    assert not (copy / "model.onnx").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".part")] == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "{", "not valid JSON"),
        ("config.json", '{"model_type": "bert"}', "not of a folder that `clouds export` wrote"),
        ("model.safetensors", None, "--format safetensors"),
        ("model.safetensors", "x", "truncated"),
    ],
)
def test_a_damaged_folder_is_refused(exported, tmp_path, name, text, message):
    shutil.copytree(exported, tmp_path / "copy")
    file = tmp_path / "copy" / name
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "copy")


def test_a_changed_weight_is_found(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        load(tmp_path / "copy")


def test_command(checkpoint, tmp_path, capsys):
    folder = tmp_path / "x"
    words = ["export", "--weights", str(checkpoint), "--output", str(folder)]
    assert main([*words, "--format", "safetensors"]) is None
    out = capsys.readouterr().out
    assert "model.safetensors" in out and "--licence" in out and "no scores" in out
    with pytest.raises(SystemExit) as stop:
        main([*words, "--format", "safetensors"])
    assert stop.value.code == 2 and "--overwrite" in capsys.readouterr().err


def test_missing_packages_are_named_before_the_model_is_loaded(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("clouds.export.graphs.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"onnx, onnxscript, onnxruntime: pip install.*export"):
        export(checkpoint, tmp_path / "x", ["onnx"])
    assert not (tmp_path / "x").exists()


def test_formats_of_the_command_are_those_of_the_library():
    assert command.FORMATS == FORMATS


def test_unknown_format(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="tflite; allowed are onnx, torch, safetensors"):
        export(checkpoint, tmp_path / "x", ["tflite"])


def test_weights_are_those_of_the_checkpoint(checkpoint, exported):
    before = torch.load(checkpoint, weights_only=True)["model"]
    after = load(exported).model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
