from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from transformers_weights import mask2former, mask2former_config

from clouds.data.targets import Targets, masks_from_label
from clouds.engine import distributed
from clouds.modeling.criterion import set_criterion
from clouds.modeling.criterion.matcher import CostWeights, match, matching_costs
from clouds.modeling.criterion.points import Points, PointSampler, sample_at
from clouds.modeling.criterion.set_criterion import SetCriterion
from clouds.modeling.mask_decoder.predictions import Predictions

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


def entropy(logits, wanted):
    p = sigmoid(logits)
    return -np.mean(wanted * np.log(p) + (1 - wanted) * np.log(1 - p))


def dice(logits, wanted):
    p = sigmoid(logits)
    return 1 - (2 * (p * wanted).sum() + 1) / (p.sum() + wanted.sum() + 1)


def cost_matrix(class_logits, mask_logits, labels, masks, points):
    """(Q, K) of one image."""
    costs = np.zeros((len(class_logits), len(labels)))
    for q, k in np.ndindex(costs.shape):
        predicted, wanted = read(mask_logits[q], points), read(masks[k], points)
        costs[q, k] = -WEIGHTS.classes * softmax(class_logits[q])[labels[k]]
        costs[q, k] += WEIGHTS.mask * entropy(predicted, wanted)
        costs[q, k] += WEIGHTS.dice * dice(predicted, wanted)
    return costs


def losses_by_hand(made, targets, seeds, sampler=SAMPLER):
    """Losses and matched pairs; the points are drawn in the documented order: the last prediction
    first, of each the matching points, the candidates, the random ones."""
    n, queries = made.class_logits[0].shape[:2]
    labels = [t.labels.numpy() for t in targets]
    masks = [t.masks.double().numpy() for t in targets]
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
                cost_matrix(classes[i], logits[i], labels[i], masks[i], points)
            )
            pairs[layer, i] = list(zip(rows.tolist(), columns.tolist(), strict=True))
            wanted = {q: labels[i][k] for q, k in pairs[layer, i]}
            for q in range(queries):
                w = 1.0 if q in wanted else NO_OBJECT
                total -= w * np.log(softmax(classes[i, q])[wanted.get(q, CLASSES)])
                weight += w
            for m, (q, k) in enumerate(pairs[layer, i]):
                order = np.argsort(np.abs(read(logits[i, q], candidates[m].numpy())))
                chosen = np.concatenate([candidates[m].numpy()[order[:uncertain]], random[m]])
                bces += entropy(read(logits[i, q], chosen), read(masks[i][k], chosen))
                dices += dice(read(logits[i, q], chosen), read(masks[i][k], chosen))
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

    monkeypatch.setattr(set_criterion, "match", record)
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
        sample_at(made.mask_logits[0], points.expand(2, -1, -1)),
        labels,
        sample_at(masks, points.expand(2, -1, -1)),
        WEIGHTS,
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
    points = torch.tensor([[[0.25, 0.25], [0.75, 0.25], [0.5, 0.5], [0.25, 0.5], [1.0, 0.75]]])
    assert sample_at(plane, points).tolist() == [[[0.0, 4.0, 6.0, 4.0, 6.0]]]
    assert sample_at(plane[:0], points[:0]).shape == (0, 1, 5)


def test_the_least_certain_candidates_are_taken():
    """Logits rise along x from -3.5 to 3.5: the outline is in the middle."""
    plane = torch.arange(8).float().sub(3.5).expand(1, 1, 4, 8)
    x = torch.tensor([0.1, 0.45, 0.9, 0.52, 0.7, 0.56, 0.3, 0.2])
    sampler = PointSampler(points=4, oversample=2.0, importance=0.75)
    (drawn,) = sampler.draw(1, [1], [None], torch.device("cpu"))
    candidates = torch.stack((x, torch.full_like(x, 0.5)), -1)[None, None]
    points = Points(drawn.matching, candidates, drawn.random)
    chosen = sampler.choose(plane, points)
    assert chosen.shape == (1, 4, 2)
    assert sorted(round(v, 2) for v in chosen[0, :3, 0].tolist()) == [0.45, 0.52, 0.56]
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
            assert p.numel() == 0 or (p.min() >= 0 and p.max() < 1)
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
        monkeypatch.setattr(distributed, "dist", fake)
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
