"""Masked image consistency (MIC): the student sees a part of an image, the teacher all of it.

Hoyer et al., MIC: Masked Image Consistency for Context-Enhanced Domain Adaptation, CVPR 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clouds.d2 import CfgNode, ImageList
from clouds.data.structures import Draw, Sample, is_generated, sample_rng


@dataclass(frozen=True)
class BlockMasking:
    """Hides random blocks of a student's view.

    Attributes:
        ratio: probability that a block is hidden; MIC: 0.7.
        block_size: side of a block, pixels; MIC: 64.
    """

    ratio: float
    block_size: int

    @classmethod
    def from_config(cls, cfg: CfgNode) -> BlockMasking | None:
        """From MODEL.CLOUDS.MASKED_CONSISTENCY; None if its ratio is 0."""
        node = cfg.MODEL.CLOUDS.MASKED_CONSISTENCY
        return cls(node.RATIO, node.BLOCK_SIZE) if node.RATIO > 0 else None

    def visible(self, height: int, width: int, seed: int) -> Tensor:
        """bool (height, width), True where the image is shown, drawn from the sample's seed."""
        size, rng = self.block_size, sample_rng(seed, Draw.MASKED_BLOCKS)
        shown = rng.random((-(-height // size), -(-width // size))) >= self.ratio
        pixels = np.kron(shown, np.ones((size, size), np.bool_))[:height, :width]
        return torch.from_numpy(np.ascontiguousarray(pixels))


def hide_blocks(masking: BlockMasking, batch: Sequence[Sample], images: ImageList) -> None:
    """Set blocks of the student's views of generated images to the mean color, in place.

    Args:
        masking: draws the blocks from `seed` of a sample (0 without).
        batch: the samples.
        images: of the samples, normalized: the mean color is 0.
    """
    for sample, image, (height, width) in zip(
        batch, images.tensor, images.image_sizes, strict=True
    ):
        if is_generated(sample):
            visible = masking.visible(height, width, int(sample.get("seed", 0)))
            image[:, :height, :width] *= visible.to(image.device)
