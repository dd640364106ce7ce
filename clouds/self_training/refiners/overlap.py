"""From one mask per component to one mask per class."""

from __future__ import annotations

import torch

from clouds.self_training.pseudo_label import RefinedLabel, union


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
        masks = masks & ~_covered_twice(covers)
    unions = _join(masks, per_class)
    areas = torch.stack([mask.count_nonzero() for mask in masks])
    agreement = _agreement(masks, areas, classes, teacher)
    if overlap != "published":
        kept = torch.stack([some.any() for some in torch.split(areas, per_class)])
        labels, unions = labels[kept], unions[kept]
    return RefinedLabel(labels, unions, agreement)


# Masks are few and large: the loops below read each of them a few times at memory speed, which
# on a CPU is several times faster than reducing (M, H, W), and needs no other array of that size.


def _join(masks: torch.Tensor, per_class: list[int]) -> torch.Tensor:
    """(K, H, W), the union of each run of masks."""
    return torch.stack([union(run) for run in torch.split(masks, per_class)])


def _covered_twice(masks: torch.Tensor) -> torch.Tensor:
    """bool (H, W), where more than one mask is."""
    once = torch.zeros_like(masks[0])
    twice = torch.zeros_like(once)
    for mask in masks:
        twice |= once & mask
        once |= mask
    return twice


def _agreement(
    masks: torch.Tensor, areas: torch.Tensor, classes: torch.Tensor, teacher: torch.Tensor
) -> torch.Tensor:
    """float32 (H, W): per mask, the share where the teacher says its class; the best per pixel."""
    agreement = torch.zeros(teacher.shape, device=teacher.device)
    for mask, area, kind in zip(masks, areas, classes, strict=True):
        same = torch.count_nonzero(mask & (teacher == kind))
        share = (same / area.clamp(min=1)).to(torch.float32)
        agreement.masked_fill_(mask & (agreement < share), share)
    return agreement
