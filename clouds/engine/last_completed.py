"""Saving of the last completed iteration when a signal or an error ends training."""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import Any

import torch

from clouds import comm
from clouds.engine.checkpoint import Checkpointer
from clouds.engine.parallel import is_sharded
from clouds.engine.train_loop import HookBase, TrainStep

logger = logging.getLogger(__name__)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the errors of a full disk, an exhausted quota, and a limit of the size of files."""


class LastCompleted(HookBase):
    """Knows whether weights, optimizer and hooks are those after the last completed iteration.

    They are not if an error ended the optimizer's step, a hook, or a forward pass that had changed
    buffers, such as the statistics of batch normalization. It runs after all hooks that a
    checkpoint has the state of.

    Args:
        checkpointer: saves.
        step: tells whether the optimizer was in its step.
    """

    def __init__(self, checkpointer: Checkpointer, step: TrainStep) -> None:
        self.checkpointer = checkpointer
        self.step = step
        self.iteration = -1
        self.versions: list[int] = []

    def before_train(self) -> None:
        self.iteration = self.trainer.start_iter - 1
        self.versions = self._versions()

    def after_step(self) -> None:
        self.iteration = self.trainer.iter
        self.versions = self._versions()

    def _tensors(self) -> list[torch.Tensor]:
        """Parameters and buffers of the model that are saved."""
        state: dict[str, Any] = self.checkpointer.model.state_dict(keep_vars=True)
        return [comm.own_part(v) for v in state.values() if isinstance(v, torch.Tensor)]

    def _versions(self) -> list[int]:
        """Numbers that change with each change of a tensor."""
        return [tensor._version for tensor in self._tensors()]

    def obstacle(self) -> str:
        """Why the present state must not be saved; empty if it may be.

        A sharded model can be saved by all processes together, which only a stop on which they have
        agreed lets them do.
        """
        if not is_sharded(self.checkpointer.model):
            return self._own_obstacle()
        step = self.trainer.last_step
        if step is None or not step.stop:
            return "each process has only a part of the weights, and they have not agreed to stop"
        return next(filter(None, comm.all_gather(self._own_obstacle())), "")

    def _own_obstacle(self) -> str:
        """`obstacle` as this process sees it."""
        changed = self.iteration != self.trainer.completed_iter or self.step.stepping
        if changed or self.versions != self._versions():
            return "the iteration that was ended had changed the weights or a hook's state"
        check = self.step.check
        if check.failed == self.iteration or (check.unchecked and check.unchecked.problems()):
            return "losses or gradients of the last iteration are not finite"
        if not all(bool(torch.isfinite(t).all()) for t in self._tensors() if t.is_floating_point()):
            return "weights are not finite"
        return ""

    def save(self) -> str:
        """Save the last completed iteration, unless it is saved or not whole.

        Returns:
            What --resume does now: `after 7 of 12 iterations. The same command with --resume …`.

        Raises:
            OSError: the checkpoint cannot be written.
        """
        completed, checkpointer = self.trainer.completed_iter, self.checkpointer
        done = f"after {completed + 1} of {self.trainer.max_iter} iterations"
        if completed < 0:
            return f"{done}. There is nothing to save."
        lost = ""
        if checkpointer.saved_iteration != completed:
            lost = self.obstacle()
            if not lost:
                try:
                    checkpointer.save(f"model_{completed:07d}", iteration=completed)
                except RuntimeError as error:
                    raise disk_full(error) or error from error
        lost = f" They are not saved: {lost}." if lost else ""
        path = checkpointer.get_checkpoint_file()
        if not path:
            return f"{done}.{lost} There is no checkpoint."
        return f"{done}.{lost} The same command with --resume resumes from '{path}'."

    def hint(self) -> str:
        """How to resume after a loss that was not finite."""
        path = self.checkpointer.get_checkpoint_file()
        if not path or not Path(path).exists():
            return "No checkpoint was saved before it."
        return (
            f"The last checkpoint is '{path}'. --resume resumes from it; a lower SOLVER.BASE_LR "
            "may help."
        )

    def save_after(self, error: BaseException) -> None:
        """Save as `save`, and log it; an error in that is logged, too, since `error` is raised."""
        kind = type(error).__name__
        logger.debug("stopped by an error", exc_info=error)
        try:
            hint = self.save()
        except Exception as second:
            # Any: after some errors, such as those of a device, nothing works. `error` is raised.
            logger.debug("not saved", exc_info=second)
            path = self.checkpointer.get_checkpoint_file()
            then = f"--resume resumes from '{path}'" if path else "there is no checkpoint"
            hint = (
                f"after {self.trainer.completed_iter + 1} of {self.trainer.max_iter} iterations. "
                f"The last one cannot be saved ({_first_line(second)}); {then}."
            )
        if self.checkpointer.save_to_disk:
            logger.error("stopped by %s (%s) %s", kind, _first_line(error), hint)


def disk_full(error: BaseException) -> OSError | None:
    """The error of a full disk that `error` follows from, with a message; None if there is none.

    After a write that failed torch.save raises an error about positions in the file.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in DISK_FULL:
            advice = "A file of the run cannot be written. Free space, then add --resume."
            return OSError(seen.errno, f"{seen.strerror}. {advice}", seen.filename)
        seen = seen.__cause__ or seen.__context__
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
