"""Joint training: what the student is taught of generated images, and that a run survives."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from joint_samples import MIXED, generated, joint_model, source
from run_files import losses, resume, saved, train_until
from street_renderer import Contents, get_style, render
from tiny_model import tiny_config, tiny_model
from torch.nn import functional as F

from clouds.config import load_config
from clouds.data.structures import Domain, Targets, masks_from_label
from clouds.engine import Trainer
from clouds.engine.launch import launch
from clouds.self_training.pseudo_labeler import PseudoLabeler
from clouds.self_training.refiners.base import PseudoLabel

ROOT = Path(__file__).resolve().parents[2]
JOINT = ROOT / "configs/demo/joint.yaml"


def labels_by_hand(model, clean):
    """The published pseudo-label: argmax of the teacher's semantic map of the clean image."""
    mean, std = model.pixel_mean, model.pixel_std
    image = ((clean.float() - mean) / std)[None]
    with torch.no_grad():
        features = model.backbone(image)
        predictions = model.pseudo_labeler.teacher_parts["sem_seg_head"](features)
        masks = F.interpolate(predictions.mask_logits[-1], image.shape[-2:], mode="bilinear")
        classes = predictions.class_logits[-1].softmax(-1)[..., :-1]
        return torch.einsum("nqc,nqhw->nchw", classes, masks.sigmoid())[0].argmax(0)


def test_the_losses_are_those_of_a_batch_with_the_teachers_labels_written_into_it():
    model = joint_model()
    batch = [source(1), generated(2), source(3), generated(4)]
    labelled = [
        {**sample, "sem_seg": labels_by_hand(model, sample["clean_image"]).to(torch.uint8)}
        if sample["domain"] is Domain.GENERATED
        else sample
        for sample in batch
    ]
    found = model(batch)
    for sample in labelled:
        sample["domain"] = Domain.SOURCE
    expected = model(labelled)
    assert found.keys() == expected.keys()
    for name, loss in expected.items():
        assert found[name].item() == pytest.approx(loss.item(), rel=1e-5), name


def test_views_of_another_size_are_padded_alike():
    model = joint_model()
    batch = [source(1, 64, 96), generated(2, 48, 80)]
    pseudo = labels_by_hand(model, F.pad(batch[1]["clean_image"], (0, 16, 0, 16)))
    found = model(batch)
    assert all(loss.isfinite() for loss in found.values())
    # alone, the clean view is padded to 64x96 with the mean color rather than with black
    label = model.predict_pseudo_labels([batch[1]["clean_image"]])[0]
    assert label.classes.shape == (48, 80)
    assert label.classes.shape != pseudo.shape


@pytest.mark.parametrize(
    ("frozen", "sizes", "passes"),
    [(True, (64, 64), 1), (True, (64, 128), 2), (False, (64, 64), 2)],
)
def test_one_backbone_pass_where_the_views_allow_it(frozen, sizes, passes):
    model = joint_model(MODEL__BACKBONE__FREEZE=frozen)
    seen = []
    model.backbone.register_forward_hook(lambda *args: seen.append(len(args[1][0])))
    model([source(1, sizes[1]), generated(2, sizes[0])])
    assert len(seen) == passes and sum(seen) == 3


def test_a_batch_of_one_domain_alone():
    model = joint_model()
    for batch in ([source(1), source(2)], [generated(1), generated(2)]):
        losses = model(batch)
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())


def test_the_teacher_is_no_part_of_the_model():
    model = joint_model()
    head = model.pseudo_labeler.teacher_parts["sem_seg_head"]
    assert model.state_dict().keys() == tiny_model().state_dict().keys()
    inside = {id(module) for module in model.modules()}
    assert inside.isdisjoint(id(module) for module in head.modules())
    model.train()
    sum(model([source(1), generated(2)]).values()).backward()
    assert not any(module.training for module in head.modules())
    assert all(p.grad is None for p in head.parameters())


def test_a_label_without_any_class_still_trains(monkeypatch):
    model = joint_model()
    nothing = Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 64, 96, dtype=torch.bool))
    monkeypatch.setattr(PseudoLabeler, "__call__", lambda self, images, *_: [nothing] * len(images))
    for batch in ([generated(1)], [source(1), generated(2)]):
        model.zero_grad()
        losses = model(batch)
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_generated_image_needs_a_teacher():
    with pytest.raises(ValueError, match=r"sd_<folder>.*DATASETS.TRAIN"):
        tiny_model().train()([generated(1)])


