"""The criterion against NumPy, transformers and finite differences."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from criterion_numpy import (
    NO_OBJECT_WEIGHT,
    NUM_CLASSES,
    NUM_LAYERS,
    NUM_QUERIES,
    SAMPLER,
    WEIGHTS,
    build,
    ignored,
    image_of,
    leaves_of,
    losses_by_hand,
    predictions,
    some_weights,
    targets_of,
    with_weights,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers_weights import mask2former, mask2former_config

from clouds import comm
from clouds.d2 import CfgNode
from clouds.data.structures import Targets
from clouds.modeling.criterion import SetCriterion
from clouds.modeling.matcher import CostWeights, MatchedPairs
from clouds.modeling.points import PointSampler
from clouds.modeling.transformer_decoder.decoder import Predictions


def test_losses_and_pairs_against_numpy(recorded_matches):
    outputs, targets = predictions(3), targets_of([0, 2, 3, 255], [1], [255, 0, 1])
    seeds = [11, 5, 99]
    losses = build()(outputs, targets, seeds)
    expected, pairs = losses_by_hand(outputs, targets, seeds)
    assert list(losses) == [
        f"loss_{term}{suffix}" for suffix in ("", "_0", "_1") for term in ("ce", "mask", "dice")
    ]
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for layer, matched in zip([2, 0, 1], recorded_matches, strict=True):
        for i, (queries, indices) in enumerate(matched):
            assert list(zip(queries.tolist(), indices.tolist(), strict=True)) == pairs[layer, i]
    assert len({tuple(p) for p in pairs.values() if len(p) == 3}) > 1  # predictions differ


@pytest.mark.parametrize("present", [([0, 2, 3], [1, 2]), ([0, 1, 2, 3, 255], [3])])
def test_against_transformers(present, recorded_matches):
    """Points from torch's global generator, in the same order as theirs."""
    config = mask2former_config(
        no_object_weight=NO_OBJECT_WEIGHT,
        class_weight=WEIGHTS.class_weight,
        mask_weight=WEIGHTS.mask_weight,
        dice_weight=WEIGHTS.dice_weight,
        train_num_points=SAMPLER.num_points,
        oversample_ratio=SAMPLER.oversample_ratio,
        importance_sample_ratio=SAMPLER.importance_sample_ratio,
        num_labels=NUM_CLASSES,
    )
    theirs = mask2former().Mask2FormerLoss(config, {})
    outputs, targets = predictions(2), targets_of(*present)
    torch.manual_seed(3)
    expected = theirs(
        outputs.mask_logits[-1],
        outputs.class_logits[-1],
        [t.masks.float() for t in targets],
        [t.labels for t in targets],
        [
            {"masks_queries_logits": m, "class_queries_logits": c}
            for m, c in zip(outputs.mask_logits[:-1], outputs.class_logits[:-1], strict=True)
        ],
    )
    torch.manual_seed(3)
    losses = build()(outputs, targets)
    assert len(losses) == len(expected) == 3 * NUM_LAYERS
    for suffix in ("", "_0", "_1"):
        for ours, name, weight in (
            ("loss_ce", "loss_cross_entropy", WEIGHTS.class_weight),
            ("loss_mask", "loss_mask", WEIGHTS.mask_weight),
            ("loss_dice", "loss_dice", WEIGHTS.dice_weight),
        ):
            torch.testing.assert_close(losses[ours + suffix], weight * expected[name + suffix])

    torch.manual_seed(3)
    pairs = theirs.matcher(
        outputs.mask_logits[-1],
        outputs.class_logits[-1],
        [t.masks.float() for t in targets],
        [t.labels for t in targets],
    )
    for (queries, indices), (their_queries, their_indices) in zip(
        recorded_matches[0], pairs, strict=True
    ):
        assert queries.tolist() == their_queries.tolist()
        assert indices.tolist() == their_indices.tolist()


