from __future__ import annotations

import copy
import hashlib
import json
import math
import platform

import numpy as np
import PIL
import pytest
import torch
import torchvision
from torch import nn

from clouds.config import get_cfg
from clouds.data.label_space import CITYSCAPES_19, LabelSpace
from clouds.evaluation import ConfusionMatrix, DatasetResult, Results
from clouds.evaluation.evaluated_weights import hash_file, hash_model
from clouds.evaluation.image_scores import ImageScore
from clouds.evaluation.report import describe_run, write_results

ALL = tuple(range(19))
SYNTHIA = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18)
BUS, VEGETATION = 15, 8


THREE = LabelSpace("three", ("road", "water", "sky"), ((1, 1, 1),) * 3, (("road",),) * 3)


def result_of(name, counts, classes=ALL, *, label_space=CITYSCAPES_19, **options):
    """Result of counts {(label, prediction): pixels}."""
    matrix = ConfusionMatrix(label_space.num_classes)
    for (label, prediction), pixels in counts.items():
        matrix.counts[label, prediction] = pixels
    return DatasetResult.from_confusion(name, label_space, matrix, classes, **options)


# half of the bus pixels predicted as vegetation; roads correct; terrain predicted as road
COUNTS = {(0, 0): 60, (9, 0): 20, (15, 15): 10, (15, 8): 10, (8, 8): 30}


def small(name="cityscapes_val", **options):
    return result_of(name, COUNTS, **options)


def test_scores_by_hand():
    result = small(subsets={16: SYNTHIA}, images=4, seconds=2.0)
    assert result.iou[0] == pytest.approx(100 * 60 / 80)
    assert result.iou[9] == 0
    assert result.iou[BUS] == pytest.approx(50)
    assert result.iou[VEGETATION] == pytest.approx(75)
    assert sum(map(math.isnan, result.iou)) == 15
    assert result.miou == pytest.approx((75 + 0 + 50 + 75) / 4)
    assert result.subset_miou == pytest.approx({16: (75 + 50 + 75) / 3})  # without terrain
    assert result.pixel_accuracy == pytest.approx(100 * 100 / 130)
    assert result.mean_accuracy == pytest.approx((100 + 0 + 50 + 100) / 4)
    assert result.images_per_second == 2.0


def test_scores_have_the_name_of_their_class():
    # bus and vegetation, whose synonyms include "bushes"
    flat = Results("native", (small(),)).flat()
    assert flat["cityscapes_val/IoU-bus"] == pytest.approx(50)
    assert flat["cityscapes_val/IoU-vegetation"] == pytest.approx(75)


def test_classes_outside_of_the_label_set_are_not_scored():
    result = result_of("synthia", COUNTS, SYNTHIA, subsets={16: SYNTHIA})
    assert math.isnan(result.iou[9])
    assert result.miou == result.subset_miou[16] == pytest.approx((75 + 50 + 75) / 3)
    camvid = result_of("camvid_val", {(0, 0): 3, (0, 15): 1}, (0, 1, 13), subsets={16: SYNTHIA})
    assert camvid.iou[0] == pytest.approx(75)
    assert math.isnan(camvid.iou[15])  # predicted, but not in the label set
    assert camvid.miou == camvid.subset_miou[16] == pytest.approx(75)


def test_flat_names():
    other = result_of("bdd_val", {(0, 0): 1}, subsets={16: SYNTHIA})
    results = Results("native", (small(subsets={16: SYNTHIA}), other))
    flat = results.flat()
    assert len(flat) == 2 * (4 + 19) + 2
    assert flat["cityscapes_val/mIoU"] == pytest.approx(50)
    assert flat["bdd_val/mIoU-16"] == pytest.approx(100)
    assert flat["bdd_val/pixel-accuracy"] == pytest.approx(100)
    assert flat["bdd_val/mean-accuracy"] == pytest.approx(100)
    assert math.isnan(flat["bdd_val/IoU-traffic light"])
    assert flat["mean/mIoU"] == pytest.approx(75)
    assert flat["mean/mIoU-16"] == pytest.approx((200 / 3 + 100) / 2)
    assert "mean/mIoU-16" not in Results("native", (small(),)).flat()


def rows_of(table):
    return [
        [cell.strip() for cell in line.split("  ") if cell.strip()] for line in table.split("\n")
    ]


