"""Training on the labels that generated images were generated for."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from dataset_files import random_image, save, write
from joint_samples import generated, joint_model, source

from clouds.config import get_cfg, problems
from clouds.data.build import build_train_loader, check_training_data
from clouds.data.datasets import forget_listings, get_dataset
from clouds.data.datasets.builtin import classes_text
from clouds.data.datasets.manifest import Entry, append_entry, read_manifest
from clouds.data.label_space import CITYSCAPES_19, builtin_label_space
from clouds.data.structures import Domain, class_map
from clouds.files import file_sha256

SIZE = (24, 32)
FILTERED = {
    "MODEL__CLOUDS__GENERATED_LABELS": "filtered",
    "MODEL__CLOUDS__PSEUDO_LABEL__MAX_CLASS_LOSS": 1.25,
    "MODEL__CLOUDS__REFINER": "sam",
}


def write_pair(root, number: int, label=None, labels: str = "approximate"):
    """An image of sd_x, its label in train ids, and its line in the manifest."""
    top = root / "stable_diffusion/x"
    image = save(top / f"images/{number}.png", random_image(number, SIZE))
    if label is not None:
        save(top / f"labels/{number}.png", label)
    entry = Entry(
        image.name, "a street", number, "made", "", *SIZE, file_sha256(image), labels=labels,
        condition="00001.png",
    )  # fmt: skip
    append_entry(top / "manifest.jsonl", entry)


def a_label(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array([0, 8, 10, 13, 255], np.uint8), SIZE)


@pytest.fixture
def root(tmp_path, monkeypatch):
    forget_listings()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for number in range(2):
        write(tmp_path, "gta5", number)
        write_pair(tmp_path, number, a_label(number))
    return tmp_path


@pytest.fixture
def cfg(root):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("gta5", "sd_x")
    cfg.MODEL.CLOUDS.GENERATED_LABELS = "given"
    cfg.INPUT.CROP.SIZE = (16, 20)
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg


def samples(cfg, batches: int = 6):
    return [s for batch in islice(build_train_loader(cfg), batches) for s in batch]


def test_the_label_has_the_flip_of_the_image(cfg, root):
    cfg.INPUT.COLOR_AUG_SSD = False
    flips = set()
    for sample in samples(cfg):
        if sample["domain"] != Domain.GENERATED:
            continue
        assert "clean_image" not in sample
        number = int(sample["file_name"].rsplit("/", 1)[1][0])
        label = a_label(number)
        flipped = not np.array_equal(sample["sem_seg"].numpy(), label)
        expected = label[:, ::-1] if flipped else label
        image = random_image(number, SIZE)
        assert np.array_equal(sample["sem_seg"].numpy(), expected)
        shown = image[:, ::-1] if flipped else image
        assert np.array_equal(sample["image"].numpy().transpose(1, 2, 0), shown)
        flips.add(flipped)
    assert flips == {True, False}


def test_the_students_view_is_that_of_pseudo_labels(cfg):
    given = samples(cfg)
    cfg.MODEL.CLOUDS.GENERATED_LABELS = "teacher"
    for sample, other in zip(given, samples(cfg), strict=True):
        assert torch.equal(sample["image"], other["image"])
        assert ("clean_image" in other) == (other["domain"] == Domain.GENERATED)


def test_labels_are_mapped_to_the_training_label_space(cfg, root):
    """A folder with CamVid's classes; sky is 0 there and 10 in Cityscapes."""
    space = builtin_label_space("camvid_11").label_space
    sky = np.zeros(SIZE, np.uint8)
    sky[:, 16:] = space.names.index("car")
    sky[:, 30:] = space.names.index("bicyclist")  # no class of Cityscapes has this name
    for number in range(2):
        save(root / f"stable_diffusion/x/labels/{number}.png", sky)
    (root / "stable_diffusion/x/classes.yaml").write_text(classes_text(space, range(11)))
    for sample in samples(cfg, 2):
        if sample["domain"] == Domain.GENERATED:
            found = np.bincount(sample["sem_seg"].numpy().ravel(), minlength=256)
            assert {c: n for c, n in enumerate(found) if n} == {10: 384, 13: 336, 255: 48}
            assert sample["partly_labelled"]


def test_every_image_needs_a_label(cfg, root):
    write_pair(root, 7)
    forget_listings()
    for use in (build_train_loader, check_training_data):
        with pytest.raises(ValueError, match=r"1 of 3 images of sd_x have no label .*7\.png.*tea"):
            use(cfg)
    cfg.MODEL.CLOUDS.GENERATED_LABELS = "teacher"
    check_training_data(cfg)


def test_a_label_of_another_size_is_named(cfg, root):
    for number in range(2):
        save(root / f"stable_diffusion/x/labels/{number}.png", a_label(0)[:-1])
    with pytest.raises(ValueError, match=r"labels/\d\.png: the label is 32x23 .* image is 32x24"):
        samples(cfg)


def test_the_manifest_tells_approximate_labels(root):
    write_pair(root, 3, a_label(3), labels="")
    write_pair(root, 4, a_label(4), labels="")
    entries = read_manifest(root / "stable_diffusion/x/manifest.jsonl")
    assert [entries[f"{n}.png"].labels for n in (0, 1, 3)] == ["approximate", "approximate", ""]
    assert entries["0.png"].condition == "00001.png"
    kinds = [record.approximate_label for record in get_dataset("sd_x").records()]
    assert kinds == [True, True, False, False]
    with pytest.raises(ValueError, match="labels is 'rough', but must be 'approximate' or empty"):
        Entry("a.png", "", 0, "", "", 1, 1, "0" * 64, labels="rough")


