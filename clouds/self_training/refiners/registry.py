"""What a refiner is, and how a config chooses one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from clouds.d2 import CfgNode, Registry
from clouds.self_training.pseudo_label import PseudoLabel, RefinedLabel

REFINER_REGISTRY = Registry("REFINER")
REFINER_REGISTRY.__doc__ = """
Refiners: functions or classes, called with (cfg, device), that return a `Refiner`. The name they
are registered by, their own, is what MODEL.CLOUDS.REFINER says.
"""


class Refiner(Protocol):
    """Turns the teacher's labels of clean generated images into better ones.

    A refiner is no part of the model: it is no module, trains nothing and is not saved. Networks
    in it are frozen and in evaluation mode.
    """

    def refine(
        self,
        images: Sequence[torch.Tensor],
        labels: Sequence[PseudoLabel],
        seeds: Sequence[int],
    ) -> list[RefinedLabel]:
        """One refined label per image.

        Args:
            images: uint8 (3, H, W) RGB, clean; sizes may differ.
            labels: the teacher's, each (H, W) as its image.
            seeds: one per image, at least 0; whatever is drawn for an image is drawn from it.

        Returns:
            Tensors on the device of the labels.
        """
        ...


def build_refiner(cfg: CfgNode, device: torch.device | str) -> Refiner:
    """The refiner that MODEL.CLOUDS.REFINER names.

    'sam' with MODEL.CLOUDS.SAM.ENABLED False, the published way to do without, is 'none'.

    Raises:
        ValueError: no refiner is registered by that name.
    """
    name = cfg.MODEL.CLOUDS.REFINER
    if name == "sam" and not cfg.MODEL.CLOUDS.SAM.ENABLED:
        name = "none"
    if name not in REFINER_REGISTRY:
        known = ", ".join(sorted(name for name, _ in REFINER_REGISTRY))
        raise ValueError(f"MODEL.CLOUDS.REFINER is {name!r}; registered are: {known}")
    refiner: Refiner = REFINER_REGISTRY.get(name)(cfg, torch.device(device))
    return refiner
