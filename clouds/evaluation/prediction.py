"""Prediction of an image under a protocol, with little memory where that is needed."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from clouds.evaluation.protocols import Protocol, Segmenter

logger = logging.getLogger(__name__)


def predict_in_pieces(
    protocol: Protocol, model: Segmenter, sample: dict[str, Any], *, with_confidence: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`Protocol.classify`; if memory runs out, once more in the smallest pieces.

    The pieces are those of TEST.MASKS_AT_ONCE, which change scores by rounding only.

    Raises:
        torch.OutOfMemoryError: there is still too little memory.
    """
    try:
        return protocol.classify(model, sample, with_confidence=with_confidence)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = str(error).split("\n")[0]
    # outside of the handler, where the traceback no longer keeps tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    file = sample["file_name"]
    logger.warning("%s: out of memory; trying once more in smaller pieces (%s)", file, reason)
    pieces: Any = model
    before = getattr(model, "masks_at_once", None)
    try:
        if before is not None:
            pieces.masks_at_once = 1
        return protocol.classify(model, sample, with_confidence=with_confidence)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        height, width = sample["image"].shape[-2:]
        raise torch.OutOfMemoryError(
            f"{file}: not enough memory for this image of {width}x{height} pixels, also with "
            f"TEST.MASKS_AT_ONCE 1: {reason}. Set SOLVER.AMP.ENABLED True, or evaluate by windows "
            "(TEST.PROTOCOL slide, TEST.SLIDE.CROP_SIZE lower) or at a lower TEST.SHORT_SIDE, "
            "whose scores are others; or use a device with more memory (MODEL.DEVICE)."
        ) from error
    finally:
        if before is not None:
            pieces.masks_at_once = before


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory of a device or of the host could not be allocated."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator: can't allocate memory" in str(error)
