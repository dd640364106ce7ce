#!/usr/bin/env python
"""The criterion alone, forward and backward: ours beside the published way, in one run.

    OMP_NUM_THREADS=1 python benchmarks/criterion.py
    OMP_NUM_THREADS=1 python benchmarks/criterion.py --size 768 --repeats 3

The published way is composed of plain torch calls: layer after layer and image after image, a
transfer of costs for each, float copies of all matched masks. Both draw the same points; their
losses and gradients are compared before anything is timed. On a CPU the processor's time is taken,
of all threads: what other programs take of it does not count.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from in_turns import in_turns, machine, parser_of, report, seconds_of
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from clouds.data.structures import Targets, masks_from_label
from clouds.modeling.criterion import SetCriterion
from clouds.modeling.matcher import CostWeights
from clouds.modeling.points import PointSampler
from clouds.modeling.transformer_decoder.decoder import Predictions

CLASSES = 19
NO_OBJECT = 0.1
WEIGHTS = CostWeights(classes=2.0, mask=5.0, dice=5.0)
SEED = 0
TOLERANCE = 1e-4
"""Of losses, relative; of gradients, relative to the largest one."""


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    sampler = PointSampler(points=args.points, oversample=3.0, importance=0.75)
    made = predictions(args, device)
    targets = labelled(args, device)
    criterion = SetCriterion(CLASSES, WEIGHTS, NO_OBJECT, sampler).to(device)
    ways: dict[str, Callable[[], dict[str, Tensor]]] = {
        "published way": lambda: plain_losses(made, targets, sampler),
        "ours": lambda: criterion(made, targets),
    }
    if args.weights:
        doubted = [Targets(t.labels, t.masks, torch.rand_like(t.masks[0].float())) for t in targets]
        ways["ours, pixels weighed"] = lambda: criterion(made, doubted)
    leaves = made.class_logits + made.mask_logits
    compare(ways["published way"], ways["ours"], leaves)
    times = in_turns(ways, lambda way: seconds(way, leaves, device), args.repeats)
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
    parser.add_argument("--size", type=int, default=384, help="of the targets; masks: a quarter")
    parser.add_argument("--present", type=int, default=10, help="classes in an image")
    parser.add_argument("--points", type=int, default=12544)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--weights", action="store_true", help="also time weighed pixels")
    return parser.parse_args()


def predictions(args: argparse.Namespace, device: torch.device) -> Predictions:
    """Smooth masks with outlines, as a head makes them."""
    torch.manual_seed(SEED)
    coarse = args.size // 16
    classes = [torch.randn(args.images, args.queries, CLASSES + 1) for _ in range(args.layers)]
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


def labelled(args: argparse.Namespace, device: torch.device) -> list[Targets]:
    """Label maps of square blocks, every class being in each image."""
    cells = 8
    targets = []
    for _ in range(args.images):
        blocks = torch.randint(args.present, (cells, cells))
        blocks.flatten()[: args.present] = torch.arange(args.present)
        label = F.interpolate(blocks[None, None].float(), (args.size, args.size))[0, 0]
        targets.append(masks_from_label(label.to(device, torch.uint8)))
    return targets


def seconds(
    way: Callable[[], dict[str, Tensor]], leaves: list[Tensor], device: torch.device
) -> float:
    for leaf in leaves:
        leaf.grad = None
    return seconds_of(lambda: sum(way().values()).backward(), device)


def compare(
    a: Callable[[], dict[str, Tensor]], b: Callable[[], dict[str, Tensor]], leaves: list[Tensor]
) -> None:
    """Both draw from torch's global generator."""
    results = []
    for way in (a, b):
        torch.manual_seed(SEED)
        for leaf in leaves:
            leaf.grad = None
        losses = way()
        sum(losses.values()).backward()
        results.append((losses, [leaf.grad for leaf in leaves]))
    (losses, gradients), (other_losses, other_gradients) = results
    assert set(losses) == set(other_losses)
    for name, loss in losses.items():
        torch.testing.assert_close(other_losses[name], loss, rtol=TOLERANCE, atol=0)
    for gradient, other in zip(gradients, other_gradients, strict=True):
        worst = (gradient - other).abs().max() / gradient.abs().max()
        assert worst < TOLERANCE, f"gradients differ by {worst}"


