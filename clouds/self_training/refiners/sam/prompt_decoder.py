"""Mask decoders of all SAMs behind one call: prompts of an image to mask logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from clouds.self_training.refiners.sam.frame import Frame, Points, Size
from clouds.self_training.refiners.sam.predictor import REGIONS_AT_ONCE, REGIONS_AT_ONCE_CPU


@dataclass(frozen=True)
class Prompts:
    """Prompts of M masks of one image.

    Attributes:
        points: float32 (M, P, 2), (x, y) in the frame, all in the mask. Masks with different
            numbers of points are prompted separately: padding changes the masks of all families.
        boxes: float32 (M, 4), left, top, right, bottom in the frame; None: no boxes.
    """

    points: Points
    boxes: Points | None = None

    def __len__(self) -> int:
        return len(self.points)

    def chunks(self, size: int) -> Iterator[Prompts]:
        """At most `size` prompts each, in order."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield Prompts(self.points[part], None if self.boxes is None else self.boxes[part])


class PromptDecoder(Protocol):
    """Prompt encoder and mask decoder of a SAM.

    Attributes:
        frame: of points, boxes and logits.
        at_once_cpu: how many prompts are decoded together on a CPU.
    """

    frame: Frame
    at_once_cpu: int

    def decode(
        self, embedding: Tensor, prompts: Prompts, multimask: bool, masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Masks for prompts.

        Args:
            embedding: of the image, as the model's `Embed` returns it.
            prompts: M of them.
            multimask: three masks per prompt (K = 3), for ambiguous prompts, rather than one.
            masks: mask prompts, logits (M, 1, h, w) as returned.

        Returns:
            logits: float32 (M, K, h, w) of the whole frame; positive in the mask.
            ious: float32 (M, K), predicted IoUs.
        """
        ...


def prompts_at_once(decoder: PromptDecoder, device: torch.device) -> int:
    """How many prompts are decoded together on a device."""
    return decoder.at_once_cpu if device.type == "cpu" else REGIONS_AT_ONCE


class SegmentAnythingDecoder:
    """The decoder of a `segment_anything.modeling.Sam`: a `PromptDecoder`."""

    def __init__(self, sam: Any, at_once_cpu: int = REGIONS_AT_ONCE_CPU) -> None:
        self.sam = sam
        self.frame = Frame.of_segment_anything(sam)
        self.at_once_cpu = at_once_cpu

    @torch.no_grad()
    def decode(
        self, embedding: Tensor, prompts: Prompts, multimask: bool, masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `PromptDecoder`."""
        points = torch.from_numpy(prompts.points).to(embedding.device)
        boxes = prompts.boxes
        encoder = self.sam.prompt_encoder
        sparse, dense = encoder(
            points=(points, torch.ones(points.shape[:2], dtype=torch.int, device=points.device)),
            boxes=None if boxes is None else torch.from_numpy(boxes).to(embedding.device),
            masks=masks,
        )
        logits, ious = self.sam.mask_decoder(
            image_embeddings=embedding[None],
            image_pe=encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
        )
        return logits, ious


class BestMaskPredictor:
    """The mask with the largest predicted IoU of each prompt, for any `PromptDecoder`.

    A `PredictMasks`, as `PointPredictor`.

    Args:
        second_pass: decode again, with the logits of each prompt's best mask as a mask prompt.
    """

    def __init__(self, decoder: PromptDecoder, second_pass: bool = False) -> None:
        self.decoder = decoder
        self.second_pass = second_pass

    @torch.no_grad()
    def __call__(
        self, embeddings: Sequence[Tensor], points: Sequence[Points], sizes: Sequence[Size]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Masks bool (M, height, width) and predicted IoUs (M, 3); see `PointPredictor`.

        P may differ between images, too.
        """
        for embedding, own, size in zip(embeddings, points, sizes, strict=True):
            prompts = Prompts(self.decoder.frame.to_frame(own, size))
            at_once = prompts_at_once(self.decoder, embedding.device)
            # In half precision points of a large image would be off by pixels.
            with torch.autocast(embedding.device.type, enabled=False):
                parts = [self._predict(embedding, c, size) for c in prompts.chunks(at_once)]
            masks, ious = (torch.cat(part) for part in zip(*parts, strict=True))
            yield masks, ious

    def _predict(self, embedding: Tensor, prompts: Prompts, size: Size) -> tuple[Tensor, Tensor]:
        logits, ious = self._best(embedding, prompts, None)
        if self.second_pass:
            logits, ious = self._best(embedding, prompts, logits)
        return self.decoder.frame.from_frame(logits, size)[:, 0] > 0, ious

    def _best(
        self, embedding: Tensor, prompts: Prompts, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Logits (M, 1, h, w) of the best masks, and predicted IoUs (M, 3)."""
        logits, ious = self.decoder.decode(embedding, prompts, multimask=True, masks=masks)
        best = ious.argmax(1)
        return logits[torch.arange(len(best), device=best.device), best][:, None], ious
