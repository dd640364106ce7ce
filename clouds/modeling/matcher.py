"""Hungarian matching of queries and targets (Mask2Former, section 3.1)."""

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
    """Weights of the three costs of matching, and of the losses of the same terms.

    Attributes:
        class_weight: of the class probability (matching) and the cross-entropy (loss).
        mask_weight: of the binary cross-entropy of masks.
        dice_weight: of the dice loss of masks.
    """

    class_weight: float
    mask_weight: float
    dice_weight: float


def matching_costs(
    class_logits: Tensor,
    mask_logits: Tensor,
    labels: Tensor,
    masks: Tensor,
    weights: CostWeights,
    pixel_weights: Tensor,
) -> Tensor:
    """The cost of matching each query with each target.

    Args:
        class_logits: (N, Q, C + 1)
        mask_logits: at the sampled points (N, Q, P).
        labels: (N, K) classes of the targets.
        masks: at the same points (N, K, P), in [0, 1], times `pixel_weights`.
        weights: of the three costs.
        pixel_weights: at the same points (N, P), see `clouds.modeling.points`.

    Returns:
        (N, Q, K)
    """
    probability = class_logits.softmax(-1)
    labels = labels[:, None].expand(-1, class_logits.shape[1], -1)
    cost = -weights.class_weight * probability.gather(-1, labels)
    mean_weight = pixel_weights.mean(-1)[:, None, None]
    # The matrix with few rows is the left factor: on a CPU such products are faster.
    mask_probability = mask_logits.sigmoid()
    sums = (torch.cat((masks, pixel_weights[:, None]), dim=1) @ mask_probability.mT).mT
    # Binary cross-entropy of a pair: sum of softplus(x) - x t over the points.
    softplus = (pixel_weights[:, None] @ F.softplus(mask_logits).mT).mT
    entropy = softplus - (masks @ mask_logits.mT).mT
    cost = cost + weights.mask_weight * entropy / mask_logits.shape[-1]
    sizes = sums[..., -1:] + masks.sum(-1)[:, None]
    return cost + weights.dice_weight * dice_loss(sums[..., :-1], sizes, mean_weight)


def match(costs: Tensor, counts: Sequence[int]) -> list[list[Match]]:
    """Solve all assignments of a training step; the costs are copied to the host once.

    Args:
        costs: (L, N, Q, K), of L predictions of N images.
        counts: number of targets of each image; further columns are padding.

    Returns:
        per prediction, per image, the matched pairs, on the host.
    """
    # Costs that are not finite must not raise here: the losses are then not finite either, and the
    # trainer stops with an error that names the images.
    on_host = costs.float().nan_to_num().cpu()
    return [
        [_assign(image[:, :count]) for image, count in zip(layer, counts, strict=True)]
        for layer in on_host
    ]


def _assign(cost: Tensor) -> Match:
    queries, targets = linear_sum_assignment(cost.numpy())
    return torch.from_numpy(queries), torch.from_numpy(targets)