def test_what_does_not_count_has_no_part_in_the_losses(monkeypatch):
    """With uncovered pixels ignored, the true label of uncovered pixels does not matter."""
    model = joint_model(MODEL__CLOUDS__UNCOVERED="ignore")
    sample = generated(1)
    classes = source(5)["sem_seg"]
    losses = []
    for other in (255, 7):
        label = classes.clone()
        label[:, 48:] = other
        covered = masks_from_label(classes.masked_fill(torch.arange(96) >= 48, 255))
        pseudo = PseudoLabel(label, torch.ones(64, 96))
        monkeypatch.setattr(model.pseudo_labeler, "labels", lambda _, pseudo=pseudo: [pseudo])
        refined = model.pseudo_labeler.refine([sample["clean_image"]], [pseudo], [1])[0]
        refined = type(refined)(covered.labels, covered.masks, refined.agreement)
        monkeypatch.setattr(model.pseudo_labeler, "refine", lambda *_, refined=refined: [refined])
        losses.append(model([sample]))
        monkeypatch.undo()
    for name, loss in losses[0].items():
        assert losses[1][name].item() == loss.item(), name


# --------------------------------------------------------------------------- whole runs

SMALL = """
    MODEL.SEM_SEG_HEAD.CONVS_DIM 32 MODEL.SEM_SEG_HEAD.MASK_DIM 32 MODEL.MASK_FORMER.HIDDEN_DIM 32
    MODEL.MASK_FORMER.DEC_LAYERS 3 MODEL.MASK_FORMER.NUM_OBJECT_QUERIES 24
    MODEL.MASK_FORMER.TRAIN_NUM_POINTS 128 INPUT.CROP.SIZE (64,128) INPUT.SCALE_RANGE (0.8,1.0)
    DATALOADER.NUM_WORKERS 0 SOLVER.IMS_PER_BATCH 4 SOLVER.MAX_ITER 6 SOLVER.CHECKPOINT_PERIOD 3
    SOLVER.WARMUP_ITERS 0 LOG_PERIOD 1 TEST.SHORT_SIDE 64
    TEST.VISUALIZED_IMAGES 1 TEST.GENERATED_IMAGES 2
    MODEL.CLOUDS.ITERATION_UPDATE 2 MODEL.CLOUDS.REFINER superpixel
""".split()

TRAINED_BACKBONE = (
    *("MODEL.BACKBONE.FREEZE", "False", "MODEL.CLOUDS.CLIP_MODEL_NAME", "clouds_tiny"),
    *("MODEL.CLOUDS.CLIP_PRETRAINED_WEIGHTS", ""),
)

AGAINST_NOISE = """
    DATASETS.RARE_CLASS_SAMPLING.ENABLED True DATASETS.RARE_CLASS_SAMPLING.MIN_PIXELS 50
    INPUT.CLASS_MIXING True MODEL.CLOUDS.MASKED_CONSISTENCY.RATIO 0.5
    MODEL.CLOUDS.MASKED_CONSISTENCY.BLOCK_SIZE 16 MODEL.CLOUDS.EMA_WARM_START True
    MODEL.CLOUDS.TEACHER_FLIP True MODEL.CLOUDS.PSEUDO_LABEL.ASSIGNMENT sinkhorn
    MODEL.CLOUDS.PSEUDO_LABEL.MIN_IMAGE_CONFIDENCE 0.01
    MODEL.CLOUDS.PSEUDO_LABEL.QUALITY_THRESHOLD 0.1 MODEL.CLOUDS.PSEUDO_LABEL.DICE_WEIGHT 0.5
    MODEL.CLOUDS.PSEUDO_LABEL.MAX_CLASS_LOSS 1.25 MODEL.CLOUDS.PSEUDO_LABEL.BOUNDARY_WEIGHT 3.0
""".split()
"""All options against noise in pseudo-labels."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six images each of a source and a generated dataset, two to evaluate on."""
    root = tmp_path_factory.mktemp("joint")
    folders = {
        "gta5": ("gta5/images", "gta5/labels", "{:05d}.png", "{:05d}.png", 6),
        "gta5_generated": (
            "stable_diffusion/demo/images", "stable_diffusion/demo/labels",
            "{:05d}.png", "{:05d}.png", 6,
        ),
        "bdd": ("bdd100k/images/10k/val", "bdd100k/labels/sem_seg/masks/val",
                "{:05d}.jpg", "{:05d}.png", 2),
    }  # fmt: skip
    to_ids = np.full(256, 0, np.uint8)
    to_ids[:19] = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    for number, (name, (images, labels, image_name, label_name, count)) in enumerate(
        folders.items()
    ):
        for folder in (images, labels):
            (root / folder).mkdir(parents=True)
        for i in range(count):
            rng = np.random.default_rng([number, i])
            image, label = render(rng, get_style("gta5"), Contents(), (64, 128))
            cv2.imwrite(str(root / images / image_name.format(i)), image[..., ::-1])
            written = to_ids[label] if name == "gta5" else label
            cv2.imwrite(str(root / labels / label_name.format(i)), written)
    return root


