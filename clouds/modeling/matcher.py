"""Which query answers for which target: Hungarian matching (Mask2Former, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from clouds.modeling.points import dice_loss

Match = tuple[Tensor, Tensor]
"""Query indices and target indices of the matched pairs of one image, int64 (M,) each."""


@dataclass(frozen=True)
class CostWeights:
    """Weights of the class cost, the mask's binary cross-entropy and its dice cost."""

    classes: float
    mask: float
    dice: float


def matching_costs(
    class_logits: Tensor,
    mask_logits: Tensor,
    labels: Tensor,
    masks: Tensor,
    weights: CostWeights,
    pixel_weights: Tensor,
) -> Tensor:
    """The cost of giving each target to each query.

    Args:
        class_logits: (N, Q, C + 1)
        mask_logits: at the sampled points (N, Q, P).
        labels: (N, K) classes of the targets.
        masks: at the same points (N, K, P), in [0, 1], times `pixel_weights`.
        weights: of the three costs.
        pixel_weights: at the same points (N, P). See `mask_losses`.

    Returns:
        (N, Q, K)
    """
    probability = class_logits.softmax(-1)
    labels = labels[:, None].expand(-1, class_logits.shape[1], -1)
    cost = -weights.classes * probability.gather(-1, labels)
    strength = pixel_weights.mean(-1)[:, None, None]
    # The matrix of few rows stands in front: on a CPU such products are the faster ones.
    inside = mask_logits.sigmoid()
    sums = (torch.cat((masks, pixel_weights[:, None]), dim=1) @ inside.mT).mT
    # BCE of a pair: sum softplus(x) - x t, over points.
    softplus = (pixel_weights[:, None] @ F.softplus(mask_logits).mT).mT
    entropy = softplus - (masks @ mask_logits.mT).mT
    cost = cost + weights.mask * entropy / mask_logits.shape[-1]
    sizes = sums[..., -1:] + masks.sum(-1)[:, None]
    return cost + weights.dice * dice_loss(sums[..., :-1], sizes, strength)


def match(costs: Tensor, counts: Sequence[int]) -> list[list[Match]]:
    """Solve every assignment of a step; the costs travel to the host once.

    Args:
        costs: (L, N, Q, K), of L predictions of N images, K the largest number of targets.
        counts: how many targets each image has; columns behind them are padding.

    Returns:
        per prediction, per image, the pairs, on the host.
    """
    # Predictions that are not finite match anyhow: their losses are not finite either, and the
    # trainer stops at them and names the images.
    on_host = costs.float().nan_to_num().cpu()
    return [
        [_assign(image[:, :count]) for image, count in zip(layer, counts, strict=True)]
        for layer in on_host
    ]


def _assign(cost: Tensor) -> Match:
    queries, targets = linear_sum_assignment(cost.numpy())
    return torch.from_numpy(queries), torch.from_numpy(targets)
