"""One training iteration, and what it leaves behind for hooks."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from clouds import comm
from clouds.engine.lr_scheduler import Schedule
from clouds.engine.optimizer import ClipGradients

Batch = Sequence[Mapping[str, Any]]
"""This process's share of a global batch, in Detectron2's form: one dictionary per image."""


class Diverged(FloatingPointError):  # noqa: N818 - reads as a fact
    """A loss or the gradient is NaN or infinite; the weights are those before the iteration."""


@dataclass(frozen=True)
class Step:
    """What one iteration did.

    Attributes:
        iteration: counted from 0.
        losses: weighted losses by name, each the mean over the processes.
        total: their sum, which was minimised.
        grad_norm: norm of the whole gradient before clipping.
        learning_rates: by the name of the parameter group.
        loss_scale: factor of fp16 training, 1 without.
        data_seconds: time spent waiting for the batch.
        seconds: time of the iteration, that included.
        stop: some process was asked to stop.
    """

    iteration: int
    losses: dict[str, float]
    total: float
    grad_norm: float
    learning_rates: dict[str, float]
    loss_scale: float
    data_seconds: float
    seconds: float
    stop: bool


def seed_iteration(seed: int, iteration: int, rank: int) -> None:
    """Seed every global generator from what identifies the iteration, and from nothing past.

    So dropout and the like in iteration i are the same in a run that was resumed before it.
    """
    state = np.random.SeedSequence((seed, iteration, rank)).generate_state(4, np.uint32)
    torch.manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)
    random.seed(int(state[2]))
    np.random.seed(int(state[3]))


@dataclass
class Iteration:
    """Does one iteration: forward, backward, clip, step.

    Attributes:
        model: returns a dictionary of scalar losses for a batch; may be DistributedDataParallel.
        optimizer: over its parameters that train.
        schedule: sets the optimizer's learning rates.
        clip: clips the gradients and returns their norm.
        scaler: loss scaling of fp16; disabled otherwise.
        autocast: makes the forward pass's autocast context.
        seed: SEED.
        stop_requested: whether this process was asked to stop.
        stepping: the optimizer is changing the weights; still set when it failed in that.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    clip: ClipGradients
    scaler: torch.amp.GradScaler
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]
    seed: int
    stop_requested: Callable[[], bool]
    stepping: bool = False

    def __call__(self, iteration: int, batch: Batch, started: float) -> Step:
        """Do iteration number `iteration` on `batch`.

        Args:
            iteration: counted from 0.
            batch: this process's images.
            started: `perf_counter()` from before the batch was fetched.

        Raises:
            Diverged: on all processes; the weights stay as they were.
        """
        fetched = perf_counter()
        seed_iteration(self.seed, iteration, comm.get_rank())
        self.schedule.set(iteration)
        with self.autocast():
            losses = self.model(batch)
            total = torch.stack([loss.float() for loss in losses.values()]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        norm = self.clip()
        # The one place where the host waits for the GPU: everything up to here is queued, and
        # the step must not be taken on numbers that are not finite.
        values, grad_norm, stop = self.read(losses, norm)
        self.check(iteration, batch, values, grad_norm)
        self.stepping = True
        self.scaler.step(self.optimizer)
        self.stepping = False
        loss_scale = float(self.scaler.get_scale())
        self.scaler.update()
        return Step(
            iteration=iteration,
            losses=values,
            total=math.fsum(values.values()),
            grad_norm=grad_norm,
            learning_rates={g["name"]: g["lr"] for g in self.optimizer.param_groups},
            loss_scale=loss_scale,
            data_seconds=fetched - started,
            seconds=perf_counter() - started,
            stop=stop,
        )

    def read(
        self, losses: Mapping[str, torch.Tensor], norm: torch.Tensor
    ) -> tuple[dict[str, float], float, bool]:
        """Losses averaged over the processes, gradient norm, and whether one wants to stop."""
        names = sorted(losses)
        # Filled on the device: a copy from the host would wait for all that is queued there.
        stop = norm.new_full((), float(self.stop_requested()))
        vector = torch.stack(
            [losses[name].detach().double() for name in names] + [norm.double(), stop.double()]
        )
        *values, grad_norm, stopping = comm.mean_over_ranks(vector).tolist()
        return dict(zip(names, values, strict=True)), grad_norm, stopping > 0

    def check(
        self, iteration: int, batch: Batch, losses: Mapping[str, float], grad_norm: float
    ) -> None:
        """Raise `Diverged`, with the batch's files, unless all is finite.

        An infinite gradient is normal in fp16: the scaler skips that step and scales less.
        """
        bad = [f"{name} is {value}" for name, value in losses.items() if not math.isfinite(value)]
        if not bad and not math.isfinite(grad_norm) and not self.scaler.is_enabled():
            bad = [f"the gradient's norm is {grad_norm}, with finite losses"]
        if not bad:
            return
        own = [str(sample.get("file_name", "(no file name)")) for sample in batch]
        files = [name for names in comm.all_gather(own) for name in names]
        raise Diverged(
            f"training diverged in iteration {iteration}: {', '.join(bad)}.\n"
            "Images of the batch:\n" + "\n".join(f"  {name}" for name in files)
        )
