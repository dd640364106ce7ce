"""The teacher: an exponential moving average of the head (paper section 3.4)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from clouds.d2 import CfgNode
from clouds.self_training.refiners.base import PseudoLabel


class EMATeacher:
    """Averages a student's weights over time, in a copy of it that labels but never trains.

    It is no `nn.Module`, so nothing of it is in the state dict, the optimizer or `train()` of a
    model that holds it; its own `state_dict` goes into checkpoints beside the model's.

    Args:
        student: the head that trains.
        momentum: share of the teacher's weights that stays at an update.
        interval: iterations between updates.
    """

    def __init__(self, student: nn.Module, momentum: float, interval: int) -> None:
        self.student = student
        self.momentum = momentum
        self.interval = interval
        self._head: nn.Module | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode, student: nn.Module) -> EMATeacher:
        """Momentum MODEL.CLOUDS.SAM.ALPHA_EMA every MODEL.CLOUDS.ITERATION_UPDATE iterations."""
        options = cfg.MODEL.CLOUDS
        return cls(student, options.SAM.ALPHA_EMA, options.ITERATION_UPDATE)

    @property
    def head(self) -> nn.Module:
        """The averaged head, on the student's device; a copy of the student when first asked."""
        if self._head is None:
            self.restart()
        assert self._head is not None
        return self._head

    def restart(self) -> None:
        """Begin anew as a copy of the student."""
        self._head = copy.deepcopy(self.student).requires_grad_(False).eval()

    def due(self, iteration: int) -> bool:
        """Whether an update follows iteration number `iteration`, counted from 0."""
        return (iteration + 1) % self.interval == 0

    @torch.no_grad()
    def update(self) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student; buffers are copied."""
        average = get_ema_multi_avg_fn(self.momentum)  # type: ignore[no-untyped-call]
        average(list(self.head.parameters()), list(self.student.parameters()), 0)
        for ours, theirs in zip(self.head.buffers(), self.student.buffers(), strict=True):
            ours.copy_(theirs)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights."""
        return dict(self.head.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.head.load_state_dict(state)


def label_from_scores(scores: Tensor) -> PseudoLabel:
    """The best class of every pixel, and how sure that is.

    Args:
        scores: (C, H, W), the semantic map: per class the sum over queries of class probability
            times mask probability, which may exceed 1 where queries overlap.

    Returns:
        Classes of the largest score; the confidence is its share in the sum of all scores, or the
        score itself where that sum is below 1, so that a pixel which no query claims is doubtful.
    """
    best, classes = scores.max(0)
    confidence = best / scores.sum(0).clamp(min=1)
    return PseudoLabel(classes.to(torch.uint8), confidence.float())
