"""The trainer's hooks: metrics, checkpoints, evaluation and the EMA teacher."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fvcore.common.history_buffer import HistoryBuffer

from clouds import comm
from clouds.d2 import CfgNode
from clouds.engine.best_checkpoint import SOURCE_VAL, BestCheckpoint
from clouds.engine.checkpoint import Checkpointer, PeriodicCheckpointer
from clouds.engine.interrupt import Interrupted, StopRequest
from clouds.engine.loggers import RunLogger, build_loggers
from clouds.engine.metrics import MetricsFile, ProgressLine, Record, console_line, memory_gib
from clouds.engine.step_result import StepResult
from clouds.engine.train_loop import HookBase
from clouds.engine.weight_average import WeightAverage
from clouds.evaluation import Results
from clouds.files import partial_files
from clouds.self_training.ema import EMATeacher
from clouds.self_training.filters.class_loss import ClassLosses
from clouds.self_training.pseudo_labeler import PseudoLabeler

logger = logging.getLogger(__name__)

ETA_WINDOW = 100
"""Number of iterations whose median duration the remaining time is estimated from."""


class MetricsHook(HookBase):
    """Writes training records every `period` iterations and after the last.

    A record has the scalars that were put into `trainer.storage` since the previous one. Its state
    is the values since the last record, so that the records of a resumed run are those of an
    uninterrupted one. Losses are taken in the next iteration, unless a record is due: on a GPU they
    are not there before.

    Args:
        file: metrics.json.
        period: iterations between records.
        batch_size: images of an iteration over all processes.
        device: whose memory is recorded.
        loggers: show the records, too.
    """

    checkpoint_entry = "metrics"

    def __init__(
        self,
        file: MetricsFile,
        period: int,
        batch_size: int,
        device: torch.device,
        loggers: Sequence[RunLogger] = (),
    ) -> None:
        self.file = file
        self.period = period
        self.batch_size = batch_size
        self.device = device
        self.loggers = loggers
        self.progress: ProgressLine | None = None
        self.pending: dict[str, HistoryBuffer] = {}
        self.unread: deque[tuple[StepResult, dict[str, float]]] = deque()
        self.durations = HistoryBuffer(ETA_WINDOW)

    @classmethod
    def from_config(cls, cfg: CfgNode, batch_size: int, device: torch.device) -> MetricsHook:
        """With OUTPUT_DIR, LOG_PERIOD and LOGGER."""
        file = MetricsFile(Path(cfg.OUTPUT_DIR, "metrics.json"))
        return cls(file, cfg.LOG_PERIOD, batch_size, device, build_loggers(cfg, file))

    def before_train(self) -> None:
        """Delete the records that this run will write again."""
        if not comm.is_main_process():
            return
        start = self.trainer.start_iter
        if start == 0:
            self.file.set_aside()
        self.file.start_from(start)
        for one in self.loggers:
            one.start(start)
        self.progress = ProgressLine(self.trainer.max_iter, start)

    def after_step(self) -> None:
        step = self.trainer.last_step
        assert step is not None, "after_step follows run_step"
        last = step.iteration + 1 == self.trainer.max_iter
        due = (step.iteration + 1) % self.period == 0 or last
        if due:
            self.trainer.check_results()
        if not comm.is_main_process():
            return
        self.durations.update(step.seconds)
        if self.progress is not None:
            self.progress.update()
        stored = self.trainer.storage.latest(read=False).items()
        own = {name: value for name, (value, number) in stored if number == step.iteration}
        self.unread.append((step, own))
        self.collect(wait=due)
        if due:
            self.write(step)

    def collect(self, wait: bool) -> None:
        """Take the scalars of iterations that were read, or of all, into `pending`."""
        while self.unread and (wait or self.unread[0][0].copy.is_read):
            step, own = self.unread.popleft()
            for name, value in {**step.scalars(), **own}.items():
                self.pending.setdefault(name, HistoryBuffer(self.period)).update(value)

    def write(self, step: StepResult) -> None:
        """Write the record to metrics.json, the loggers and the console; nothing is pending."""
        record: Record = {"iteration": step.iteration}
        hints = self.trainer.storage.smoothing_hints()
        for name, buffer in self.pending.items():
            mean = hints.get(name, True)
            record[name] = float(buffer.avg(self.period) if mean else buffer.latest())
        record |= learning_rates(step.learning_rates)
        if step.loss_scale is not None:
            record["loss_scale"] = step.loss_scale
        record["images_per_second"] = self.batch_size / max(record["seconds"], 1e-9)
        record["memory_gib"] = memory_gib(self.device)
        self.file.write(record)
        self.pending = {}
        for one in self.loggers:
            one.training(record)
        shown = self.progress is not None and self.progress.is_shown
        if self.progress is not None:
            self.progress.show(record)
        max_iter = self.trainer.max_iter
        seconds_left = float(self.durations.median(ETA_WINDOW)) * (max_iter - step.iteration - 1)
        level = logging.DEBUG if shown else logging.INFO  # the log file has both
        logger.log(level, "%s", console_line(record, max_iter, seconds_left))

    def write_evaluation(self, scores: Record, panels: Mapping[str, Any], iteration: int) -> None:
        """Write the scores of an evaluation and its images to metrics.json and the loggers."""
        self.file.write_evaluation(iteration, scores)
        for one in self.loggers:
            one.evaluation(scores, iteration)
            for name, panel in panels.items():
                one.image(name, panel, iteration)

    def close(self) -> None:
        """Close progress line and loggers; to be called when training ends, also by an error."""
        if self.progress is not None:
            self.progress.close()
        for one in self.loggers:
            one.close()

    def state_dict(self) -> dict[str, Any]:
        """Values since the last record, by name."""
        self.collect(wait=True)
        return {name: [v for v, _ in buffer.values()] for name, buffer in self.pending.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pending = {}
        self.unread.clear()
        for name, values in state.items():
            self.pending[name] = HistoryBuffer(self.period)
            for value in values:
                self.pending[name].update(value)


def learning_rates(by_group: dict[str, float]) -> dict[str, float]:
    """Learning rates of a record: `lr` of the head, `lr_backbone` if it is trainable.

    Each is that of the first parameter group of the head or of the backbone.
    """
    head = [rate for name, rate in by_group.items() if name.startswith("head")]
    backbone = [rate for name, rate in by_group.items() if name.startswith("backbone")]
    rates = {"lr": (head or backbone)[0]}
    if head and backbone:
        rates["lr_backbone"] = backbone[0]
    return rates


class CheckpointHook(HookBase):
    """Saves every `period` iterations, and `model_final.pth` after the last.

    Of the periodic checkpoints the newest `max_to_keep` are kept on disk; 0: all.
    """

    def __init__(self, checkpointer: Checkpointer, period: int, max_to_keep: int) -> None:
        self.checkpointer = checkpointer
        self.periodic = PeriodicCheckpointer(checkpointer, period, max_to_keep=max_to_keep or None)

    def before_train(self) -> None:
        """Delete partial files; a resumed run counts the existing checkpoints."""
        if comm.is_main_process():
            for leftover in partial_files(Path(self.checkpointer.save_dir)):
                leftover.unlink(missing_ok=True)
        if self.trainer.start_iter > 0:
            self.periodic.adopt_existing()

    def after_step(self) -> None:
        if self.trainer.iter + 1 < self.trainer.max_iter:
            self.periodic.step(self.trainer.iter)

    def after_train(self) -> None:
        """Save the final checkpoint, unless it is the one that was resumed, or there is none.

        A run that was stopped between its last iteration and the final checkpoint gets it now.
        """
        trainer, newest = self.trainer, Path(self.checkpointer.get_checkpoint_file())
        complete = 0 < trainer.max_iter == trainer.completed_iter + 1
        if trainer.completed_iter >= trainer.start_iter or (
            complete and newest.name != "model_final.pth"
        ):
            self.checkpointer.save("model_final", iteration=trainer.completed_iter)


class EvalHook(HookBase):
    """Evaluates every `period` iterations and after the last.

    A resumed run that was interrupted during an evaluation repeats it first.

    Args:
        period: iterations between evaluations; 0: only after the last.
        evaluate: runs the evaluation on all processes and leaves the model unchanged.
        metrics: its file and loggers get the results.
        stop_request: a signal interrupts the evaluation.
        average: weights that are evaluated, too, where they are no copy; their scores are
            recorded as `average/<score>`.
        validate: evaluates on the held-out images of the source; its scores are recorded as
            `source_val/<score>`.
        best: keeps the best weights.

    Attributes:
        results: of the last evaluation; None before, and without `evaluate`.
        average_results: those of the average; None if it was not evaluated.
    """

    def __init__(
        self,
        period: int,
        evaluate: Callable[[], Results] | None,
        metrics: MetricsHook,
        stop_request: StopRequest,
        average: WeightAverage | None = None,
        validate: Callable[[], Results] | None = None,
        best: BestCheckpoint | None = None,
    ) -> None:
        self.period = period
        self.evaluate = evaluate
        self.metrics = metrics
        self.stop_request = stop_request
        self.average = average
        self.validate = validate
        self.best = best
        self.results: Results | None = None
        self.average_results: Results | None = None

    def due(self, iteration: int) -> bool:
        """Whether an evaluation during training follows `iteration`."""
        last = iteration + 1 >= self.trainer.max_iter
        return self.period > 0 and (iteration + 1) % self.period == 0 and not last

    def before_train(self) -> None:
        """Repeat an interrupted evaluation."""
        previous = self.trainer.start_iter - 1
        if self.best is not None:
            self.best.start(self.trainer.start_iter)
        due = previous >= 0 and self.due(previous)
        if comm.all_gather(due and not self.metrics.file.has_evaluation(previous))[0]:
            self.run(previous)

    def after_step(self) -> None:
        if self.due(self.trainer.iter):
            self.run(self.trainer.iter)

    def after_train(self) -> None:
        self.run(self.trainer.completed_iter)

    def run(self, iteration: int) -> None:
        """Evaluate the weights after `iteration` and record the results.

        Raises:
            Interrupted: a signal arrived. It takes effect at once, since nothing is lost.
        """
        self.trainer.check_results()
        validation = None
        try:
            with self.stop_request.at_once():
                self.results = None if self.evaluate is None else self.evaluate()
                self.average_results = self.evaluate_average(iteration)
                validation = None if self.validate is None else self.validate()
        except Exception as error:
            # If the signal ended loader processes, the loader raises its own error.
            if self.stop_request.requested and not isinstance(error, Interrupted):
                raise self.stop_request.interruption() from error
            raise
        scores = self.scores(validation)
        if comm.is_main_process():
            panels = {} if self.results is None else self.results.panels
            self.metrics.write_evaluation(scores, panels, iteration)
        if self.best is not None:
            self.best.update(scores, iteration)
        comm.synchronize()

    def evaluate_average(self, iteration: int) -> Results | None:
        """Evaluate the weight average after `iteration`; None if there is none, or it is a copy."""
        if self.evaluate is None or self.average is None or self.average.is_copy(iteration):
            return None
        logger.info("evaluation of the weight average")
        with self.average.apply():
            return self.evaluate()

    def scores(self, validation: Results | None) -> Record:
        """All scores by name: those of the tests, the average and the held-out images."""
        scores: Record = {} if self.results is None else dict(self.results.flat())
        for prefix, results in (("average", self.average_results), (SOURCE_VAL, validation)):
            if results is not None:
                scores |= {f"{prefix}/{name}": value for name, value in results.flat().items()}
        return scores


class EMAHook(HookBase):
    """Initializes the teacher from the weights that training starts from, and updates it.

    The teacher's state is that of the hook, so a resumed run continues with it.
    """

    checkpoint_entry = "teacher"

    def __init__(self, teacher: EMATeacher) -> None:
        self.teacher = teacher

    def before_train(self) -> None:
        """Copy the student, unless the teacher is from a checkpoint."""
        if self.trainer.start_iter == 0:
            self.teacher.reset()

    def after_step(self) -> None:
        if self.teacher.due(self.trainer.iter):
            self.teacher.update(self.teacher.momentum_at(self.trainer.iter))

    def state_dict(self) -> dict[str, Any]:
        return self.teacher.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.teacher.load_state_dict(state)


class ClassLossHook(HookBase):
    """Takes the losses on an iteration's labelled images into the means of each class."""

    checkpoint_entry = "class_losses"

    def __init__(self, class_losses: ClassLosses, device: torch.device) -> None:
        self.class_losses, self.device = class_losses, device

    def before_step(self) -> None:
        """Forget what an iteration that failed has observed."""
        self.class_losses.discard()

    def after_step(self) -> None:
        self.class_losses.commit(self.device)

    def state_dict(self) -> dict[str, Any]:
        return self.class_losses.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.class_losses.load_state_dict(state)


def self_training_hooks(labeler: PseudoLabeler, device: torch.device) -> list[HookBase]:
    """Hooks that keep the state of pseudo-labels: the teacher, and losses that a filter needs."""
    hooks: list[HookBase] = [EMAHook(labeler.teacher)]
    if labeler.class_losses is not None:
        hooks.append(ClassLossHook(labeler.class_losses, device))
    return hooks
