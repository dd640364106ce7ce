"""Random points on masks: drawn per image, so that they do not depend on how a batch is split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Generator = torch.Generator | None
"""None is torch's global generator."""


def generators_from(seeds: Sequence[int], device: torch.device) -> list[Generator]:
    """One generator per image."""
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def sample_at(maps: Tensor, points: Tensor) -> Tensor:
    """Read maps bilinearly at points.

    Args:
        maps: (N, C, H, W)
        points: (N, P, 2) as (x, y), 0 the left or upper edge and 1 the opposite one; outside of the
            outermost pixel centres zeros are blended in.

    Returns:
        (N, C, P)
    """
    if not len(maps):
        return maps.new_zeros(0, maps.shape[1], points.shape[1])
    return F.grid_sample(maps, 2 * points[:, None] - 1, align_corners=False)[:, :, 0]


@dataclass(frozen=True)
class LayerPoints:
    """The points of one prediction of a batch of N images with M matched masks in all.

    Attributes:
        matching: (N, P, 2), shared by all masks of an image.
        candidates: (M, P * oversample, 2), of which the least certain are taken.
        random: (M, P - the number taken, 2), added to them.
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
        self, matched: Sequence[int], generators: Sequence[Generator], device: torch.device
    ) -> LayerPoints:
        """Draw the points of one prediction.

        Args:
            matched: how many masks of each image will be matched.
            generators: one per image; the same one may stand for several.
        """

        def uniform(counts: Sequence[int], points: int) -> Tensor:
            return torch.cat(
                [
                    torch.rand(count, points, 2, generator=generator, device=device)
                    for count, generator in zip(counts, generators, strict=True)
                ]
            )

        return LayerPoints(
            matching=uniform([1] * len(matched), self.points),
            candidates=uniform(matched, int(self.points * self.oversample)),
            random=uniform(matched, self.points - self.uncertain),
        )

    @torch.no_grad()
    def choose(self, mask_logits: Tensor, points: LayerPoints) -> Tensor:
        """The candidates nearest to the mask's outline, and the random points.

        Args:
            mask_logits: (M, 1, h, w)

        Returns:
            (M, P, 2)
        """
        certainty = sample_at(mask_logits, points.candidates)[:, 0].abs()
        nearest = certainty.topk(self.uncertain, dim=1, largest=False).indices
        uncertain = points.candidates.gather(1, nearest[..., None].expand(-1, -1, 2))
        return torch.cat((uncertain, points.random), dim=1)
