"""What a mask costs at sampled points, where pixels may count less than fully.

Let w be the weights of the points, from 0 to 1, and s their mean. A loss of a mask is s times the
published loss of points that have the relative weights w / s, whose mean is 1:

    cross-entropy = sum(w * bce) / P
    dice loss     = s * (1 - (2 * sum(w p t) + s) / (sum(w p) + sum(w t) + s))

Where all pixels have the weight c it is c times the published loss, and the published loss itself
for c = 1; where none counts it is 0. Dividing by sum(w) instead of the number P of points would
give a doubtful image as much say as a certain one.

The weights enter where pixels are blended into a point, not afterwards: masks are multiplied with
them before they are sampled. So a mask's value at a pixel of weight 0 reaches no point beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


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
