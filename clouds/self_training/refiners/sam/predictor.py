"""Masks of SAM (Kirillov et al., 2023) for point prompts in many regions of several images.

`SamRefiner` needs two functions: one that embeds images (`Embed`) and one that predicts masks from
embeddings and points (`PredictMasks`). `ImageEmbedder` and `PointPredictor` are those of
segment_anything's SAM; those of transformers' models are in transformers_points.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clouds.ops.sam import as_tokens, best_masks, encode
from clouds.self_training.refiners.sam.frame import Frame, Points, Size

REGIONS_AT_ONCE = 64
"""Regions that are decoded together, which bounds memory."""
REGIONS_AT_ONCE_CPU = 1
"""On a CPU: more do not fit its caches and take longer."""

Embed = Callable[[Sequence[Tensor]], list[Tensor]]
"""Clean images, uint8 (3, H, W) RGB each, to one tensor each. Its shape depends on the model alone,
(C, s, s) for segment_anything's, and its values on image and autocast."""
PredictMasks = Callable[
    [Sequence[Tensor], Sequence[Points], Sequence[Size]], Iterator[tuple[Tensor, Tensor]]
]
"""Embeddings, points and sizes to masks and predicted IoUs, see `PointPredictor`."""


class ImageEmbedder:
    """The image encoder of a SAM from `build_sam`, which takes most of the time."""

    def __init__(self, sam: Any) -> None:
        self.sam = sam
        self.frame = Frame.of_segment_anything(sam)

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Embed images one after the other: sizes may differ, and memory stays bounded.

        Args:
            images: uint8 (3, H, W) RGB, on any device.

        Returns:
            (C, s, s) each, on SAM's device. The image, its longer side resized to SAM's input size
            (1024), is at the top left, the rest is padding. C is 256 and s 64, except in the tiny
            model.
        """
        self.sam.image_encoder.to(self.sam.device)  # does not copy if it is there
        return [self._embed(image) for image in images]

    def _embed(self, image: Tensor) -> Tensor:
        pixels = self.frame.pixel_values(image, self.sam.device)
        return encode(self.sam.image_encoder, pixels)[0]


class PointPredictor:
    """SAM's prompt encoder and mask decoder, for many regions of several images at once.

    Args:
        sam: as from `build_sam`.
        second_pass: decode again, with the logits of each region's best mask as a mask prompt.
        at_once: number of regions that are decoded together; on a CPU REGIONS_AT_ONCE_CPU.
    """

    def __init__(self, sam: Any, second_pass: bool = False, at_once: int = REGIONS_AT_ONCE) -> None:
        self.sam = sam
        self.frame = Frame.of_segment_anything(sam)
        self.second_pass = second_pass
        self.at_once = at_once

    @torch.no_grad()
    def __call__(
        self, embeddings: Sequence[Tensor], points: Sequence[Points], sizes: Sequence[Size]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The best of SAM's three masks for each region of each image.

        Args:
            embeddings: (C, s, s) of each image, on one device.
            points: (M, P, 2) for each image, (x, y) in its pixels, all in the region, M >= 1. M may
                differ between images, P may not.
            sizes: height, width of each image.

        Yields:
            For each image, whose masks are computed only then:
            masks: bool (M, height, width), those with the largest predicted IoU.
            ious: float32 (M, 3), the predicted IoUs of all three.
        """
        device, counts = embeddings[0].device, [len(prompts) for prompts in points]
        at_once = min(self.at_once, REGIONS_AT_ONCE_CPU) if device.type == "cpu" else self.at_once
        scaled = [self.frame.to_frame(*one) for one in zip(points, sizes, strict=True)]
        prompts = torch.from_numpy(np.concatenate(scaled)).to(device)
        # In half precision points of a large image would be off by pixels.
        with torch.autocast(device.type, enabled=False):
            images = [as_tokens(embedding.float()).contiguous() for embedding in embeddings]
            positions = as_tokens(self.sam.prompt_encoder.get_dense_pe()[0]).contiguous()
            image_of = [image for image, m in zip(images, counts, strict=True) for _ in range(m)]
            chunks = [slice(i, i + at_once) for i in range(0, len(prompts), at_once)]
            parts = [
                self._decode(torch.stack(image_of[chunk]), positions, prompts[chunk])
                for chunk in chunks
            ]
        logits, ious = (torch.split(torch.cat(part), counts) for part in zip(*parts, strict=True))
        for own, own_ious, size in zip(logits, ious, sizes, strict=True):
            yield self._binary_masks(own, size, at_once), own_ious

    def _decode(self, pixels: Tensor, positions: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """Best logits (m, 1, 4s, 4s), predicted IoUs (m, 3); points are in SAM's input frame."""
        logits, ious = self._predict(pixels, positions, points, None)
        if self.second_pass:
            logits, ious = self._predict(pixels, positions, points, logits)
        return logits, ious

    def _predict(
        self, pixels: Tensor, positions: Tensor, points: Tensor, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One pass of `_decode`; `masks` are mask prompts, logits (m, 1, 4s, 4s)."""
        encoder = self.sam.prompt_encoder
        foreground = torch.ones(points.shape[:2], dtype=torch.int, device=points.device)
        sparse, dense = encoder(points=(points, foreground), boxes=None, masks=masks)
        return best_masks(
            self.sam.mask_decoder,
            pixels + as_tokens(dense),
            positions,
            sparse,
            encoder.image_embedding_size,
        )

    def _binary_masks(self, logits: Tensor, size: Size, at_once: int) -> Tensor:
        """bool (M, height, width) of the selected masks, resized to the image."""
        return torch.cat(
            [
                self.frame.from_frame(chunk, size)[:, 0] > self.sam.mask_threshold
                for chunk in torch.split(logits, at_once)
            ]
        )
