"""Random points on masks, and the mask losses there (Mask2Former, section 3.3).

Points are drawn per image, so that they do not depend on how a batch is split. Pixels may count
less than fully. Let w be the weights of the points, from 0 to 1, and s their mean. A loss of a mask
is s times the published loss of points with the relative weights w / s, whose mean is 1:

    cross-entropy = sum(w * bce) / P
    dice loss     = s * (1 - (2 * sum(w p t) + s) / (sum(w p) + sum(w t) + s))

Where all pixels have the weight c it is c times the published loss, and the published loss itself
for c = 1; where all weights are 0 it is 0. Dividing by sum(w) instead of the number P of points
would give an uncertain image as much weight as a certain one.

Masks are multiplied with the weights before they are sampled, so a mask's value at a pixel of
weight 0 reaches no point beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Generator = torch.Generator | None
"""None is torch's global generator."""

_MASKS_AT_ONCE = 4
"""Whose candidates a CPU looks at together: as many as its cache holds."""

_MASKS_AT_ONCE = 4
"""Whose candidates a CPU looks at together: as many as its cache holds."""


def generators_from(seeds: Sequence[int], device: torch.device) -> list[Generator]:
    """One generator per image."""
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def sample_at(maps: Tensor, points: Tensor, padding: str = "zeros") -> Tensor:
    """Read maps bilinearly at points.

    Args:
        maps: (N, C, H, W)
        points: (N, P, 2) as (x, y), -1 the left or upper edge and 1 the opposite one.
        padding: what is blended in outside of the outermost pixel centers: 'zeros', or 'border' for
            the outermost pixels themselves.

    Returns:
        (N, C, P)
    """
    if not len(maps):
        return maps.new_zeros(0, maps.shape[1], points.shape[1])
    if maps.shape[1] > 1:  # all channels of a pixel side by side: several times faster on a CPU
        maps = maps.contiguous(memory_format=torch.channels_last)
    grid = points[:, None]
    return F.grid_sample(maps, grid, padding_mode=padding, align_corners=False)[:, :, 0]


@dataclass(frozen=True)
class Points:
    """The points of L predictions of an image that has M matched masks in each.

    (x, y) in [-1, 1], as `sample_at` wants them.

    Attributes:
        matching: (L, P, 2), shared by all masks of a prediction.
        candidates: (L, M, P * oversample, 2), of which the least certain are taken.
        random: (L, M, P - the number taken, 2), added to them.
    """

    matching: Tensor
    candidates: Tensor
    random: Tensor


@dataclass(frozen=True)
class PointSampler:
    """How many points the criterion looks at (Mask2Former, section 3.3).

    Attributes:
        points: per mask.
        oversample: candidates per point.
        importance: share of the points taken where the prediction is least certain.
    """

    points: int
    oversample: float
    importance: float

    @property
    def uncertain(self) -> int:
        return int(self.importance * self.points)

    def draw(
        self,
        layers: int,
        matched: Sequence[int],
        generators: Sequence[Generator],
        device: torch.device,
    ) -> list[Points]:
        """Draw the points of a step, of every image.

        The order, on which reproducing published numbers depends: prediction after prediction; of
        each the matching points of all images, then all candidates, then all random points.

        Args:
            layers: how many predictions there are.
            matched: how many masks of each image will be matched.
            generators: one per image; the same one may stand for several.
        """
        candidates = int(self.points * self.oversample)
        images = [
            Points(
                torch.empty(layers, self.points, 2, device=device),
                torch.empty(layers, masks, candidates, 2, device=device),
                torch.empty(layers, masks, self.points - self.uncertain, 2, device=device),
            )
            for masks in matched
        ]
        for layer in range(layers):
            for kind in ("matching", "candidates", "random"):
                for image, generator in zip(images, generators, strict=True):
                    getattr(image, kind)[layer].uniform_(-1, 1, generator=generator)
        return images

    @torch.no_grad()
    def choose(self, mask_logits: Tensor, points: Points, weights: Tensor | None = None) -> Tensor:
        """The candidates nearest to each mask's outline, and the random points.

        Args:
            mask_logits: (L, M, h, w)
            points: of the same masks.
            weights: (H, W), of the image's pixels. Candidates of weight 0 are taken last.

        Returns:
            (L * M, P, 2)
        """
        masks = mask_logits.flatten(0, 1)[:, None]
        candidates, random = points.candidates.flatten(0, 1), points.random.flatten(0, 1)
        chosen = random.new_empty(len(masks), self.points, 2)
        as_numbers = torch.view_as_complex  # a point is moved as one number
        at_once = max(len(masks), 1) if masks.is_cuda else _MASKS_AT_ONCE
        for first in range(0, len(masks), at_once):
            some = slice(first, first + at_once)
            certainty = sample_at(masks[some], candidates[some])[:, 0].abs_()
            if weights is not None:
                certainty.masked_fill_(weights_at(weights, candidates[some]) == 0, torch.inf)
            nearest = as_numbers(candidates[some]).gather(1, _smallest(certainty, self.uncertain))
            parts = (nearest, as_numbers(random[some]))
            torch.cat(parts, dim=1, out=as_numbers(chosen[some]))
        return chosen


def weights_at(weights: Tensor, points: Tensor) -> Tensor:
    """Weights of pixels (H, W) at points (..., P, 2), as (..., P); 1 everywhere stays 1."""
    flat = points.reshape(1, -1, 2)
    return sample_at(weights[None, None], flat, padding="border").view(points.shape[:-1])


def _smallest(values: Tensor, count: int) -> Tensor:
    """Where the `count` smallest values of each row (N, P) are, in any order: (N, count)."""
    if values.is_cuda or not 0 < count < values.shape[1]:
        return values.topk(count, dim=1, largest=False, sorted=False).indices
    # numpy selects with the CPU's vector instructions: 7 times faster than topk.
    order = np.argpartition(values.numpy(), count - 1, axis=1)
    return torch.from_numpy(order[:, :count])


def dice_loss(overlap: Tensor, sizes: Tensor, strength: Tensor | None = None) -> Tensor:
    """1 - (2 overlap + 1) / (sizes + 1), and the same of weighed points.

    Args:
        overlap: sum of w p t, over points.
        sizes: sum of w p + w t.
        strength: s; None: 1, where w is 1.
    """
    if strength is None:
        return 1 - (2 * overlap + 1) / (sizes + 1)
    least = torch.finfo(strength.dtype).eps  # where nothing counts: 0 * (1 - 0 / least)
    return strength * (1 - (2 * overlap + strength) / (sizes + strength.clamp(min=least)))


def pair_losses(logits: Tensor, wanted: Tensor, weights: Tensor | None) -> Tensor:
    """Binary cross-entropy and dice loss of matched pairs.

    Args:
        logits: predictions at the points of each pair (M, P).
        wanted: the targets there in [0, 1], times weights.
        weights: at the same points; None: 1.

    Returns:
        (2, M)
    """
    inside = logits.sigmoid()
    overlap = (inside * wanted).sum(1)
    if weights is None:
        bce = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        dice = dice_loss(overlap, inside.sum(1) + wanted.sum(1))
    else:
        bce = weights * F.softplus(logits) - logits * wanted
        sizes = (inside * weights).sum(1) + wanted.sum(1)
        dice = dice_loss(overlap, sizes, weights.mean(1))
    return torch.stack((bce.mean(1), dice))
