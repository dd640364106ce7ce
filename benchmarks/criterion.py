#!/usr/bin/env python
"""The criterion, forward and backward: ours against the published algorithm, in one run.

    OMP_NUM_THREADS=1 python benchmarks/criterion.py
    OMP_NUM_THREADS=1 python benchmarks/criterion.py --size 768 --repeats 3

The published algorithm is composed of plain torch calls: layer by layer and image by image, a copy
of the costs to the host for each, float copies of all matched masks. Both sample the same points;
losses and gradients are compared before the timing. On a CPU the time is the CPU time of all
threads of this process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from in_turns import in_turns, machine, parser_of, report, seconds_of
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from clouds.data.structures import Targets, masks_from_label, union_of_masks
from clouds.modeling.criterion import SetCriterion
from clouds.modeling.matcher import CostWeights
from clouds.modeling.points import PointSampler
from clouds.modeling.transformer_decoder.decoder import Predictions

NUM_CLASSES = 19
NO_OBJECT_WEIGHT = 0.1
WEIGHTS = CostWeights(class_weight=2.0, mask_weight=5.0, dice_weight=5.0)
SEED = 0

Losses = Callable[[], dict[str, Tensor]]

TOLERANCE = 1e-4
"""Largest difference of losses, relative; of gradients, relative to the largest one."""


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    sampler = PointSampler(
        num_points=args.points, oversample_ratio=3.0, importance_sample_ratio=0.75
    )
    outputs = make_predictions(args, device)
    targets = make_targets(args, device)
    criterion = SetCriterion(NUM_CLASSES, WEIGHTS, NO_OBJECT_WEIGHT, sampler).to(device)
    variants: dict[str, Losses] = {
        "published algorithm": lambda: plain_losses(outputs, targets, sampler),
        "ours": lambda: criterion(outputs, targets),
    }
    if args.weights:
        weighted = [
            Targets(t.labels, t.masks, torch.rand_like(t.masks[0].float())) for t in targets
        ]
        variants["ours, pixel weights"] = lambda: criterion(outputs, weighted)
    if args.partly_labelled:
        partly = [replace(t, no_object_weight=union_of_masks(t.masks[1:]).float()) for t in targets]
        variants["ours, partly labelled"] = lambda: criterion(outputs, partly)
    leaves = outputs.class_logits + outputs.mask_logits
    compare(variants["published algorithm"], variants["ours"], leaves)
    times = in_turns(variants, lambda variant: seconds(variant, leaves, device), args.repeats)
    print(
        f"{args.layers} predictions x {args.images} images x {args.queries} queries, masks "
        f"{args.size // 4}, targets {args.size} with {args.present} classes, {args.points} points; "
        f"{machine(device)}"
    )
    print(report(times))


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument(
        "--size", type=int, default=384, help="side of the targets, pixels; masks have a quarter"
    )
    parser.add_argument("--present", type=int, default=10, help="classes of an image")
    parser.add_argument("--points", type=int, default=12544)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--weights", action="store_true", help="also time pixel weights")
    parser.add_argument(
        "--partly-labelled",
        action="store_true",
        help="also time images whose pixels of a class have no no-object loss",
    )
    return parser.parse_args()


def make_predictions(args: argparse.Namespace, device: torch.device) -> Predictions:
    """Random class logits and smooth masks, similar to those of a head."""
    torch.manual_seed(SEED)
    coarse = args.size // 16
    classes = [torch.randn(args.images, args.queries, NUM_CLASSES + 1) for _ in range(args.layers)]
    masks = [
        F.interpolate(
            4 * torch.randn(args.images, args.queries, coarse, coarse),
            scale_factor=4.0,
            mode="bilinear",
            align_corners=False,
        )
        for _ in range(args.layers)
    ]
    return Predictions(
        [c.to(device).requires_grad_() for c in classes],
        [m.to(device).requires_grad_() for m in masks],
    )


def make_targets(args: argparse.Namespace, device: torch.device) -> list[Targets]:
    """Label maps of square blocks, with every class in each image."""
    cells = 8
    targets = []
    for _ in range(args.images):
        blocks = torch.randint(args.present, (cells, cells))
        blocks.flatten()[: args.present] = torch.arange(args.present)
        label = F.interpolate(blocks[None, None].float(), (args.size, args.size))[0, 0]
        targets.append(masks_from_label(label.to(device, torch.uint8)))
    return targets


def seconds(variant: Losses, leaves: list[Tensor], device: torch.device) -> float:
    for leaf in leaves:
        leaf.grad = None
    return seconds_of(lambda: sum(variant().values()).backward(), device)


def compare(a: Losses, b: Losses, leaves: list[Tensor]) -> None:
    """Losses and gradients; both sample points with torch's global generator."""
    results = []
    for variant in (a, b):
        torch.manual_seed(SEED)
        for leaf in leaves:
            leaf.grad = None
        losses = variant()
        sum(losses.values()).backward()
        results.append((losses, [leaf.grad for leaf in leaves]))
    (losses, gradients), (other_losses, other_gradients) = results
    assert set(losses) == set(other_losses)
    for name, loss in losses.items():
        torch.testing.assert_close(other_losses[name], loss, rtol=TOLERANCE, atol=0)
    for gradient, other in zip(gradients, other_gradients, strict=True):
        worst = (gradient - other).abs().max() / gradient.abs().max()
        assert worst < TOLERANCE, f"gradients differ by {worst}"


