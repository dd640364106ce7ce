"""Our numbers against those of the published code, for the same weights, image and labels.

CLOUDS_REFERENCE_REPORT=file.json writes the largest difference of every comparison; the same
numbers are in a JUnit report (--junitxml).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_files import (
    TEXT_ENCODER,
    facts,
    needs_reference,
    reference_config,
    weights_rule,
)

from clouds.data.label_space import CITYSCAPES_19
from clouds.engine.optimizer import parameter_groups
from clouds.modeling import criterion
from clouds.modeling.backbone.open_clip_models import get_tokenizer
from clouds.modeling.build import build_seeded
from clouds.modeling.matcher import match
from clouds.modeling.text_classifier import prompts_for

pytestmark = needs_reference

TOLERANCE = 1e-4
"""Absolute, and relative to the published number."""

LAYERS = ("last", *(f"aux{i}" for i in range(9)))
BACKBONE = ("stem", "res2", "res3", "res4", "res5", "clip_vis_dense")


@pytest.fixture(scope="module")
def cfg():
    cfg = reference_config()
    return cfg


@pytest.fixture(scope="module")
def model(cfg):
    """With the reference's weights, except in the text encoder, which only one test needs."""
    model = build_seeded(cfg)
    state = model.state_dict()
    part = {name: value for name, value in state.items() if not name.startswith(TEXT_ENCODER)}
    weights_rule().fill(model, part)
    return model.eval()


@pytest.fixture(scope="module")
def differences():
    largest = {}
    yield largest
    path = os.environ.get("CLOUDS_REFERENCE_REPORT")
    if path:
        Path(path).write_text(json.dumps(largest, indent=1))


@pytest.fixture
def agree(differences, record_property):
    """Compare, and record the largest difference."""

    def check(name, ours, theirs):
        ours = np.asarray(ours.detach() if isinstance(ours, torch.Tensor) else ours)
        theirs = np.asarray(theirs)
        assert ours.shape == theirs.shape, name
        difference = np.abs(ours.astype(np.float64) - theirs)
        differences[name] = float(difference.max())
        record_property(f"largest difference: {name}", differences[name])
        assert np.isfinite(ours).all(), name
        worst = (difference - TOLERANCE * np.abs(theirs)).max()
        assert worst <= TOLERANCE, f"{name}: off by {differences[name]}"

    return check


@pytest.fixture(scope="module")
def inference(model, reference):
    """Features, pixel decoder's outputs, predictions and scores of the reference's image."""
    sample = {"image": torch.from_numpy(reference["in/image"])}
    with torch.no_grad():
        images = model._preprocess([sample["image"]]).tensor
        features = model.backbone(images)
        mask_features, maps = model.sem_seg_head.pixel_decoder(features)
        predictions = model.sem_seg_head.predictor(maps, mask_features)
        scores = model([sample])[0]["sem_seg"]
    return features, mask_features, maps, predictions, scores


