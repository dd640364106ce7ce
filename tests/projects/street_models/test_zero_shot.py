"""Zero-shot classification of crops: the crops, the scores, the printed table."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest
import torch
from street_models.evaluate_clip import UNSEEN, evaluation_scenes, main, mean_of, report
from street_models.records import without_record, write_record
from street_models.train_clip import write_weights
from street_models.weight_files import STREET_CLIP
from street_models.zero_shot import ObjectCrops, classify, confusion, mean_accuracy
from torch.nn import functional as F

from clouds.data.label_space import CITYSCAPES_19
from clouds.modeling.backbone.open_clip_models import (
    PIXEL_MEAN,
    PIXEL_STD,
    create_clip,
    get_tokenizer,
)
from clouds.modeling.text_classifier import TEMPLATES
from clouds.weights_record import check_record, read_record, record_file


def test_scores_by_hand():
    # class 0: 2 of 3 right; class 2: 1 of 2; others do not occur
    table = confusion(np.array([0, 0, 0, 2, 2]), np.array([0, 0, 1, 2, 18]))
    assert int(table[0, 1]) == 1 and int(table[2, 18]) == 1 and int(table.sum()) == 5
    assert mean_accuracy(table) == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)
    assert mean_of({"a": table, "b": torch.eye(19)}) == pytest.approx((100 * 7 / 12 + 100) / 2)


def test_the_report_names_what_is_mistaken_for_what():
    table = confusion(np.array([13, 13, 13, 13]), np.array([13, 14, 14, 15]))
    text = report({"some look": table})
    assert "some look: top-1 25.0 %" in text and "of 4 crops" in text
    (line,) = (line for line in text.splitlines() if line.startswith("  car"))
    assert line.endswith("truck 50, bus 25")


def test_one_crop_per_class_and_scene_of_large_objects_alone(scenes):
    triples = list(zip(scenes.images[:4], scenes.labels[:4], scenes.instances[:4], strict=True))
    crops = ObjectCrops.of(triples, seed=0)
    expected = sum(
        any(((label == c) & (instances == i)).sum() >= 60 for i in np.unique(instances[label == c]))
        for _, label, instances in triples
        for c in range(19)
    )
    assert len(crops.classes) == len(crops.images) == expected


def test_classes_by_plain_matrix_products():
    """An ensemble of prompts per word, the best word of a class, cosines."""
    torch.manual_seed(0)
    model = create_clip("street_clip").eval()
    images = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8)
    tokenizer = get_tokenizer("street_clip")
    with torch.no_grad():
        x = (torch.tensor(images).float() - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
        seen = F.normalize(model.encode_image(x.permute(0, 3, 1, 2)), dim=-1)
        best = []
        for words in CITYSCAPES_19.synonyms:
            rows = []
            for word in words:
                prompts = tokenizer([template.format(word) for template in TEMPLATES])
                row = F.normalize(model.encode_text(prompts), dim=-1).mean(0)
                rows.append(seen @ row / row.norm())
            best.append(torch.stack(rows).amax(0))
        expected = torch.stack(best).argmax(0)
    assert classify(model, images).tolist() == expected.tolist()


@pytest.mark.parametrize("name", UNSEEN)
def test_images_of_the_unseen_looks_have_the_short_side_of_the_demo(name):
    ((image, label, instances),) = evaluation_scenes(name, seed=1000, count=1)
    assert min(label.shape) == 160 and image.shape == (*label.shape, 3)
    assert instances.shape == label.shape


def test_a_record_matches_the_weights_and_no_others(tmp_path):
    weights = tmp_path / "street_clip.safetensors"
    weights.write_bytes(b"as trained")
    write_record(weights, "python -m street_models.train_clip", {"top1": {"mean": 60.0}})
    check_record(weights)
    weights.write_bytes(b"altered")
    with pytest.raises(ValueError, match=r"SHA-256 is .*python -m street_models\.train_clip"):
        check_record(weights)


def test_a_record_is_restored_if_no_new_one_was_made(tmp_path):
    weights = tmp_path / "street_clip.safetensors"
    weights.write_bytes(b"as trained")
    write_record(weights, "python -m street_models.train_clip", {})
    before = record_file(weights).read_bytes()
    weights.write_bytes(b"trained again, and broken")
    with pytest.raises(SystemExit):
        main(["--weights", str(weights), "--images", "1", "--record", "again"])
    assert record_file(weights).read_bytes() == before
    with without_record(weights):
        assert not record_file(weights).exists()
    assert not record_file(weights).exists()


def test_the_shipped_weights_are_the_recorded_ones():
    record = read_record(STREET_CLIP)
    assert record is not None
    assert hashlib.sha256(STREET_CLIP.read_bytes()).hexdigest() == record.sha256
    assert set(record.details["evaluation"]["top1"]) == {*UNSEEN, "mean"}


def test_the_shipped_weights_know_the_classes(scenes):
    """More than a third of the crops of scenes of half the size; by chance it is a nineteenth."""
    model = create_clip("street_clip", "street_clip").eval()
    triples = zip(scenes.images, scenes.labels, scenes.instances, strict=True)
    crops = ObjectCrops.of(triples, seed=0)
    assert (classify(model, crops.images) == crops.classes).mean() > 1 / 3


@pytest.mark.slow
def test_the_recorded_scores_are_measured(capsys):
    record = read_record(STREET_CLIP)
    assert record is not None
    main([])
    printed = capsys.readouterr().out
    mean = float(re.search(r"mean of the looks: ([\d.]+) %", printed)[1])
    assert mean == pytest.approx(record.details["evaluation"]["top1"]["mean"], abs=0.5)


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    weights = tmp_path / "weights.safetensors"
    write_weights(create_clip("street_clip"), weights)
    main(["--weights", str(weights), "--images", "1", "--json", str(tmp_path / "scores.json")])
    printed = capsys.readouterr().out
    assert all(f"{name}: top-1" in printed for name in UNSEEN)
    assert '"mean"' in (tmp_path / "scores.json").read_text()
