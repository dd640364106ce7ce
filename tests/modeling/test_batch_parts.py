"""Losses and gradients of a batch in parts add up to those of the whole batch."""

from __future__ import annotations

import pytest
import torch
from joint_samples import generated, joint_model, source
from test_clouds_model import sample, train_step
from tiny_adapter import vit_model_config
from tiny_model import tiny_model

from clouds.modeling.build import build_seeded
from clouds.modeling.criterion import BatchTotals


def in_parts(model, parts):
    """Losses and gradients of the parts of one batch, added up."""
    model.zero_grad()
    sums = {}
    for part, prepared in zip(parts, model.prepare_parts(parts), strict=True):
        losses = model(part, prepared)
        sum(losses.values()).backward()
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0) + loss.detach()
    return sums, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(one, other):
    for ours, expected in zip(one, other, strict=True):
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            bound = 1e-5 * max(1.0, float(value.detach().abs().max()))
            torch.testing.assert_close(ours[name], value.detach(), rtol=0, atol=bound)


def few_classes(index):
    """A label with one class; those of `sample` have three."""
    other = sample(index)
    return {**other, "sem_seg": torch.full_like(other["sem_seg"], index % 19)}


def partly(index):
    """An image of a dataset that lacks a class, a quarter of it unlabelled."""
    other = sample(index)
    label = other["sem_seg"].clone()
    label[:32, :32] = 255
    return {**other, "sem_seg": label, "partly_labelled": True}


def unlabelled(index):
    other = sample(index)
    return {**other, "sem_seg": torch.full_like(other["sem_seg"], 255)}


BATCHES = {
    "labelled": [sample(0), few_classes(1), sample(2), few_classes(3)],
    "partly labelled": [sample(0), partly(1), few_classes(2), partly(3)],
    "unlabelled": [unlabelled(0), sample(1), unlabelled(2), unlabelled(3)],
}


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 2)])
@pytest.mark.parametrize("name", BATCHES)
def test_four_times_one_equals_four(name, sizes):
    model, batch = tiny_model().train(), BATCHES[name]
    whole = train_step(model, batch)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = [batch[i : i + n] for i, n in zip(starts, sizes, strict=True)]
    assert_equal(in_parts(model, parts), whole)


def test_losses_of_parts_with_normalizers_of_their_own_are_others():
    model, batch = tiny_model().train(), BATCHES["labelled"]
    whole, _ = train_step(model, batch)
    means = sum(float(model([one])["loss_ce"].detach()) for one in batch) / 4
    assert abs(means - float(whole["loss_ce"].detach())) > 1e-3


@pytest.mark.parametrize("no_object", [1.0, 0.25])
def test_generated_images_in_parts(no_object):
    model = joint_model(MODEL__CLOUDS__PSEUDO_LABEL__NO_OBJECT_WEIGHT=no_object)
    batch = [source(0), generated(1), generated(2), {**source(3), "partly_labelled": True}]
    batch[3]["sem_seg"] = batch[3]["sem_seg"].masked_fill(batch[3]["sem_seg"] == 2, 255)
    for images in (batch, batch[:3]):
        whole = train_step(model, images)
        assert_equal(in_parts(model, [[image] for image in images]), whole)


@pytest.mark.parametrize("name", ["labelled", "partly labelled"])
def test_dropout_is_the_same_in_what_is_predicted_twice(name):
    """Normalizers are those of the predictions that are trained, with their dropout."""
    model = tiny_model(MODEL__MASK_FORMER__DROPOUT=0.3).train()
    parts = [BATCHES[name][:2], BATCHES[name][2:]]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    prepared = model.prepare_parts(parts)
    assert torch.equal(torch.get_rng_state(), state)
    totals = []
    for part, other in zip(parts, prepared, strict=True):
        predictions, padded = model.predict_targets(part, other.targets)
        totals.append(model.criterion.totals(predictions, padded, [one["seed"] for one in part]))
    expected = model.criterion.normalizers(totals[0] + totals[1])
    torch.testing.assert_close(prepared[1].normalizers.classes, expected.classes)
    torch.testing.assert_close(prepared[1].normalizers.masks, expected.masks)


def test_normalizers_by_hand():
    """12 queries; 3, 1, 3, 1 classes: 8 matched, 40 unmatched of weight 0.1."""
    model = tiny_model().train()
    parts = [[one] for one in BATCHES["labelled"]]
    counts = [len(one["sem_seg"].unique()) for one in BATCHES["labelled"]]
    for part in model.prepare_parts(parts):
        assert part.normalizers.masks.item() == sum(counts)
        weight = sum(counts) + 0.1 * (48 - sum(counts))
        assert part.normalizers.classes.tolist() == pytest.approx([weight] * 4)
    half = BatchTotals(2, torch.tensor([3.0])) + BatchTotals(5, torch.tensor([0.5]))
    assert (half.matched, half.unmatched.tolist()) == (7, [3.5])


@pytest.mark.parametrize("name", ["labelled", "partly labelled"])
def test_queries_of_an_adapter_are_counted(name):
    model = build_seeded(vit_model_config("rein")).train()
    assert model.sem_seg_head.predictor.num_queries == 0
    batch = BATCHES[name]
    whole = train_step(model, batch)
    assert any("adapter" in key for key in whole[1])
    assert_equal(in_parts(model, [[one] for one in batch]), whole)
