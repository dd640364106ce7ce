"""Mask losses at randomly sampled points (Mask2Former, section 3.3), with weights of pixels.

Points are sampled per image, so they do not depend on how a batch is split.

Pixels may have weights (`Targets.weights`). Let w be the weights of the points, from 0 to 1, and s
their mean. The losses of a mask are

    cross-entropy = sum(w * bce) / P
    dice loss     = s * (1 - (2 * sum(w p t) + s) / (sum(w p) + sum(w t) + s))

which is s times the published loss of points with the relative weights w / s, whose mean is 1. If
all pixels have the weight c it is c times the published loss; for c = 1 the published loss itself.
Dividing by sum(w) instead of the number P of points would give an image of uncertain pixels as
large a loss as one of certain pixels.

Masks are multiplied by the weights before they are sampled, so the mask at a pixel of weight 0 does
not influence points in neighboring pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

MASKS_PER_CHUNK = 4
"""Masks whose candidates are computed at a time on a CPU: as many as fit into its cache."""

Generator = torch.Generator | None
"""None is torch's global generator."""


@dataclass(frozen=True)
class SampledPoints:
    """The points of L predictions of an image that has M matched masks in each.

    (x, y) in [-1, 1], see `point_sample`.

    Attributes:
        matching: (L, num_points, 2), shared by all masks of a prediction.
        candidates: (L, M, num_points * oversample_ratio, 2), of which the most uncertain are taken.
        random: (L, M, num_points - num_uncertain, 2), taken in addition.
    """

    matching: Tensor
    candidates: Tensor
    random: Tensor


@dataclass(frozen=True)
class PointSampler:
    """Samples the points of the matcher and of the mask losses (Mask2Former, section 3.3).

    Attributes:
        num_points: per mask.
        oversample_ratio: candidates per point.
        importance_sample_ratio: share of the points taken where the prediction is most uncertain.
    """

    num_points: int
    oversample_ratio: float
    importance_sample_ratio: float

    @property
    def num_uncertain(self) -> int:
        return int(self.importance_sample_ratio * self.num_points)

    def sample(
        self,
        num_predictions: int,
        num_matched: Sequence[int],
        generators: Sequence[Generator],
        device: torch.device,
    ) -> list[SampledPoints]:
        """The points of every image, of which `num_matched` masks will be matched, in one step.

        Published numbers depend on the order: prediction after prediction; of each the matching
        points of all images, then all candidates, then all random points. Images may share a
        generator.
        """
        num_candidates = int(self.num_points * self.oversample_ratio)
        num_random = self.num_points - self.num_uncertain
        images = [
            SampledPoints(
                torch.empty(num_predictions, self.num_points, 2, device=device),
                torch.empty(num_predictions, num_masks, num_candidates, 2, device=device),
                torch.empty(num_predictions, num_masks, num_random, 2, device=device),
            )
            for num_masks in num_matched
        ]
        for prediction in range(num_predictions):
            for field in ("matching", "candidates", "random"):
                for image, generator in zip(images, generators, strict=True):
                    getattr(image, field)[prediction].uniform_(-1, 1, generator=generator)
        return images

    @torch.no_grad()
    def select_uncertain(
        self, mask_logits: Tensor, points: SampledPoints, weights: Tensor | None = None
    ) -> Tensor:
        """The candidates whose logits are nearest to 0, and the random points.

        Args:
            mask_logits: (L, M, h, w)
            points: of the same masks.
            weights: (H, W), of the image's pixels. Candidates of weight 0 are taken last.

        Returns:
            (L * M, num_points, 2)
        """
        masks = mask_logits.flatten(0, 1)[:, None]
        candidates, random = points.candidates.flatten(0, 1), points.random.flatten(0, 1)
        selected = random.new_empty(len(masks), self.num_points, 2)
        as_complex = torch.view_as_complex  # copies x and y of a point as one number
        step = MASKS_PER_CHUNK if masks.is_cpu else max(len(masks), 1)
        for first in range(0, len(masks), step):
            chunk = slice(first, first + step)
            certainty = point_sample(masks[chunk], candidates[chunk])[:, 0].abs_()
            if weights is not None:
                ignored = sample_weights(weights, candidates[chunk]) == 0
                certainty.masked_fill_(ignored, torch.inf)
            index = _indices_of_smallest(certainty, self.num_uncertain)
            uncertain = as_complex(candidates[chunk]).gather(1, index)
            parts = (uncertain, as_complex(random[chunk]))
            torch.cat(parts, dim=1, out=as_complex(selected[chunk]))
        return selected


