"""What the model asks of a backbone beyond Detectron2's `Backbone`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def masks_at(dense: Tensor, mask_logits: Tensor) -> Tensor:
    """Where mask logits (N, Q, h, w) are > 0 at the size of a map (N, C, H, W): (N, Q, H, W)."""
    resized = F.interpolate(
        mask_logits, size=dense.shape[-2:], mode="bilinear", align_corners=False
    )
    return resized > 0


def pool_masks(features: Tensor, inside: Tensor) -> Tensor:
    """Mean feature inside each mask: (N, C, H, W), bool (N, Q, H, W) -> (N, Q, C).

    A mask without a pixel gives zeros.
    """
    weight = inside.to(features.dtype)
    weight = weight / (weight.sum((-1, -2), keepdim=True) + 1e-8)
    return torch.einsum("nchw,nqhw->nqc", features, weight)
