"""Learning rates and weight decays as a function of the iteration alone.

Those of iteration i do not depend on earlier iterations, so a resumed run needs no saved state of
them. Shapes of schedules are fvcore's parameter schedulers, and mmengine's PolyLR.
"""

from __future__ import annotations

import math
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
    """SOLVER.LR_SCHEDULER_NAME and SOLVER.WEIGHT_DECAY_SCHEDULE for `optimizer`.

    Raises:
        ValueError: see `learning_rate_factor`.
    """
    return LRScheduler(optimizer, learning_rate_factor(cfg), weight_decay_at(cfg))


def learning_rate_factor(cfg: CfgNode) -> Callable[[int], float]:
    """Factor of the learning rates at an iteration, from 0 to SOLVER.MAX_ITER.

    It is the product of the factors of schedule and warm-up, as in the published code's polynomial
    schedule. (Detectron2's composite schedule interpolates towards the schedule's value at the end
    of the warm-up instead; where the schedule is constant there, both are equal.) PolyLR is another
    one: see `_poly_after_warmup`.

    Raises:
        ValueError: an unknown schedule.
    """
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME == "PolyLR":
        return _poly_after_warmup(cfg)
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


def _poly_after_warmup(cfg: CfgNode) -> Callable[[int], float]:
    """The factors of mmengine's LinearLR followed by its PolyLR, without its rounding.

    With a warm-up of w iterations, the factor is SOLVER.WARMUP_FACTOR at iteration 0 and 1 at w - 1
    and w; from w on it is (1 - (i - w) / (T - w - 1)) ** SOLVER.POLY_LR_POWER, which is 0 at the
    last iteration T - 1.
    """
    solver = cfg.SOLVER
    start, power, warmup = solver.WARMUP_FACTOR, solver.POLY_LR_POWER, int(solver.WARMUP_ITERS)
    steps = max(int(solver.MAX_ITER) - warmup - 1, 1)

    def factor(iteration: int) -> float:
        if iteration >= warmup:
            return float((1 - min((iteration - warmup) / steps, 1.0)) ** power)
        if solver.WARMUP_METHOD == "constant":
            return float(start)
        share = iteration / (warmup - 1) if warmup > 1 else 1.0
        return float(start + (1 - start) * share)

    return factor


def weight_decay_at(cfg: CfgNode) -> Callable[[float, int], float]:
    """Weight decay of a group at an iteration, from its value in the config and the iteration.

    With SOLVER.WEIGHT_DECAY_SCHEDULE 'cosine' it goes from that value to SOLVER.WEIGHT_DECAY_END
    in half a period of the cosine; where it starts at a lower value, such as 0, it rises.
    """
    solver = cfg.SOLVER
    last, end = max(int(solver.MAX_ITER), 1), float(solver.WEIGHT_DECAY_END)

    def annealed(base: float, iteration: int) -> float:
        return end + (base - end) * (1 + math.cos(math.pi * min(iteration / last, 1.0))) / 2

    def constant(base: float, iteration: int) -> float:
        return base

    return annealed if solver.WEIGHT_DECAY_SCHEDULE == "cosine" else constant


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
        "WarmupPolyLR, WarmupCosineLR or PolyLR."
    )


class LRScheduler:
    """Sets an optimizer's learning rates, each group's base rate times `factor(iteration)`, and its
    weight decays.

    Args:
        optimizer: `lr` and `weight_decay` of its groups when this object is created are the base
            rates and base decays.
        factor: iteration, counted from 0 -> factor.
        weight_decay: base decay, iteration -> weight decay; None: constant.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        factor: Callable[[int], float],
        weight_decay: Callable[[float, int], float] | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.factor = factor
        self.weight_decay = weight_decay
        self.base_rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.base_decays = [float(g.get("weight_decay", 0.0)) for g in optimizer.param_groups]
        self.iteration = 0
        self.set(0)

    def set(self, iteration: int) -> None:
        """Set the learning rates and weight decays of `iteration`."""
        self.iteration = iteration
        factor = self.factor(iteration)
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        if self.weight_decay is not None:
            for group, decay in zip(self.optimizer.param_groups, self.base_decays, strict=True):
                group["weight_decay"] = self.weight_decay(decay, iteration)

    def state_dict(self) -> dict[str, Any]:
        """The entries of Detectron2's scheduler in a checkpoint."""
        return {"last_epoch": self.iteration, "base_lrs": list(self.base_rates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set what belongs to the iteration of `state`; base values are those of the config."""
        self.set(int(state["last_epoch"]))
