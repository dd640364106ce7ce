from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from color_model import (
    ColorModel,
    blocks,
    confidence_of_classes,
    random_pairs,
    to_image,
    write_cityscapes,
)
from PIL import Image
from sklearn.metrics import confusion_matrix, roc_auc_score
from tiny_model import tiny_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clouds import comm
from clouds.config import get_cfg
from clouds.data.label_space import CITYSCAPES_19
from clouds.engine import launch
from clouds.evaluation import Results, SemSegEvaluator, evaluate, evaluate_dataset
from clouds.visualizer import compare

ROOT = Path(__file__).resolve().parents[2]
TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


def config(folder, *overrides):
    cfg = get_cfg()
    cfg.DATASETS.TEST = ("cityscapes_val",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.TEST.SHORT_SIDE = 0
    cfg.OUTPUT_DIR = str(folder)
    cfg.merge_from_list(list(overrides))
    return cfg


def iou_of(pairs):
    """Intersection over union in percent of (prediction, label) pairs, by scikit-learn."""
    prediction = np.concatenate([p.ravel() for p, _ in pairs])
    label = np.concatenate([t.ravel() for _, t in pairs])
    counts = confusion_matrix(label[label < 19], prediction[label < 19], labels=range(19))
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    with np.errstate(invalid="ignore"):
        return 100 * counts.diagonal() / union


def test_scores_of_known_predictions(tmp_path, root, caplog):
    pairs = random_pairs(5)
    write_cityscapes(root, pairs)
    with caplog.at_level(logging.INFO, "clouds"):
        results = evaluate(config(tmp_path), ColorModel())
    (result,) = results.datasets
    expected = iou_of(pairs)
    assert 10 < np.nanmean(expected) < 90
    np.testing.assert_allclose(result.iou, expected, rtol=1e-12)
    assert result.miou == pytest.approx(np.nanmean(expected))
    assert result.subset_miou == {16: None}
    assert result.images == 5 and result.seconds > 0
    assert results.protocol == "native"
    assert results.flat()["cityscapes_val/IoU-bus"] == pytest.approx(expected[15])
    assert results.table() in caplog.text


@pytest.mark.parametrize("protocol", ["native", "clouds", "slide"])
def test_the_prediction_is_scored_at_the_size_of_the_label(tmp_path, root, protocol):
    # short side 48 -> 96
    pairs = random_pairs(2, (48, 64))
    write_cityscapes(root, pairs)
    overrides = ("TEST.PROTOCOL", protocol, "TEST.SHORT_SIDE", 96, "TEST.SLIDE.CROP_SIZE", 32)
    result = evaluate_dataset(config(tmp_path, *overrides), ColorModel(), "cityscapes_val")
    # interpolation mixes classes at the edges of the cells
    tolerance = 0 if protocol == "slide" else 12
    np.testing.assert_allclose(result.iou, iou_of(pairs), atol=tolerance, rtol=1e-12)


def test_clouds_scores_bdd_at_the_size_of_the_input(tmp_path, root):
    label, folder = blocks(1, (32, 64), 16), root / "bdd100k"
    images, labels = folder / "images/10k/val", folder / "labels/sem_seg/masks/val"
    images.mkdir(parents=True), labels.mkdir(parents=True)
    Image.fromarray(to_image(label)).save(images / "a.jpg", quality=100)
    Image.fromarray(label).save(labels / "a.png")
    sizes = {}
    for protocol in ("native", "clouds"):
        model = ColorModel()
        overrides = ("TEST.PROTOCOL", protocol, "TEST.SHORT_SIDE", 16)
        evaluate_dataset(config(tmp_path, *overrides), model, "bdd_val")
        (sample,) = model.inputs
        assert sample["image"].shape == (3, 16, 32)
        sizes[protocol] = (sample["height"], sample["width"])
    assert sizes == {"native": (32, 64), "clouds": (16, 32)}


def test_the_model_gets_no_label(tmp_path, root):
    write_cityscapes(root, random_pairs(2))
    model = ColorModel()
    evaluate(config(tmp_path), model)
    assert len(model.inputs) == 2
    assert not {key for sample in model.inputs for key in sample} & {"label", "sem_seg"}


# ---------------------------------------------------------------- out of memory


class Greedy(ColorModel):
    """Needs more memory than there is for images wider than 64 pixels, unless in small pieces."""

    masks_at_once = 10

    def __init__(self, always=False, error=None):
        super().__init__()
        self.always, self.error, self.tried = always, error, []

    def segment(self, batch):
        self.tried.append((Path(batch[0]["file_name"]).name, self.masks_at_once))
        if batch[0]["image"].shape[-1] > 64 and (self.always or self.masks_at_once > 1):
            if self.error is not None:
                raise self.error
            torch.empty(1 << 60)  # the error of the allocator itself
        return super().segment(batch)


def different_widths(root):
    pairs = [*random_pairs(1, (48, 64)), *random_pairs(1, (48, 96)), *random_pairs(1, (48, 64))]
    write_cityscapes(root, pairs)
    return pairs


@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError("CUDA out of memory")])
def test_an_image_without_enough_memory_is_tried_in_smaller_pieces(tmp_path, root, caplog, error):
    pairs = different_widths(root)
    model = Greedy(error=error)
    result = evaluate_dataset(config(tmp_path), model, "cityscapes_val")
    np.testing.assert_allclose(result.iou, iou_of(pairs), rtol=1e-12)
    assert [at_once for _, at_once in model.tried] == [10, 10, 1, 10]
    name = model.tried[1][0]
    assert f"{name}: out of memory; trying once more" in caplog.text