def config(folder, *overrides):
    fixed = ["MODEL.WEIGHTS", "", "DATASETS.TEST", "('bdd_val',)", "OUTPUT_DIR", str(folder)]
    words = [*SMALL, *TRAINED_BACKBONE, *fixed, *overrides]
    return load_config(JOINT, words)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(data))
        results = Trainer(config(folder)).train()
    return folder, results


def test_a_checkpoint_holds_the_teacher_beside_the_model(trained):
    folder, _ = trained
    state = saved(folder)
    student, teacher = state["model"], state["teacher"]
    parts = ("sem_seg_head.", "backbone.clip_model.visual.trunk.")  # both train
    assert {name for name in student if name.startswith(parts[0])} <= teacher.keys()
    for part in parts:  # an average, not a copy
        names = [name for name in teacher if name.startswith(part)]
        assert max(float((student[n] - teacher[n]).abs().max()) for n in names) > 1e-4
    assert not any(name.startswith("backbone.clip_model.transformer") for name in teacher)


def test_a_broken_off_run_goes_on_bit_for_bit_with_its_teacher(
    trained, data, tmp_path, monkeypatch
):
    whole, _ = trained
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data))
    cfg = config(tmp_path)
    train_until(Trainer(cfg), 5)
    resume(Trainer(cfg))
    assert losses(tmp_path) == losses(whole)
    for part in ("model", "teacher"):
        for name, value in saved(whole)[part].items():
            assert torch.equal(value, saved(tmp_path)[part][name]), name


@pytest.mark.slow
def test_with_options_against_noise_it_goes_on_bit_for_bit_with_their_state(
    trained, data, tmp_path, monkeypatch
):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    no_test = ("DATASETS.TEST", "()")
    Trainer(config(whole, *no_test, *AGAINST_NOISE)).train()
    cfg = config(parts, *no_test, *AGAINST_NOISE)
    train_until(Trainer(cfg), 3)
    resume(Trainer(cfg))
    assert losses(parts) == losses(whole) != losses(trained[0])
    for part in ("model", "teacher", "class_losses"):
        for name, value in saved(whole)[part].items():
            assert torch.equal(value, saved(parts)[part][name]), name
    assert saved(whole)["class_losses"]["totals"].count_nonzero() > 10


def train_frozen(folder, data, overrides=()):
    """What each process does."""
    os.environ["DETECTRON2_DATASETS"] = data
    torch.set_num_threads(1)
    # Points all at random: where the least certain ones are taken, a rounding error swaps points.
    points = ("MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO", "0")
    sgd = (
        *points,
        "SOLVER.OPTIMIZER",
        "SGD",
        "SOLVER.BASE_LR",
        "1e-3",
        "MODEL.BACKBONE.FREEZE",
        "True",
    )
    Trainer(config(folder, "DATASETS.TEST", "()", *sgd, *overrides)).train()


