"""`model_best.pth`: the weights of the best evaluation of a run.

The best is that on held-out images of the source (DATASETS.SOURCE_VAL_FRACTION). Weights that are
chosen by their scores on the test datasets have seen these; SOLVER.BEST_ON test chooses so all the
same, and then the file says it, and the results of its evaluation, the report and the card do.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clouds import comm
from clouds.d2 import CfgNode
from clouds.engine.checkpoint import Checkpointer
from clouds.engine.metrics import MetricsFile
from clouds.evaluation.evaluated_weights import SELECTION
from clouds.weights_io import DamagedFileError, read_checkpoint

logger = logging.getLogger(__name__)

FILE = "model_best"
"""Name of the file, without its suffix."""

SOURCE_VAL = "source_val"
"""First part of the names of scores on held-out images of the source."""

SCORES = {"source": f"{SOURCE_VAL}/mean/mIoU", "test": "mean/mIoU"}
"""SOLVER.BEST_ON -> the score by which weights are chosen."""


class BestCheckpoint:
    """Keeps the weights of the evaluation with the highest score.

    The evaluations before a resumed iteration are read from metrics.json, so that a resumed run
    keeps what an uninterrupted one does.

    Args:
        checkpointer: writes the file.
        file: metrics.json, which has the evaluations.
        on: of SCORES.
        datasets: those that the score is of.

    Attributes:
        best: score and iteration; None before the first evaluation.
    """

    def __init__(
        self, checkpointer: Checkpointer, file: MetricsFile, on: str, datasets: tuple[str, ...]
    ) -> None:
        self.checkpointer = checkpointer
        self.file = file
        self.on = on
        self.datasets = datasets
        self.best: tuple[float, int] | None = None

    @classmethod
    def from_config(
        cls, cfg: CfgNode, checkpointer: Checkpointer, file: MetricsFile
    ) -> BestCheckpoint | None:
        """With SOLVER.BEST_ON; None if there is no held-out image by which to choose."""
        on = cfg.SOLVER.BEST_ON
        if on == "source" and cfg.DATASETS.SOURCE_VAL_FRACTION == 0:
            return None
        datasets = cfg.DATASETS.TRAIN if on == "source" else cfg.DATASETS.TEST
        return cls(checkpointer, file, on, tuple(datasets))

    def start(self, iteration: int) -> None:
        """Find the best among the evaluations before `iteration`, after metrics.json was cut."""
        if not comm.is_main_process():
            return  # the main process decides, see `update`
        if self.on == "test":
            logger.warning(
                "SOLVER.BEST_ON test: %s.pth is chosen by the test datasets %s, so its scores on "
                "them are not those of a model that never saw them",
                *(FILE, ", ".join(self.datasets)),
            )
        self.best = self._best_recorded() if iteration > 0 else None
        path = Path(self.checkpointer.save_dir, f"{FILE}.pth")
        if self.best is not None and (problem := _problem(path, self.best[1])):
            logger.warning(
                "'%s' with the best weights so far (iteration %d) %s: it will have the best of "
                "the evaluations from here on",
                *(path, self.best[1] + 1, problem),
            )
            self.best = None

    def update(self, scores: Mapping[str, Any], iteration: int) -> None:
        """Save the weights after `iteration` if its score is the highest. A collective operation.

        Raises:
            NonFiniteWeightsError, OSError: see `Checkpointer.save`.
        """
        score = self._score(scores)
        is_best = score is not None and (self.best is None or score > self.best[0])
        if comm.all_gather(is_best)[0]:
            assert score is not None, "all processes have the same scores"
            self.best = score, iteration
            self.checkpointer.save_weights(
                FILE, iteration=iteration, **{SELECTION: self.selection()}
            )

    def selection(self) -> str:
        """How the weights were chosen, as a sentence."""
        assert self.best is not None, "there was an evaluation"
        score, iteration = self.best
        names = ", ".join(self.datasets)
        start = f"Weights after iteration {iteration + 1}, the best of the run's evaluations by"
        if self.on == "source":
            return f"{start} mIoU on held-out images of the source {names}: {score:.2f} %."
        return (
            f"{start} mIoU on the test datasets {names}: {score:.2f} %. They were chosen on these, "
            "so their scores there are not those of a model that never saw them."
        )

    def _best_recorded(self) -> tuple[float, int] | None:
        """The best evaluation in metrics.json, of equal ones the first."""
        best: tuple[float, int] | None = None
        for record in self.file.records():
            score = self._score(record) if record.get("evaluation") else None
            if score is not None and (best is None or score > best[0]):
                best = score, int(record["iteration"])
        return best

    def _score(self, scores: Mapping[str, Any]) -> float | None:
        """The score that decides; None if no class of it was labelled or predicted."""
        score = scores.get(SCORES[self.on])
        return float(score) if score is not None and math.isfinite(score) else None


def _problem(path: Path, iteration: int) -> str:
    """Why a file has not the weights after `iteration`, as a predicate; empty: it has them."""
    if not path.is_file():
        return "is missing"
    try:
        saved = read_checkpoint(path, mmap=True).get("iteration")
    except DamagedFileError as error:
        return f"is damaged ({error})"
    if saved == iteration:
        return ""
    # the interrupted run has replaced them after the checkpoint that is resumed
    return f"has been replaced by those of iteration {saved + 1 if isinstance(saved, int) else '?'}"