@pytest.fixture(scope="module")
def training(model, reference):
    """Losses, matched pairs and gradients of one image, points sampled after manual_seed(123)."""
    matches = []

    def record(*args):
        matches.extend(match(*args))
        return matches

    sample = {
        "image": torch.from_numpy(reference["in/image"]),
        "sem_seg": torch.from_numpy(reference["in/labels"]),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(criterion, "match", record)
        model.train()
        torch.manual_seed(123)
        losses = model([sample])
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    yield losses, [image for (image,) in matches], gradients
    model.zero_grad()
    model.eval()


def test_names_and_shapes_are_those_of_a_published_checkpoint(model):
    official = {name: tuple(entry["shape"]) for name, entry in facts("official_keys").items()}
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert ours == official


def test_the_images_normalization(model, reference, agree):
    agree("pixel mean", model.pixel_mean.flatten(), reference["in/pixel_mean"])
    agree("pixel std", model.pixel_std.flatten(), reference["in/pixel_std"])


@pytest.mark.parametrize("name", BACKBONE)
def test_backbone_features(name, inference, reference, agree):
    features, *_ = inference
    agree(f"backbone {name}", features[name][:, ::16], reference[f"inf/backbone/{name}"])


def test_pixel_decoder(inference, reference, agree):
    _, mask_features, maps, *_ = inference
    published = "inf/pixel_decoder/"
    agree("mask features", mask_features[:, ::16], reference[published + "mask_features"])
    for i, features in enumerate(maps):
        agree(f"multi-scale {i}", features[:, ::16], reference[f"{published}multi_scale_{i}"])
    encoded = reference[published + "transformer_encoder_features"]
    agree("transformer's coarsest map", maps[0][:, ::16], encoded)


def test_class_logits_of_all_ten_predictions(inference, reference, agree):
    predictions = inference[3]
    assert len(predictions.class_logits) == 10
    for i, logits in enumerate(predictions.class_logits[:-1]):
        agree(f"class logits {i}", logits, reference[f"inf/aux{i}/pred_logits"])
    agree("class logits, last", predictions.class_logits[-1], reference["inf/pred_logits"])


def test_masks_and_semantic_map(inference, reference, agree):
    *_, predictions, scores = inference
    agree("mask logits, last", predictions.mask_logits[-1][:, ::5], reference["inf/pred_masks"])
    published = reference["inf/sem_seg_plain"]
    ours = scores[:, ::4, ::4].numpy()
    agree("scores of classes", ours, published)
    equal = (ours.argmax(0) == published.argmax(0)).mean()
    assert equal >= 0.999


def test_random_numbers_are_the_references(reference):
    torch.manual_seed(123)
    assert np.array_equal(torch.rand(4).numpy(), reference["crit/rng_check_seed123_first4"])


def test_matched_pairs_of_all_ten_predictions(training, reference):
    _, matches, _ = training
    labels = np.unique(reference["in/labels"])
    assert reference["crit/target_labels"].tolist() == [v for v in labels.tolist() if v != 255]
    assert len(matches) == len(LAYERS)
    for name, (queries, targets) in zip(LAYERS, matches, strict=True):
        assert queries.tolist() == reference[f"crit/indices_{name}/src"].tolist(), name
        assert targets.tolist() == reference[f"crit/indices_{name}/tgt"].tolist(), name


def test_all_thirty_losses(training, reference, published, agree):
    losses, *_ = training
    weights = {"loss_ce": 2, "loss_mask": 5, "loss_dice": 5}
    weighted, unweighted = (published[f"losses_{w}_seed123"] for w in ("weighted", "unweighted"))
    assert set(losses) == set(weighted) and len(losses) == 30
    for name, loss in losses.items():
        agree(name, loss, weighted[name])
        weight = weights["_".join(name.split("_")[:2])]
        agree(f"{name}, unweighted", loss / weight, unweighted[name])
        agree(f"{name}, as an array", loss / weight, reference[f"crit/loss/{name}"])
    agree("sum of losses", sum(losses.values()), published["loss_total_seed123"])


def test_gradients(training, reference, agree):
    *_, gradients = training
    names = [name for name in reference.files if name.startswith("crit/grad/")]
    assert len(names) == 6
    for name in names:
        agree(f"gradient of {name[10:]}", gradients[name[10:]], reference[name])


def test_norms_of_all_gradients(training, published, agree):
    *_, gradients = training
    theirs = published["grad_norms"]
    assert set(gradients) == set(theirs) and len(theirs) == 292
    ours = [gradients[name].norm().item() for name in theirs]
    agree("norms of gradients", ours, list(theirs.values()))


def test_what_the_optimizer_trains(cfg, model, published):
    """The published one also lists the no_object embedding, which gets no gradient."""
    groups = parameter_groups(cfg, model)
    decay = {name: g["weight_decay"] for g in groups for name in g["param_names"]}
    no_object = "void_embedding.weight"
    assert no_object not in decay
    assert {n for n, d in decay.items() if d == 0} == set(published["optimizer_wd0"]) - {no_object}
    assert {d for d in decay.values() if d} == {0.05}
    assert len(decay) == published["optimizer"]["n_params"] - 1
    assert [g["lr"] for g in groups] == published["optimizer"]["lr"] * len(groups)


def test_prompts_and_tokens(reference, published):
    prompts = prompts_for(CITYSCAPES_19.synonyms)
    assert len(prompts) == published["n_prompts"]
    assert prompts[:20] == published["test_class_names_first20"]
    assert [len(names) for names in CITYSCAPES_19.synonyms] == published["num_templates"]
    tokens = get_tokenizer("convnext_base")(prompts[:4])
    assert np.array_equal(tokens.numpy(), reference["inf/text_tokens_first"])


@pytest.mark.slow
def test_text_classifier(model, reference, agree):
    state = model.state_dict()
    text = {name: value for name, value in state.items() if name.startswith(TEXT_ENCODER)}
    weights_rule().fill(model, text)
    model.text_classifier.reset()
    with torch.no_grad():
        text = model._text_embeddings(model.network)
    assert list(text.counts) == [len(names) for names in CITYSCAPES_19.synonyms]
    agree("text classifier", text.rows[:, ::4], reference["inf/text_classifier"])