# ------------------------------------------------------------------ the published algorithm


def plain_losses(
    outputs: Predictions, targets: list[Targets], sampler: PointSampler
) -> dict[str, Tensor]:
    last = len(outputs.class_logits) - 1
    losses = {}
    for layer in [last, *range(last)]:
        suffix = "" if layer == last else f"_{layer}"
        terms = plain_layer(
            outputs.class_logits[layer], outputs.mask_logits[layer], targets, sampler
        )
        losses |= {f"loss_{name}{suffix}": loss for name, loss in terms.items()}
    return losses


def plain_layer(
    class_logits: Tensor, mask_logits: Tensor, targets: list[Targets], sampler: PointSampler
) -> dict[str, Tensor]:
    device = class_logits.device
    pairs = [
        plain_match(c, m, t, sampler)
        for c, m, t in zip(class_logits, mask_logits, targets, strict=True)
    ]
    classes = torch.full(class_logits.shape[:2], NUM_CLASSES, device=device)
    for row, target, (queries, indices) in zip(classes, targets, pairs, strict=True):
        row[queries] = target.labels[indices]
    empty_weight = torch.ones(NUM_CLASSES + 1, device=device)
    empty_weight[-1] = NO_OBJECT_WEIGHT
    entropy = F.cross_entropy(class_logits.transpose(1, 2), classes, empty_weight)

    predicted = torch.cat([m[q] for m, (q, _) in zip(mask_logits, pairs, strict=True)])[:, None]
    masks = torch.cat([t.masks.float()[k] for t, (_, k) in zip(targets, pairs, strict=True)])[
        :, None
    ]
    with torch.no_grad():
        num_candidates = int(sampler.num_points * sampler.oversample_ratio)
        candidates = random_points(pairs, num_candidates, device)
        certainty = point_sample(predicted, candidates)[:, 0].abs()
        num_uncertain = int(sampler.num_points * sampler.importance_sample_ratio)
        index = certainty.topk(num_uncertain, dim=1, largest=False).indices
        random = random_points(pairs, sampler.num_points - num_uncertain, device)
        uncertain = candidates.gather(1, index[..., None].expand(-1, -1, 2))
        points = torch.cat((uncertain, random), 1)
        target_masks = point_sample(masks, points)[:, 0]
    logits = point_sample(predicted, points)[:, 0]
    bce = F.binary_cross_entropy_with_logits(logits, target_masks, reduction="none").mean(1).sum()
    probability = logits.sigmoid()
    overlap = (probability * target_masks).sum(1)
    dice = 1 - (2 * overlap + 1) / (probability.sum(1) + target_masks.sum(1) + 1)
    return {
        "ce": WEIGHTS.class_weight * entropy,
        "mask": WEIGHTS.mask_weight * bce / len(masks),
        "dice": WEIGHTS.dice_weight * dice.sum() / len(masks),
    }


@torch.no_grad()
def plain_match(
    class_logits: Tensor, mask_logits: Tensor, target: Targets, sampler: PointSampler
) -> tuple[Tensor, Tensor]:
    points = torch.rand(1, sampler.num_points, 2, device=class_logits.device)
    masks = target.masks.float()
    target_masks = point_sample(masks[:, None], points.expand(len(masks), -1, -1))[:, 0]
    logits = point_sample(mask_logits[:, None], points.expand(len(mask_logits), -1, -1))[:, 0]
    inside = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits), reduction="none")
    outside = F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits), reduction="none")
    bce = (inside @ target_masks.T + outside @ (1 - target_masks).T) / sampler.num_points
    probability = logits.sigmoid()
    sizes = probability.sum(1)[:, None] + target_masks.sum(1)
    dice = 1 - (2 * probability @ target_masks.T + 1) / (sizes + 1)
    class_probability = class_logits.softmax(-1)[:, target.labels]
    cost = (
        WEIGHTS.mask_weight * bce
        - WEIGHTS.class_weight * class_probability
        + WEIGHTS.dice_weight * dice
    )
    queries, indices = linear_sum_assignment(cost.cpu().numpy())
    return torch.from_numpy(queries).to(cost.device), torch.from_numpy(indices).to(cost.device)


def random_points(
    pairs: list[tuple[Tensor, Tensor]], num_points: int, device: torch.device
) -> Tensor:
    return torch.cat([torch.rand(len(q), num_points, 2, device=device) for q, _ in pairs])


def point_sample(maps: Tensor, points: Tensor) -> Tensor:
    """(N, C, H, W) at points (N, P, 2) in [0, 1] -> (N, C, P)."""
    return F.grid_sample(maps, 2 * points[:, :, None] - 1, align_corners=False)[..., 0]


if __name__ == "__main__":
    main()