def test_an_image_without_enough_memory_is_named(tmp_path, root):
    different_widths(root)
    model = Greedy(always=True)
    with pytest.raises(torch.OutOfMemoryError) as error:
        evaluate_dataset(config(tmp_path), model, "cityscapes_val")
    name = model.tried[1][0]
    for part in (f"{name}: ", "96x48 pixels", "can't allocate memory", "TEST.SLIDE.CROP_SIZE"):
        assert part in str(error.value)
    assert len(model.tried) == 3 and model.masks_at_once == 10


def test_other_errors_are_not_tried_again(tmp_path, root):
    different_widths(root)
    model = Greedy(error=RuntimeError("sizes of tensors must match"))
    with pytest.raises(RuntimeError, match="sizes of tensors must match"):
        evaluate_dataset(config(tmp_path), model, "cityscapes_val")
    assert len(model.tried) == 2


# ---------------------------------------------------------------- modes and contexts


class PartlyFrozen(ColorModel):
    """A submodule stays in evaluation mode during training."""

    fail = False

    def __init__(self):
        super().__init__()
        self.frozen = nn.Dropout()
        self.train()
        self.frozen.eval()

    def segment(self, batch):
        self.autocast = (
            torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        )
        self.grad = torch.is_grad_enabled()
        if self.fail:
            raise RuntimeError("broken")
        return super().segment(batch)


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_mode_of_every_module_is_restored(tmp_path, root, fail, training):
    write_cityscapes(root, random_pairs(1))
    model = PartlyFrozen()
    model.fail = fail
    if not training:
        model.eval()
    if fail:
        with pytest.raises(RuntimeError, match="broken"):
            evaluate(config(tmp_path), model)
    else:
        evaluate(config(tmp_path), model)
    assert (model.training, model.dropout.training, model.frozen.training) == (
        training,
        training,
        False,
    )
    assert model.grad is False
    assert torch.is_grad_enabled()


def test_autocast_as_configured(tmp_path, root):
    write_cityscapes(root, random_pairs(1))
    model = PartlyFrozen()
    evaluate(config(tmp_path), model)
    assert model.autocast is None
    evaluate(config(tmp_path, "SOLVER.AMP.ENABLED", True), model)
    assert model.autocast == torch.bfloat16


class Caching(ColorModel):
    """Caches a tensor in evaluation and uses it in training, as the text classifier does."""

    def segment(self, batch):
        self.cached = self.colors.detach() * 2
        return super().segment(batch)


def test_tensors_cached_in_evaluation_can_be_used_in_training(tmp_path, root):
    write_cityscapes(root, random_pairs(1))
    model = Caching()
    evaluate(config(tmp_path), model)
    (model.cached * model.colors).sum().backward()
    assert torch.equal(model.colors.grad, model.cached)


# ----------------------------------------------------------------------------- panels


