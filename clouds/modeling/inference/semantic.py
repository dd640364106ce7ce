"""From the head's predictions to a score for every class and pixel (MaskFormer, section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int]


def semantic_scores(
    probabilities: Tensor,
    mask_logits: Tensor,
    padded_size: Size,
    image_size: Size,
    masks_at_once: int,
) -> Tensor:
    """Sum over the queries of class probability times mask probability.

    Args:
        probabilities: (Q, C), void left out.
        mask_logits: (Q, h, w), of the padded image.
        padded_size: (height, width) of the image that the network saw.
        image_size: (height, width) of the picture in its upper left corner.
        masks_at_once: queries whose full-size masks are in memory together; what is left of the
            order in which they are summed is a rounding error.

    Returns:
        (C, *image_size) float32
    """
    height, width = image_size
    scores = mask_logits.new_zeros(probabilities.shape[1], height * width, dtype=torch.float32)
    chunks = zip(
        torch.split(probabilities, masks_at_once),
        torch.split(mask_logits, masks_at_once),
        strict=True,
    )
    for weights, logits in chunks:
        masks = F.interpolate(
            logits[None].float(), size=padded_size, mode="bilinear", align_corners=False
        )[0, :, :height, :width]
        scores.addmm_(weights.float().T, masks.sigmoid().flatten(1))
    return scores.view(-1, height, width)
