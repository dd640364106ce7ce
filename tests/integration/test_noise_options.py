"""Options against noise in pseudo-labels, in the whole model: joint training with each of them."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from joint_samples import generated, joint_model, source

from clouds.engine.hooks import ClassLossHook, EMAHook, self_training_hooks

PSEUDO = "MODEL__CLOUDS__PSEUDO_LABEL__"
OPTIONS = {
    "assignment": {PSEUDO + "ASSIGNMENT": "sinkhorn", PSEUDO + "MIN_CONFIDENCE": 0.5},
    "image filter": {PSEUDO + "MIN_IMAGE_CONFIDENCE": 1.0},
    "quality": {PSEUDO + "QUALITY_THRESHOLD": 0.5},
    "dice": {PSEUDO + "DICE_WEIGHT": 0.0},
    "class loss": {PSEUDO + "MAX_CLASS_LOSS": 1.0},
    "boundary": {PSEUDO + "BOUNDARY_WEIGHT": 3.0},
    "flip": {"MODEL__CLOUDS__TEACHER_FLIP": True},
    "masking": {
        "MODEL__CLOUDS__MASKED_CONSISTENCY__RATIO": 0.7,
        "MODEL__CLOUDS__MASKED_CONSISTENCY__BLOCK_SIZE": 16,
    },
}


def model_of(**settings):
    """A model whose untrained teacher, with larger weights, sees several classes in an image."""
    model = joint_model(**settings)
    with torch.no_grad():
        for name, values in model.pseudo_labeler.teacher_parts["sem_seg_head"].named_parameters():
            if "class_embed" in name or "mask_embed" in name:
                values *= 10
    return model


def mixed(seed):
    """A generated sample with a square of class 2 of another image."""
    sample = generated(seed)
    sample["pasted_label"] = torch.full((64, 96), 255, dtype=torch.uint8)
    sample["pasted_label"][20:40, 30:60] = 2
    sample["image"] = sample["image"].clone()
    sample["image"][:, 20:40, 30:60] = 77
    return sample


def losses_of(batch, steps=2, **settings):
    """Losses of the second of two equal steps, so that statistics of the first have an effect."""
    model = model_of(**settings)
    hooks = self_training_hooks(model.pseudo_labeler, torch.device("cpu"))
    for _ in range(steps):
        losses = model(batch)
        for hook in hooks:
            if isinstance(hook, ClassLossHook):
                hook.after_step()
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    return {name: loss.item() for name, loss in losses.items()}


@pytest.fixture(scope="module")
def published():
    return losses_of([source(1), generated(2)])


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_changes_the_losses_of_generated_images_alone(name, published):
    with_option = losses_of([source(1), generated(2)], **OPTIONS[name])
    assert with_option != published
    assert all(torch.isfinite(torch.tensor(v)) for v in with_option.values())
    sources = [source(1), source(2)]
    assert losses_of(sources, 1, **OPTIONS[name]) == losses_of(sources, 1)


def test_all_options_together_and_class_mixing():
    settings = {k: v for options in OPTIONS.values() for k, v in options.items()}
    settings[PSEUDO + "MIN_IMAGE_CONFIDENCE"] = 0.01
    losses = losses_of([source(1), mixed(2), generated(3)], **settings)
    assert losses != losses_of([source(1), generated(2), generated(3)], **settings)


def test_pasted_pixels_have_their_label_and_the_teacher_does_not_see_them():
    model = model_of()
    plain, with_square = model.targets([generated(2)]), model.targets([mixed(2)])
    is_pasted = mixed(2)["pasted_label"] == 2
    as_maps = [
        torch.stack([t[0].masks[i] * (c + 1) for i, c in enumerate(t[0].labels.tolist())]).sum(0)
        for t in (plain, with_square)
    ]
    assert torch.equal(as_maps[1], torch.where(is_pasted, 3, as_maps[0]))


def test_the_flip_averaged_teacher_is_the_mean_over_both_views():
    model = model_of(MODEL__CLOUDS__TEACHER_FLIP=True)
    image = generated(4, 50, 90)["clean_image"]
    images = model._preprocess([image])
    features = model.backbone(images.tensor)
    (found,) = model._teacher_predictions(features, images)
    model.teacher_flip = False
    both = []
    for view in (image, image.flip(-1)):
        padded = model._preprocess([view])
        (one,) = model._teacher_predictions(model.backbone(padded.tensor), padded)
        both.append(one)
    expected = (both[0].scores + both[1].scores.flip(-1)) / 2
    torch.testing.assert_close(found.scores, expected)
    torch.testing.assert_close(
        found.query_confidence, (both[0].query_confidence + both[1].query_confidence) / 2
    )
    assert not torch.allclose(found.scores, both[0].scores, atol=1e-4)


def test_the_confidence_of_queries_is_the_mean_of_their_largest_probabilities():
    model = model_of()
    images = model._preprocess([generated(4)["clean_image"]])
    features = model.backbone(images.tensor)
    (found,) = model._teacher_predictions(features, images)
    logits = model._predict(model.pseudo_labeler.teacher_parts, features).final[0]
    torch.testing.assert_close(found.query_confidence, logits[0].softmax(-1).amax(-1).mean())


def test_the_student_alone_sees_masked_blocks(monkeypatch):
    settings = OPTIONS["masking"]
    plain, masked = model_of(), model_of(**settings)
    batch = [source(1), generated(2)]
    labels = [model.targets(batch)[1] for model in (plain, masked)]
    assert torch.equal(labels[0].masks, labels[1].masks)
    images = masked._student_images(batch).tensor
    unmasked = plain._student_images(batch).tensor
    assert torch.equal(images[0], unmasked[0])
    visible = masked.block_masking.visible(64, 96, 2)
    assert torch.equal(images[1], unmasked[1] * visible)
    assert 0.05 < visible.float().mean() < 0.6


def test_losses_of_parts_add_up_with_all_options():
    """Gradient accumulation: with weights per pixel and per image, as without."""
    settings = {k: v for options in OPTIONS.values() for k, v in options.items()}
    settings[PSEUDO + "MIN_IMAGE_CONFIDENCE"], settings[PSEUDO + "MAX_CLASS_LOSS"] = 0.01, 0.0
    model = model_of(**settings)
    batch = [source(1), mixed(2), generated(3), source(4)]
    whole = model(batch)
    parts = [batch[:2], batch[2:]]
    prepared = model.prepare_parts(parts)
    sums = [model(part, one) for part, one in zip(parts, prepared, strict=True)]
    for name, loss in whole.items():
        torch.testing.assert_close(sums[0][name] + sums[1][name], loss, rtol=1e-4, atol=1e-5)


def test_a_batch_of_dropped_images_has_losses_of_0():
    losses = losses_of([generated(1), generated(2)], **OPTIONS["image filter"])
    assert set(losses.values()) == {0.0}


def test_class_losses_are_those_of_the_students_predictions():
    model = model_of(**OPTIONS["class loss"])
    batch = [source(1), generated(2), source(3)]
    model(batch)
    statistics = model.pseudo_labeler.class_losses
    assert torch.isinf(statistics.means).all()
    statistics.commit(torch.device("cpu"))
    # the two labelled images by hand, in inference: the network has neither dropout nor batch norm
    model.eval()
    sums = torch.zeros(2, 19, dtype=torch.float64)
    for sample in (batch[0], batch[2]):
        scores = model([{"image": sample["image"]}])[0]["sem_seg"].double()
        shares = scores / scores.sum(0).clamp(min=1)
        for c in range(4):
            pixels = sample["sem_seg"] == c
            sums[0, c] -= shares[c][pixels].log().sum()
            sums[1, c] += pixels.sum()
    expected = (sums[0] / sums[1])[:4]
    torch.testing.assert_close(statistics.means[:4], expected, rtol=1e-4, atol=1e-4)


def test_hooks_save_what_the_options_need():
    labeler = model_of().pseudo_labeler
    assert [type(h) for h in self_training_hooks(labeler, torch.device("cpu"))] == [EMAHook]
    labeler = model_of(**OPTIONS["class loss"]).pseudo_labeler
    _, hook = self_training_hooks(labeler, torch.device("cpu"))
    labeler.class_losses.observe(torch.rand(19, 4, 4), torch.zeros(4, 4, dtype=torch.uint8))
    hook.after_step()
    saved = deepcopy(hook.state_dict())
    labeler.class_losses.observe(torch.rand(19, 4, 4), torch.ones(4, 4, dtype=torch.uint8))
    hook.before_step()  # the iteration is repeated
    hook.after_step()
    means = labeler.class_losses.means
    hook.load_state_dict(saved)
    torch.testing.assert_close(labeler.class_losses.means, means)
