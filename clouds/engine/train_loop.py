"""The training loop with its hooks, as in Detectron2, and one training step."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clouds import comm
from clouds.engine.lr_scheduler import LRScheduler
from clouds.engine.metrics import ScalarStorage
from clouds.engine.optimizer import ClipGradients
from clouds.engine.parallel import average_gradients, is_sharded, teacher_of, whole_weights
from clouds.engine.step_result import HostCopy, ResultCheck, StepResult

Batch = Sequence[Mapping[str, Any]]
"""This process's share of a global batch, in Detectron2's form: one dictionary per image."""


@runtime_checkable
class PreparesParts(Protocol):
    """A model whose losses of a batch are no mean over its images, for SOLVER.ACCUMULATE.

    The losses of `model(part, prepared)` of all parts add up to those of the batch. Of other models
    the mean over the parts is taken.
    """

    def prepare_parts(self, parts: Sequence[Batch]) -> Sequence[Any]:
        """What the model is called with beside each part, from all parts."""


class HookBase:
    """Base class of hooks, with Detectron2's protocol.

    A hook reads the state of training from `self.trainer`, which `register_hooks` sets. Its methods
    are called on every process, in this order:

        hook.before_train()
        for trainer.iter in range(trainer.start_iter, trainer.max_iter):
            hook.before_step()
            trainer.run_step()  # calls hook.after_backward()
            hook.after_step()
        hook.after_train()

    Unlike in Detectron2, `after_train` is not called when an exception ends training.

    A hook that also has `load_state_dict` is saved in checkpoints and restored on resuming.

    Attributes:
        trainer: the trainer that the hook is registered with.
        checkpoint_entry: name of the hook's state in checkpoints; empty: `hooks.<class name>`.
    """

    trainer: TrainerBase
    checkpoint_entry: str = ""

    def before_train(self) -> None:
        """Called once, when weights are loaded and before the first iteration."""

    def after_train(self) -> None:
        """Called once, after the last iteration; not when an exception ends training."""

    def before_step(self) -> None:
        """Called before each iteration; again for one that failed, when a run resumes at it."""

    def after_backward(self) -> None:
        """Called when the batch's gradients are there, before clipping; they are unscaled."""

    def after_step(self) -> None:
        """Called after each iteration, when the optimizer has stepped."""

    def state_dict(self) -> dict[str, Any]:
        """State that a resumed run needs."""
        return {}


class TrainerBase:
    """Iterative training with hooks; a subclass implements `run_step`.

    Attributes:
        iter: the current iteration, counted from 0; after the last one, `max_iter`.
        start_iter: the first iteration of this run.
        max_iter: number of iterations.
        completed_iter: the last completed iteration; `start_iter` - 1 if there is none.
        last_step: results of that iteration; None before the first.
        storage: scalars that hooks and `run_step` put; the numbers of metrics.json.
        hooks: registered hooks, in the order in which they are called.
    """

    def __init__(self, max_iter: int) -> None:
        self.iter = self.start_iter = 0
        self.max_iter = max_iter
        self.completed_iter = -1
        self.last_step: StepResult | None = None
        self.storage = ScalarStorage()
        self.hooks: list[HookBase] = []

    def register_hooks(self, hooks: Iterable[HookBase | None]) -> None:
        """Add hooks, which need not inherit from `HookBase`, to the end; None is skipped."""
        for hook in hooks:
            if hook is not None:
                hook.trainer = self
                self.hooks.append(hook)

    def train_loop(self) -> None:
        """Run the iterations from `start_iter` to `max_iter`."""
        self.iter = self.storage.iter = self.start_iter
        self.before_train()
        for iteration in range(self.start_iter, self.max_iter):
            self.iter = self.storage.iter = iteration
            self.call_hooks("before_step")
            self.run_step()
            self.completed_iter = iteration
            self.after_step()
        self.iter = self.completed_iter + 1
        self.call_hooks("after_train")

    def run_step(self) -> None:
        """Run one iteration and set `last_step`."""
        raise NotImplementedError

    def check_results(self) -> None:
        """Check results of the last iteration that were not read yet; called on all processes.

        Before anything is saved or recorded. An error of that iteration is raised here.
        """

    def before_train(self) -> None:
        """Call the hooks' `before_train`."""
        self.call_hooks("before_train")

    def after_step(self) -> None:
        """Call the hooks' `after_step`."""
        self.call_hooks("after_step")

    def call_hooks(self, name: str) -> None:
        """Call the method `name` of every hook."""
        for hook in self.hooks:
            # A hook that does not inherit from HookBase, or from an older one, may lack a method.
            method = getattr(hook, name, None)
            if method is not None:
                method()


def seed_iteration(seed: int, iteration: int, rank: int) -> None:
    """Seed the global random generators from what identifies the iteration.

    Dropout in iteration i is then the same in a run that was resumed before it.
    """
    state = np.random.SeedSequence((seed, iteration, rank)).generate_state(4, np.uint32)
    torch.manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)
    random.seed(int(state[2]))
    np.random.seed(int(state[3]))