@pytest.mark.parametrize(
    "overrides",
    [(), pytest.param(AGAINST_NOISE, marks=pytest.mark.slow)],
    ids=["published", "against noise"],
)
def test_two_processes_train_as_one(overrides, data, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data))
    train_frozen(tmp_path / "one", str(data), overrides)
    launch(train_frozen, (str(tmp_path / "two"), str(data), overrides), num_gpus=2, device="cpu")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) == 6
    for iteration, expected in one.items():
        for name, value in expected.items():
            assert two[iteration][name] == pytest.approx(value, rel=1e-5), (iteration, name)
    for name, value in saved(tmp_path / "one")["teacher"].items():
        torch.testing.assert_close(saved(tmp_path / "two")["teacher"][name], value)


def test_evaluation_shows_and_scores_the_pseudo_labels(trained):
    folder, results = trained
    (labels,) = results.pseudo_labels
    assert labels.name == "sd_demo" and labels.images == 2
    assert set(labels.miou) == {"teacher", "refined", "teacher-where-refined", "student"}
    assert all(0 <= value <= 100 for value in labels.miou.values())
    assert labels.covered == pytest.approx(100)  # superpixels cover everything
    written = json.loads((folder / "results.json").read_text())["pseudo-labels"]["sd_demo"]
    assert written["mIoU"] == pytest.approx(labels.miou)
    panel = cv2.imread(str(folder / "visualizations/sd_demo/0.png"))
    assert panel.shape[1] == 5 * (360 + 12) + 12  # clean, teacher, refined, student, true label
    assert "sd_demo" in results.table()
    assert results.flat()["sd_demo/teacher-mIoU"] == labels.miou["teacher"]


def test_starting_without_warm_up_weights_warns(data, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data))
    with caplog.at_level(logging.WARNING):
        Trainer(config(tmp_path)).resume_or_load(resume=False)
    assert any("without MODEL.WEIGHTS" in record.getMessage() for record in caplog.records)


def test_missing_sam_weights_are_told_before_training(data, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data))
    sam = ("MODEL.CLOUDS.REFINER", "sam", "MODEL.CLOUDS.SAM.MODEL", "vit_b")
    weights = ("MODEL.CLOUDS.SAM.WEIGHTS", str(tmp_path / "sam_vit_b_01ec64.pth"))
    with pytest.raises(FileNotFoundError, match="sam_vit_b_01ec64"):
        Trainer(config(tmp_path, *sam, *weights)).resume_or_load(resume=False)


@pytest.mark.parametrize(
    "overrides",
    [
        ("MODEL.CLOUDS.REFINER", "none"),
        ("MODEL.CLOUDS.REFINER", "sam"),
        ("MODEL.CLOUDS.REFINER", "sam", "MODEL.CLOUDS.SAM.ENABLED", "False"),
        ("MODEL.CLOUDS.REFINER", "sam", "MODEL.CLOUDS.UNCOVERED", "ignore"),
        ("MODEL.CLOUDS.REFINER", "sam", "MODEL.CLOUDS.UNCOVERED", "teacher"),
        ("MODEL.CLOUDS.PSEUDO_LABEL.MIN_CONFIDENCE", "0.3"),
        ("MODEL.CLOUDS.PSEUDO_LABEL.MIN_AGREEMENT", "0.6"),
        ("MODEL.CLOUDS.PSEUDO_LABEL.WEIGHT", "both"),
        ("MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", "text"),
        ("MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", "pooled"),
        ("MODEL.BACKBONE.FREEZE", "True"),
        ("MODEL.CLOUDS.GEOMETRIC_ENSEMBLE_EMA", "True"),
        ("DATASETS.TRAIN", "('gta5',)"),
    ],
    ids=lambda words: " ".join(words),
)
def test_every_ablation_is_an_override_that_trains(overrides, data, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data))
    no_test = ("DATASETS.TEST", "()")
    Trainer(config(tmp_path, "SOLVER.MAX_ITER", "2", *no_test, *overrides)).train()
    assert len(losses(tmp_path)) == 2


def test_the_config_decides_the_teachers_pace():
    teacher = tiny_model(
        **MIXED, MODEL__CLOUDS__ITERATION_UPDATE=7, MODEL__CLOUDS__SAM__ALPHA_EMA=0.5
    ).pseudo_labeler.teacher
    assert (teacher.interval, teacher.momentum) == (7, 0.5)
    assert tiny_config().DATASETS.TRAIN == ("gta5",)  # by default there is none
    assert tiny_model().pseudo_labeler is None
