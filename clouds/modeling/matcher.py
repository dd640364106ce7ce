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
    finite = costs.float().nan_to_num()
    # The meta device, on which memory is counted, has no values: any assignment will do.
    on_host = torch.zeros(finite.shape) if finite.is_meta else finite.cpu()
    return [
        [_assign(image[:, :count]) for image, count in zip(layer, counts, strict=True)]
        for layer in on_host
    ]


def _assign(cost: Tensor) -> Match:
    queries, targets = linear_sum_assignment(cost.numpy())
    return torch.from_numpy(queries), torch.from_numpy(targets)


@dataclass(frozen=True)
class MatchedPairs:
    """The matched pairs of L predictions of N images with Q queries, image after image.

    An image has m pairs in each prediction; M is the sum of m over the images.

    Attributes:
        queries: (L, M), indices among the N * Q queries of a prediction.
        targets: per image (L, m), indices among its own targets.
        by_target: per image (L * m,), the order that sorts its pairs of all predictions by target.
        counts: m of each image.
    """

    queries: Tensor
    targets: Sequence[Tensor]
    by_target: Sequence[Tensor]
    counts: list[int]

    @classmethod
    def from_matches(
        cls, matches: Sequence[Sequence[Match]], num_queries: int, device: torch.device
    ) -> MatchedPairs:
        """From the matches of each prediction and image, all copied to the device together."""
        images = [
            (torch.stack([q for q, _ in image]), torch.stack([t for _, t in image]))
            for image in zip(*matches, strict=True)
        ]
        sizes = [t.numel() for _, t in images]
        orders = torch.cat([t.flatten().argsort(stable=True) for _, t in images])
        on_host = torch.stack(
            [
                torch.cat([q + i * num_queries for i, (q, _) in enumerate(images)], dim=1),
                torch.cat([t for _, t in images], dim=1),
                orders.view(len(matches), sum(sizes) // len(matches)),
            ]
        )
        queries, targets, orders = on_host.to(device, non_blocking=True)
        counts = [t.shape[1] for _, t in images]
        by_target = orders.flatten().split(sizes)
        return cls(queries, targets.split(counts, dim=1), by_target, counts)

    def queries_per_image(self, num_queries: int) -> list[Tensor]:
        """Per image (L, m), indices among its own Q queries."""
        images = torch.split(self.queries, self.counts, dim=1)
        return [image - i * num_queries for i, image in enumerate(images)]
