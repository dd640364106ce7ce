"""The trainer: puts the parts together and runs the loop."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clouds import comm
from clouds.d2 import CfgNode
from clouds.device import autocast, resolve_device
from clouds.engine.checkpoint import Checkpointer, changed_keys
from clouds.engine.hooks import CheckpointHook, EvalHook, Hook, MetricsHook
from clouds.engine.interrupt import Interrupted, StopRequest
from clouds.engine.lr_scheduler import build_schedule
from clouds.engine.optimizer import build_clipping, build_optimizer
from clouds.engine.train_loop import Batch, Diverged, Iteration, Step
from clouds.environment import provenance

if TYPE_CHECKING:
    from clouds.evaluation import Results
    from clouds.self_training.pseudo_labeler import SelfTraining

logger = logging.getLogger(__name__)

Loader = Callable[[int], Iterable[Batch]]
"""Number of the first batch to this process's batches from that one on, without end."""


class Trainer:
    """Trains a model as a config says.

    The model keeps Detectron2's protocol: called with a list of dictionaries it returns a
    dictionary of scalar losses, weighted, whose mean over the processes is the loss of the global
    batch. Parameters that do not train have requires_grad False.

    Args:
        cfg: the config. MODEL.DEVICE may be 'auto'.
        model: None: `clouds.building.build_seeded(cfg)`.
        loader: None: the one that `clouds.data.build.build_train_loader` builds.
        evaluate: None: `clouds.evaluation.evaluate` on DATASETS.TEST; nothing when that is empty.

    Attributes:
        cfg: a copy of the config with this process's device in MODEL.DEVICE.
        model: the model itself, without DistributedDataParallel.
        start: iteration that training starts with, from `prepare` on.
        completed: the last finished iteration, start - 1 when none is.
        max_iter: SOLVER.MAX_ITER.
        batch_size: images of an iteration over all processes.
        hooks: called in this order; insert your own before `train`.
        checkpointer: saves and restores; takes further checkpointables before `prepare`.
        batches: the training data from `start` on, from `prepare` on.
        results: of the last evaluation, once training is done.

    Raises:
        ValueError: a device, a batch size or an AMP type that cannot be; nothing to train.
        FileNotFoundError, ValueError: data to evaluate on that is not there or unknown.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module | None = None,
        loader: Loader | None = None,
        evaluate: Callable[[], Results] | None = None,
    ) -> None:
        self.device = comm.device_of_process(resolve_device(cfg.MODEL.DEVICE))
        self.cfg = on_device(cfg, self.device)
        self.max_iter = int(cfg.SOLVER.MAX_ITER)
        self.batch_size = int(cfg.SOLVER.IMS_PER_BATCH)
        self.check_batch_size()
        torch.backends.cudnn.benchmark = bool(cfg.CUDNN_BENCHMARK)

        self.model = (self.build_model() if model is None else model).to(self.device).train()
        self.loader = self.build_loader if loader is None else loader
        self.stop = StopRequest()
        self.optimizer = build_optimizer(self.cfg, self.model)
        self.schedule = build_schedule(self.cfg, self.optimizer)
        fp16 = bool(cfg.SOLVER.AMP.ENABLED) and cfg.SOLVER.AMP.DTYPE == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        make_autocast = functools.partial(autocast, self.cfg, self.device)
        make_autocast()  # an AMP type that cannot be is told now

        self.checkpointer = self.build_checkpointer(cfg)
        self.hooks = self.build_hooks(evaluate)
        self.iteration = Iteration(
            model=self.parallel(),
            optimizer=self.optimizer,
            schedule=self.schedule,
            clip=build_clipping(self.cfg, self.optimizer),
            scaler=self.scaler,
            autocast=make_autocast,
            seed=int(cfg.SEED),
            stop_requested=lambda: self.stop.requested,
        )
        self.start = 0
        self.completed = -1
        self.results: Results | None = None
        self.batches: Iterable[Batch] | None = None

    def check_batch_size(self) -> None:
        """Reject a global batch that the processes cannot share evenly."""
        if self.batch_size % comm.get_world_size():
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH is {self.batch_size}, which {comm.get_world_size()} "
                "processes cannot share evenly. Make it a multiple of their number."
            )

    def build_model(self) -> nn.Module:
        """The config's model, its initial weights a function of SEED."""
        from clouds.modeling.build import build_seeded

        return build_seeded(self.cfg)

    def build_loader(self, start: int) -> Iterable[Batch]:
        """The config's training data from batch `start` on, this process's share of it."""
        from clouds.data.build import build_train_loader

        return build_train_loader(self.cfg, start, comm.get_rank(), comm.get_world_size())

    def parallel(self) -> nn.Module:
        """The model, in DistributedDataParallel when there are several processes."""
        if comm.get_world_size() == 1:
            return self.model
        with warnings.catch_warnings():
            # Newer torch calls it forward_sync_buffers, which torch 2.4 does not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            return DistributedDataParallel(self.model, broadcast_buffers=False)

    def build_checkpointer(self, cfg: CfgNode) -> Checkpointer:
        """A checkpointer of model, optimizer, schedule and loss scale; `cfg` goes into the file."""
        checkpointer = Checkpointer(
            self.model,
            cfg.OUTPUT_DIR,
            save_to_disk=comm.is_main_process(),
            provenance={**provenance(), "config": cfg.dump()},
            partial=cfg.MODEL.WEIGHTS_PARTIAL,
            optimizer=self.optimizer,
            scheduler=self.schedule,
        )
        if self.scaler.is_enabled():
            checkpointer.add_checkpointable("scaler", self.scaler)
        return checkpointer

    def build_hooks(self, evaluate: Callable[[], Results] | None) -> list[Hook]:
        """Metrics, checkpoints and, when there is something to evaluate on, evaluation."""
        metrics = MetricsHook(self.cfg.OUTPUT_DIR, self.cfg.LOG_PERIOD)
        self.checkpointer.add_checkpointable("metrics", metrics)
        solver = self.cfg.SOLVER
        hooks: list[Hook] = [
            metrics,
            *self.build_teacher_hooks(),
            CheckpointHook(solver.CHECKPOINT_PERIOD, solver.CHECKPOINTS_KEPT),
        ]
        if evaluate is None and self.cfg.DATASETS.TEST:
            self.check_test_data()
            evaluate = self.evaluate
        if evaluate is not None:
            hooks.append(EvalHook(self.cfg.TEST.EVAL_PERIOD, evaluate, metrics))
        return hooks

    def build_teacher_hooks(self) -> list[Hook]:
        """In joint training, the hook that averages the teacher, whose state goes into files."""
        from clouds.engine.hooks import TeacherHook

        if self.self_training is None:
            return []
        teacher = self.self_training.teacher
        self.checkpointer.add_checkpointable("teacher", teacher)
        return [TeacherHook(teacher)]

    @property
    def self_training(self) -> SelfTraining | None:
        """The model's, None when it trains on labelled images alone."""
        return getattr(self.model, "self_training", None)

    def check_test_data(self) -> None:
        """Raise now what the first evaluation would: a dataset that is unknown or not there."""
        from clouds.data.datasets import get_dataset

        for name in self.cfg.DATASETS.TEST:
            get_dataset(name).records()

    def evaluate(self) -> Results:
        """Evaluate the model on DATASETS.TEST."""
        from clouds.evaluation import evaluate

        on_disk = self.checkpointer.saved_iteration == self.completed
        file = self.checkpointer.get_checkpoint_file() if on_disk else ""
        return evaluate(
            self.cfg,
            self.model,
            weights=file,
            iteration=self.completed,
            pseudo_labels=self.self_training is not None,
        )

    def prepare(self, resume: bool = False) -> int:
        """Load what training starts from, and find its data.

        Args:
            resume: go on from the newest checkpoint of OUTPUT_DIR when there is one. Otherwise,
                and without one, training starts at iteration 0 from MODEL.WEIGHTS.

        Returns:
            The iteration that training starts with.

        Raises:
            FileNotFoundError, ValueError: a checkpoint is missing, unreadable or of another model;
                training data is missing or unusable.
        """
        rest = self.checkpointer.resume() if resume else None
        if rest is not None:
            self.start = int(rest["iteration"]) + 1
            self.tell_changes(rest)
        else:
            self.start_afresh(resume)
        starts = comm.all_gather(self.start)
        if len(set(starts)) > 1:
            raise ValueError(
                f"the processes found different checkpoints (they would start at {starts}). "
                f"OUTPUT_DIR '{self.cfg.OUTPUT_DIR}' must be a folder that all machines share."
            )
        self.completed = self.start - 1
        if self.self_training is not None:
            self.self_training.prepare(self.device)
        self.batches = self.loader(self.start)
        return self.start

    def start_afresh(self, resume: bool) -> None:
        """Begin at iteration 0 with MODEL.WEIGHTS."""
        folder = self.cfg.OUTPUT_DIR
        if resume:
            logger.warning("--resume: no checkpoint in '%s'; starting at iteration 0", folder)
        elif self.checkpointer.has_checkpoint():
            logger.warning("'%s' has checkpoints of an earlier run; --resume continues it", folder)
        if self.cfg.MODEL.WEIGHTS:
            self.checkpointer.load_weights(self.cfg.MODEL.WEIGHTS)
        elif self.self_training is not None:
            logger.warning(
                "joint training starts without MODEL.WEIGHTS: the teacher is random, and so are "
                "its labels. Name the checkpoint of a warm-up run (model_final.pth)."
            )
        self.start = 0

    def tell_changes(self, saved: dict[str, Any]) -> None:
        """Say where the resumed run starts, and in what it differs from the saved one."""
        logger.info("resuming at iteration %d", self.start)
        if self.start > self.max_iter:
            logger.warning("SOLVER.MAX_ITER is %d: nothing is left to train", self.max_iter)
        changes = changed_keys(saved.get("clouds", {}).get("config", ""), self.cfg)
        if changes:
            logger.warning(
                "the config differs from that of the checkpoint, so this is not the run that was "
                "broken off:\n  %s",
                "\n  ".join(changes),
            )

    def train(self, resume: bool = False) -> Results | None:
        """Train to SOLVER.MAX_ITER, then save and evaluate.

        Args:
            resume: see `prepare`; has no say after `prepare`.

        Returns:
            The final evaluation's results, None when there is nothing to evaluate on.

        Raises:
            Diverged: a loss or gradient is not finite; nothing of it was saved.
            Interrupted: SIGINT or SIGTERM came; a checkpoint was saved.
        """
        if self.batches is None:
            self.prepare(resume)
        try:
            with self.stop.listening():
                for hook in self.hooks:
                    hook.before_train(self)
                self.run()
                for hook in self.hooks:
                    hook.after_train(self)
        except Interrupted as request:
            raise self.save_and_stop(request) from None
        except Diverged as error:
            raise Diverged(f"{error}\n{self.last_good()}") from None
        return self.results

    def run(self) -> None:
        """Do the iterations."""
        groups = ", ".join(
            f"{g['name']} {len(g['params'])} (lr {base:g}, weight decay {g['weight_decay']:g})"
            for g, base in zip(self.optimizer.param_groups, self.schedule.base_rates, strict=True)
        )
        logger.info(
            "iterations %d to %d in batches of %d; parameter tensors that train: %s",
            self.start,
            self.max_iter,
            self.batch_size,
            groups,
        )
        assert self.batches is not None, "prepare comes first"
        batches = iter(self.batches)
        for iteration in range(self.start, self.max_iter):
            for hook in self.hooks:
                hook.before_step(self, iteration)
            step = self.iterate(iteration, batches)
            self.completed = iteration
            for hook in self.hooks:
                hook.after_step(self, step)
            if step.stop:
                raise self.stop.interruption()

    def iterate(self, iteration: int, batches: Iterator[Batch]) -> Step:
        """Fetch the next batch and do one iteration on it."""
        started = perf_counter()
        try:
            batch = next(batches, None)
            if batch is None:
                raise ValueError(f"the training data ended before iteration {iteration}")
            return self.iteration(iteration, batch, started)
        except Exception as error:
            # A signal to the whole process group ends loader processes, and other ranks perhaps,
            # before this one is done. The weights are still those of the last iteration.
            if self.stop.requested and not self.iteration.stepping:
                raise self.stop.interruption() from error
            raise

    def save_and_stop(self, request: Interrupted) -> Interrupted:
        """Save after the last finished iteration, unless that is on disk already."""
        if self.completed >= 0 and self.checkpointer.saved_iteration != self.completed:
            self.checkpointer.save(f"model_{self.completed:07d}", iteration=self.completed)
        done = f"{request} after {self.completed + 1} of {self.max_iter} iterations"
        path = self.checkpointer.get_checkpoint_file() if self.completed >= 0 else ""
        hint = f"The same command with --resume goes on from '{path}'." if path else ""
        return Interrupted(f"{done}. {hint}".strip(), request.signal_number)

    def last_good(self) -> str:
        """Where to go on from after a divergence."""
        path = self.checkpointer.get_checkpoint_file()
        if not path or not Path(path).exists():
            return "No checkpoint was saved before it."
        return (
            f"The last good checkpoint is '{path}'. --resume goes on from it, with a lower "
            "SOLVER.BASE_LR perhaps."
        )


def on_device(cfg: CfgNode, device: torch.device) -> CfgNode:
    """A copy of `cfg` with `device` in MODEL.DEVICE."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = str(device)
    cfg.freeze()
    return cfg
