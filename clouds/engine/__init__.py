"""Training: the loop, its hooks, optimizer, schedule, checkpoints, processes and logs.

`Trainer(cfg).train()` is the way in; the names below are the parts that it is put together from.
"""

from __future__ import annotations

from clouds.engine.checkpoint import Checkpointer
from clouds.engine.hooks import CheckpointHook, EvalHook, Hook, MetricsHook
from clouds.engine.interrupt import Interrupted
from clouds.engine.lr_scheduler import build_schedule
from clouds.engine.optimizer import build_optimizer
from clouds.engine.train_loop import Diverged, Step
from clouds.engine.trainer import Trainer

__all__ = [
    "CheckpointHook",
    "Checkpointer",
    "Diverged",
    "EvalHook",
    "Hook",
    "Interrupted",
    "MetricsHook",
    "Step",
    "Trainer",
    "build_optimizer",
    "build_schedule",
]