def test_table():
    other = result_of("bdd_val", {(0, 0): 7, (0, 1): 1}, images=9)
    rows = rows_of(Results("native", (small(images=4), other)).table())
    assert rows[0] == ["IoU in %", "cityscapes_val", "bdd_val", "mean"]
    assert rows[2] == ["road", "75.0", "87.5"]
    assert rows[3] == ["sidewalk", "–", "0.0"]
    assert rows[2 + BUS] == ["bus", "50.0", "–"]
    assert rows[20][0] == "bicycle"
    assert set(rows[21][0]) == {"-"}  # a rule before the means
    assert rows[22] == ["mIoU", "50.0", "43.8", "46.9"]
    assert rows[23] == ["pixel accuracy", "76.9", "87.5"]
    assert rows[24] == ["mean accuracy", "62.5", "87.5"]
    assert rows[25] == ["images", "4", "9"]
    assert len(rows) == 26


def test_table_of_one_dataset_has_no_mean_column():
    rows = rows_of(Results("native", (small(subsets={16: SYNTHIA}),)).table())
    assert rows[0] == ["IoU in %", "cityscapes_val"]
    assert rows[22:24] == [["mIoU", "50.0"], ["mIoU (16 classes)", "66.7"]]


def test_without_a_score_of_each_dataset_there_is_no_mean():
    without_counts = result_of("acdc_fog_val", {})
    results = Results("native", (small(), without_counts))
    assert math.isnan(results.mean_miou)
    assert results.without_score() == ["acdc_fog_val"]
    assert results.table().split("\n")[-1].startswith("acdc_fog_val has no mIoU")
    assert ["mIoU", "50.0", "–", "–"] in rows_of(results.table())
    assert math.isnan(results.flat()["mean/mIoU"])
    assert results.to_dict()["mean"]["mIoU"] is None


def test_table_of_two_label_spaces_has_one_row_per_class_name():
    other = result_of("land", {(0, 0): 3, (0, 1): 1, (2, 2): 5}, range(3), label_space=THREE)
    table = Results("native", (small(subsets={16: SYNTHIA}), other)).table()
    lines = table.split("\n")
    assert rows_of(table)[2] == ["road", "75.0", "75.0"]
    assert rows_of(table)[12] == ["sky", "–", "100.0"]
    assert rows_of(table)[21] == ["water", "0.0"]  # below the 19 classes, with a blank cell
    end = lines[0].index("cityscapes_val") + len("cityscapes_val")
    assert lines[21][len("water") : end].isspace()
    assert rows_of(table)[2 + BUS] == ["bus", "50.0"]
    assert lines[2 + BUS].rstrip().endswith("50.0") and len(lines[2 + BUS].rstrip()) == end
    assert ["mIoU (16 classes)", "66.7", "–", "–"] in rows_of(table)
    assert len(rows_of(table)) == 2 + 20 + 1 + 5


def test_scores_in_a_label_space_of_three_classes():
    result = result_of("land", {(0, 0): 3, (0, 1): 1, (2, 2): 5}, range(3), label_space=THREE)
    results = Results("native", (result,))
    assert result.class_iou == pytest.approx({"road": 75, "water": 0, "sky": 100})
    assert set(results.flat()) == {
        *(f"land/IoU-{name}" for name in THREE.names),
        *("land/mIoU", "land/pixel-accuracy", "land/mean-accuracy", "mean/mIoU"),
    }
    content = results.to_dict()
    assert set(content["mean"]) == {"mIoU"}
    assert content["datasets"]["land"]["IoU"] == pytest.approx(result.class_iou)
    assert not any("mIoU-" in key for key in content["datasets"]["land"])


def test_no_dataset():
    assert math.isnan(Results("native", ()).mean_miou)
    assert Results("native", ()).mean_subset_miou == {}


# -------------------------------------------------------------------------- results.json


def write(folder, cfg=None, **options):
    results = Results("clouds", (small(subsets={16: None}, images=3, seconds=1.5),))
    run = describe_run(cfg or get_cfg(), nn.Linear(2, 2), **options)
    path = write_results(results, run, folder)
    # valid JSON, without NaN
    return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(word))