# ------------------------------------------------------------------ the published way


def plain_losses(
    made: Predictions, targets: list[Targets], sampler: PointSampler
) -> dict[str, Tensor]:
    last = len(made.class_logits) - 1
    losses = {}
    for layer in [last, *range(last)]:
        suffix = "" if layer == last else f"_{layer}"
        three = plain_layer(made.class_logits[layer], made.mask_logits[layer], targets, sampler)
        losses |= {f"loss_{name}{suffix}": loss for name, loss in three.items()}
    return losses


def plain_layer(
    class_logits: Tensor, mask_logits: Tensor, targets: list[Targets], sampler: PointSampler
) -> dict[str, Tensor]:
    device = class_logits.device
    pairs = [
        plain_match(c, m, t, sampler)
        for c, m, t in zip(class_logits, mask_logits, targets, strict=True)
    ]
    wanted = torch.full(class_logits.shape[:2], CLASSES, device=device)
    for row, target, (queries, indices) in zip(wanted, targets, pairs, strict=True):
        row[queries] = target.labels[indices]
    empty = torch.ones(CLASSES + 1, device=device)
    empty[-1] = NO_OBJECT
    entropy = F.cross_entropy(class_logits.transpose(1, 2), wanted, empty)

    predicted = torch.cat([m[q] for m, (q, _) in zip(mask_logits, pairs, strict=True)])[:, None]
    masks = torch.cat([t.masks.float()[k] for t, (_, k) in zip(targets, pairs, strict=True)])[
        :, None
    ]
    with torch.no_grad():
        candidates = drawn(pairs, int(sampler.points * sampler.oversample), device)
        certainty = read(predicted, candidates)[:, 0].abs()
        uncertain = int(sampler.points * sampler.importance)
        index = certainty.topk(uncertain, dim=1, largest=False).indices
        random = drawn(pairs, sampler.points - uncertain, device)
        near = candidates.gather(1, index[..., None].expand(-1, -1, 2))
        points = torch.cat((near, random), 1)
        truth = read(masks, points)[:, 0]
    logits = read(predicted, points)[:, 0]
    bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1).sum()
    inside = logits.sigmoid()
    dice = 1 - (2 * (inside * truth).sum(1) + 1) / (inside.sum(1) + truth.sum(1) + 1)
    return {
        "ce": WEIGHTS.classes * entropy,
        "mask": WEIGHTS.mask * bce / len(masks),
        "dice": WEIGHTS.dice * dice.sum() / len(masks),
    }


@torch.no_grad()
def plain_match(
    class_logits: Tensor, mask_logits: Tensor, target: Targets, sampler: PointSampler
) -> tuple[Tensor, Tensor]:
    points = torch.rand(1, sampler.points, 2, device=class_logits.device)
    masks = target.masks.float()
    truth = read(masks[:, None], points.expand(len(masks), -1, -1))[:, 0]
    logits = read(mask_logits[:, None], points.expand(len(mask_logits), -1, -1))[:, 0]
    inside = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits), reduction="none")
    outside = F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits), reduction="none")
    bce = (inside @ truth.T + outside @ (1 - truth).T) / sampler.points
    share = logits.sigmoid()
    dice = 1 - (2 * share @ truth.T + 1) / (share.sum(1)[:, None] + truth.sum(1) + 1)
    likely = class_logits.softmax(-1)[:, target.labels]
    cost = WEIGHTS.mask * bce - WEIGHTS.classes * likely + WEIGHTS.dice * dice
    queries, indices = linear_sum_assignment(cost.cpu().numpy())
    return torch.from_numpy(queries).to(cost.device), torch.from_numpy(indices).to(cost.device)


def drawn(pairs: list[tuple[Tensor, Tensor]], points: int, device: torch.device) -> Tensor:
    return torch.cat([torch.rand(len(q), points, 2, device=device) for q, _ in pairs])


def read(maps: Tensor, points: Tensor) -> Tensor:
    """(N, C, H, W) at points (N, P, 2) in [0, 1] -> (N, C, P)."""
    return F.grid_sample(maps, 2 * points[:, :, None] - 1, align_corners=False)[..., 0]


if __name__ == "__main__":
    main()