def test_classes_of_a_folder_are_read_as_they_were_written(tmp_path, root):
    path = root / "stable_diffusion/x/classes.yaml"
    path.write_text(classes_text(CITYSCAPES_19, (0, 8, 10, 13)))
    dataset = get_dataset("sd_x")
    assert dataset.label_space == CITYSCAPES_19 and dataset.classes_present == (0, 8, 10, 13)
    assert np.array_equal(dataset.read_label(dataset.records()[1]), a_label(1))


def test_filtered_labels_come_with_the_teachers_view(cfg):
    cfg.INPUT.COLOR_AUG_SSD = False
    given = samples(cfg)
    cfg.MODEL.CLOUDS.GENERATED_LABELS = "filtered"
    for sample, other in zip(samples(cfg), given, strict=True):
        if sample["domain"] == Domain.GENERATED:
            assert "sem_seg" not in sample
            assert torch.equal(sample["given_label"], other["sem_seg"])
            assert torch.equal(sample["clean_image"], other["image"])


def test_pasted_classes_are_in_given_labels(cfg):
    """Class mixing: pixel for pixel the pasted class, else the given one."""
    cfg.INPUT.CLASS_MIXING = True
    model = joint_model(MODEL__CLOUDS__GENERATED_LABELS="given")
    seen = 0
    for sample in samples(cfg, 3):
        if sample["domain"] == Domain.GENERATED:
            (targets,) = model.targets([sample])
            found = class_map(targets.labels, targets.masks)
            pasted = sample["pasted_label"]
            expected = torch.where(pasted == 255, sample["sem_seg"], pasted)
            assert torch.equal(found.to(torch.uint8), expected)
            seen += int((pasted != 255).sum())
    assert seen


# ---------------------------------------------------------------------- the model
def test_a_given_label_trains_as_that_of_a_source_image():
    model = joint_model(MODEL__CLOUDS__GENERATED_LABELS="given")
    assert model.pseudo_labeler is None
    plain = {**source(1), "seed": 5}
    losses = model([plain, source(2)])
    given = {**plain, "domain": Domain.GENERATED}
    same = model([given, source(2)])
    assert losses.keys() == same.keys()
    assert all(torch.equal(losses[name], same[name]) for name in losses)


def test_filtered_labels_against_the_formula():
    """Weight 0 where the teacher's cross-entropy is above 1.25 times the mean of the class."""
    model = joint_model(**FILTERED)
    means = torch.linspace(0.5, 4.0, 19, dtype=torch.float64)
    totals = torch.stack([10 * means, torch.full_like(means, 10)])
    model.pseudo_labeler.class_losses.load_state_dict({"totals": totals})
    sample = generated(3)
    label = torch.randint(0, 5, (64, 96), generator=torch.Generator().manual_seed(0))
    label[label == 4] = 255
    sample["given_label"] = label.to(torch.uint8)
    (targets,) = model.targets([sample])
    probability = teacher_scores(model, sample["clean_image"])
    probability = probability / probability.sum(0).clamp(min=1)
    kept = 0
    for y in range(0, 64, 3):
        for x in range(0, 96, 3):
            c = int(label[y, x])
            noisy = c != 255 and -probability[c, y, x].log() > 1.25 * means[c]
            assert targets.weights[y, x] == (0 if noisy else 1), (y, x)
            kept += not noisy
    assert 0 < kept < 22 * 32
    assert torch.equal(
        class_map(targets.labels, targets.masks)[targets.weights > 0],
        label[targets.weights > 0].to(torch.uint8),
    )


def teacher_scores(model, image):
    with torch.no_grad():
        labeler = model.pseudo_labeler
        padded = model._preprocess([image])
        features = labeler.teacher_parts["backbone"](padded.tensor)
        (prediction,) = model._teacher_predictions(features, padded)
    return prediction.scores


def test_filtered_labels_need_no_refiner_and_train():
    model = joint_model(**FILTERED, MODEL__CLOUDS__SAM__WEIGHTS="/nowhere.pth")
    model.pseudo_labeler.prepare(torch.device("cpu"))  # not SAM
    sample = {**generated(3), "given_label": source(3)["sem_seg"]}
    losses = model([source(1), sample])
    sum(losses.values()).backward()
    before = model.pseudo_labeler.class_losses.means
    model.pseudo_labeler.class_losses.commit(torch.device("cpu"))
    assert before.isinf().all()
    assert model.pseudo_labeler.class_losses.means[:4].isfinite().all()  # of the source alone


def test_a_filter_without_a_limit_is_refused():
    cfg = get_cfg()
    cfg.MODEL.CLOUDS.GENERATED_LABELS = "filtered"
    assert any("needs MODEL.CLOUDS.PSEUDO_LABEL.MAX_CLASS_LOSS above 0" in p for p in problems(cfg))
    cfg.MODEL.CLOUDS.PSEUDO_LABEL.MAX_CLASS_LOSS = 1.25
    assert not any("MAX_CLASS_LOSS" in p for p in problems(cfg))


def test_an_image_without_its_label_is_refused():
    model = joint_model(MODEL__CLOUDS__GENERATED_LABELS="given")
    with pytest.raises(ValueError, match="needs a teacher to label it"):
        model([source(1), generated(2)])
