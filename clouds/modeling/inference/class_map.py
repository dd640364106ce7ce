"""From class scores to a class map of another size, in bounded memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STRIPE_ELEMENTS = 1 << 24
"""Scores held at the wanted size at a time, in elements (float32: 64 MiB)."""


def class_map(
    scores: Tensor, size: tuple[int, int], *, stripe_elements: int = STRIPE_ELEMENTS
) -> Tensor:
    """Resize scores bilinearly and take the best class of every pixel.

    The result is that of `F.interpolate(scores[None], size, mode="bilinear",
    align_corners=False)[0].argmax(0)` up to rounding of the scores, but the resized scores exist
    only a stripe of rows at a time: 19 classes of a 6000x4000 image would take 1.8 GB at once.

    Args:
        scores: (C, h, w) of any floating type, C at most 256; computed with in float32.
        size: height and width of the class map, pixels.
        stripe_elements: most elements (C x rows x width) of a stripe; a stripe has at least a row.

    Returns:
        (height, width) uint8 on the device of `scores`.
    """
    channels, source_height, source_width = scores.shape
    height, width = size
    assert channels <= 256, f"a uint8 class map cannot hold {channels} classes"
    result = torch.empty(height, width, dtype=torch.uint8, device=scores.device)
    rows = max(1, stripe_elements // (channels * max(width, source_width)))
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        if source_height == height:
            stripe = scores[:, top:bottom].float()
        else:
            stripe = _interpolate_rows(scores, top, bottom, height)
        if source_width != width:
            stripe = F.interpolate(
                stripe[None], (bottom - top, width), mode="bilinear", align_corners=False
            )[0]
        # on a CPU several times faster than argmax
        result[top:bottom] = stripe.max(0).indices
    return result


def _interpolate_rows(scores: Tensor, top: int, bottom: int, height: int) -> Tensor:
    """Rows top..bottom of `scores` (C, h, w) stretched to `height` rows: (C, bottom - top, w).

    Pixel centers are at half-integers in both sizes (align_corners False): row y of the result
    lies at (y + 0.5) * h / height - 0.5 of the source, held inside its first and last row.
    """
    source_height = scores.shape[1]
    y = torch.arange(top, bottom, dtype=torch.float32, device=scores.device)
    source_y = ((y + 0.5) * (source_height / height) - 0.5).clamp(0, source_height - 1)
    above = source_y.floor().long()
    below = (above + 1).clamp(max=source_height - 1)
    share = (source_y - above)[None, :, None]
    return torch.lerp(scores[:, above].float(), scores[:, below].float(), share)
