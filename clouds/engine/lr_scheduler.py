"""Learning rates as a function of the iteration alone.

The learning rate of iteration i does not depend on earlier iterations, so a resumed run needs no
saved state of it. Shapes of schedules are fvcore's parameter schedulers.
"""

from __future__ import annotations

from collections.abc import Callable
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


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """SOLVER.LR_SCHEDULER_NAME for `optimizer`.

    Raises:
        ValueError: see `learning_rate_factor`.
    """
    return LRScheduler(optimizer, learning_rate_factor(cfg))


def learning_rate_factor(cfg: CfgNode) -> Callable[[int], float]:
    """Factor of the learning rates at an iteration, from 0 to SOLVER.MAX_ITER.

    It is the product of the factors of schedule and warm-up, as in the published code's polynomial
    schedule. (Detectron2's composite schedule interpolates towards the schedule's value at the end
    of the warm-up instead; where the schedule is constant there, both are equal.)

    Raises:
        ValueError: an unknown schedule.
    """
    solver = cfg.SOLVER
    last = max(int(solver.MAX_ITER), 1)
    shape = _build_shape(cfg, last)
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


def _build_shape(cfg: CfgNode, last: int) -> ParamScheduler:
    """The schedule without its warm-up: [0, 1] -> factor, 1 at 0."""
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME == "WarmupPolyLR":
        return PolynomialDecayParamScheduler(1.0, solver.POLY_LR_POWER)
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        return CosineParamScheduler(1.0, 0.0)
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        steps = [step for step in solver.STEPS if step < last]
        values = [solver.GAMMA**k for k in range(len(steps) + 1)]
        return MultiStepParamScheduler(values, num_updates=last, milestones=steps)
    raise ValueError(
        f"SOLVER.LR_SCHEDULER_NAME is {solver.LR_SCHEDULER_NAME!r}; use WarmupMultiStepLR, "
        "WarmupPolyLR or WarmupCosineLR."
    )


class LRScheduler:
    """Sets an optimizer's learning rates: each group's base rate times `factor(iteration)`.

    Args:
        optimizer: the `lr` of its groups when this object is created are the base rates.
        factor: iteration, counted from 0 -> factor.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Callable[[int], float]) -> None:
        self.optimizer = optimizer
        self.factor = factor
        self.base_rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.iteration = 0
        self.set(0)

    def set(self, iteration: int) -> None:
        """Set the learning rates of `iteration`."""
        self.iteration = iteration
        factor = self.factor(iteration)
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor

    def state_dict(self) -> dict[str, Any]:
        """The entries of Detectron2's scheduler in a checkpoint."""
        return {"last_epoch": self.iteration, "base_lrs": list(self.base_rates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the rates of the iteration of `state`; base rates remain those of the config."""
        self.set(int(state["last_epoch"]))
