"""More weight for uncertain pixels at boundaries of classes.

FLEX-Seg's uncertainty boundary emphasis: Kim et al., Do We Need Perfect Data? Leveraging Noise for
Domain Generalized Segmentation, 2025.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from clouds.data.structures import Targets, class_map
from clouds.self_training.refiners.base import PseudoLabel


@dataclass(frozen=True)
class BoundaryWeights:
    """Multiplies weights at boundaries by 1 + `weight` * sigmoid((H - mean(H)) / std(H)).

    H is the entropy of the teacher's prediction; mean and standard deviation are those of the
    image's boundary pixels.

    Attributes:
        weight: FLEX-Seg: 3.
        width: a pixel is at a boundary if a pixel of another class, or of none, is at most so many
            rows and columns away.
    """

    weight: float
    width: int
    needs_scores = True

    def __call__(self, label: PseudoLabel, targets: Targets) -> Targets:
        assert label.scores is not None
        boundary = boundary_mask(class_map(targets.labels, targets.masks), self.width)
        factor = boundary_weights(entropy(label.scores), boundary, self.weight)
        return replace(targets, weights=targets.pixel_weights * factor)


def boundary_mask(classes: Tensor, width: int) -> Tensor:
    """bool (H, W), where the window of `width` pixels to each side has two values of `classes`."""
    values, side = classes.float()[None, None], 2 * width + 1
    highest = F.max_pool2d(values, side, stride=1, padding=width)
    lowest = -F.max_pool2d(-values, side, stride=1, padding=width)
    differ: Tensor = highest.ne(lowest)
    return differ[0, 0]


def entropy(scores: Tensor) -> Tensor:
    """Entropy of each pixel's class distribution, (C, H, W) -> float32 (H, W), natural logarithm.

    The distribution is the scores divided by their sum.
    """
    smallest = torch.finfo(scores.dtype).tiny
    shares = scores / scores.sum(0).clamp(min=smallest)
    total: Tensor = torch.special.entr(shares).sum(0)
    return total.float()


def boundary_weights(uncertainty: Tensor, boundary: Tensor, weight: float) -> Tensor:
    """float32 (H, W), the factor of each pixel: 1 outside of boundaries; see `BoundaryWeights`."""
    values = uncertainty[boundary]
    factor = torch.ones_like(uncertainty)
    if values.numel() == 0:
        return factor
    deviation = values.std(correction=0).clamp(min=torch.finfo(values.dtype).eps)
    factor[boundary] += weight * ((values - values.mean()) / deviation).sigmoid()
    return factor
