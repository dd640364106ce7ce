from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.utils._python_dispatch import TorchDispatchMode
from transformers_weights import mask2former, mask2former_config

from clouds import comm
from clouds.data.structures import Targets, masks_from_label
from clouds.modeling import criterion
from clouds.modeling.criterion import SetCriterion
from clouds.modeling.matcher import CostWeights, match, matching_costs
from clouds.modeling.points import (
    Points,
    PointSampler,
    _smallest,
    pair_losses,
    sample_at,
    weights_at,
)
from clouds.modeling.transformer_decoder.decoder import Predictions

CLASSES, QUERIES, LAYERS = 4, 6, 3
WEIGHTS = CostWeights(classes=2.0, mask=5.0, dice=3.0)
NO_OBJECT = 0.1
SAMPLER = PointSampler(points=20, oversample=3.0, importance=0.75)


def build(sampler=SAMPLER, **options):
    return SetCriterion(CLASSES, WEIGHTS, NO_OBJECT, sampler, **options)


def predictions(n, queries=QUERIES, size=(6, 9), layers=LAYERS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Predictions(
        [torch.randn(n, queries, CLASSES + 1, generator=generator) for _ in range(layers)],
        [3 * torch.randn(n, queries, *size, generator=generator) for _ in range(layers)],
    )


def leaves_of(made):
    leaves = made.class_logits + made.mask_logits
    for leaf in leaves:
        leaf.requires_grad_()
    return leaves


def label(present, size=(24, 36), seed=0):
    """A label map of blocks of the classes `present` (255 is one of them)."""
    generator = torch.Generator().manual_seed(seed)
    choice = torch.randint(len(present), (size[0] // 6, size[1] // 6), generator=generator)
    choice.flatten()[: len(present)] = torch.arange(len(present))
    blocks = torch.tensor(present)[choice]
    return blocks.repeat_interleave(6, 0).repeat_interleave(6, 1)


def targets_of(*present):
    return [masks_from_label(label(p, seed=i)) for i, p in enumerate(present)]


# --------------------------------------------- the same in numpy, a pixel and a pair at a time


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def read(plane, points):
    """`plane` (H, W) at points (P, 2) as (x, y) in [0, 1], bilinear, zero outside."""
    height, width = plane.shape
    out = []
    for px, py in points:
        x, y = px * width - 0.5, py * height - 0.5
        total = 0.0
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                if 0 <= row < height and 0 <= column < width:
                    total += (1 - abs(x - column)) * (1 - abs(y - row)) * plane[row, column]
        out.append(total)
    return np.array(out)


def entropy(logits, wanted, weights=1.0):
    p = sigmoid(logits)
    return -np.mean(weights * (wanted * np.log(p) + (1 - wanted) * np.log(1 - p)))


def dice(logits, wanted, weights=1.0):
    p = weights * sigmoid(logits)
    wanted = weights * wanted
    return 1 - (2 * (p * wanted / weights).sum() + 1) / (p.sum() + wanted.sum() + 1)


def terms(logits, mask, weights, points):
    """Cross-entropy and dice loss of a mask at points.

    A point's weight is blended from the pixels around it (the outermost ones reach to infinity),
    and its target is their mean, weighed too. The losses are those of points whose weights are
    divided by their mean, times this mean.
    """
    predicted = read(logits, points)
    if weights is None:
        wanted = read(mask, points)
        return np.array([entropy(predicted, wanted), dice(predicted, wanted)])
    height, width = weights.shape
    wide = np.pad(weights, 1, mode="edge")
    inner = (points * [width, height] + 1) / [width + 2, height + 2]
    at_points = read(wide, inner)
    counts = at_points > 1e-9
    if not counts.any():
        return np.zeros(2)
    wanted = read(weights * mask, points)[counts] / at_points[counts]
    strength = at_points.mean()
    relative, predicted = at_points[counts] / strength, predicted[counts]
    share = (
        counts.mean()
    )  # the cross-entropy is a mean over all points, also those that do not count
    return strength * np.array(
        [share * entropy(predicted, wanted, relative), dice(predicted, wanted, relative)]
    )


def cost_matrix(class_logits, mask_logits, labels, masks, points, weights=None):
    """(Q, K) of one image."""
    costs = np.zeros((len(class_logits), len(labels)))
    for q, k in np.ndindex(costs.shape):
        costs[q, k] = -WEIGHTS.classes * softmax(class_logits[q])[labels[k]]
        both = terms(mask_logits[q], masks[k], weights, points)
        costs[q, k] += WEIGHTS.mask * both[0] + WEIGHTS.dice * both[1]
    return costs


def losses_by_hand(made, targets, seeds, sampler=SAMPLER):
    """Losses and matched pairs; the points are drawn in the documented order: the last prediction
    first, of each the matching points, the candidates, the random ones."""
    n, queries = made.class_logits[0].shape[:2]
    labels = [t.labels.numpy() for t in targets]
    masks = [t.masks.double().numpy() for t in targets]
    weights = [None if t.weights is None else t.weights.double().numpy() for t in targets]
    counts = [min(len(t), queries) for t in labels]
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    losses, pairs = {}, {}
    last = len(made.class_logits) - 1
    for layer in [last, *range(last)]:
        classes = made.class_logits[layer].detach().double().numpy()
        logits = made.mask_logits[layer].detach().double().numpy()
        total, weight, bces, dices = 0.0, 0.0, 0.0, 0.0
        for i in range(n):
            points = torch.rand(1, sampler.points, 2, generator=generators[i])[0].numpy()
            candidates = torch.rand(
                counts[i], int(sampler.points * sampler.oversample), 2, generator=generators[i]
            )
            uncertain = int(sampler.points * sampler.importance)
            random = torch.rand(counts[i], sampler.points - uncertain, 2, generator=generators[i])
            rows, columns = linear_sum_assignment(
                cost_matrix(classes[i], logits[i], labels[i], masks[i], points, weights[i])
            )
            pairs[layer, i] = list(zip(rows.tolist(), columns.tolist(), strict=True))
            wanted = {q: labels[i][k] for q, k in pairs[layer, i]}
            for q in range(queries):
                w = 1.0 if q in wanted else NO_OBJECT
                total -= w * np.log(softmax(classes[i, q])[wanted.get(q, CLASSES)])
                weight += w
            for m, (q, k) in enumerate(pairs[layer, i]):
                certainty = np.abs(read(logits[i, q], candidates[m].numpy()))
                if weights[i] is not None:  # candidates among ignored pixels come last
                    certainty[read(weights[i], candidates[m].numpy()) == 0] = np.inf
                order = np.argsort(certainty)
                chosen = np.concatenate([candidates[m].numpy()[order[:uncertain]], random[m]])
                both = terms(logits[i, q], masks[i][k], weights[i], chosen)
                bces, dices = bces + both[0], dices + both[1]
        suffix = "" if layer == last else f"_{layer}"
        masks_in_all = max(sum(counts), 1)
        losses["loss_ce" + suffix] = WEIGHTS.classes * total / weight
        losses["loss_mask" + suffix] = WEIGHTS.mask * bces / masks_in_all
        losses["loss_dice" + suffix] = WEIGHTS.dice * dices / masks_in_all
    return losses, pairs


@pytest.fixture
def recorded_matches(monkeypatch):
    """What the criterion matched: per prediction (the last first), per image."""
    matches = []

    def record(*args):
        matches.extend(match(*args))
        return matches[-LAYERS:]

    monkeypatch.setattr(criterion, "match", record)
    return matches


def test_losses_and_pairs_against_numpy(recorded_matches):
    made, targets = predictions(3), targets_of([0, 2, 3, 255], [1], [255, 0, 1])
    seeds = [11, 5, 99]
    losses = build()(made, targets, seeds)
    expected, pairs = losses_by_hand(made, targets, seeds)
    assert list(losses) == [
        f"loss_{kind}{suffix}" for suffix in ("", "_0", "_1") for kind in ("ce", "mask", "dice")
    ]
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for layer, matched in zip([2, 0, 1], recorded_matches, strict=True):
        for i, (queries, indices) in enumerate(matched):
            assert list(zip(queries.tolist(), indices.tolist(), strict=True)) == pairs[layer, i]
    assert len({tuple(p) for p in pairs.values() if len(p) == 3}) > 1  # layers do differ


def test_costs_against_numpy():
    made, targets = predictions(2), targets_of([0, 2, 3], [1, 0, 2])
    points = torch.rand(1, 20, 2, generator=torch.Generator().manual_seed(1))
    labels = torch.stack([t.labels for t in targets])
    masks = torch.stack([t.masks for t in targets]).float()
    costs = matching_costs(
        made.class_logits[0],
        sample_at(made.mask_logits[0], 2 * points.expand(2, -1, -1) - 1),
        labels,
        sample_at(masks, 2 * points.expand(2, -1, -1) - 1),
        WEIGHTS,
        torch.ones(2, 20),
    )
    for i in range(2):
        expected = cost_matrix(
            made.class_logits[0][i].double().numpy(),
            made.mask_logits[0][i].double().numpy(),
            labels[i].numpy(),
            masks[i].double().numpy(),
            points[0].numpy(),
        )
        np.testing.assert_allclose(costs[i].numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("queries", [6, 3, 2])
def test_matching_is_the_cheapest_of_all_assignments(queries):
    """3 targets: with 2 queries, one of them stays unmatched. Padding columns are never matched."""
    costs = torch.randn(2, 2, queries, 5, generator=torch.Generator().manual_seed(queries))
    costs[..., 3:] = -1000  # padding
    for layer, matched in zip(costs, match(costs, [3, 0]), strict=True):
        (rows, columns), (none, of_none) = matched
        assert len(none) == len(of_none) == 0
        found = layer[0, rows, columns].sum().item()
        # Whichever side has less gets one of the other side each, in every way there is.
        larger, smaller = max(queries, 3), min(queries, 3)
        cheapest = min(
            sum(
                layer[0, a, b].item() if queries >= 3 else layer[0, b, a].item()
                for a, b in zip(chosen, range(smaller), strict=True)
            )
            for chosen in itertools.permutations(range(larger), smaller)
        )
        assert found == pytest.approx(cheapest, abs=1e-5)
        assert len(rows) == min(queries, 3) == len(set(rows.tolist())) == len(set(columns.tolist()))


@pytest.mark.parametrize("present", [([0, 2, 3], [1, 2]), ([0, 1, 2, 3, 255], [3])])
def test_against_transformers(present, recorded_matches):
    """Points from torch's global generator, in the same order as theirs."""
    config = mask2former_config(
        no_object_weight=NO_OBJECT,
        class_weight=WEIGHTS.classes,
        mask_weight=WEIGHTS.mask,
        dice_weight=WEIGHTS.dice,
        train_num_points=SAMPLER.points,
        oversample_ratio=SAMPLER.oversample,
        importance_sample_ratio=SAMPLER.importance,
        num_labels=CLASSES,
    )
    theirs = mask2former().Mask2FormerLoss(config, {})
    made, targets = predictions(2), targets_of(*present)
    torch.manual_seed(3)
    expected = theirs(
        made.mask_logits[-1],
        made.class_logits[-1],
        [t.masks.float() for t in targets],
        [t.labels for t in targets],
        [
            {"masks_queries_logits": m, "class_queries_logits": c}
            for m, c in zip(made.mask_logits[:-1], made.class_logits[:-1], strict=True)
        ],
    )
    torch.manual_seed(3)
    losses = build()(made, targets)
    assert len(losses) == len(expected) == 3 * LAYERS
    for suffix in ("", "_0", "_1"):
        for ours, name, weight in (
            ("loss_ce", "loss_cross_entropy", WEIGHTS.classes),
            ("loss_mask", "loss_mask", WEIGHTS.mask),
            ("loss_dice", "loss_dice", WEIGHTS.dice),
        ):
            torch.testing.assert_close(losses[ours + suffix], weight * expected[name + suffix])

    torch.manual_seed(3)
    pairs = theirs.matcher(
        made.mask_logits[-1],
        made.class_logits[-1],
        [t.masks.float() for t in targets],
        [t.labels for t in targets],
    )
    for (queries, indices), (their_queries, their_indices) in zip(
        recorded_matches[0], pairs, strict=True
    ):
        assert queries.tolist() == their_queries.tolist()
        assert indices.tolist() == their_indices.tolist()


def test_gradients_against_finite_differences():
    made, targets = predictions(1, queries=3, layers=1), targets_of([0, 2])
    leaves = leaves_of(made)
    criterion = build(PointSampler(points=8, oversample=1.0, importance=0.0))
    sum(criterion(made, targets, [4]).values()).backward()
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
                    Predictions([moved], made.mask_logits)
                    if leaf is leaves[0]
                    else Predictions(made.class_logits, [moved])
                )
                expected, _ = losses_by_hand(other, targets, [4], criterion.sampler)
                sides.append(sum(expected.values()))
            assert gradient[j].item() == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-2)


# ------------------------------------------------------------------ points


def test_reading_by_hand():
    """2 x 2 pixels: centers at quarters, half-way between them, and half outside."""
    plane = torch.tensor([[[[0.0, 4.0], [8.0, 12.0]]]])
    points = torch.tensor([[[-0.5, -0.5], [0.5, -0.5], [0.0, 0.0], [-0.5, 0.0], [1.0, 0.5]]])
    assert sample_at(plane, points).tolist() == [[[0.0, 4.0, 6.0, 4.0, 6.0]]]
    assert sample_at(plane[:0], points[:0]).shape == (0, 1, 5)


def test_the_least_certain_candidates_are_taken():
    """Logits rise along x from -3.5 to 3.5: the outline is in the middle."""
    plane = torch.arange(8).float().sub(3.5).expand(1, 1, 4, 8)
    x = torch.tensor([-0.8, -0.1, 0.8, 0.04, 0.4, 0.12, -0.4, -0.6])
    sampler = PointSampler(points=4, oversample=2.0, importance=0.75)
    (drawn,) = sampler.draw(1, [1], [None], torch.device("cpu"))
    candidates = torch.stack((x, torch.zeros_like(x)), -1)[None, None]
    points = Points(drawn.matching, candidates, drawn.random)
    chosen = sampler.choose(plane, points)
    assert chosen.shape == (1, 4, 2)
    assert sorted(round(v, 2) for v in chosen[0, :3, 0].tolist()) == [-0.1, 0.04, 0.12]
    assert torch.equal(chosen[0, 3:], drawn.random[0, 0])


def test_how_many_points_are_drawn():
    sampler = PointSampler(points=10, oversample=2.5, importance=0.75)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    images = sampler.draw(4, [2, 0, 1], generators, "cpu")
    for points, masks in zip(images, [2, 0, 1], strict=True):
        assert points.matching.shape == (4, 10, 2)
        assert points.candidates.shape == (4, masks, 25, 2)
        assert points.random.shape == (4, masks, 3, 2)  # 7 uncertain ones are taken
        for p in (points.matching, points.candidates, points.random):
            assert p.numel() == 0 or (-1 <= p.min() < 0 < p.max() <= 1)
            assert len(p.unique()) == p.numel()


# ------------------------------------------------------------------ corners


def ignored(size=(24, 36)):
    return masks_from_label(torch.full(size, 255))


def test_images_without_a_target_have_finite_losses_and_a_gradient_everywhere():
    made = predictions(2)
    leaves = leaves_of(made)
    losses = build()(made, [ignored(), ignored()], [1, 2])
    sum(losses.values()).backward()
    for name, loss in losses.items():
        assert (loss == 0) == (not name.startswith("loss_ce")), name
        assert loss.isfinite()
    for leaf in leaves:
        assert leaf.grad is not None and leaf.grad.isfinite().all()
    # Every query should say void: a plain mean of cross-entropies.
    expected = -made.class_logits[-1].log_softmax(-1)[..., -1].mean()
    torch.testing.assert_close(losses["loss_ce"], WEIGHTS.classes * expected)


def test_an_image_without_a_target_beside_one_with(recorded_matches):
    made, targets = predictions(2), [ignored(), *targets_of([0, 3])]
    losses = build()(made, targets, [1, 2])
    expected, _ = losses_by_hand(made, targets, [1, 2])
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, rel=1e-4)
    assert [len(queries) for queries, _ in recorded_matches[0]] == [0, 2]


def test_more_targets_than_queries(recorded_matches):
    made, targets = predictions(2, queries=2), targets_of([0, 1, 2, 3], [1])
    losses = build()(made, targets, [1, 2])
    expected, _ = losses_by_hand(made, targets, [1, 2])
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, rel=1e-4)
    assert [len(queries) for queries, _ in recorded_matches[0]] == [2, 1]


