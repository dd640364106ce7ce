"""Sets with masks of unknown objects, against scikit-learn."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from color_model import ColorModel, blocks, confidence_of_classes, to_image, write_cityscapes
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from clouds.config import get_cfg
from clouds.evaluation import build_protocol, evaluate
from clouds.evaluation.anomaly import evaluate_anomaly_set, list_anomaly_set


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


def write_set(folder, count=3, suffix=".png"):
    """Images of blocks with masks of 0, 1, 255; returns all classes and mask values."""
    rng = np.random.default_rng(5)
    written = []
    for i in range(count):
        classes = blocks(40 + i)
        mask = rng.choice(np.array([0, 0, 1, 255], np.uint8), classes.shape)
        for path, pixels in (
            (folder / f"images/validation{i:04}{suffix}", to_image(classes)),
            (folder / f"labels_masks/validation{i:04}_labels_semantic.png", mask),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, quality=100)
        written.append((classes, mask))
    return [np.concatenate([w[k].ravel() for w in written]) for k in (0, 1)]


def config(tmp_path, name):
    cfg = get_cfg()
    cfg.DATASETS.TEST = ("cityscapes_val",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.TEST.SHORT_SIDE = 0
    cfg.TEST.ANOMALY_SETS = (name,)
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    return cfg


@pytest.mark.parametrize("protocol", ["native", "slide"])
def test_scores_are_those_of_scikit_learn(tmp_path, root, caplog, protocol):
    classes, mask = write_set(root / "smiyc/road_anomaly21")
    Image.new("RGB", (8, 8)).save(root / "smiyc/road_anomaly21/images/test0001.png")
    write_cityscapes(root, [(blocks(1), blocks(2))])
    cfg = config(tmp_path, "smiyc/road_anomaly21")
    cfg.TEST.PROTOCOL = protocol
    model = ColorModel()
    if protocol == "slide":  # which has the model's scores, that are probabilities here
        scores = model.scores
        model.scores = lambda image: (scores(image) / 50).softmax(0)
    with caplog.at_level(logging.INFO, "clouds"):
        results = evaluate(cfg, model)
    score = 1 - confidence_of_classes()[classes]
    counted = mask != 255
    truth, score = mask[counted] == 1, score[counted]
    false, true, _ = roc_curve(truth, score, drop_intermediate=False)
    expected = {
        "AUPR": 100 * average_precision_score(truth, score),
        "FPR95": 100 * false[np.argmax(true >= 0.95)],
        "AUROC": 100 * roc_auc_score(truth, score),
    }
    flat = results.flat()
    found = {name: flat[f"road_anomaly21/{name}"] for name in expected}
    assert found == pytest.approx(expected, abs=1e-6)
    saved = json.loads((tmp_path / "out/results.json").read_text())["anomaly-sets"]
    assert saved == {"road_anomaly21": pytest.approx({**expected, "images": 3}, abs=1e-6)}
    assert "road_anomaly21 (3 images), anomalies by 1 - confidence: AUPR" in caplog.text


def test_missing_files(tmp_path, root):
    with pytest.raises(FileNotFoundError, match=r"'x', but '.*x/images' is no folder"):
        list_anomaly_set("x")
    write_set(root / "x", suffix=".jpg")
    assert len(list_anomaly_set(str(root / "x"))) == 3
    for path in (root / "x/labels_masks").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="none of the 3 images in"):
        list_anomaly_set("x")
    write_cityscapes(root, [(blocks(1), blocks(2))])
    with pytest.raises(FileNotFoundError, match="none of the 3 images in"):
        evaluate(config(tmp_path, "x"), None)  # before a model is used


def test_two_sets_of_a_name(tmp_path, root):
    write_cityscapes(root, [(blocks(1), blocks(2))])
    cfg = config(tmp_path, "a/val")
    cfg.TEST.ANOMALY_SETS = ("a/val", "b/val")
    with pytest.raises(ValueError, match="'a/val': 'val' is the name of another set"):
        evaluate(cfg, None)


def test_labels_of_another_form(tmp_path, root):
    write_cityscapes(root, [(blocks(1), blocks(2))])
    write_set(root / "x")
    label = root / "x/labels_masks/validation0001_labels_semantic.png"
    for pixels, message in (
        (np.full((24, 32), 7, np.uint8), "has the values 7; allowed are 0"),
        (np.zeros((24, 32, 3), np.uint8), "one channel is expected; it has 3"),
        (np.zeros((24, 30), np.uint8), "has 30x24 pixels, its image 32x24"),
    ):
        Image.fromarray(pixels).save(label)
        with pytest.raises(ValueError, match=rf"validation0001_labels.*{message}"):
            evaluate(config(tmp_path, "x"), ColorModel())


def test_a_confidence_that_is_not_finite(tmp_path, root):
    write_cityscapes(root, [(blocks(1), blocks(2))])
    write_set(root / "x", count=1)
    model = ColorModel()
    with torch.no_grad():
        model.colors.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"validation0000.png: the confidence is not finite"):
        evaluate_anomaly_set(build_protocol(config(tmp_path, "x")), model.eval(), "x")
