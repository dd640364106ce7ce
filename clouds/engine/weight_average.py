"""The average of the whole model's weights over training, evaluated and saved beside the last ones.

It is that of mmengine's EMAHook: a copy of the weights until a first iteration, then an exponential
moving average. Unlike the teacher (`clouds.self_training.ema`) it takes no part in training.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clouds import comm
from clouds.d2 import CfgNode
from clouds.engine.checkpoint import Checkpointer
from clouds.engine.train_loop import HookBase
from clouds.messages import format_examples
from clouds.self_training.ema import update_average

logger = logging.getLogger(__name__)

FILE = "model_average"
"""Name of the file with the average after the last iteration, without its suffix."""

FOLDER = "average"
"""Folder in OUTPUT_DIR of the average's results."""


class WeightAverage(HookBase):
    """Averages the parameters that train; others, and buffers, are the model's own.

    Args:
        model: the model that trains.
        decay: factor of the average in an update, which follows every iteration.
        start_iter: number of iterations after which averaging begins; up to there the average is a
            copy of the weights.
        checkpointer: writes FILE after the last iteration.

    Attributes:
        values: the averages, by name of the parameter; empty before training.
        applied: whether the model has the averages now, see `apply`.
    """

    checkpoint_entry = "average"

    def __init__(
        self, model: nn.Module, decay: float, start_iter: int, checkpointer: Checkpointer
    ) -> None:
        self.decay = decay
        self.start_iter = start_iter
        self.checkpointer = checkpointer
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.values: dict[str, Tensor] = {}
        self.applied = False

    @classmethod
    def from_config(
        cls, cfg: CfgNode, model: nn.Module, checkpointer: Checkpointer
    ) -> WeightAverage | None:
        """With SOLVER.WEIGHT_AVERAGE; None if it is not enabled."""
        options = cfg.SOLVER.WEIGHT_AVERAGE
        if not options.ENABLED:
            return None
        return cls(model, options.DECAY, options.START_ITER, checkpointer)

    def is_copy(self, iteration: int) -> bool:
        """Whether the average after iteration number `iteration`, from 0, is a copy of the weights.

        The first update is a copy, too.
        """
        return iteration + 1 <= max(self.start_iter, 1)

    def before_train(self) -> None:
        """Begin with a copy of the weights, unless the average is from a checkpoint."""
        start = self.trainer.start_iter
        if start > 0 and self.values:
            return
        if not self.is_copy(start - 1):
            logger.warning(
                "there is no weight average of the iterations before %d: it begins there", start
            )
        self.values = {n: p.detach().clone() for n, p in self.parameters.items()}

    def after_step(self) -> None:
        copied = self.is_copy(self.trainer.iter)
        current = [comm.own_part(p.detach()) for p in self.parameters.values()]
        averages = [comm.own_part(value) for value in self.values.values()]
        update_average(averages, current, 0.0 if copied else self.decay)

    def after_train(self) -> None:
        """Save the average, unless this run only repeats the evaluation of a complete one."""
        completed, checkpointer = self.trainer.completed_iter, self.checkpointer
        exists = Path(checkpointer.save_dir, f"{FILE}.pth").exists()
        if completed >= 0 and not (exists and completed < self.trainer.start_iter):
            with self.apply():
                checkpointer.save_weights(FILE, iteration=completed)

    @contextlib.contextmanager
    def apply(self) -> Iterator[None]:
        """The model has the averages in this context, and its own weights again afterwards.

        Tensors are exchanged, not copied, so the versions that autograd counts stay as they are;
        those of a sharded model are copied, since FSDP keeps their memory.
        """
        self._exchange()
        self.applied = True
        try:
            yield
        finally:
            self._exchange()
            self.applied = False

    def _exchange(self) -> None:
        for name, parameter in self.parameters.items():
            if comm.is_sharded(parameter):
                own, average = comm.own_part((parameter.data, self.values[name].data))
                before = own.clone()
                own.data.copy_(average)
                average.data.copy_(before)
                continue
            parameter.data, self.values[name] = self.values[name], parameter.data

    def state_dict(self) -> dict[str, Any]:
        return dict(self.values)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: it is of other parameters.
        """
        problems = sorted(self.parameters.keys() ^ state.keys())
        problems += [n for n in state if n not in problems and not self._fits(n, state[n])]
        if problems:
            raise ValueError(
                "the weight average in the checkpoint is of other parameters than those that are "
                f"trainable now: {format_examples(problems)}"
            )
        # In the memory format of the parameters, on their devices.
        self.values = {n: torch.empty_like(p) for n, p in self.parameters.items()}
        for name, value in self.values.items():
            value.copy_(comm.sharded_like(value, state[name]))

    def _fits(self, name: str, value: Tensor) -> bool:
        return value.shape == self.parameters[name].shape