def test_panels_are_evenly_spaced_and_deterministic(tmp_path, root):
    pairs = random_pairs(7)
    write_cityscapes(root, pairs)
    cfg = config(tmp_path, "TEST.VISUALIZED_IMAGES", 3)
    results = evaluate(cfg, ColorModel())
    assert list(results.panels) == [f"cityscapes_val/{i}" for i in range(3)]
    for i, (panel, number) in enumerate(zip(results.panels.values(), (1, 3, 5), strict=True)):
        prediction, label = pairs[number]
        expected = compare(
            to_image(prediction), label, prediction, CITYSCAPES_19, title="a title 26 pixels high"
        )
        np.testing.assert_array_equal(panel[12 + 26 :], expected[12 + 26 :])
        on_disk = tmp_path / "visualizations/cityscapes_val" / f"{i}.png"
        np.testing.assert_array_equal(np.asarray(Image.open(on_disk)), panel)
    again = evaluate(cfg, ColorModel())
    assert all(np.array_equal(again.panels[n], p) for n, p in results.panels.items())


@pytest.mark.parametrize(("num_requested", "num_drawn"), [(0, 0), (2, 2), (9, 2)])
def test_number_of_panels(tmp_path, root, num_requested, num_drawn):
    write_cityscapes(root, random_pairs(2))
    results = evaluate(config(tmp_path, "TEST.VISUALIZED_IMAGES", num_requested), ColorModel())
    assert len(results.panels) == num_drawn


def test_names_that_are_not_utf8(tmp_path, root, escaped_logs):
    pairs = random_pairs(2)
    write_cityscapes(root, pairs)
    expected = evaluate(config(tmp_path / "utf8"), ColorModel())
    for file in (root / "cityscapes").rglob("*000001*.png"):
        file.rename(file.with_name(file.name.replace("000019", os.fsdecode(b"\xff0019"))))
    results = evaluate(config(tmp_path / "other"), ColorModel())
    assert results.datasets[0].miou == expected.datasets[0].miou
    assert json.loads((tmp_path / "other/results.json").read_text("utf-8"))["mean"]
    one, two = (r.panels["cityscapes_val/1"] for r in (expected, results))
    assert np.array_equal(one[38:], two[38:])  # without the title

    (label,) = (root / "cityscapes").rglob(os.fsdecode(b"*\xff*labelIds.png"))
    label.write_text("text")
    with pytest.raises(ValueError, match=r"ulm_000001_.0019_gtFine_labelIds\.png: cannot be"):
        evaluate(config(tmp_path / "third"), ColorModel())


# --------------------------------------------------------------------- several datasets


def test_several_datasets_in_one_run(tmp_path, root):
    write_cityscapes(root, random_pairs(2))
    write_cityscapes(root, random_pairs(3)[2:], split="train")
    cfg = config(tmp_path, "DATASETS.TEST", ("cityscapes_train", "cityscapes_val"))
    results = evaluate(cfg, ColorModel())
    assert [r.name for r in results.datasets] == ["cityscapes_train", "cityscapes_val"]
    first, second = (iou_of(p) for p in (random_pairs(3)[2:], random_pairs(2)))
    assert results.mean_miou == pytest.approx((np.nanmean(first) + np.nanmean(second)) / 2)
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["mean"]["mIoU"] == pytest.approx(results.mean_miou)
    assert content["datasets"]["cityscapes_val"]["images"] == 2


def test_mean_over_16_classes_when_the_source_is_synthia(tmp_path, root):
    pairs = random_pairs(3)
    write_cityscapes(root, pairs)
    cfg = config(tmp_path, "DATASETS.TRAIN", ("synthia",))
    (result,) = evaluate(cfg, ColorModel()).datasets
    subset = [i for i in range(19) if i not in (9, 14, 16)]  # no terrain, truck, train
    assert result.subset_miou == pytest.approx({16: np.nanmean(iou_of(pairs)[subset])})
    assert result.miou == pytest.approx(np.nanmean(iou_of(pairs)))
    assert abs(result.miou - result.subset_miou[16]) > 0.1


def test_camvid_is_scored_on_its_eleven_classes(tmp_path, root):
    # 8-pixel cells: sky (raw 0), building (1), road (3), ignored (11)
    raw = np.kron([[0, 0], [1, 3], [11, 3]], np.ones((8, 8))).astype(np.uint8)
    predicted = np.kron([[10, 2], [2, 14], [10, 0]], np.ones((8, 8))).astype(np.uint8)
    for folder, array in (("val", to_image(predicted)), ("valannot", raw)):
        (root / "camvid" / folder).mkdir(parents=True)
        Image.fromarray(array).save(root / "camvid" / folder / "0001TP_000001.png")
    (result,) = evaluate(config(tmp_path), ColorModel(), ["camvid_val"]).datasets
    scores = {i: v for i, v in enumerate(result.iou) if not math.isnan(v)}
    # truck (14) is predicted, but not in the label set of CamVid: a false negative of road
    assert scores == pytest.approx({10: 50, 2: 50, 0: 50})
    assert result.miou == pytest.approx(50)
    assert result.pixel_accuracy == pytest.approx(60)