def parts(made, i):
    one = slice(i, i + 1)
    return Predictions([c[one] for c in made.class_logits], [m[one] for m in made.mask_logits])


def test_losses_do_not_depend_on_how_a_batch_is_split():
    """Seeds belong to images: the losses of a batch are weighted means of its images' losses."""
    made, targets = predictions(2), targets_of([0, 2, 3], [1])
    seeds = [7, 8]
    whole = build()(made, targets, seeds)
    a, b = (build()(parts(made, i), targets[i : i + 1], seeds[i : i + 1]) for i in range(2))
    swapped = build()(
        Predictions([c.flip(0) for c in made.class_logits], [m.flip(0) for m in made.mask_logits]),
        targets[::-1],
        seeds[::-1],
    )
    class_weights = [k + NO_OBJECT * (QUERIES - k) for k in (3, 1)]
    for name, loss in whole.items():
        weight_a, weight_b = class_weights if name.startswith("loss_ce") else (3, 1)
        combined = (weight_a * a[name] + weight_b * b[name]) / (weight_a + weight_b)
        torch.testing.assert_close(loss, combined)
        torch.testing.assert_close(loss, swapped[name])
    other_seed = build()(made, targets, [7, 9])
    assert other_seed["loss_mask"] != whole["loss_mask"]
    torch.manual_seed(0)
    torch.testing.assert_close(build()(made, targets, seeds)["loss_mask"], whole["loss_mask"])


