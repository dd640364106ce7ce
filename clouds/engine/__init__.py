"""Training: loop and hooks, optimizer, learning rates, checkpoints and processes.

`Trainer(cfg).train()` trains a model according to a config.
"""

from __future__ import annotations

from clouds.engine.checkpoint import Checkpointer
from clouds.engine.hooks import EMAHook
from clouds.engine.interrupt import Interrupted
from clouds.engine.step_result import NonFiniteLossError
from clouds.engine.train_loop import HookBase
from clouds.engine.trainer import Trainer

__all__ = [
    "Checkpointer",
    "EMAHook",
    "HookBase",
    "Interrupted",
    "NonFiniteLossError",
    "Trainer",
]
