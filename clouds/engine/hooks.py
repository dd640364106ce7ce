"""What happens around iterations: metrics, checkpoints, evaluation.

A hook is called with the trainer, on every process. The trainer's `hooks` run in order; one that
changes what a checkpoint holds (an EMA teacher, say) belongs before `CheckpointHook`, and adds its
state with `trainer.checkpointer.add_checkpointable`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fvcore.common.history_buffer import HistoryBuffer

from clouds import comm
from clouds.engine.checkpoint import PeriodicCheckpointer
from clouds.engine.interrupt import Interrupted
from clouds.engine.metrics import (
    MetricsFile,
    Record,
    TensorBoard,
    console_line,
    memory_gib,
    tensorboard_folder,
)
from clouds.engine.train_loop import Step
from clouds.files import unfinished
from clouds.self_training.ema import EMATeacher

if TYPE_CHECKING:
    from clouds.engine.trainer import Trainer
    from clouds.evaluation import Results

logger = logging.getLogger(__name__)

ETA_WINDOW = 100
"""Iterations whose median duration the remaining time is told from."""


class Hook:
    """Base of all hooks: does nothing."""

    def before_train(self, trainer: Trainer) -> None:
        """Once, when weights are loaded and before the first iteration."""

    def before_step(self, trainer: Trainer, iteration: int) -> None:
        """Before each iteration."""

    def after_step(self, trainer: Trainer, step: Step) -> None:
        """After each iteration, when the optimizer has stepped."""

    def after_train(self, trainer: Trainer) -> None:
        """Once, after the last iteration; not when training broke off."""


class MetricsHook(Hook):
    """Writes training records every `period` iterations and after the last.

    Its state, the iterations since the last record, belongs into checkpoints: so the records of a
    resumed run are those of the unbroken one.

    Args:
        output_dir: folder of metrics.json and the TensorBoard files.
        period: iterations between records.
    """

    def __init__(self, output_dir: str, period: int) -> None:
        self.file = MetricsFile(Path(output_dir, "metrics.json"))
        self.folder = tensorboard_folder(output_dir)
        self.period = period
        self.tensorboard = TensorBoard(self.folder, start=0)
        self.pending: dict[str, HistoryBuffer] = {}
        self.durations = HistoryBuffer(ETA_WINDOW)

    def before_train(self, trainer: Trainer) -> None:
        """Drop the records that this run will write again."""
        if not comm.is_main_process():
            return
        if trainer.start == 0:
            self.file.set_aside()
        self.file.start_from(trainer.start)
        self.tensorboard = TensorBoard(self.folder, trainer.start)

    def after_step(self, trainer: Trainer, step: Step) -> None:
        """Take the iteration in; write a record when it is time."""
        if not comm.is_main_process():
            return
        self.durations.update(step.seconds)
        values = {
            "total_loss": step.total,
            **step.losses,
            "grad_norm": step.grad_norm,
            "seconds": step.seconds,
            "data_seconds": step.data_seconds,
        }
        for name, value in values.items():
            self.pending.setdefault(name, HistoryBuffer(self.period)).update(value)
        last = step.iteration + 1 == trainer.max_iter
        if (step.iteration + 1) % self.period == 0 or last:
            self.write(trainer, step)
            self.pending = {}

    def write(self, trainer: Trainer, step: Step) -> None:
        """Write the record to metrics.json, TensorBoard and the console."""
        record: Record = {"iteration": step.iteration}
        record |= {name: float(b.avg(self.period)) for name, b in self.pending.items()}
        record |= rates(step.learning_rates)
        if trainer.scaler.is_enabled():
            record["loss_scale"] = step.loss_scale
        record["images_per_second"] = trainer.batch_size / max(record["seconds"], 1e-9)
        record["memory_gib"] = memory_gib(trainer.device)
        self.file.write(record)
        scalars = {f"train/{name}": value for name, value in record.items() if name != "iteration"}
        self.tensorboard.scalars(scalars, step.iteration)
        left = trainer.max_iter - step.iteration - 1
        seconds_left = float(self.durations.median(ETA_WINDOW)) * left
        logger.info("%s", console_line(record, trainer.max_iter, seconds_left))

    def after_train(self, trainer: Trainer) -> None:
        """Close the TensorBoard file, which is opened again when more is written."""
        self.tensorboard.close()

    def state_dict(self) -> dict[str, Any]:
        """Values since the last record, by name."""
        return {name: [v for v, _ in buffer.values()] for name, buffer in self.pending.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.pending = {}
        for name, values in state.items():
            self.pending[name] = HistoryBuffer(self.period)
            for value in values:
                self.pending[name].update(value)


def rates(by_group: dict[str, float]) -> dict[str, float]:
    """Record entries of the learning rates: `lr` of the head, `lr_backbone` when it trains."""
    heads = [rate for name, rate in by_group.items() if name.startswith("head")]
    backbones = [rate for name, rate in by_group.items() if name.startswith("backbone")]
    found = {"lr": (heads or backbones)[0]}
    if heads and backbones:
        found["lr_backbone"] = backbones[0]
    return found


class CheckpointHook(Hook):
    """Saves every `period` iterations, and `model_final.pth` after the last.

    Args:
        period: iterations between checkpoints.
        keep: newest periodic checkpoints that stay on disk; 0: all.
    """

    def __init__(self, period: int, keep: int) -> None:
        self.period = period
        self.keep = keep
        self.periodic: PeriodicCheckpointer | None = None

    def before_train(self, trainer: Trainer) -> None:
        """Clear up half-written files; count the checkpoints that a resumed run finds."""
        self.periodic = PeriodicCheckpointer(trainer.checkpointer, self.period, self.keep or None)
        if comm.is_main_process():
            for leftover in unfinished(Path(trainer.checkpointer.save_dir)):
                leftover.unlink(missing_ok=True)
        if trainer.start > 0:
            self.periodic.adopt_existing()

    def after_step(self, trainer: Trainer, step: Step) -> None:
        """Save when it is time to."""
        assert self.periodic is not None, "before_train comes first"
        if step.iteration + 1 < trainer.max_iter:
            self.periodic.step(step.iteration)

    def after_train(self, trainer: Trainer) -> None:
        """Save the final checkpoint, unless nothing was trained."""
        if trainer.completed >= trainer.start:
            trainer.checkpointer.save("model_final", iteration=trainer.completed)


class EvalHook(Hook):
    """Evaluates every `period` iterations and after the last.

    A resumed run whose last checkpoint lies where an evaluation was due, and broke off in it,
    evaluates first.

    Args:
        period: iterations between evaluations; 0: only after the last.
        evaluate: runs the evaluation on all processes and leaves the model as it was.
        metrics: its file and TensorBoard get the results.
    """

    def __init__(self, period: int, evaluate: Callable[[], Results], metrics: MetricsHook) -> None:
        self.period = period
        self.evaluate = evaluate
        self.metrics = metrics

    def due(self, iteration: int, max_iter: int) -> bool:
        """Whether an evaluation in the midst of training follows `iteration`."""
        return self.period > 0 and (iteration + 1) % self.period == 0 and iteration + 1 < max_iter

    def before_train(self, trainer: Trainer) -> None:
        """Make up for an evaluation that was broken off."""
        previous = trainer.start - 1
        lacking = (
            previous >= 0
            and self.due(previous, trainer.max_iter)
            and not self.metrics.file.has_evaluation(previous)
        )
        if comm.all_gather(lacking)[0]:
            self.run(trainer, previous)

    def after_step(self, trainer: Trainer, step: Step) -> None:
        """Evaluate when it is time to."""
        if self.due(step.iteration, trainer.max_iter):
            self.run(trainer, step.iteration)

    def after_train(self, trainer: Trainer) -> None:
        """Evaluate the final weights."""
        trainer.results = self.run(trainer, trainer.completed)

    def run(self, trainer: Trainer, iteration: int) -> Results:
        """Evaluate the weights after `iteration` and write down the results.

        Raises:
            Interrupted: a signal came. Nothing is half done then, so it does not wait.
        """
        try:
            with trainer.stop.at_once():
                results = self.evaluate()
        except Exception as error:
            # The signal may have ended loader processes, which fails the loader in its own way.
            if trainer.stop.requested and not isinstance(error, Interrupted):
                raise trainer.stop.interruption() from error
            raise
        if comm.is_main_process():
            self.record(results, iteration)
        comm.synchronize()
        return results

    def record(self, results: Results, iteration: int) -> None:
        """Write the results to metrics.json and TensorBoard, with the pictures."""
        metrics = results.flat()
        self.metrics.file.write_evaluation(iteration, metrics)
        self.metrics.tensorboard.scalars(
            {f"eval/{name}": value for name, value in metrics.items()}, iteration
        )
        for name, picture in results.pictures.items():
            self.metrics.tensorboard.picture(f"eval/{name}", picture, iteration)


class TeacherHook(Hook):
    """Starts the teacher from the weights that training starts from, and updates it.

    Its state belongs into checkpoints: a resumed run goes on with the teacher it had.
    """

    def __init__(self, teacher: EMATeacher) -> None:
        self.teacher = teacher

    def before_train(self, trainer: Trainer) -> None:
        """Copy the student, unless the teacher came from a checkpoint."""
        if trainer.start == 0:
            self.teacher.restart()

    def after_step(self, trainer: Trainer, step: Step) -> None:
        """Update the teacher when it is time to."""
        if self.teacher.due(step.iteration):
            self.teacher.update()
