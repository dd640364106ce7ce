"""The criterion in NumPy, a pixel and a pair at a time, and inputs to compare on."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from clouds.data.structures import Targets, masks_from_label
from clouds.modeling.criterion import SetCriterion
from clouds.modeling.matcher import CostWeights
from clouds.modeling.points import PointSampler
from clouds.modeling.transformer_decoder.decoder import Predictions

NUM_CLASSES, NUM_QUERIES, NUM_LAYERS = 4, 6, 3
WEIGHTS = CostWeights(class_weight=2.0, mask_weight=5.0, dice_weight=3.0)
NO_OBJECT_WEIGHT = 0.1
SAMPLER = PointSampler(num_points=20, oversample_ratio=3.0, importance_sample_ratio=0.75)


def build(sampler=SAMPLER, **options):
    return SetCriterion(NUM_CLASSES, WEIGHTS, NO_OBJECT_WEIGHT, sampler, **options)


def predictions(n, queries=NUM_QUERIES, size=(6, 9), layers=NUM_LAYERS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Predictions(
        [torch.randn(n, queries, NUM_CLASSES + 1, generator=generator) for _ in range(layers)],
        [3 * torch.randn(n, queries, *size, generator=generator) for _ in range(layers)],
    )


def leaves_of(outputs):
    leaves = outputs.class_logits + outputs.mask_logits
    for leaf in leaves:
        leaf.requires_grad_()
    return leaves


def label(present, size=(24, 36), seed=0):
    """A label map of blocks of the classes `present`, of which 255 is ignored."""
    generator = torch.Generator().manual_seed(seed)
    choice = torch.randint(len(present), (size[0] // 6, size[1] // 6), generator=generator)
    choice.flatten()[: len(present)] = torch.arange(len(present))
    blocks = torch.tensor(present)[choice]
    return blocks.repeat_interleave(6, 0).repeat_interleave(6, 1)


def targets_of(*present):
    return [masks_from_label(label(p, seed=i)) for i, p in enumerate(present)]


def ignored(size=(24, 36)):
    """Targets of an image whose pixels are all ignored."""
    return masks_from_label(torch.full(size, 255))


def image_of(outputs, i):
    """The predictions of image i."""
    one = slice(i, i + 1)
    return Predictions(
        [c[one] for c in outputs.class_logits], [m[one] for m in outputs.mask_logits]
    )


def with_weights(target, weights):
    return Targets(target.labels, target.masks, weights)


def some_weights(size=(24, 36), seed=0):
    """Blocks of weights in [0, 1]; a third of the blocks is 0, another third 1."""
    values = torch.rand(size[0] // 4, size[1] // 4, generator=torch.Generator().manual_seed(seed))
    return (3 * values - 1).clamp(0, 1).repeat_interleave(4, 0).repeat_interleave(4, 1)


def left_half(size=(24, 36)):
    """Weights of 1 in the left half, 0 in the right half."""
    weights = torch.zeros(size)
    weights[:, : size[1] // 2] = 1
    return weights


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def sample(plane, points):
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


def entropy(logits, target, weights=1.0):
    p = sigmoid(logits)
    return -np.mean(weights * (target * np.log(p) + (1 - target) * np.log(1 - p)))


def dice(logits, target, weights=1.0):
    p = weights * sigmoid(logits)
    target = weights * target
    return 1 - (2 * (p * target / weights).sum() + 1) / (p.sum() + target.sum() + 1)


def terms(logits, mask, weights, points):
    """Cross-entropy and dice loss of a mask at points.

    A point's weight is interpolated between pixels with border padding, and its target is the
    weighted mean of the mask around it. The losses are those of points whose weights are divided by
    their mean, times this mean.
    """
    predicted = sample(logits, points)
    if weights is None:
        target = sample(mask, points)
        return np.array([entropy(predicted, target), dice(predicted, target)])
    height, width = weights.shape
    padded = np.pad(weights, 1, mode="edge")
    inner_points = (points * [width, height] + 1) / [width + 2, height + 2]
    at_points = sample(padded, inner_points)
    counts = at_points > 1e-9
    if not counts.any():
        return np.zeros(2)
    target = sample(weights * mask, points)[counts] / at_points[counts]
    mean_weight = at_points.mean()
    relative, predicted = at_points[counts] / mean_weight, predicted[counts]
    # The cross-entropy is a mean over all points, those of weight 0 included.
    cross_entropy = counts.mean() * entropy(predicted, target, relative)
    return mean_weight * np.array([cross_entropy, dice(predicted, target, relative)])


def cost_matrix(class_logits, mask_logits, labels, masks, points, weights=None):
    """(Q, K) of one image."""
    costs = np.zeros((len(class_logits), len(labels)))
    for q, k in np.ndindex(costs.shape):
        costs[q, k] = -WEIGHTS.class_weight * softmax(class_logits[q])[labels[k]]
        both = terms(mask_logits[q], masks[k], weights, points)
        costs[q, k] += WEIGHTS.mask_weight * both[0] + WEIGHTS.dice_weight * both[1]
    return costs


def draw_points(sampler, num_masks, generator):
    """Matching points, candidates and random points of an image, in this order, in [0, 1]."""
    num_candidates = int(sampler.num_points * sampler.oversample_ratio)
    num_random = sampler.num_points - int(sampler.num_points * sampler.importance_sample_ratio)
    matching = torch.rand(1, sampler.num_points, 2, generator=generator)[0]
    candidates = torch.rand(num_masks, num_candidates, 2, generator=generator)
    random = torch.rand(num_masks, num_random, 2, generator=generator)
    return matching.numpy(), candidates.numpy(), random.numpy()


def select_points(logits, candidates, random, num_points, weights):
    """The candidates nearest to the outline of a mask, and the random points."""
    certainty = np.abs(sample(logits, candidates))
    if weights is not None:  # candidates of weight 0 come last
        certainty[sample(weights, candidates) == 0] = np.inf
    num_uncertain = num_points - len(random)
    return np.concatenate([candidates[np.argsort(certainty)[:num_uncertain]], random])


def class_terms(class_logits, targets):
    """Weighted sum of the cross-entropies of an image's queries, and the sum of the weights.

    Args:
        class_logits: (Q, C + 1)
        targets: query -> class, of matched queries.
    """
    total = total_weight = 0.0
    for q, logits in enumerate(class_logits):
        weight = 1.0 if q in targets else NO_OBJECT_WEIGHT
        total -= weight * np.log(softmax(logits)[targets.get(q, NUM_CLASSES)])
        total_weight += weight
    return np.array([total, total_weight])


def losses_by_hand(outputs, targets, seeds, sampler=SAMPLER):
    """Losses and matched pairs.

    Points are drawn in the documented order: the last prediction first, of each the matching
    points, the candidates and the random points.
    """
    labels = [t.labels.numpy() for t in targets]
    masks = [t.masks.double().numpy() for t in targets]
    weights = [None if t.weights is None else t.weights.double().numpy() for t in targets]
    counts = [min(len(t), outputs.class_logits[0].shape[1]) for t in labels]
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    losses, pairs = {}, {}
    last = len(outputs.class_logits) - 1
    for layer in [last, *range(last)]:
        class_logits = outputs.class_logits[layer].detach().double().numpy()
        mask_logits = outputs.mask_logits[layer].detach().double().numpy()
        of_classes, of_masks = np.zeros(2), np.zeros(2)
        for i, generator in enumerate(generators):
            points, candidates, random = draw_points(sampler, counts[i], generator)
            costs = cost_matrix(
                class_logits[i], mask_logits[i], labels[i], masks[i], points, weights[i]
            )
            rows, columns = linear_sum_assignment(costs)
            matched = pairs[layer, i] = list(zip(rows.tolist(), columns.tolist(), strict=True))
            of_classes += class_terms(class_logits[i], {q: labels[i][k] for q, k in matched})
            for m, (q, k) in enumerate(matched):
                selected = select_points(
                    mask_logits[i, q], candidates[m], random[m], sampler.num_points, weights[i]
                )
                of_masks += terms(mask_logits[i, q], masks[i][k], weights[i], selected)
        suffix = "" if layer == last else f"_{layer}"
        bce, dice_sum = of_masks / max(sum(counts), 1)
        losses["loss_ce" + suffix] = WEIGHTS.class_weight * of_classes[0] / of_classes[1]
        losses["loss_mask" + suffix] = WEIGHTS.mask_weight * bce
        losses["loss_dice" + suffix] = WEIGHTS.dice_weight * dice_sum
    return losses, pairs
