"""The teacher: an exponential moving average of everything that trains (paper section 3.4)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from clouds import comm
from clouds.d2 import CfgNode

logger = logging.getLogger(__name__)


class EMATeacher:
    """A network whose trainable parameters are moving averages of a student's.

    The teacher has the student's parts by name. A part without a parameter that trains (a frozen
    backbone) is the student's own module; of other parts the teacher has a copy, which shares the
    student's frozen parameters; of a sharded student (SOLVER.PARALLEL fsdp) it has its own.

    It is no `nn.Module`: nothing of it is in the state dict, the optimizer or `train()` of a model
    that holds it. Its own `state_dict` is saved in checkpoints beside the model's.

    Args:
        student: parts of the network that trains, by name: `backbone`, `sem_seg_head`, ….
        momentum: factor of the teacher's parameters at an update.
        interval: iterations between updates.
        warm_start: the momentum of the t-th update, from 1, is at most 1 - 1 / (t + 1), so that the
            teacher is the mean of the student's weights so far until that exceeds `momentum`
            (Mean Teacher; DAFormer).

    Attributes:
        parts: the teacher's parts by name, on the student's device; empty before `reset`.
    """

    def __init__(
        self,
        student: Mapping[str, nn.Module],
        momentum: float,
        interval: int,
        warm_start: bool = False,
    ) -> None:
        self.student = dict(student)
        self.momentum = momentum
        self.interval = interval
        self.warm_start = warm_start
        self.parts: dict[str, nn.Module] = {}

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Mapping[str, nn.Module]) -> EMATeacher:
        """Momentum MODEL.CLOUDS.SAM.ALPHA_EMA every MODEL.CLOUDS.ITERATION_UPDATE iterations."""
        options = cfg.MODEL.CLOUDS
        return cls(student, options.SAM.ALPHA_EMA, options.ITERATION_UPDATE, options.EMA_WARM_START)

    def reset(self) -> None:
        """Set the teacher to the student's present parameters."""
        if self._is_sharded():
            for name, part in self.averaged_parts().items():
                _copy_parts(part, self.student[name])
            return
        self.parts = {name: averaged_copy(part) for name, part in self.student.items()}

    def _is_sharded(self) -> bool:
        """Whether each process has a part of the parameters, also of those that do not train."""
        parts = self.parts.values()
        return any(comm.is_sharded(p) for part in parts for p in part.parameters())

    def due(self, iteration: int) -> bool:
        """Whether an update follows iteration number `iteration`, counted from 0."""
        return (iteration + 1) % self.interval == 0

    def momentum_at(self, iteration: int) -> float:
        """Momentum of the update that follows iteration number `iteration`, counted from 0."""
        if not self.warm_start:
            return self.momentum
        number = (iteration + 1) // self.interval
        return min(1 - 1 / (number + 1), self.momentum)

    @torch.no_grad()
    def update(self, momentum: float | None = None) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student; buffers are copied.

        Args:
            momentum: None: `self.momentum`.
        """
        momentum = self.momentum if momentum is None else momentum
        for name, teacher in self.averaged_parts().items():
            student = self.student[name]
            pairs = [
                (comm.own_part(ours), comm.own_part(theirs))
                for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True)
                if theirs.requires_grad
            ]
            update_average([ours for ours, _ in pairs], [theirs for _, theirs in pairs], momentum)
            for ours, theirs in zip(teacher.buffers(), student.buffers(), strict=True):
                ours.copy_(theirs)

    def averaged_parts(self) -> dict[str, nn.Module]:
        """The parts that are not the student's own modules."""
        if not self.parts:
            self.reset()
        return {name: part for name, part in self.parts.items() if part is not self.student[name]}

    def state_dict(self) -> dict[str, Any]:
        """Averaged parameters and copied buffers, by `<part>.<name>`; shared ones are left out."""
        state: dict[str, Any] = {}
        for name, part in self.averaged_parts().items():
            parameters = self.student[name].named_parameters()
            shared = {key for key, p in parameters if not p.requires_grad}
            values = part.state_dict().items()
            state |= {f"{name}.{key}": value for key, value in values if key not in shared}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned.

        States of earlier versions hold the head alone, its names without `sem_seg_head.`; other
        averaged parts then start as copies of the student, with a warning.

        Raises:
            ValueError: names or shapes are not those of this teacher.
        """
        if self._is_sharded():
            self.reset()  # the student's frozen parameters, of which it has copies
        expected = self.state_dict()
        if state and not any(
            name.startswith(f"{part}.") for part in self.student for name in state
        ):
            state = {f"sem_seg_head.{name}": value for name, value in state.items()}
            missing = sorted({name.split(".")[0] for name in expected.keys() - state.keys()})
            if missing:
                logger.warning(
                    "the checkpoint's teacher averages the head alone; copied from the student: %s",
                    ", ".join(missing),
                )
            state = {**{name: expected[name] for name in expected.keys() - state.keys()}, **state}
        problems = sorted(expected.keys() ^ state.keys())
        problems += [n for n in expected if n in state and expected[n].shape != state[n].shape]
        if problems:
            raise ValueError(
                f"the teacher's state in the checkpoint is of another network: {len(problems)} "
                f"names or shapes differ, such as {problems[0]}. Was the backbone frozen or "
                "unfrozen (MODEL.BACKBONE.FREEZE)?"
            )
        with torch.no_grad():
            for name, value in expected.items():
                value.copy_(comm.sharded_like(value, state[name]))


@torch.no_grad()
def update_average(averages: list[Tensor], values: list[Tensor], decay: float) -> None:
    """averages = decay * averages + (1 - decay) * values, in place."""
    get_ema_multi_avg_fn(decay)(averages, values, 0)  # type: ignore[no-untyped-call]


@torch.no_grad()
def _copy_parts(target: nn.Module, source: nn.Module) -> None:
    """Copy this process's parts of all parameters and buffers."""
    for tensors in ("parameters", "buffers"):
        pairs = zip(getattr(target, tensors)(), getattr(source, tensors)(), strict=True)
        for ours, theirs in pairs:
            comm.own_part(ours).copy_(comm.own_part(theirs))


def averaged_copy(part: nn.Module) -> nn.Module:
    """The part itself if nothing of it trains, else a frozen copy that shares frozen parameters."""
    if not any(parameter.requires_grad for parameter in part.parameters()):
        return part
    frozen = {id(p): p for p in part.parameters() if not p.requires_grad}
    return copy.deepcopy(part, memo=dict(frozen)).requires_grad_(False).eval()