def test_corrupted_images_are_scored_on_the_original_labels(tmp_path, root, monkeypatch):
    pairs = random_pairs(3, (32, 48))
    write_cityscapes(root, pairs)
    package = types.ModuleType("imagecorruptions")
    package.corrupt = lambda image, **_: image[::-1]  # upside down, so the predictions are known
    monkeypatch.setitem(sys.modules, "imagecorruptions", package)
    names = ("cityscapes_val", "cityscapes_c_snow_5")
    results = evaluate(config(tmp_path, "DATASETS.TEST", names), ColorModel())
    clean, corrupted = results.datasets
    assert (clean.name, corrupted.name) == names
    np.testing.assert_allclose(clean.iou, iou_of(pairs), rtol=1e-12)
    np.testing.assert_allclose(corrupted.iou, iou_of([(p[::-1], t) for p, t in pairs]), rtol=1e-12)
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["datasets"]["cityscapes_c_snow_5"]["mIoU"] == corrupted.miou
    assert stored["mean"]["mIoU"] == pytest.approx((clean.miou + corrupted.miou) / 2)


def test_only_ignored_pixels_give_no_score(tmp_path, root, caplog):
    ignored = np.full((24, 32), 255, np.uint8)
    write_cityscapes(root, [(blocks(0), ignored)])
    write_cityscapes(root, random_pairs(1), split="train")
    with caplog.at_level(logging.INFO, "clouds"):
        results = evaluate(config(tmp_path), ColorModel(), ["cityscapes_val", "cityscapes_train"])
    assert math.isnan(results.datasets[0].miou) and math.isnan(results.mean_miou)
    assert "cityscapes_val has no mIoU" in caplog.text
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["mean"]["mIoU"] is None


# ------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no datasets to evaluate on: DATASETS.TEST is empty"),
        (["cityscapes_val", "cityscapes_val"], "names cityscapes_val more than once"),
        (["cityscapes_test"], "unknown dataset 'cityscapes_test'. Known: gta5, "),
        (["cityscapes_val", "bdd_val"], "bdd_val"),
    ],
)
def test_all_datasets_are_checked_before_the_first_evaluation(tmp_path, root, names, message):
    write_cityscapes(root, random_pairs(1))
    model = ColorModel()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate(config(tmp_path), model, names)
    assert not model.inputs


def test_a_dataset_without_labels(tmp_path, root):
    images = root / "stable_diffusion/city/images"
    images.mkdir(parents=True)
    Image.fromarray(to_image(blocks(0))).save(images / "0.png")
    with pytest.raises(ValueError, match=r"sd_city: .*0\.png has no label"):
        evaluate(config(tmp_path), ColorModel(), ["sd_city"])


class InvalidClasses(ColorModel):
    def segment(self, batch):
        return [out.add(17) for out in super().segment(batch)]


def test_an_invalid_prediction_is_reported_with_its_image(tmp_path, root):
    write_cityscapes(root, random_pairs(1))
    with pytest.raises(
        ValueError, match=r"ulm_000000_000019_leftImg8bit\.png: prediction has values"
    ):
        evaluate(config(tmp_path), InvalidClasses())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("protocol", ["native", "clouds", "slide"])
def test_scores_that_are_not_finite_stop_with_the_name_of_the_image(
    tmp_path, root, protocol, value
):
    """The second image has a pixel of which the model makes scores that are not finite."""
    pairs = [(np.zeros((64, 64), np.uint8), np.zeros((64, 64), np.uint8)) for _ in range(2)]
    write_cityscapes(root, pairs)
    model = tiny_model()
    calls = []

    def spoil(module, args, output):
        calls.append(1)
        return output * value if len(calls) == 2 else output

    model.sem_seg_head.predictor.class_embed.register_forward_hook(spoil)
    match = r"ulm_000001_000019_leftImg8bit\.png: the model's scores are not finite"
    with pytest.raises(ValueError, match=match):
        evaluate(config(tmp_path, "TEST.PROTOCOL", protocol), model)
    assert len(calls) == 2
    assert not (tmp_path / "results.json").exists()


