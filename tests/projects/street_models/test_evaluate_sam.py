"""Scores of Street-SAM, with masks and labels whose scores are known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from street_models import evaluate_sam
from street_models.evaluate_sam import (
    HELD_OUT,
    LOOKS,
    MaskScore,
    config_of,
    scenes_of,
    score_labels,
    score_masks,
    show,
    simulated_teacher,
    summary,
)
from street_models.weight_files import STREET_SAM

from clouds.self_training.refiners.sam.backends import PointSam, build_point_sam
from clouds.self_training.refiners.sam.frame import Frame
from clouds.self_training.refiners.sam.prompts import PointOptions, find_components
from clouds.self_training.refiners.sam.refiner import SamOptions
from clouds.weights_record import check_record, read_record

OPTIONS = SamOptions(20, PointOptions(5))


def label_of_three():
    """Sky (10) over road (0), and a car (13) on it; 64 x 128."""
    label = np.zeros((64, 128), np.uint8)
    label[:24] = 10
    label[30:50, 40:80] = 13
    return label


class TrueMasks:
    """A decoder that knows the label: its third mask is the component of the first point."""

    frame = Frame(128, True, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    at_once_cpu = 1

    def __init__(self, label):
        self.components = find_components(label, 0)
        self.half = np.zeros(label.shape, np.bool_)
        self.half[:, ::2] = True

    def masks(self, points):
        columns, rows = points[:, 0].astype(int).T
        numbers = self.components.ids[rows, columns]
        return torch.from_numpy(self.components.ids == numbers[:, None, None])

    def decode(self, embedding, prompts, multimask, masks=None):
        assert multimask
        true = self.masks(prompts.points)
        logits = torch.stack([true & torch.from_numpy(self.half), ~true, true], 1).float() - 0.5
        padded = torch.nn.functional.pad(logits, (0, 0, 0, 64), value=-0.5)
        return padded, torch.tensor([[0.2, 0.1, 0.9]]).repeat(len(true), 1)

    def predict(self, embeddings, points, sizes):
        for own in points:
            yield self.masks(own), torch.tensor([[0.2, 0.1, 0.9]]).repeat(len(own), 1)


def true_sam(label):
    decoder = TrueMasks(label)
    return PointSam(lambda images: [torch.zeros(1)] * len(images), decoder.predict, decoder)


def test_true_masks_have_iou_one():
    label = label_of_three()
    image = np.zeros((64, 128, 3), np.uint8)
    scores = score_masks(true_sam(label), image, label, OPTIONS, 0)
    assert [(s.class_id, s.area) for s in scores] == [(0, 4320), (10, 3072), (13, 800)]
    assert all(s.chosen == s.best == 1 for s in scores)
    assert [s.predicted for s in scores] == [pytest.approx(0.9)] * 3


def test_the_mask_with_the_largest_predicted_iou_counts():
    label = label_of_three()
    sam = true_sam(label)
    decode = sam.decoder.decode
    ious = torch.tensor([[0.9, 0.1, 0.2]])
    sam.decoder.decode = lambda *a, **k: (decode(*a, **k)[0], ious)
    scores = score_masks(sam, np.zeros((64, 128, 3), np.uint8), label, OPTIONS, 0)
    assert [s.chosen for s in scores] == [pytest.approx(0.5)] * 3  # every other column
    assert [s.best for s in scores] == [1, 1, 1]


def test_an_image_without_a_component():
    label = np.full((64, 128), 255, np.uint8)
    image = np.zeros((64, 128, 3), np.uint8)
    assert score_masks(true_sam(label), image, label, OPTIONS, 0) == []


def test_refining_a_simulated_teacher_with_true_masks_helps():
    label = label_of_three()
    scores = score_labels(true_sam(label), [(np.zeros((64, 128, 3), np.uint8), label)], OPTIONS, 0)
    assert scores["refined"] > scores["teacher"] + 1
    assert 0 < scores["covered"] <= 100


def test_a_simulated_teacher_errs_more_with_more_noise():
    label = label_of_three()
    wrong = [(simulated_teacher(label, 0, strength) != label).mean() for strength in (0, 1, 2)]
    assert wrong[0] < 0.05
    assert wrong[0] < wrong[1] < wrong[2] < 0.8
    assert (simulated_teacher(label, 0) == simulated_teacher(label, 0)).all()
    assert (simulated_teacher(np.full((64, 128), 7, np.uint8), 0) == 7).all()


def test_means_by_class_and_size():
    scores = [
        MaskScore(0, 150, 0.5, 0.6, 0.7),
        MaskScore(0, 400, 0.9, 0.9, 0.9),
        MaskScore(13, 299, 0.7, 0.8, 0.5),
    ]
    found = summary(scores)
    assert found["mean_iou"] == pytest.approx(0.7)
    assert found["mean_iou_of_best"] == pytest.approx(0.7667, abs=1e-4)
    assert found["error_of_predicted_iou"] == pytest.approx(0.1333, abs=1e-4)
    assert found["by_area"] == {"100": [2, pytest.approx(0.6)], "300": [1, pytest.approx(0.9)]}
    assert found["by_class"] == {"car": [1, pytest.approx(0.7)], "road": [2, pytest.approx(0.7)]}
    text = show({"look": found})
    assert "mean IoU 0.700" in text and "road 0.70 (2)" in text


def test_scenes_of_the_looks_and_of_held_out_ones():
    for name in (*LOOKS, HELD_OUT):
        [(image, label)] = scenes_of(name, 1, 5, (64, 128))
        assert image.shape == (*label.shape, 3)
        [(again, _)] = scenes_of(name, 1, 5, (64, 128))
        assert (image == again).all()


def test_the_command_prints_and_writes_scores(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(evaluate_sam, "LOOKS", LOOKS[:1])
    words = ["--weights", "", "--images", "1", "--size", "64", "128", "--size-threshold", "400"]
    assert evaluate_sam.main([*words, "--output", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores) == {LOOKS[0], "all"}
    assert f"{scores['all']['mean_iou']:.3f}" in capsys.readouterr().out


def test_the_kept_weights_are_those_of_their_record_and_load():
    check_record(STREET_SAM)
    assert read_record(STREET_SAM).command.startswith("python -m street_models.train_sam")
    cfg = config_of("street", str(STREET_SAM), 100)
    sam = build_point_sam(cfg, torch.device("cpu"))
    [embedding] = sam.embed([torch.zeros(3, 64, 128, dtype=torch.uint8)])
    assert embedding.shape == (448, 40, 40) and embedding.isfinite().all()
