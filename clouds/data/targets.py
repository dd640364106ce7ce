"""A label map -> one binary mask per class: what mask classification trains on."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Targets:
    """The classes in one image.

    Attributes:
        labels: int64 (K,), train ids, ascending.
        masks: bool (K, H, W), where each of them is.
        weights: float32 (H, W) in [0, 1], how much each pixel counts in matching and in the mask
            losses; None: all of them fully. What masks say of a pixel of weight 0 has no effect.
        void: how much the image's unmatched queries count in the class loss, relative to those
            of other images; 0 where a class that has no mask may still be there.
    """

    labels: torch.Tensor
    masks: torch.Tensor
    weights: torch.Tensor | None = None
    void: float = 1.0


def masks_from_label(
    sem_seg: torch.Tensor, ignore: int = 255, device: torch.device | None = None
) -> Targets:
    """Split a label map into binary masks (Mask2Former's targets of semantic segmentation).

    Args:
        sem_seg: (H, W), uint8 or wider integers, values 0..255.
        ignore: the value that is in no mask.
        device: where the masks are wanted; None: where `sem_seg` is. Which classes there are is
            found where `sem_seg` is, so that from a label on the host nothing waits for a GPU.

    Returns:
        One mask per class present; K = 0 and masks (0, H, W) when every pixel is ignored.
    """
    assert sem_seg.ndim == 2, f"expected (H, W), got {tuple(sem_seg.shape)}"
    labels = torch.bincount(sem_seg.flatten(), minlength=256).nonzero().squeeze(1)
    labels = labels[labels != ignore]
    if device is not None:
        labels = labels.to(device, non_blocking=True)
        sem_seg = sem_seg.to(device, non_blocking=True)
    masks = sem_seg == labels.to(sem_seg.dtype)[:, None, None]
    return Targets(labels, masks)
