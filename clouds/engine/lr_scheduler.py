"""The learning rate as a function of the iteration, and of nothing else.

What a schedule is at iteration i does not depend on how training came there, so a resumed run
needs no state of it. Shapes come from fvcore's parameter schedulers.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from fvcore.common.param_scheduler import (
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
    PolynomialDecayParamScheduler,
)

from clouds.d2 import CfgNode


def build_schedule(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Schedule:
    """SOLVER.LR_SCHEDULER_NAME for `optimizer`.

    Raises:
        ValueError: see `learning_rate_factor`.
    """
    return Schedule(optimizer, learning_rate_factor(cfg))


def learning_rate_factor(cfg: CfgNode) -> Callable[[int], float]:
    """What the learning rates are multiplied with at an iteration, from 0 to SOLVER.MAX_ITER.

    The factor is that of the schedule times that of the warm-up, as in the published code's
    polynomial schedule. (Detectron2's own composite interpolates towards the schedule's value at
    the end of the warm-up instead; with a schedule that is constant there, both are the same.)

    Raises:
        ValueError: an unknown schedule, or SOLVER.STEPS that do not rise from above 0.
    """
    solver = cfg.SOLVER
    last = max(int(solver.MAX_ITER), 1)
    shape = shape_of(cfg, last)
    floor = solver.POLY_LR_CONSTANT_ENDING if solver.LR_SCHEDULER_NAME == "WarmupPolyLR" else 0.0
    warmup = LinearParamScheduler(solver.WARMUP_FACTOR, 1.0)

    def factor(iteration: int) -> float:
        value = max(float(shape(min(iteration, last) / last)), floor)
        if iteration >= solver.WARMUP_ITERS:
            return value
        if solver.WARMUP_METHOD == "constant":
            return value * float(solver.WARMUP_FACTOR)
        return value * float(warmup(iteration / solver.WARMUP_ITERS))

    return factor


def shape_of(cfg: CfgNode, last: int) -> ParamScheduler:
    """The schedule without its warm-up, on [0, 1], starting at 1."""
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME == "WarmupPolyLR":
        return PolynomialDecayParamScheduler(1.0, solver.POLY_LR_POWER)
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        return CosineParamScheduler(1.0, 0.0)
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        steps = list(solver.STEPS)
        if any(a >= b for a, b in pairwise([0, *steps])):
            raise ValueError(
                f"SOLVER.STEPS is {tuple(steps)}; it must be iterations above 0 in rising order."
            )
        steps = [step for step in steps if step < last]
        values = [solver.GAMMA**k for k in range(len(steps) + 1)]
        return MultiStepParamScheduler(values, num_updates=last, milestones=steps)
    raise ValueError(
        f"SOLVER.LR_SCHEDULER_NAME is {solver.LR_SCHEDULER_NAME!r}; use WarmupMultiStepLR, "
        "WarmupPolyLR or WarmupCosineLR."
    )


class Schedule:
    """Sets an optimizer's learning rates: each group's own rate times `factor(iteration)`.

    Args:
        optimizer: its groups' `lr` at this moment are the rates that are multiplied.
        factor: iteration, counted from 0, to multiplier.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Callable[[int], float]) -> None:
        self.optimizer = optimizer
        self.factor = factor
        self.base_rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.iteration = 0
        self.set(0)

    def set(self, iteration: int) -> None:
        """Make the learning rates those of `iteration`."""
        self.iteration = iteration
        factor = self.factor(iteration)
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor

    def state_dict(self) -> dict[str, Any]:
        """The entries that Detectron2's scheduler has in a checkpoint."""
        return {"last_epoch": self.iteration, "base_lrs": list(self.base_rates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the iteration of `state`; the rates stay those of this run's config."""
        self.set(int(state["last_epoch"]))
