"""The trainer: builds the parts that a config names and runs the training loop."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from clouds import comm
from clouds.config.config import with_value
from clouds.d2 import CfgNode
from clouds.data.build import build_train_loader, check_batch_size, check_training_data
from clouds.device import autocast, resolve_device
from clouds.engine import parallel
from clouds.engine.best_checkpoint import BestCheckpoint
from clouds.engine.checkpoint import Checkpointer
from clouds.engine.config_changes import warn_changes
from clouds.engine.hooks import CheckpointHook, EvalHook, MetricsHook, self_training_hooks
from clouds.engine.initial_weights import (
    fetch_backbone,
    fetch_what_is_missing,
    has_backbone,
    require_own_weights,
)
from clouds.engine.interrupt import Interrupted, StopRequest
from clouds.engine.last_completed import LastCompleted, disk_full
from clouds.engine.loggers import check_loggers
from clouds.engine.lr_scheduler import build_lr_scheduler
from clouds.engine.memory import fit_to_memory
from clouds.engine.optimizer import build_clipping, build_optimizer
from clouds.engine.run_folder import prepare
from clouds.engine.run_lock import locked, on_main_process
from clouds.engine.step_result import NonFiniteLossError, ResultCheck
from clouds.engine.train_loop import Batch, HookBase, TrainerBase, TrainStep
from clouds.engine.weight_average import FILE, FOLDER, WeightAverage
from clouds.environment import check_writable, provenance
from clouds.evaluation import Results, check_test_data, evaluate_held_out
from clouds.evaluation import evaluate as evaluate_model
from clouds.modeling.build import build_seeded
from clouds.self_training.pseudo_labeler import PseudoLabeler
from clouds.weights_io import read_checkpoint

logger = logging.getLogger(__name__)

Loader = Callable[[int], Iterable[Batch]]
"""Number of the first batch -> this process's share of the batches from that one on, endless."""

LAST_HOOKS = (LastCompleted, MetricsHook, CheckpointHook, EvalHook)
"""Hooks that run after all others, so that records and checkpoints include what the others did."""