class TwoRanks:
    """torch.distributed as one of two processes sees it, the other one's totals being known."""

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


@pytest.mark.parametrize("over", ["batch", "rank"])
def test_the_mean_over_two_ranks_is_the_loss_of_the_whole_batch(over, monkeypatch):
    """Gradients are averaged over ranks, so what each takes must average to the whole."""
    made, targets, seeds = predictions(2), targets_of([0, 2, 3], [1]), [7, 8]
    whole = build()(made, targets, seeds)
    totals = [torch.tensor([k, k + NO_OBJECT * (QUERIES - k)]) for k in (3.0, 1.0)]
    ranks = []
    for rank in range(2):
        fake = TwoRanks(totals[1 - rank])
        monkeypatch.setattr(comm, "dist", fake)
        criterion = build(normalize_class_loss_over=over)
        ranks.append(criterion(parts(made, rank), [targets[rank]], [seeds[rank]]))
        torch.testing.assert_close(fake.sent, totals[rank])
    monkeypatch.undo()
    for name, loss in whole.items():
        mean = (ranks[0][name] + ranks[1][name]) / 2
        if name.startswith("loss_ce") and over == "rank":
            alone = [build()(parts(made, i), [targets[i]], [seeds[i]])[name] for i in range(2)]
            torch.testing.assert_close(mean, (alone[0] + alone[1]) / 2)
            assert abs(mean - loss) > 1e-3
        else:
            torch.testing.assert_close(mean, loss)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["class_logits", "mask_logits"])
