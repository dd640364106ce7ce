"""Evaluation in a label space of three classes."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from color_model import ColorModel, to_image
from PIL import Image

from clouds.config import ConfigError, get_cfg, load_config
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
    cfg.DATASETS.TRAIN = ("camvid_train",)
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


def use_label_space(monkeypatch, label_space):
    for name in ("camvid_train", "camvid_val"):
        camvid = replace(
            builtin.builtin_datasets()[name], label_space=label_space, classes=(0, 1, 2)
        )
        monkeypatch.setitem(builtin.builtin_datasets(), name, camvid)


@pytest.fixture
def land(root, monkeypatch):
    """camvid_val and camvid_train with 3 classes, and one image; (prediction, label)."""
    use_label_space(monkeypatch, LAND)
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


def test_a_dataset_with_other_classes_is_scored_on_those_in_common(tmp_path, root, land):
    """Cityscapes with a model of road, water and sky: road and sky are scored."""
    ids = np.kron([[7, 7], [23, 23], [7, 11]], np.ones((8, 8))).astype(np.uint8)  # 11: building
    prediction = np.kron([[0, 1], [2, 0], [0, 0]], np.ones((8, 8))).astype(np.uint8)
    for folder, end, array in (
        ("leftImg8bit", "leftImg8bit", to_image(prediction)),
        ("gtFine", "gtFine_labelIds", ids),
    ):
        path = root / f"cityscapes/{folder}/val/town/a_{end}.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(array).save(path)
    results = evaluate(config(tmp_path), ColorModel(3), ["camvid_val", "cityscapes_val"])
    land_result, result = results.datasets
    assert land_result.class_iou["water"] == pytest.approx(50)
    # road: 2 of 3 cells, and 1 cell of sky; the cell of building does not count
    assert result.class_iou["road"] == pytest.approx(100 * 2 / 4)
    assert result.class_iou["sky"] == pytest.approx(100 * 1 / 2)
    assert np.isnan(result.class_iou["water"]) and result.miou == pytest.approx(50)
    assert result.pixel_accuracy == pytest.approx(100 * 3 / 5)
    assert result.unscored_classes == ("water",) and len(result.unmapped_classes) == 17
    (note,) = [line for line in results.table().split("\n") if "is scored on" in line]
    assert note.startswith("cityscapes_val is scored on 2 classes: road, sky. Not classes of the")
    assert "building, wall" in note and note.endswith("Not in cityscapes_val: water.")
    content = json.loads((tmp_path / "results.json").read_text())["datasets"]["cityscapes_val"]
    assert content["unscored-classes"] == ["water"] and "building" in content["unmapped-classes"]


def test_the_class_map_of_the_config(tmp_path, root, land):
    """CamVid's own 11 classes for a model of road, water and sky: pavement is counted as water."""
    bad = ["DATASETS.TEST", "('camvid11_val',)", "DATASETS.CLASS_MAP", "('camvid11_*: lake=road',)"]
    with pytest.raises(ConfigError, match="'lake' is no class of camvid_11"):
        load_config(None, bad)
    overrides = ("DATASETS.CLASS_MAP", ("camvid11_*: pavement=water, building=sky, sky=",))
    result = evaluate(config(tmp_path, *overrides), ColorModel(3), ["camvid11_val"]).datasets[0]
    # the same labels as camvid_val of LAND: road, pavement and building are its three classes
    assert result.class_iou == pytest.approx({"road": 200 / 3, "water": 50, "sky": 100})


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
    # names of Cityscapes, whose train ids the label files of generated images have: 0, 9, 10
    use_label_space(monkeypatch, replace(LAND, names=("road", "terrain", "sky")))
    label = np.kron([[1, 2, 2, 0]], np.ones((16, 8))).astype(np.uint8)
    stored = np.array([0, 9, 10], np.uint8)[label]
    for folder, array in (("images", to_image(label)), ("labels", stored)):
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
    by_class = {name: list(result.class_iou[name].values()) for name in ("teacher", "refined")}
    assert by_class["teacher"] == pytest.approx([0, 0, 50])
    assert by_class["refined"] == pytest.approx([math.nan, 50, 0], nan_ok=True)
    assert result.flat()["sd_x/teacher-IoU-sky"] == 50 and len(result.flat()) == 4 + 4 * 3 + 1
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
