"""From one mask per component to one mask per class."""

from __future__ import annotations

import torch

from clouds.self_training.pseudo_label import RefinedLabel


def unite(
    masks: torch.Tensor,
    classes: torch.Tensor,
    teacher: torch.Tensor,
    remove_overlap: bool = True,
    overlap: str = "classes",
) -> RefinedLabel:
    """Remove overlaps, then join the masks of each class.

    Args:
        masks: bool (M, H, W), M >= 1; not written to.
        classes: int64 (M,), train ids, ascending.
        teacher: uint8 (H, W), the teacher's classes, for the agreement with them.
        remove_overlap: whether pixels that several masks cover leave all of them.
        overlap: which pixels those are: covered by masks of different 'classes', or by any two
            ('published', where also a class that has no pixel left stays, with an empty mask).

    Returns:
        Without points. The agreement is that of each component's mask as overlap removal left it.
    """
    labels, counts = torch.unique_consecutive(classes, return_counts=True)
    per_class = counts.tolist()
    if remove_overlap:
        covers = masks if overlap == "published" else _join(masks, per_class)
        masks = masks & (covers.sum(0, dtype=torch.int32) <= 1)
    unions = _join(masks, per_class)
    agreement = _agreement(masks, classes, teacher)
    if overlap != "published":
        kept = unions.flatten(1).any(1)
        labels, unions = labels[kept], unions[kept]
    return RefinedLabel(labels, unions, agreement)


def _join(masks: torch.Tensor, per_class: list[int]) -> torch.Tensor:
    """(K, H, W), the union of each run of masks."""
    return torch.stack([run.any(0) for run in torch.split(masks, per_class)])


def _agreement(masks: torch.Tensor, classes: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """float32 (H, W): per mask, the share where the teacher says its class; the best per pixel."""
    same = masks & (teacher == classes.to(teacher.dtype)[:, None, None])
    areas = masks.flatten(1).sum(1).clamp(min=1)
    shares = same.flatten(1).sum(1).to(torch.float32) / areas
    return (masks * shares[:, None, None]).amax(0)
