"""The teacher in the training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clouds.engine.hooks import Hook
from clouds.self_training.ema_teacher import EMATeacher

if TYPE_CHECKING:
    from clouds.engine.loop import Step
    from clouds.engine.trainer import Trainer


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