def test_gradients_against_finite_differences():
    outputs, targets = predictions(1, queries=3, layers=1), targets_of([0, 2])
    leaves = leaves_of(outputs)
    criterion = build(PointSampler(num_points=8, oversample_ratio=1.0, importance_sample_ratio=0.0))
    sum(criterion(outputs, targets, [4]).values()).backward()
    step = 1e-3
    for leaf in leaves:
        values, gradient = leaf.detach().flatten(), leaf.grad.flatten()
        for j in gradient.abs().topk(3).indices:
            sides = []
            for sign in (1, -1):
                moved = values.clone()
                moved[j] += sign * step
                moved = moved.view(leaf.shape)
                other = (
                    Predictions([moved], outputs.mask_logits)
                    if leaf is leaves[0]
                    else Predictions(outputs.class_logits, [moved])
                )
                expected, _ = losses_by_hand(other, targets, [4], criterion.sampler)
                sides.append(sum(expected.values()))
            assert gradient[j].item() == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-2)


def test_images_without_a_target_have_finite_losses_and_gradients():
    outputs = predictions(2)
    leaves = leaves_of(outputs)
    losses = build()(outputs, [ignored(), ignored()], [1, 2])
    sum(losses.values()).backward()
    for name, loss in losses.items():
        assert (loss == 0) == (not name.startswith("loss_ce")), name
        assert loss.isfinite()
    for leaf in leaves:
        assert leaf.grad is not None and leaf.grad.isfinite().all()
    # The target of every query is no_object: the mean of the cross-entropies.
    expected = -outputs.class_logits[-1].log_softmax(-1)[..., -1].mean()
    torch.testing.assert_close(losses["loss_ce"], WEIGHTS.class_weight * expected)


def test_an_image_without_a_target_in_a_batch_with_one(recorded_matches):
    outputs, targets = predictions(2), [ignored(), *targets_of([0, 3])]
    losses = build()(outputs, targets, [1, 2])
    expected, _ = losses_by_hand(outputs, targets, [1, 2])
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, rel=1e-4)
    assert [len(queries) for queries, _ in recorded_matches[0]] == [0, 2]


def test_more_targets_than_queries(recorded_matches):
    outputs, targets = predictions(2, queries=2), targets_of([0, 1, 2, 3], [1])
    losses = build()(outputs, targets, [1, 2])
    expected, _ = losses_by_hand(outputs, targets, [1, 2])
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, rel=1e-4)
    assert [len(queries) for queries, _ in recorded_matches[0]] == [2, 1]


@pytest.mark.parametrize(("num_targets", "num_seeds"), [(1, 1), (1, 2), (2, 1), (2, 3)])
def test_one_target_and_one_seed_for_each_image(num_targets, num_seeds):
    targets = targets_of([0, 2], [1])[:num_targets]
    with pytest.raises(ValueError, match="zip"):
        build()(predictions(2), targets, range(num_seeds))


def test_losses_do_not_depend_on_how_a_batch_is_split():
    """Seeds are per image: a batch's losses are weighted means of its images' losses."""
    outputs, targets = predictions(2), targets_of([0, 2, 3], [1])
    seeds = [7, 8]
    whole = build()(outputs, targets, seeds)
    a, b = (build()(image_of(outputs, i), targets[i : i + 1], seeds[i : i + 1]) for i in range(2))
    swapped = build()(
        Predictions(
            [c.flip(0) for c in outputs.class_logits], [m.flip(0) for m in outputs.mask_logits]
        ),
        targets[::-1],
        seeds[::-1],
    )
    class_weights = [k + NO_OBJECT_WEIGHT * (NUM_QUERIES - k) for k in (3, 1)]
    for name, loss in whole.items():
        weight_a, weight_b = class_weights if name.startswith("loss_ce") else (3, 1)
        combined = (weight_a * a[name] + weight_b * b[name]) / (weight_a + weight_b)
        torch.testing.assert_close(loss, combined)
        torch.testing.assert_close(loss, swapped[name])
    other_seed = build()(outputs, targets, [7, 9])
    assert other_seed["loss_mask"] != whole["loss_mask"]
    torch.manual_seed(0)
    torch.testing.assert_close(build()(outputs, targets, seeds)["loss_mask"], whole["loss_mask"])


class TwoRanks:
    """torch.distributed in one of two processes; the totals of the other one are given."""

    def __init__(self, others):
        self.others, self.sent = others, None

    def is_available(self):
        return True

    def is_initialized(self):
        return True

    def get_world_size(self):
        return 2

    def all_reduce(self, tensor):
        self.sent = tensor.clone()
        tensor += self.others