def point_sample(maps: Tensor, points: Tensor, padding: str = "zeros") -> Tensor:
    """Sample maps bilinearly at points.

    Args:
        maps: (N, C, H, W)
        points: (N, P, 2) as (x, y), -1 the left or upper edge and 1 the opposite one.
        padding: values outside of the map: 'zeros', or 'border' for those of the outermost pixels.

    Returns:
        (N, C, P)
    """
    if not len(maps):
        return maps.new_zeros(0, maps.shape[1], points.shape[1])
    if maps.is_cuda and maps.requires_grad and torch.are_deterministic_algorithms_enabled():
        return gather_points(maps, points, padding)
    if maps.shape[1] > 1:  # channels last: several times as fast on a CPU
        maps = maps.contiguous(memory_format=torch.channels_last)
    grid = points[:, None]
    return F.grid_sample(maps, grid, padding_mode=padding, align_corners=False)[:, :, 0]


def gather_points(maps: Tensor, points: Tensor, padding: str = "zeros") -> Tensor:
    """`point_sample` whose gradient is deterministic on CUDA too, where that of grid_sample is not.

    The gradient of the points is not computed.
    """
    height, width = maps.shape[-2:]
    size = points.new_empty(2)
    size[0], size[1] = width, height  # filled: a copy from the host would wait
    position = (points.detach() + 1) * size / 2 - 0.5
    if padding == "border":
        position = torch.minimum(position.clamp(min=0), size - 1)
    corner = position.floor()
    fraction = position - corner
    total = maps.new_zeros(*maps.shape[:2], points.shape[1])
    for right, below in ((0, 0), (1, 0), (0, 1), (1, 1)):
        column, row = corner[..., 0] + right, corner[..., 1] + below
        x, y = fraction[..., 0], fraction[..., 1]
        weight = (x if right else 1 - x) * (y if below else 1 - y)
        weight = weight * ((column >= 0) & (column < width) & (row >= 0) & (row < height))
        index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
        index = index.long()[:, None].expand(-1, maps.shape[1], -1)
        total = total + weight[:, None] * maps.flatten(2).gather(2, index)
    return total


def sample_weights(weights: Tensor, points: Tensor) -> Tensor:
    """Weights of pixels (H, W) at points (..., P, 2): (..., P).

    With border padding, so that a weight of 1 everywhere is 1 at every point.
    """
    flat = points.reshape(1, -1, 2)
    return point_sample(weights[None, None], flat, padding="border").view(points.shape[:-1])


def dice_loss(overlap: Tensor, sizes: Tensor, mean_weight: Tensor | None = None) -> Tensor:
    """The dice loss of the module docstring, from sums over the points.

    Args:
        overlap: sum of w p t.
        sizes: sum of w p + w t.
        mean_weight: s; None: 1, where all weights are 1.
    """
    if mean_weight is None:
        return 1 - (2 * overlap + 1) / (sizes + 1)
    # All weights 0: s = overlap = sizes = 0, and the clamp makes it 0 * (1 - 0 / eps) = 0.
    smallest = torch.finfo(mean_weight.dtype).eps
    return mean_weight * (
        1 - (2 * overlap + mean_weight) / (sizes + mean_weight.clamp(min=smallest))
    )


def mask_losses(logits: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
    """Binary cross-entropy and dice loss of matched pairs, see the module docstring.

    Args:
        logits: predictions at the points of each pair (M, P).
        target: target masks there in [0, 1], times `weights`.
        weights: of the same points; None: 1.

    Returns:
        (2, M)
    """
    probability = logits.sigmoid()
    overlap = (probability * target).sum(1)
    if weights is None:
        bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        dice = dice_loss(overlap, probability.sum(1) + target.sum(1))
    else:
        bce = weights * F.softplus(logits) - logits * target
        sizes = (probability * weights).sum(1) + target.sum(1)
        dice = dice_loss(overlap, sizes, weights.mean(1))
    return torch.stack((bce.mean(1), dice))


def _indices_of_smallest(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` smallest values of each row (N, P), in any order: (N, count)."""
    if not values.is_cpu or not 0 < count < values.shape[1]:
        return values.topk(count, dim=1, largest=False, sorted=False).indices
    # NumPy's partition uses the CPU's vector instructions: 7 times as fast as topk.
    order = np.argpartition(values.numpy(), count - 1, axis=1)
    return torch.from_numpy(order[:, :count])