def test_results_file(tmp_path):
    weights = tmp_path / "model.pth"
    torch.save({"model": {}}, weights)
    cfg = get_cfg()
    cfg.MODEL.WEIGHTS = str(weights)
    cfg.SEED = 7
    content = write(tmp_path / "new/folder", cfg, iteration=12)
    assert list(content["mean"]) == ["mIoU", "mIoU-16"] and content["mean"]["mIoU-16"] is None
    assert content["protocol"] == "clouds" and content["unit"] == "percent"
    scores = content["datasets"]["cityscapes_val"]
    assert scores["mIoU"] == pytest.approx(50) and scores["mIoU-16"] is None
    assert scores["IoU"]["bus"] == pytest.approx(50) and scores["IoU"]["truck"] is None
    assert list(scores) == [
        *("mIoU", "mIoU-16", "pixel-accuracy", "mean-accuracy", "IoU"),
        *("unmapped-classes", "unscored-classes", "images", "seconds", "images-per-second"),
        "confusion-matrix",
    ]
    matrix = np.zeros((19, 19), int)
    for (label, prediction), pixels in COUNTS.items():
        matrix[label, prediction] = pixels
    assert scores["confusion-matrix"] == matrix.tolist()
    assert scores["images"] == 3 and scores["images-per-second"] == 2.0
    assert content["seed"] == 7 and content["iteration"] == 12
    assert content["weights"]["file"] == str(weights)
    assert content["weights"]["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert content["selection"] is None
    versions = content["versions"]
    assert versions["torch"] == torch.__version__
    assert versions["torchvision"] == torchvision.__version__.split("+")[0]
    assert versions["numpy"] == np.__version__
    assert versions["pillow"] == PIL.__version__
    assert versions["python"] == platform.python_version()
    assert {"open_clip_torch", "backend", "backend_version", "commit"} <= set(versions)
    assert content["date"].endswith("+00:00")


def test_the_config_in_the_results_can_be_loaded(tmp_path):
    cfg = get_cfg()
    cfg.TEST.SHORT_SIDE = 321
    node = write(tmp_path, cfg)["config"]
    again = get_cfg()
    again.merge_from_other_cfg(type(again)(node))
    assert again == cfg


def test_weights_of_the_caller_or_none(tmp_path):
    other = tmp_path / "b.pth"
    torch.save({"model": {}, "selection": "best on x"}, other)
    content = write(tmp_path, weights=str(other))
    assert content["weights"]["file"] == str(other) and content["selection"] == "best on x"
    # after an iteration the weights are others than those of the file
    assert write(tmp_path, weights=str(other), iteration=3)["selection"] is None
    none = write(tmp_path)["weights"]
    assert none["file"] is None and none["sha256"] is None and len(none["model_sha256"]) == 64


def test_a_failed_write_keeps_the_previous_file(tmp_path, monkeypatch):
    write(tmp_path)
    before = (tmp_path / "results.json").read_text()

    def fail(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr("clouds.files.os.fsync", fail)  # after the text was written
    with pytest.raises(OSError, match="no space"):
        write(tmp_path)
    assert (tmp_path / "results.json").read_text() == before
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "per_image.json"}


def test_rows_of_the_confusion_matrix_are_lines(tmp_path):
    cfg = get_cfg()
    cfg.DATASETS.CLASS_MAP = ("camvid11_*: [ 1, 2 ]=road",)  # text is left as it is
    content = write(tmp_path, cfg)
    lines = (tmp_path / "results.json").read_text().splitlines()
    row = f"        [60{', 0' * 18}],"
    assert row in lines and len([line for line in lines if line.count(",") > 17]) == 19
    assert content["config"]["DATASETS"]["CLASS_MAP"] == ["camvid11_*: [ 1, 2 ]=road"]


def test_scores_of_single_images(tmp_path):
    nan = math.nan
    scores = (ImageScore("a/0.png", 12.5, 50.0), ImageScore("odd \udcff.png", nan, nan))
    results = Results("native", (small(image_scores=scores), small("bdd_val")))
    write_results(results, {}, tmp_path)
    assert json.loads((tmp_path / "per_image.json").read_text()) == {
        "unit": "percent",
        "datasets": {
            "cityscapes_val": [
                {"file": "a/0.png", "mIoU": 12.5, "pixel-accuracy": 50.0},
                {"file": "odd \udcff.png", "mIoU": None, "pixel-accuracy": None},
            ],
            "bdd_val": [],
        },
    }


def test_file_hash_after_a_change_of_the_file(tmp_path):
    path = tmp_path / "w"
    for content in (b"one", b"three"):
        path.write_bytes(content)
        assert hash_file(path) == hashlib.sha256(content).hexdigest()


def test_model_hash_depends_on_names_and_values():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm2d(2)).to(torch.bfloat16)
    same = copy.deepcopy(model)
    assert hash_model(model) == hash_model(same)
    with torch.no_grad():
        same[0].bias[1] += 1
    assert hash_model(model) != hash_model(same)
    other = copy.deepcopy(model)
    other[1].num_batches_tracked += 1
    assert hash_model(model) != hash_model(other)
    assert hash_model(nn.Linear(1, 1, bias=False)) != hash_model(nn.Sequential(nn.Linear(1, 1)))
