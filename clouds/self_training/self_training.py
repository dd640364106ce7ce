"""Self-training: a teacher labels clean pictures, a refiner improves its labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from clouds.d2 import CfgNode
from clouds.data.datasets import generated
from clouds.data.targets import Targets
from clouds.self_training.ema_teacher import EMATeacher
from clouds.self_training.pseudo_label import (
    PseudoLabel,
    PseudoLabelOptions,
    RefinedLabel,
    targets,
)
from clouds.self_training.refiners import Refiner, build_refiner


class SelfTraining:
    """What joint training has beside the model; no `nn.Module`, see `EMATeacher`.

    Args:
        teacher: of the model's head.
        make_refiner: builds the refiner on a device; called in `prepare`, or for the first label.
        options: what becomes of uncovered and of doubtful pixels.

    Attributes:
        teacher: see there.
    """

    def __init__(
        self,
        teacher: EMATeacher,
        make_refiner: Callable[[torch.device], Refiner],
        options: PseudoLabelOptions,
    ) -> None:
        self.teacher = teacher
        self._make_refiner = make_refiner
        self._refiner: Refiner | None = None
        self._options = options

    @classmethod
    def from_config(cls, cfg: CfgNode, head: nn.Module) -> SelfTraining | None:
        """None when no dataset of DATASETS.TRAIN is a generated one."""
        if not generated(cfg.DATASETS.TRAIN):
            return None
        return cls(
            EMATeacher.from_config(cfg, head),
            lambda device: build_refiner(cfg, device),
            PseudoLabelOptions.from_config(cfg),
        )

    def prepare(self, device: torch.device) -> None:
        """Build the refiner now, so that weights which are not there are told before training."""
        if self._refiner is None:
            self._refiner = self._make_refiner(device)

    @torch.no_grad()
    def refine(
        self, images: Sequence[Tensor], labels: Sequence[PseudoLabel], seeds: Sequence[int]
    ) -> list[RefinedLabel]:
        """The refiner's labels.

        Args:
            images: clean pictures, uint8 (3, H, W) RGB.
            labels: the teacher's labels of them, on the device to work on.
            seeds: one per picture; random points are drawn from it.
        """
        self.prepare(labels[0].classes.device)
        assert self._refiner is not None
        return self._refiner.refine(images, labels, seeds)

    def targets(
        self, images: Sequence[Tensor], labels: Sequence[PseudoLabel], seeds: Sequence[int]
    ) -> list[Targets]:
        """What the student learns of each picture; arguments as of `refine`."""
        refined = self.refine(images, labels, seeds)
        return [
            targets(label, better, self._options)
            for label, better in zip(labels, refined, strict=True)
        ]