# ----------------------------------------------------------- Detectron2's evaluation loop


def test_semseg_evaluator_reads_labels_by_file_name(root):
    pairs = random_pairs(3)
    write_cityscapes(root, pairs)
    files = sorted((root / "cityscapes/leftImg8bit").rglob("*.png"))
    evaluator = SemSegEvaluator("cityscapes_val")
    for as_scores in (True, False):
        evaluator.reset()
        for file, (prediction, _) in zip(files, pairs, strict=True):
            classes = torch.from_numpy(prediction).long()
            scores = nn.functional.one_hot(classes, 19).permute(2, 0, 1).float()
            output = {"sem_seg": scores if as_scores else classes}
            evaluator.process([{"file_name": str(file)}], [output])
        scores = evaluator.evaluate()["sem_seg"]
        assert scores["mIoU"] == pytest.approx(np.nanmean(iou_of(pairs)))
        assert scores["IoU-road"] == pytest.approx(iou_of(pairs)[0])


def test_semseg_evaluator_resizes_scores_to_the_label(root):
    label = blocks(0, (24, 32), 8)
    write_cityscapes(root, [(label, label)])
    (file,) = (root / "cityscapes/leftImg8bit").rglob("*.png")
    small = nn.functional.one_hot(torch.from_numpy(label[::4, ::4]).long(), 19)
    evaluator = SemSegEvaluator("cityscapes_val")
    evaluator.process([{"file_name": str(file)}], [{"sem_seg": small.permute(2, 0, 1).float()}])
    assert evaluator.evaluate()["sem_seg"]["mIoU"] == pytest.approx(100)


def test_semseg_evaluator_rejects_scores_that_are_not_finite(root):
    write_cityscapes(root, random_pairs(1))
    (file,) = (root / "cityscapes/leftImg8bit").rglob("*.png")
    scores = torch.zeros(19, 24, 32)
    scores[3, 4, 5] = math.inf
    with pytest.raises(ValueError, match=rf"{file}: the scores of the model are not finite"):
        SemSegEvaluator("cityscapes_val").process([{"file_name": str(file)}], [{"sem_seg": scores}])


def test_semseg_evaluator_rejects_other_files(root):
    write_cityscapes(root, random_pairs(1))
    evaluator = SemSegEvaluator("cityscapes_val")
    output = {"sem_seg": torch.zeros(24, 32, dtype=torch.uint8)}
    with pytest.raises(ValueError, match=r"/x/y\.png is not an image of cityscapes_val"):
        evaluator.process([{"file_name": "/x/y.png"}], [output])


INSIDE_DETECTRON2 = """
import sys
from pathlib import Path
import torch
from color_model import ColorModel
from detectron2.data import DatasetMapper, build_detection_test_loader, get_detection_dataset_dicts
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format
from clouds.data.datasets import register_all
from clouds.evaluation import SemSegEvaluator
register_all()
dicts = get_detection_dataset_dicts("cityscapes_val")
for d in dicts:
    d.pop("sem_seg_file_name")  # raw ids are not what its mapper expects
mapper = DatasetMapper(False, augmentations=[], image_format="RGB")
loader = build_detection_test_loader(dicts, mapper=mapper, num_workers=0)
evaluator = SemSegEvaluator("cityscapes_val")
assert isinstance(evaluator, DatasetEvaluator)
results = inference_on_dataset(ColorModel(), loader, evaluator)
print_csv_format(results)
print("mIoU", repr(results["sem_seg"]["mIoU"]))
"""