@pytest.mark.parametrize("over", ["default", "batch", "rank"])
def test_the_mean_over_two_ranks_is_the_loss_of_the_whole_batch(over, monkeypatch):
    """Gradients are averaged over ranks, so the ranks' losses must average to the whole batch's."""
    outputs, targets, seeds = predictions(2), targets_of([0, 2, 3], [1]), [7, 8]
    whole = build()(outputs, targets, seeds)
    totals = [
        torch.tensor([k, *NUM_LAYERS * [k + NO_OBJECT_WEIGHT * (NUM_QUERIES - k)]])
        for k in (3.0, 1.0)
    ]
    ranks = []
    for rank in range(2):
        fake = TwoRanks(totals[1 - rank])
        monkeypatch.setattr(comm, "dist", fake)
        options = {} if over == "default" else {"normalize_class_loss_over": over}
        criterion = build(**options)
        ranks.append(criterion(image_of(outputs, rank), [targets[rank]], [seeds[rank]]))
        torch.testing.assert_close(fake.sent, totals[rank])
    monkeypatch.undo()
    for name, loss in whole.items():
        mean = (ranks[0][name] + ranks[1][name]) / 2
        if name.startswith("loss_ce") and over == "rank":
            alone = [
                build()(image_of(outputs, i), [targets[i]], [seeds[i]])[name] for i in range(2)
            ]
            torch.testing.assert_close(mean, (alone[0] + alone[1]) / 2)
            assert abs(mean - loss) > 1e-3
        else:
            torch.testing.assert_close(mean, loss)


@pytest.mark.parametrize(("deep", "over"), [(True, "batch"), (False, "rank")])
def test_the_values_are_those_of_the_config(deep, over, monkeypatch):
    former = {
        "CLASS_WEIGHT": WEIGHTS.class_weight,
        "MASK_WEIGHT": WEIGHTS.mask_weight,
        "DICE_WEIGHT": WEIGHTS.dice_weight,
        "NO_OBJECT_WEIGHT": NO_OBJECT_WEIGHT,
        "TRAIN_NUM_POINTS": SAMPLER.num_points,
        "OVERSAMPLE_RATIO": SAMPLER.oversample_ratio,
        "IMPORTANCE_SAMPLE_RATIO": SAMPLER.importance_sample_ratio,
        "DEEP_SUPERVISION": deep,
        "CLASS_NORMALIZER": over,
    }
    head = {"NUM_CLASSES": NUM_CLASSES}
    cfg = CfgNode({"MODEL": {"SEM_SEG_HEAD": head, "MASK_FORMER": former}})
    outputs, targets = predictions(1), targets_of([0, 2])
    # the other rank has as many masks, and a class weight that only 'batch' would count
    normalizers = NUM_LAYERS if deep else 1
    monkeypatch.setattr(comm, "dist", TwoRanks(torch.tensor([2.0, *normalizers * [1000.0]])))
    losses = SetCriterion.from_config(cfg)(outputs, targets, [3])
    last = Predictions(outputs.class_logits[-1:], outputs.mask_logits[-1:])
    expected, _ = losses_by_hand(outputs if deep else last, targets, [3])
    if over == "batch":
        own = 2 + NO_OBJECT_WEIGHT * (NUM_QUERIES - 2)
        for name in expected:
            expected[name] *= own / ((own + 1000) / 2) if name.startswith("loss_ce") else 1
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["class_logits", "mask_logits"])
def test_predictions_that_are_not_finite_give_a_loss_that_is_not(bad, where):
    """The matcher must not raise: the trainer stops at the loss and reports the images."""
    outputs, targets = predictions(2), targets_of([0, 2, 3], [1])
    getattr(outputs, where)[-1][0] = bad
    losses = build()(outputs, targets, [1, 2])
    assert not math.isfinite(sum(losses.values()))
    assert all(losses[name].isfinite() for name in losses if name.endswith(("_0", "_1")))


def test_without_deep_supervision_only_the_last_prediction_has_losses():
    outputs, targets = predictions(1), targets_of([0, 2])
    losses = build(deep_supervision=False)(outputs, targets, [3])
    last = Predictions(outputs.class_logits[-1:], outputs.mask_logits[-1:])
    expected, _ = losses_by_hand(last, targets, [3])
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, rel=1e-4)
    assert list(losses) == ["loss_ce", "loss_mask", "loss_dice"]


