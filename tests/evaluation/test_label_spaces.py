"""Evaluation in a label space of three classes."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from color_model import ColorModel, random_pairs, to_image, write_cityscapes
from PIL import Image

from clouds.config import get_cfg
from clouds.data.datasets import builtin
from clouds.data.label_space import CITYSCAPES_19, LabelSpace
from clouds.evaluation import SemSegEvaluator, evaluate
from clouds.evaluation.pseudo_labels import evaluate_pseudo_labels
from clouds.self_training.refiners.base import PseudoLabel, RefinedLabel
from clouds.visualizer import compare


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


def config(folder, *overrides):
    cfg = get_cfg()
    cfg.DATASETS.TEST = ("camvid_val",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.TEST.SHORT_SIDE = 0
    cfg.OUTPUT_DIR = str(folder)
    cfg.merge_from_list(list(overrides))
    return cfg


LAND = LabelSpace(
    name="land",
    names=("road", "water", "sky"),
    colors=((9, 1, 1), (2, 9, 2), (3, 3, 9)),
    synonyms=(("road",), ("water",), ("sky",)),
)


@pytest.fixture
def land(root, monkeypatch):
    """camvid_val with a label space of 3 classes and one image; (prediction, label)."""
    camvid = replace(builtin.BUILTIN_DATASETS["camvid_val"], label_space=LAND, classes=(0, 1, 2))
    monkeypatch.setitem(builtin.BUILTIN_DATASETS, "camvid_val", camvid)
    # CamVid's ids 3, 4, 1 and 11 are read as the train ids 0, 1, 2 and 255; cells of 8 x 8 pixels
    raw = np.kron([[3, 3], [3, 4], [1, 11]], np.ones((8, 8))).astype(np.uint8)
    label = np.kron([[0, 0], [0, 1], [2, 255]], np.ones((8, 8))).astype(np.uint8)
    prediction = np.kron([[0, 0], [1, 1], [2, 2]], np.ones((8, 8))).astype(np.uint8)
    for folder, array in (("val", to_image(prediction)), ("valannot", raw)):
        (root / "camvid" / folder).mkdir(parents=True)
        Image.fromarray(array).save(root / "camvid" / folder / "a.png")
    return prediction, label


def test_a_label_space_of_three_classes(tmp_path, land, caplog):
    with caplog.at_level(logging.INFO, "clouds"):
        results = evaluate(config(tmp_path), ColorModel(3))
    (result,) = results.datasets
    # road: 2 of 3 cells; water: 1 of 2; sky: its only counted cell
    expected = {"road": 200 / 3, "water": 50, "sky": 100}
    assert result.class_iou == pytest.approx(expected)
    assert result.miou == pytest.approx((200 / 3 + 50 + 100) / 3)
    lines = [line.split() for line in results.table().split("\n")]
    assert lines[2:5] == [["road", "66.7"], ["water", "50.0"], ["sky", "100.0"]]
    assert lines[6] == ["mIoU", "72.2"] and results.table() in caplog.text
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["datasets"]["camvid_val"]["IoU"] == pytest.approx(expected)
    assert content["mean"] == {"mIoU": pytest.approx(results.mean_miou)}


def test_panels_have_the_colors_of_the_label_space(tmp_path, land):
    evaluate(config(tmp_path, "TEST.VISUALIZED_IMAGES", 1), ColorModel(3))
    panel = np.asarray(Image.open(tmp_path / "visualizations/camvid_val/0.png"))
    expected = compare(to_image(land[0]), land[1], land[0], LAND, title="any title")
    np.testing.assert_array_equal(panel[38:], expected[38:])
    for color in LAND.colors:
        assert (panel == color).all(-1).sum() > 100
    assert not (panel == CITYSCAPES_19.colors[0]).all(-1).any()


def test_semseg_evaluator_in_a_label_space_of_three_classes(root, land):
    evaluator = SemSegEvaluator("camvid_val")
    file = str(root / "camvid/val/a.png")
    evaluator.process([{"file_name": file}], [{"sem_seg": torch.from_numpy(land[0])}])
    scores = evaluator.evaluate()["sem_seg"]
    assert [name for name in scores if name.startswith("IoU-")] == [
        "IoU-road", "IoU-water", "IoU-sky",
    ]  # fmt: skip
    assert scores["IoU-water"] == pytest.approx(50)


def test_a_prediction_outside_of_the_label_space_is_an_error(tmp_path, root, land):
    prediction, _ = land
    Image.fromarray(to_image(prediction + 1)).save(root / "camvid/val/a.png")
    with pytest.raises(ValueError, match=r"a\.png: prediction has values .*; allowed: 0\.\.2$"):
        evaluate(config(tmp_path), ColorModel(4))


def test_two_label_spaces_in_one_evaluation(tmp_path, root, land):
    pairs = [tuple(np.minimum(array, 2) for array in pair) for pair in random_pairs(1)]
    write_cityscapes(root, pairs)
    cfg = config(tmp_path, "DATASETS.TRAIN", ("synthia",))
    results = evaluate(cfg, ColorModel(3), ["camvid_val", "cityscapes_val"])
    land_result, cityscapes_result = results.datasets
    assert land_result.class_names == LAND.names and len(cityscapes_result.class_names) == 19
    assert land_result.subset_miou == {} and set(cityscapes_result.subset_miou) == {16}
    assert results.mean_subset_miou == {16: None}
    rows = [line.split() for line in results.table().split("\n")]
    assert [row[0] for row in rows].count("road") == 1
    assert ["water", "50.0"] in rows


# ---------------------------------------------------------------------- pseudo-labels


class Refiner:
    """Covers the left half of the image with the mask of class 1."""

    def refine(self, images, labels, seeds):
        mask = torch.zeros(1, *labels[0].classes.shape, dtype=torch.bool)
        mask[..., : mask.shape[-1] // 2] = True
        return [RefinedLabel(torch.tensor([1]), mask, mask[0].float())]


class Student(ColorModel):
    """`ColorModel` with a teacher that predicts class 2 for every pixel."""

    pseudo_labeler = Refiner()

    def segment(self, batch):
        height, width = batch[0]["image"].shape[1:]
        return super().segment([{**batch[0], "height": height, "width": width}])

    def predict_pseudo_labels(self, images):
        return [
            PseudoLabel(torch.full(i.shape[1:], 2).byte(), torch.ones(i.shape[1:])) for i in images
        ]


def test_pseudo_labels_in_a_label_space_of_three_classes(tmp_path, root, monkeypatch):
    camvid = replace(builtin.BUILTIN_DATASETS["camvid_train"], label_space=LAND, classes=(0, 1, 2))
    monkeypatch.setitem(builtin.BUILTIN_DATASETS, "camvid_train", camvid)
    label = np.kron([[1, 2, 2, 0]], np.ones((16, 8))).astype(np.uint8)
    for folder, array in (("images", to_image(label)), ("labels", label)):
        (root / "stable_diffusion/x" / folder).mkdir(parents=True)
        Image.fromarray(array).save(root / "stable_diffusion/x" / folder / "0.png")
    overrides = ("DATASETS.TRAIN", ("camvid_train", "sd_x"), "TEST.VISUALIZED_IMAGES", 1)
    (result,) = evaluate_pseudo_labels(config(tmp_path, *overrides), Student(3).eval())
    # columns of the label: 1 2 | 2 0, where the left half is covered
    assert result.miou == pytest.approx(
        {
            "teacher": 100 * (0 + 0 + 2 / 4) / 3,
            "refined": 100 * (1 / 2 + 0) / 2,  # class 0 is neither labeled nor predicted there
            "teacher-where-refined": 100 * (0 + 1 / 2) / 2,
            "student": 100,
        }
    )
    assert result.covered == 50 and result.images == 1
    (panel,) = result.panels
    assert panel.shape[1] == 5 * (360 + 12) + 12
    assert all((panel == color).all(-1).sum() > 1000 for color in LAND.colors)
    assert not (panel == CITYSCAPES_19.colors[0]).all(-1).any()


def test_a_teacher_without_finite_scores_stops_with_the_name_of_the_image(tmp_path, root):
    image = root / "stable_diffusion/x/images/0.png"
    image.parent.mkdir(parents=True)
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(image)
    model = Student(3).eval()
    model.predict_pseudo_labels = lambda images: [
        PseudoLabel(torch.zeros(32, 32).byte(), torch.full((32, 32), torch.nan))
    ]
    overrides = ("DATASETS.TRAIN", ("camvid_train", "sd_x"), "TEST.VISUALIZED_IMAGES", 1)
    with pytest.raises(ValueError, match=rf"{image}: the teacher's scores are not finite"):
        evaluate_pseudo_labels(config(tmp_path, *overrides), model)