class Trainer(TrainerBase):
    """Trains a model according to a config.

    The model has Detectron2's protocol: called with a list of dictionaries it returns a dictionary
    of scalar losses, weighted, whose mean over the processes is the loss of the global batch.
    Parameters that are not trained have requires_grad False.

        trainer = Trainer(cfg)
        trainer.register_hooks([MyHook()])
        trainer.resume_or_load(resume=True)
        trainer.train()

    Args:
        cfg: the config. MODEL.DEVICE may be 'auto'.
        model: None: `build_seeded(cfg)`. CLIP's weights are fetched when they are needed: not if
            MODEL.WEIGHTS or the checkpoint to resume from brings them.
        loader: None: `build_train_loader` of the config.
        evaluate: None: `clouds.evaluation.evaluate` on DATASETS.TEST; no evaluation if that is
            empty.

    Attributes:
        cfg: a copy of the config with this process's device in MODEL.DEVICE.
        model: the model, without DistributedDataParallel; sharded with SOLVER.PARALLEL fsdp.
        batch_size: images of an iteration over all processes.
        train_step: runs one iteration on a batch.
        checkpointer: saves and restores.
        average: the average of the weights; None without SOLVER.WEIGHT_AVERAGE.ENABLED.
        batches: the training data from `start_iter` on; None before `resume_or_load`.

    Raises:
        ValueError: an invalid device, batch size, AMP type or OUTPUT_DIR; nothing is trainable.
        FileNotFoundError, ValueError: a dataset is missing, unknown or unusable; MODEL.WEIGHTS is
            missing or unreadable. These are checked before the model is built.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module | None = None,
        loader: Loader | None = None,
        evaluate: Callable[[], Results] | None = None,
    ) -> None:
        super().__init__(int(cfg.SOLVER.MAX_ITER))
        self.device = comm.device_of_process(resolve_device(cfg.MODEL.DEVICE))
        self.batch_size = int(cfg.SOLVER.IMS_PER_BATCH)
        check_batch_size(self.batch_size, comm.get_world_size(), int(cfg.SOLVER.ACCUMULATE))
        if model is None:
            cfg = fit_to_memory(cfg, comm.get_world_size())
        self.cfg = with_value(cfg, "MODEL.DEVICE", str(self.device))
        torch.backends.cudnn.benchmark = bool(cfg.CUDNN_BENCHMARK)

        self.check_files(loader, evaluate)
        self._backbone_is_random = model is None and self.weights_follow()
        if model is None:
            model = build_seeded(self.cfg, skip_pretrained=self._backbone_is_random)
        self.model = parallel.place(self.cfg, model, self.device).train()
        self.loader = self.build_loader if loader is None else loader
        self.batches: Iterable[Batch] | None = None
        self._iterator: Iterator[Batch] | None = None
        self.stop_request = StopRequest()
        self.optimizer = build_optimizer(self.cfg, self.model)
        self.scheduler = build_lr_scheduler(self.cfg, self.optimizer)
        fp16 = bool(cfg.SOLVER.AMP.ENABLED) and cfg.SOLVER.AMP.DTYPE == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self.checkpointer = self.build_checkpointer(cfg)
        self.result_check = ResultCheck()
        self.train_step = self.build_train_step()
        self.last_completed = LastCompleted(self.checkpointer, self.train_step)
        self.average = WeightAverage.from_config(self.cfg, self.model, self.checkpointer)
        self.register_hooks(self.build_hooks(evaluate))

    def check_files(self, loader: Loader | None, evaluate: Callable[[], Results] | None) -> None:
        """Check what is quickly checked before the model is built; for the errors see the class."""
        check_writable(self.cfg.OUTPUT_DIR)
        check_loggers(self.cfg)
        if loader is None and type(self).build_loader is Trainer.build_loader:
            check_training_data(self.cfg)
        if evaluate is None and self.cfg.DATASETS.TEST:
            check_test_data(self.cfg, self.cfg.DATASETS.TEST)

    def weights_follow(self) -> bool:
        """Whether a checkpoint may bring the backbone's weights; raises if it cannot be read."""
        if Checkpointer(nn.Identity(), self.cfg.OUTPUT_DIR).has_checkpoint():
            return True  # it is complete if training resumes from it
        path = self.cfg.MODEL.WEIGHTS
        return bool(path) and has_backbone(read_checkpoint(path, mmap=True)["model"])

    def build_loader(self, start: int) -> Iterable[Batch]:
        """Training data of the config from batch `start` on, this process's share of each batch."""
        return build_train_loader(self.cfg, start, comm.get_rank(), comm.get_world_size())

    def build_train_step(self) -> TrainStep:
        """The training step of the model, the optimizer and the config's options."""
        make_autocast = functools.partial(autocast, self.cfg, self.device)
        make_autocast()  # raises for an invalid AMP type
        return TrainStep(
            model=self.build_parallel(),
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            clip=build_clipping(self.cfg, self.optimizer),
            scaler=self.scaler,
            autocast=make_autocast,
            seed=int(self.cfg.SEED),
            stop_requested=lambda: self.stop_request.requested,
            after_backward=functools.partial(self.call_hooks, "after_backward"),
            accumulate=int(self.cfg.SOLVER.ACCUMULATE),
            check=self.result_check,
            deferred=self.device.type == "cuda" and bool(self.optimizer.defaults.get("fused")),
        )

    def build_parallel(self) -> nn.Module:
        """What training calls: the model, in DistributedDataParallel if there are several
        processes, of which each has the whole model.
        """
        return parallel.wrap(self.model)

    def build_checkpointer(self, cfg: CfgNode) -> Checkpointer:
        """A checkpointer of model, optimizer, scheduler and loss scale; files contain `cfg`."""
        checkpointer = Checkpointer(
            self.model,
            cfg.OUTPUT_DIR,
            save_to_disk=comm.is_main_process(),
            provenance={
                **provenance(),
                "config": cfg.dump(),
                "processes": comm.get_world_size(),
            },
            partial=cfg.MODEL.WEIGHTS_PARTIAL,
            adapters_only=cfg.SOLVER.CHECKPOINT_ADAPTERS_ONLY,
            load_backbone=self.load_backbone,
            before_save=self.check_results,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
        )
        if self.scaler.is_enabled():
            checkpointer.add_checkpointable("scaler", self.scaler)
        return checkpointer

    def build_hooks(self, evaluate: Callable[[], Results] | None) -> list[HookBase]:
        """The teacher's update in joint training, metrics, checkpoints and evaluation."""
        cfg, solver = self.cfg, self.cfg.SOLVER
        self.metrics = MetricsHook.from_config(cfg, self.batch_size, self.device)
        hooks: list[HookBase] = [
            self.last_completed,
            self.metrics,
            CheckpointHook(self.checkpointer, solver.CHECKPOINT_PERIOD, solver.CHECKPOINTS_KEPT),
        ]
        if self.pseudo_labeler is not None:
            hooks += self_training_hooks(self.pseudo_labeler, self.device)
        if self.average is not None:
            hooks.append(self.average)
        if evaluate is None and cfg.DATASETS.TEST:
            evaluate = self.evaluate
        validate = None
        if cfg.DATASETS.SOURCE_VAL_FRACTION > 0:
            validate = functools.partial(evaluate_held_out, cfg, self.model)
        if evaluate is not None or validate is not None:
            best = BestCheckpoint.from_config(cfg, self.checkpointer, self.metrics.file)
            shared = (self.metrics, self.stop_request, self.average)
            whole = parallel.whole_weights(self.model)
            evaluate, held_out = (f and whole(f) for f in (evaluate, validate))
            hooks.append(EvalHook(cfg.TEST.EVAL_PERIOD, evaluate, *shared, held_out, best))
        return hooks

    def register_hooks(self, hooks: Iterable[HookBase | None]) -> None:
        """Add hooks; call it before `resume_or_load`, which restores their state.

        Hooks run in the order in which they were registered, but before the trainer's own that
        write metrics, save checkpoints and evaluate. So a checkpoint contains what the hooks
        changed in the same iteration. The state of a hook that has `load_state_dict` is saved in
        the entry `hook.checkpoint_entry`.
        """
        new = [hook for hook in hooks if hook is not None]
        super().register_hooks(new)
        for hook in new:
            if hasattr(hook, "load_state_dict"):
                self.checkpointer.add_checkpointable(self._entry_of(hook), hook)
        self.hooks.sort(key=lambda hook: isinstance(hook, LAST_HOOKS))

    def _entry_of(self, hook: HookBase) -> str:
        """Name of a hook's state in checkpoints; hooks of the same class are numbered from 2."""
        entry = getattr(hook, "checkpoint_entry", "") or f"hooks.{type(hook).__qualname__}"
        taken = self.checkpointer.checkpointables
        numbered = [entry, *(f"{entry}.{number}" for number in range(2, len(taken) + 3))]
        return next(name for name in numbered if name not in taken)

    @property
    def pseudo_labeler(self) -> PseudoLabeler | None:
        """The model's pseudo-labeler; None if all training images are labelled."""
        return getattr(self.model, "pseudo_labeler", None)

    @property
    def results(self) -> Results | None:
        """Results of the last evaluation; None before the first."""
        hooks = [hook for hook in self.hooks if isinstance(hook, EvalHook)]
        return hooks[-1].results if hooks else None

    def evaluate(self) -> Results:
        """Evaluate the model on DATASETS.TEST, after `resume_or_load`.

        Results of the weight average, while it is applied, go to a folder of their own.
        """
        if self._backbone_is_random:
            raise RuntimeError("call resume_or_load before evaluate: no weights are loaded yet")
        on_disk = self.checkpointer.saved_iteration == self.completed_iter
        cfg, weights = self.cfg, self.checkpointer.get_checkpoint_file() if on_disk else ""
        averaged = self.average is not None and self.average.applied
        if averaged:
            cfg = with_value(cfg, "OUTPUT_DIR", str(Path(cfg.OUTPUT_DIR, FOLDER)))
            complete = self.completed_iter + 1 == self.max_iter
            weights = str(Path(self.cfg.OUTPUT_DIR, f"{FILE}.pth")) if complete else ""
        with parallel.whole_weights(self.model):
            return evaluate_model(
                cfg,
                self.model,
                weights=weights,
                iteration=self.completed_iter,
                pseudo_labels=self.pseudo_labeler is not None and not averaged,
            )

    def resume_or_load(self, resume: bool = True, overwrite: bool = False) -> int:
        """Load a checkpoint and open the training data.

        Args:
            resume: resume from the newest checkpoint of OUTPUT_DIR if there is one. Otherwise,
                training starts at iteration 0 with MODEL.WEIGHTS.
            overwrite: without `resume`: set an earlier run in OUTPUT_DIR aside, in a folder
                `earlier/<date>` there.

        Returns:
            The first iteration.

        Raises:
            FileNotFoundError, ValueError: a checkpoint is missing, unreadable or of another model;
                training data is missing or unusable; OUTPUT_DIR holds a run, and neither `resume`
                nor `overwrite` is set.
        """
        folder, weights = Path(self.cfg.OUTPUT_DIR), str(self.cfg.MODEL.WEIGHTS)
        aside = on_main_process(
            lambda: prepare(folder, resume=resume, overwrite=overwrite, weights=weights)
        )
        if aside is not None:
            logger.warning("the files of the earlier run are now in '%s'", aside)
        rest = self.checkpointer.resume() if resume else None
        if rest is not None:
            self.start_iter = int(rest["iteration"]) + 1
            self.warn_config_changes(rest)
            self._backbone_is_random = False
        else:
            self.load_initial_weights(resume)
        starts = comm.all_gather(self.start_iter)
        if len(set(starts)) > 1:
            raise ValueError(
                f"the processes read different checkpoints (they would start at {starts}). "
                f"OUTPUT_DIR '{self.cfg.OUTPUT_DIR}' must be a folder that all machines share."
            )
        self.iter = self.start_iter
        self.completed_iter = self.start_iter - 1
        if self.pseudo_labeler is not None:
            self.pseudo_labeler.prepare(self.device)
        self.batches = self.loader(self.start_iter)
        return self.start_iter

    def load_initial_weights(self, resume: bool) -> None:
        """Load MODEL.WEIGHTS; if `resume`, that was requested, but there is no checkpoint."""
        if resume:
            logger.warning(
                "--resume: no checkpoint in '%s'; starting at iteration 0", self.cfg.OUTPUT_DIR
            )
        if self._backbone_is_random:
            fetch_what_is_missing(self.cfg, self.model, self.cfg.MODEL.WEIGHTS)
            self._backbone_is_random = False
        if self.cfg.MODEL.WEIGHTS:
            self.checkpointer.load_weights(self.cfg.MODEL.WEIGHTS)
        elif self.pseudo_labeler is not None:
            logger.warning(
                "joint training starts without MODEL.WEIGHTS: the teacher is random, and so are "
                "its pseudo-labels. Set it to the checkpoint of source pre-training, "
                "configs/warmup (model_final.pth)."
            )
        self.start_iter = 0

    def load_backbone(self, path: str) -> None:
        """Load the backbone's own weights, which the checkpoint `path` leaves out, if not done."""
        require_own_weights(self.cfg, path)
        if self._backbone_is_random:
            fetch_backbone(self.cfg, self.model)
            self._backbone_is_random = False

    def warn_config_changes(self, saved: dict[str, Any]) -> None:
        """Log where the resumed run starts, and how its config differs from the saved one."""
        logger.info("resuming at iteration %d", self.start_iter)
        if self.start_iter > self.max_iter:
            logger.warning("SOLVER.MAX_ITER is %d: no iterations are left", self.max_iter)
        carried = saved.get("clouds")
        carried = carried if isinstance(carried, Mapping) else {}
        processes = carried.get("processes", comm.get_world_size())
        if processes != comm.get_world_size():
            logger.warning(
                "the run was saved by %s processes and is resumed by %d: batches are the same, but "
                "each process draws its own random numbers, so the result may differ from that of "
                "an uninterrupted run",
                processes,
                comm.get_world_size(),
            )
        warn_changes(carried.get("config"), self.cfg)

    def train(self) -> Results | None:
        """Train to SOLVER.MAX_ITER, then save and evaluate; returns the results, if there are any.

        If `resume_or_load` has not been called, training starts at iteration 0 from MODEL.WEIGHTS.

        When an error ends training, the weights after the last completed iteration are saved first.

        Raises:
            NonFiniteLossError: a loss or gradient is not finite; nothing was saved after it.
            Interrupted: a signal arrived, see `StopRequest`; a checkpoint was saved.
            ValueError: another run uses OUTPUT_DIR.
            OSError: the disk is full.
        """
        if self.batches is None:
            self.resume_or_load(resume=False)
        with locked(self.cfg.OUTPUT_DIR), self.stop_request.listening():
            try:
                self.train_loop()
            except Interrupted as request:
                hint = self.last_completed.save()
                raise Interrupted(f"{request} {hint}", request.signal_number) from None
            except NonFiniteLossError as error:
                raise NonFiniteLossError(f"{error}\n{self.last_completed.hint()}") from None
            except BaseException as error:
                if not self.stop_request.twice:
                    self.last_completed.save_after(error)
                if (full := disk_full(error)) is not None:
                    raise full from error
                raise
            finally:
                self.metrics.close()
        return self.results

    def before_train(self) -> None:
        """Call the hooks, then open the training data and log what is trained."""
        self.result_check.reset()
        super().before_train()
        assert self.batches is not None, "resume_or_load precedes training"
        self._iterator = iter(self.batches)
        groups = ", ".join(
            f"{g['name']} {len(g['params'])} (lr {rate:g}, weight decay {decay:g})"
            for g, rate, decay in zip(
                self.optimizer.param_groups,
                self.scheduler.base_rates,
                self.scheduler.base_decays,
                strict=True,
            )
        )
        message = "iterations %d to %d in batches of %d; trainable parameter tensors: %s"
        logger.info(message, self.start_iter, self.max_iter, self.batch_size, groups)

    def run_step(self) -> None:
        assert self._iterator is not None, "before_train precedes it"
        started = perf_counter()
        try:
            batch = next(self._iterator, None)
            if batch is None:
                raise ValueError(f"the training data ended before iteration {self.iter}")
            step = self.train_step(self.iter, batch, started)
        except Exception as error:
            # A signal to the process group may end loader processes and other ranks before this
            # process. The weights are then still those of the last completed iteration.
            if self.stop_request.requested and not self.train_step.stepping:
                raise self.stop_request.interruption() from error
            raise
        self.last_step = step
        self.storage.put_later(step.scalars)
        self.storage.put_scalars(seconds=step.seconds, data_seconds=step.data_seconds)
        if faulty := getattr(self.batches, "num_faulty", 0):
            self.storage.put_scalar("faulty_files", faulty, smoothing_hint=False)

    def after_step(self) -> None:
        """Call the hooks; end training if a process was asked to stop."""
        super().after_step()
        if self.result_check.stop:
            raise self.stop_request.interruption()

    def check_results(self) -> None:
        """Check results that were not; an error of the last iteration is raised."""
        self.result_check()