def test_predictions_that_are_not_finite_give_a_loss_that_is_not(bad, where):
    """The matcher must not fail: the trainer stops at the loss, and says at which images."""
    made, targets = predictions(2), targets_of([0, 2, 3], [1])
    getattr(made, where)[-1][0] = bad
    losses = build()(made, targets, [1, 2])
    assert not math.isfinite(sum(losses.values()))
    assert all(losses[name].isfinite() for name in losses if name.endswith(("_0", "_1")))


def test_without_deep_supervision_only_the_last_prediction_counts():
    made, targets = predictions(1), targets_of([0, 2])
    losses = build(deep_supervision=False)(made, targets, [3])
    last = Predictions(made.class_logits[-1:], made.mask_logits[-1:])
    expected, _ = losses_by_hand(last, targets, [3])
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, rel=1e-4)
    assert list(losses) == ["loss_ce", "loss_mask", "loss_dice"]


def test_losses_are_taken_in_full_precision_under_autocast():
    made, targets = predictions(1), targets_of([0, 2])
    expected = build()(made, targets, [3])
    with torch.autocast("cpu", torch.bfloat16):
        losses = build()(made, targets, [3])
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert torch.equal(loss, expected[name])


def test_targets_may_have_other_masks_than_label_maps_give():
    """Masks that overlap and repeat a class, as refined labels may."""
    masks = torch.zeros(3, 24, 36, dtype=torch.bool)
    masks[0, :12], masks[1, 6:18], masks[2] = True, True, True
    targets = [Targets(torch.tensor([2, 2, 0]), masks)]
    made = predictions(1)
    expected, _ = losses_by_hand(made, targets, [3])
    losses = build()(made, targets, [3])
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------ pixels that count less