def test_inside_detectron2s_evaluation_loop(root):
    source = os.environ.get("DETECTRON2_SOURCE", "")
    if not source and importlib.util.find_spec("detectron2") is None:
        pytest.skip(
            "Detectron2 is not installed; set DETECTRON2_SOURCE to its source folder to run this"
        )
    pairs = random_pairs(3)
    write_cityscapes(root, pairs)
    path = [str(ROOT), str(TESTS), source, os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "CLOUDS_D2": "detectron2",
        "PYTHONPATH": os.pathsep.join(p for p in path if p),
    }
    done = subprocess.run(
        [sys.executable, "-c", INSIDE_DETECTRON2], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    miou = float(done.stdout.split()[-1])
    assert miou == pytest.approx(np.nanmean(iou_of(pairs)))


# ------------------------------------------------------------------------ two processes


def in_two_processes(datasets, folder):
    os.environ["DETECTRON2_DATASETS"] = str(datasets)
    torch.set_num_threads(1)
    rank = comm.get_rank()
    model = DistributedDataParallel(ColorModel())
    cfg = config(folder, "TEST.VISUALIZED_IMAGES", 2)
    results = evaluate(cfg, model, ["cityscapes_val", "cityscapes_train"])
    torch.save((results, len(model.module.inputs)), Path(folder) / f"rank{rank}.pt")


def test_two_processes_score_as_one(tmp_path, root):
    pairs = random_pairs(3)
    write_cityscapes(root, pairs)
    write_cityscapes(root, pairs[:1], split="train")  # without images for the second process
    cfg = config(tmp_path / "one", "TEST.VISUALIZED_IMAGES", 2)
    single = evaluate(cfg, ColorModel(), ["cityscapes_val", "cityscapes_train"])
    folder = tmp_path / "two"
    folder.mkdir()
    launch.launch(in_two_processes, (str(root), str(folder)), num_gpus=2, device="cpu")
    outputs = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    assert [num_images for _, num_images in outputs] == [3, 1]
    for results, _ in outputs:
        assert isinstance(results, Results)
        assert results.flat() == single.flat()
        assert [r.images for r in results.datasets] == [3, 1]
        assert list(results.panels) == list(single.panels)
        for name, panel in single.panels.items():
            np.testing.assert_array_equal(results.panels[name], panel)
    assert (folder / "results.json").is_file()


@pytest.mark.parametrize("protocol", ["native", "slide"])
def test_further_metrics(tmp_path, root, caplog, protocol):
    """The whole path; the metrics themselves are tested by test_metrics.py."""
    pairs = random_pairs(4)
    write_cityscapes(root, pairs)
    cfg = config(tmp_path, "TEST.PROTOCOL", protocol)
    cfg.TEST.METRICS = ("confidence", "boundary")
    model = ColorModel()
    if protocol == "slide":
        scores = model.scores
        model.scores = lambda image: (scores(image) / 50).softmax(0)
    with caplog.at_level(logging.INFO, "clouds"):
        results = evaluate(cfg, model)
    prediction, label = (np.concatenate([pair[k].ravel() for pair in pairs]) for k in (0, 1))
    counted = label != 255
    correct = (prediction == label)[counted]
    auroc = 100 * roc_auc_score(correct, confidence_of_classes()[prediction[counted]])
    flat = results.flat()
    assert flat["cityscapes_val/AUROC"] == pytest.approx(auroc, abs=1e-6)
    assert flat["mean/AUROC"] == flat["cityscapes_val/AUROC"]
    assert 0 < flat["cityscapes_val/boundary-mIoU"] < 100
    assert "cityscapes_val/boundary-IoU-road" in flat and "mean/boundary-IoU-road" not in flat
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["datasets"]["cityscapes_val"]["AUROC"] == pytest.approx(auroc, abs=1e-6)
    assert saved["mean"]["ECE"] == flat["mean/ECE"]
    rows = [line.split() for line in results.table().splitlines()]
    assert ["AUROC", f"{auroc:.1f}"] in rows
    assert not any("boundary-IoU-road" in line for line in results.table().splitlines())
    np.testing.assert_allclose(results.datasets[0].iou, iou_of(pairs), rtol=1e-12)


def test_metrics_of_the_evaluator_alone(tmp_path, root):
    pairs = random_pairs(2)
    write_cityscapes(root, pairs)
    evaluator = SemSegEvaluator("cityscapes_val", ["confidence"])
    for i, (prediction, _) in enumerate(pairs):
        scores = torch.nn.functional.one_hot(torch.from_numpy(prediction).long(), 19)
        file = root / f"cityscapes/leftImg8bit/val/ulm/ulm_{i:06}_000019_leftImg8bit.png"
        evaluator.process(
            [{"file_name": str(file)}], [{"sem_seg": 0.75 * scores.permute(2, 0, 1).float()}]
        )
    scores = evaluator.evaluate()["sem_seg"]
    assert scores["ECE"] == pytest.approx(abs(75 - scores["pixel-accuracy"]))