def test_losses_are_computed_in_full_precision_under_autocast():
    outputs, targets = predictions(1), targets_of([0, 2])
    expected = build()(outputs, targets, [3])
    with torch.autocast("cpu", torch.bfloat16):
        losses = build()(outputs, targets, [3])
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert torch.equal(loss, expected[name])


def test_pairs_are_on_the_given_device_and_of_the_same_images_in_each_prediction():
    pair = (torch.tensor([1]), torch.tensor([0]))
    pairs = MatchedPairs.from_matches([[pair, pair]], 6, torch.device("meta"))
    assert {t.device.type for t in (pairs.queries, *pairs.targets, *pairs.by_target)} == {"meta"}
    with pytest.raises(ValueError, match="zip"):
        MatchedPairs.from_matches([[pair, pair], [pair]], 6, torch.device("cpu"))


def test_masks_that_overlap_and_classes_that_repeat():
    """Targets that no label map gives, but refined labels may."""
    masks = torch.zeros(3, 24, 36, dtype=torch.bool)
    masks[0, :12], masks[1, 6:18], masks[2] = True, True, True
    targets = [Targets(torch.tensor([2, 2, 0]), masks)]
    outputs = predictions(1)
    expected, _ = losses_by_hand(outputs, targets, [3])
    losses = build()(outputs, targets, [3])
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, rel=1e-4)


class WaitsForDevice(TorchDispatchMode):
    """Records operations that make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal") or (
            name in ("index", "index_put_") and any(i.dtype == torch.bool for i in args[1])
        ):
            self.operations.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("weights", [None, some_weights()])
def test_the_host_waits_for_nothing_but_the_costs(weights):
    outputs, targets = predictions(2), targets_of([0, 2, 3], [1, 2])
    targets = [with_weights(t, weights) for t in targets]
    leaves_of(outputs)
    with WaitsForDevice() as waits:
        torch.ones(1).item()
    assert waits.operations == ["_local_scalar_dense"]
    with WaitsForDevice() as waits:
        sum(build()(outputs, targets, [1, 2]).values()).backward()
    assert waits.operations == []


def test_no_object_weight_of_an_image_applies_to_its_unmatched_queries_only():
    """The class loss by its formula, with another weight of no_object for each image."""
    torch.manual_seed(0)
    classes, queries = 4, 6
    logits = torch.randn(2, queries, classes + 1)
    masks = torch.randn(2, queries, 8, 8)
    targets = [
        Targets(
            torch.tensor([c]), torch.zeros(1, 8, 8, dtype=torch.bool), no_object_weight=no_object
        )
        for c, no_object in ((1, 1.0), (3, 0.25))
    ]
    for target, half in zip(targets, (slice(0, 4), slice(4, 8)), strict=True):
        target.masks[:, half] = True
    criterion = SetCriterion(
        classes, CostWeights(2.0, 5.0, 5.0), 0.1, PointSampler(64, 3.0, 0.75), False
    )
    torch.manual_seed(1)
    loss = criterion(Predictions([logits], [masks]), targets)["loss_ce"]
    log_probabilities = logits.double().log_softmax(-1).numpy()
    options = []  # the loss for each choice of matched queries, of which one must be equal
    for first in range(queries):
        for second in range(queries):
            total = weight = 0.0
            for image, (query, label, no_object) in enumerate(((first, 1, 1.0), (second, 3, 0.25))):
                for q in range(queries):
                    w = 1.0 if q == query else 0.1 * no_object
                    total -= w * log_probabilities[image, q, label if q == query else classes]
                    weight += w
            options.append(2.0 * total / weight)
    assert min(abs(loss.item() - option) for option in options) < 1e-5
    none = [replace(target, no_object_weight=0.0) for target in targets]
    only_matched = criterion(Predictions([logits], [masks]), none)["loss_ce"]
    pairs = [
        -(log_probabilities[0, a, 1] + log_probabilities[1, b, 3])
        for a in range(queries)
        for b in range(queries)
    ]
    assert min(abs(only_matched.item() - pair) for pair in pairs) < 1e-5