def weighed(target, weights):
    return Targets(target.labels, target.masks, weights)


def some_weights(size=(24, 36), seed=0):
    """Blocks of weights in [0, 1]; a third of them is 0, another one 1."""
    drawn = torch.rand(size[0] // 4, size[1] // 4, generator=torch.Generator().manual_seed(seed))
    return (3 * drawn - 1).clamp(0, 1).repeat_interleave(4, 0).repeat_interleave(4, 1)


def left(size=(24, 36)):
    """1 in the left half, 0 in the right one."""
    weights = torch.zeros(size)
    weights[:, : size[1] // 2] = 1
    return weights


def close(losses, expected, factor=1.0):
    for name, loss in losses.items():
        torch.testing.assert_close(loss, factor * expected[name], rtol=1e-4, atol=1e-6)


def mask_terms(losses):
    return {name: loss for name, loss in losses.items() if not name.startswith("loss_ce")}


def test_weighed_losses_and_pairs_against_numpy(recorded_matches):
    """Three images: weights of any size, only zeros and ones, and no weights."""
    made, targets = predictions(3), targets_of([0, 2, 3, 255], [1, 3], [255, 0, 1])
    targets = [weighed(targets[0], some_weights()), weighed(targets[1], left()), targets[2]]
    seeds = [11, 5, 99]
    losses = build()(made, targets, seeds)
    expected, pairs = losses_by_hand(made, targets, seeds)
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for layer, matched in zip([2, 0, 1], recorded_matches, strict=True):
        for i, (queries, indices) in enumerate(matched):
            assert list(zip(queries.tolist(), indices.tolist(), strict=True)) == pairs[layer, i]


def test_weights_of_more_targets_than_queries():
    made, (target,) = predictions(1, queries=2), targets_of([0, 1, 2, 3])
    targets = [weighed(target, some_weights())]
    expected, _ = losses_by_hand(made, targets, [1])
    losses = build()(made, targets, [1])
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_weights_of_one_everywhere_are_no_weights():
    made, targets, seeds = predictions(2), targets_of([0, 2, 3], [1, 255]), [7, 8]
    leaves = leaves_of(made)
    results = []
    for these in (targets, [weighed(t, torch.ones(24, 36)) for t in targets]):
        losses = build()(made, these, seeds)
        results.append((losses, torch.autograd.grad(sum(losses.values()), leaves)))
    (losses, gradients), (same, same_gradients) = results
    close(same, losses)
    torch.testing.assert_close(same_gradients, gradients)


@pytest.mark.parametrize("weight", [0.5, 0.01])
def test_an_image_of_one_weight_counts_that_much(weight):
    """Exactly that part of its losses, where the pairs are the same: classes have no say here."""
    made, targets, seeds = predictions(2), targets_of([0, 2, 3], [1, 2]), [7, 8]
    criterion = SetCriterion(CLASSES, CostWeights(0.0, 5.0, 3.0), NO_OBJECT, SAMPLER)
    full = criterion(made, targets, seeds)
    doubted = [weighed(t, torch.full((24, 36), weight)) for t in targets]
    close(mask_terms(criterion(made, doubted, seeds)), full, factor=weight)


def test_losses_by_hand_of_two_points_among_four():
    """Logits 0 and ln 3, so probabilities 1/2 and 3/4, of targets 1 and 0; two points do not count:
    (ln 2 + ln 4) / 4, and 1/2 (1 - (2 * 2 * 1/2 + 1) / (2 * (5/4 + 1) + 1)) = 5/22.
    """
    logits = torch.tensor([[0.0, math.log(3), 50.0, -50.0]])
    weights = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    wanted = torch.tensor([[1.0, 0.0, 0.0, 1.0]]) * weights
    losses = pair_losses(logits, wanted, weights)
    torch.testing.assert_close(losses, torch.tensor([[math.log(8) / 4], [5 / 22]]))
    costs = matching_costs(
        torch.zeros(1, 1, 2),
        logits[None],
        torch.zeros(1, 1, dtype=torch.long),
        wanted[None],
        CostWeights(0.0, 2.0, 11.0),
        weights,
    )
    assert costs.item() == pytest.approx(math.log(8) / 2 + 5 / 2)


def test_the_rest_of_an_image_beside_pixels_that_do_not_count():
    """A picture, and the same one with as much beside it that does not count: at the same places
    of it the losses are half as large, there being twice as many points."""
    plane = torch.randn(1, 1, 6, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 24, 32)
    mask[..., 4:14, 5:20] = 1
    wide_plane = torch.cat((plane, plane.flip(-1)), dim=-1)
    wide_mask = torch.cat((mask, torch.ones_like(mask)), dim=-1)
    weights = left((24, 64))
    points = 1.6 * torch.rand(1, 30, 2, generator=torch.Generator().manual_seed(1)) - 0.8
    inside = torch.stack((points[..., 0] / 2 - 0.5, points[..., 1]), -1)
    beside = inside + torch.tensor([1.0, 0.0])
    both = torch.cat((inside, beside), dim=1)
    at_points = sample_at(wide_plane, both)[:, 0]
    wanted = sample_at(wide_mask * weights, both)[:, 0]
    entropies, dices = pair_losses(at_points, wanted, weights_at(weights, both))
    narrow, of_mask = sample_at(plane, points)[0, 0].numpy(), sample_at(mask, points)[0, 0].numpy()
    assert entropies.item() == pytest.approx(entropy(narrow, of_mask) / 2, rel=1e-5)
    # The smoothing 1 is as much for the 60 points as for the 30: each of those counts twice.
    twice = dice(narrow, of_mask, np.full(30, 2.0))
    assert dices.item() == pytest.approx(twice / 2, rel=1e-5)


def test_what_masks_say_of_pixels_that_do_not_count_has_no_effect():
    made, (target,) = predictions(1), targets_of([0, 2, 3])
    leaves = leaves_of(made)
    other = target.masks.clone()
    other[:, :, 18:] = ~other[:, :, 18:]
    losses = build()(made, [weighed(target, left())], [3])
    same = build()(made, [Targets(target.labels, other, left())], [3])
    differ = build()(made, [Targets(target.labels, other)], [3])
    for name, loss in losses.items():
        assert torch.equal(loss, same[name])
    assert losses["loss_mask"] != differ["loss_mask"]
    sum(losses.values()).backward()
    for leaf in leaves[LAYERS:]:  # 9 logits are as wide as 36 pixels; column 6 begins at 24
        assert leaf.grad[..., 6:].abs().max() == 0 < leaf.grad[..., :5].abs().max()


def test_an_image_in_which_nothing_counts():
    """No loss of masks, no gradient of it, no NaN; what it teaches of classes stays."""
    made, targets = predictions(2), targets_of([0, 2, 3], [1])
    leaves = leaves_of(made)
    nothing = [weighed(t, torch.zeros(24, 36)) for t in targets]
    losses = build()(made, nothing, [1, 2])
    sum(losses.values()).backward()
    for name, loss in losses.items():
        assert loss > 0 if name.startswith("loss_ce") else loss == 0
    for leaf in leaves[:LAYERS]:
        assert leaf.grad.isfinite().all() and leaf.grad.abs().max() > 0
    for leaf in leaves[LAYERS:]:
        assert leaf.grad.abs().max() == 0


def test_gradients_of_weighed_losses_against_finite_differences():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    weights = torch.rand(3, 7, dtype=torch.float64, generator=generator)
    weights[0], weights[1, :4] = 0, 0
    wanted = weights * torch.rand(3, 7, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(lambda x: pair_losses(x, wanted, weights), logits)


def test_weights_of_one_image_do_not_reach_another():
    made, targets, seeds = predictions(2), targets_of([0, 2, 3], [1, 2]), [7, 8]
    doubted = [weighed(targets[0], some_weights()), targets[1]]
    both = build()(made, doubted, seeds)
    a, b = (build()(parts(made, i), doubted[i : i + 1], seeds[i : i + 1]) for i in range(2))
    close(mask_terms(both), {name: (3 * a[name] + 2 * b[name]) / 5 for name in a})


@pytest.mark.parametrize(("counting", "taken"), [(5, [0, 1, 2]), (2, [0, 1])])
def test_candidates_that_do_not_count_are_taken_last(counting, taken):
    """All are equally far down a ramp's height; the nearest to the outline are at the right, where
    no pixel counts."""
    plane = torch.arange(8).float().sub(5.5).expand(1, 1, 4, 8)
    x = torch.tensor([-0.2, -0.3, -0.4, -0.5, -0.6, 0.3, 0.4, 0.5])
    if counting == 2:
        x[2:5] = torch.tensor([0.6, 0.7, 0.8])
    weights = torch.zeros(16, 32)
    weights[:, :16] = 0.25
    sampler = PointSampler(points=4, oversample=2.0, importance=0.75)
    (drawn,) = sampler.draw(1, [1], [None], torch.device("cpu"))
    points = Points(
        drawn.matching, torch.stack((x, torch.zeros_like(x)), -1)[None, None], drawn.random
    )
    chosen = sampler.choose(plane, points, weights)[0, :3, 0].tolist()
    assert set(x[taken].tolist()) <= set(chosen)
    without = sampler.choose(plane, points)[0, :3, 0].tolist()
    assert not set(x[taken].tolist()) & set(without)


# ------------------------------------------------------------------ how it is computed


@pytest.mark.parametrize("count", [0, 1, 5, 12])
def test_selecting_the_smallest(count):
    values = torch.randn(4, 12, generator=torch.Generator().manual_seed(count))
    values[1, 3:9] = 0.5  # ties
    values[2, :4] = torch.inf
    values[3, 2] = torch.nan
    found = values.gather(1, _smallest(values, count)).sort(1).values
    torch.testing.assert_close(found, values.sort(1).values[:, :count], equal_nan=True)


class WaitsForDevice(TorchDispatchMode):
    """Notes operations that make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal") or (
            name in ("index", "index_put_") and any(i.dtype == torch.bool for i in args[1])
        ):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("weights", [None, some_weights()])
def test_the_host_never_waits_but_for_the_costs(weights):
    made, targets = predictions(2), targets_of([0, 2, 3], [1, 2])
    targets = [weighed(t, weights) for t in targets]
    leaves_of(made)
    with WaitsForDevice() as waits:
        torch.ones(1).item()
    assert waits.seen == ["_local_scalar_dense"]
    with WaitsForDevice() as waits:
        sum(build()(made, targets, [1, 2]).values()).backward()
    assert waits.seen == []


def test_void_weighs_unmatched_queries_of_its_image_alone():
    """The class loss by its formula, with another weight of void for each image."""
    torch.manual_seed(0)
    classes, queries = 4, 6
    logits = torch.randn(2, queries, classes + 1)
    masks = torch.randn(2, queries, 8, 8)
    targets = [
        Targets(torch.tensor([c]), torch.zeros(1, 8, 8, dtype=torch.bool), void=void)
        for c, void in ((1, 1.0), (3, 0.25))
    ]
    for target, half in zip(targets, (slice(0, 4), slice(4, 8)), strict=True):
        target.masks[:, half] = True
    criterion = SetCriterion(
        classes, CostWeights(2.0, 5.0, 5.0), 0.1, PointSampler(64, 3.0, 0.75), False
    )
    torch.manual_seed(1)
    found = criterion(Predictions([logits], [masks]), targets)["loss_ce"]
    log_probabilities = logits.double().log_softmax(-1).numpy()
    options = []  # which query is matched does not matter here: the loss must be one of these
    for first in range(queries):
        for second in range(queries):
            total = weight = 0.0
            for image, (query, label, void) in enumerate(((first, 1, 1.0), (second, 3, 0.25))):
                for q in range(queries):
                    w = 1.0 if q == query else 0.1 * void
                    total -= w * log_probabilities[image, q, label if q == query else classes]
                    weight += w
            options.append(2.0 * total / weight)
    assert min(abs(found.item() - option) for option in options) < 1e-5
    none = [replace(target, void=0.0) for target in targets]
    only_matched = criterion(Predictions([logits], [masks]), none)["loss_ce"]
    pairs = [
        -(log_probabilities[0, a, 1] + log_probabilities[1, b, 3])
        for a in range(queries)
        for b in range(queries)
    ]
    assert min(abs(only_matched.item() - pair) for pair in pairs) < 1e-5