@dataclass
class TrainStep:
    """One training step: forward, backward, gradient clipping, optimizer step.

    Attributes:
        model: returns a dictionary of scalar losses for a batch; may be DistributedDataParallel,
            or sharded.
        optimizer: of the trainable parameters.
        scheduler: sets the optimizer's learning rates.
        clip: clips the gradients and returns their norm.
        scaler: loss scaling of fp16; otherwise disabled.
        autocast: creates the autocast context of the forward pass.
        seed: SEED.
        stop_requested: whether this process was asked to stop.
        after_backward: called after the backward passes of an iteration, before clipping.
        accumulate: number of parts of equal size into which the process's images are divided; their
            gradients are added (SOLVER.ACCUMULATE).
        deferred: the losses of an iteration are read in the next one, in which the host waits for
            the device in any case; needs a fused optimizer, which leaves the weights unchanged if
            they are not finite. False: they are read before the optimizer steps.
        check: checks the results.
        stepping: the optimizer is changing the weights, or an error ended that.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    clip: ClipGradients
    scaler: torch.amp.GradScaler
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]
    seed: int
    stop_requested: Callable[[], bool]
    after_backward: Callable[[], None]
    accumulate: int = 1
    deferred: bool = False
    check: ResultCheck = field(default_factory=ResultCheck)
    stepping: bool = False

    def __call__(self, iteration: int, batch: Batch, started: float) -> StepResult:
        """Run iteration number `iteration` on this process's images.

        Args:
            started: `perf_counter()` before the batch was fetched.

        Raises:
            NonFiniteLossError: on all processes; the weights are those before the iteration that it
                names: this one or, if results are deferred, the last.
        """
        fetched = perf_counter()
        seed_iteration(self.seed, iteration, comm.get_rank())
        self.scheduler.set(iteration)
        losses = self.add_gradients(batch) if self.in_parts else self.gradients(batch)
        self.check()  # the last iteration; the device is still computing gradients
        average_gradients(self.model)
        self.scaler.unscale_(self.optimizer)
        self.after_backward()
        vector = self.result_vector(losses, self.clip())
        files = tuple(str(sample.get("file_name", "(no file name)")) for sample in batch)
        result = self.check.unchecked = StepResult(
            iteration=iteration,
            files=files,
            names=tuple(sorted(losses)),
            copy=HostCopy(vector),
            learning_rates={g["name"]: g["lr"] for g in self.optimizer.param_groups},
            data_seconds=fetched - started,
        )
        if not self.deferred:
            self.check()
        self.stepping = True
        self.step_optimizer(vector[: len(losses) + (not self.scaler.is_enabled())])
        self.scaler.update()
        self.stepping = False
        result.seconds = perf_counter() - started
        return result

    @property
    def in_parts(self) -> bool:
        """Whether targets precede the losses, of one part or several.

        They do so with a sharded teacher, which labels images with its weights gathered.
        """
        shards_teacher = is_sharded(self.model) and teacher_of(self.model) is not None
        return self.accumulate > 1 or shards_teacher

    def gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the losses of the whole batch, and set the gradients."""
        with self.autocast():
            losses: dict[str, Tensor] = self.model(batch)
            total = torch.stack([loss.float() for loss in losses.values()]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
        return losses

    def add_gradients(self, batch: Batch) -> dict[str, Tensor]:
        """`gradients`, one part of the batch after the other; memory is that of a part."""
        size = len(batch) // self.accumulate
        parts = [batch[i * size : (i + 1) * size] for i in range(self.accumulate)]
        parallel = self.model if isinstance(self.model, DistributedDataParallel) else None
        network = self.model if parallel is None else parallel.module
        arguments: list[tuple[Any, ...]] = [()] * len(parts)
        factor = 1 / len(parts)
        if isinstance(network, PreparesParts):
            # A process may have images that need the teacher, or predictions, and others not.
            with self.autocast(), whole_weights(cast(nn.Module, network)):
                arguments = [(prepared,) for prepared in network.prepare_parts(parts)]
            factor = 1.0
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for number, (part, prepared) in enumerate(zip(parts, arguments, strict=True)):
            last = number + 1 == len(parts)  # with which processes exchange their gradients
            with contextlib.nullcontext() if parallel is None or last else parallel.no_sync():
                with self.autocast():
                    losses = self.model(part, *prepared)
                    total = factor * torch.stack([v.float() for v in losses.values()]).sum()
                self.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + factor * loss.detach().float()
        return sums

    def result_vector(self, losses: Mapping[str, Tensor], norm: Tensor) -> Tensor:
        """What `StepResult.copy` has: losses sorted by name, norm and others, on the device."""
        # Filled on the device: a copy from the host would wait for all kernels in the queue.
        stop = norm.new_full((), float(self.stop_requested()))
        values = [losses[name].detach() for name in sorted(losses)]
        vector = comm.mean_over_ranks(torch.stack([v.double() for v in (*values, norm, stop)]))
        if not self.scaler.is_enabled():
            return vector
        scale = self.scaler.scale(norm.new_ones((1,), dtype=torch.float32))
        return torch.cat([vector, scale.double()])

    def step_optimizer(self, checked: Tensor) -> None:
        """Take the optimizer's step; if results are deferred, only if `checked` (N,) is finite.

        The optimizer skips it on the device, by the mechanism of loss scaling.
        """
        if not self.deferred:
            self.scaler.step(self.optimizer)
            return
        skip = (~checked.isfinite().all()).float()

        def set_skip(optimizer: Any, args: Any, kwargs: Any) -> None:
            by_scaler = getattr(optimizer, "found_inf", None)
            optimizer.found_inf = skip if by_scaler is None else torch.maximum(by_scaler, skip)

        handle = self.optimizer.register_step_pre_hook(set_skip)
        try:
            self.scaler.step(self.optimizer)
        finally:
            handle.remove()
            vars(self.optimizer).pop("found_inf", None)
