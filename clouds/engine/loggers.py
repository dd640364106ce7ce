"""Where the numbers of a run are shown besides metrics.json: TensorBoard, CSV, Weights & Biases.

LOGGER names them. Cards have the name `<group>/<what>`, and few are shown: the losses of the last
decoder layer without those of the others, the scores of datasets without those of classes.
metrics.json and CSV files have all numbers.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from clouds.d2 import CfgNode
from clouds.engine.metrics import MetricsFile, Record, is_last_layer_loss
from clouds.evaluation.metrics import is_summary
from clouds.evaluation.report import plain
from clouds.files import atomic_write
from clouds.messages import install_extra

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

logger = logging.getLogger(__name__)

OPTIMIZER = ("grad_norm", "loss_scale", "lr", "lr_backbone")
SPEED = ("seconds", "data_seconds", "images_per_second", "memory_gib")
"""Names of numbers in training records, by the group of their cards."""

RUN_ID = "wandb_id.txt"
"""File in OUTPUT_DIR with the id of the run at Weights & Biases, which a resumed run continues."""


def training_tag(name: str) -> str | None:
    """The card of a number in a training record; None: it is not shown."""
    if name in OPTIMIZER:
        return f"optimizer/{name}"
    if name in SPEED:
        return f"speed/{name}"
    if name == "total_loss":
        return "loss/total"
    if name.startswith("loss_"):
        return f"loss/{name.removeprefix('loss_')}" if is_last_layer_loss(name) else None
    return f"train/{name}"


def evaluation_tag(name: str) -> str | None:
    """The card of a score, `<score>/<dataset>` for `<dataset>/<score>`; None: it is not shown."""
    dataset, _, score = name.rpartition("/")
    return f"{score}/{dataset}" if is_summary(score) else None


class RunLogger(Protocol):
    """Shows the numbers of a run; called on the main process alone."""

    def start(self, iteration: int) -> None:
        """Before the first step: hide what an interrupted run has shown from this iteration on."""

    def training(self, record: Record) -> None:
        """Show a training record of metrics.json, which is written already."""

    def evaluation(self, scores: Mapping[str, float], iteration: int) -> None:
        """Show the scores of an evaluation, which are in metrics.json already."""

    def image(self, name: str, image: Any, iteration: int) -> None:
        """Show an image, uint8 (H, W, 3) RGB."""

    def close(self) -> None:
        """Everything is on the disk; further values may follow."""


class TensorBoard:
    """TensorBoard event files in a folder, created at the first value.

    From iteration `start` of the run on, TensorBoard discards values of earlier files, which an
    interrupted run left; those of the files that this object wrote are kept.
    """

    def __init__(self, folder: Path, start: int = 0) -> None:
        self.folder = folder
        self.first: int | None = start
        self._writer: SummaryWriter | None = None

    def start(self, iteration: int) -> None:
        self.close()
        self.first = iteration

    @property
    def writer(self) -> SummaryWriter:
        """The writer, created at the first access."""
        if self._writer is None:
            # Imported here because it takes seconds.
            from torch.utils.tensorboard.writer import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=self.first)
            self.first = None
        return self._writer

    def training(self, record: Record) -> None:
        self.scalars(cards(record), record["iteration"])

    def evaluation(self, scores: Mapping[str, float], iteration: int) -> None:
        self.scalars(cards(scores, evaluation=True), iteration)

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """Write numbers by the names of their cards."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, iteration)
        self.writer.flush()

    def image(self, name: str, image: Any, iteration: int) -> None:
        self.writer.add_image(f"images/{name}", image, iteration, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        """Close the event file; further values open a new one."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def cards(values: Mapping[str, Any], evaluation: bool = False) -> dict[str, float]:
    """The finite numbers that are shown, by the names of their cards."""
    tag = evaluation_tag if evaluation else training_tag
    named = ((tag(name), value) for name, value in values.items() if name != "iteration")
    return {
        name: float(value)
        for name, value in named
        if name is not None and isinstance(value, int | float) and math.isfinite(value)
    }


class CSVFiles:
    """metrics.csv and evaluations.csv: the records of metrics.json as tables, a column per name.

    The cell of a number that is not finite is empty.

    Args:
        file: metrics.json.
    """

    def __init__(self, file: MetricsFile) -> None:
        self.file = file
        self.paths = {
            False: file.path.with_name("metrics.csv"),
            True: file.path.with_name("evaluations.csv"),
        }
        self._columns: dict[bool, list[str]] = {}

    def start(self, iteration: int) -> None:
        for evaluation, path in self.paths.items():
            if path.exists() or self._records(evaluation):
                self._rewrite(evaluation)

    def training(self, record: Record) -> None:
        columns = self._columns.get(False)
        if columns is None or not record.keys() <= set(columns):
            self._rewrite(False)
            return
        with self.paths[False].open("a", encoding="utf-8", newline="") as file:
            file.write(_table([plain(record)], columns))

    def evaluation(self, scores: Mapping[str, float], iteration: int) -> None:
        self._rewrite(True)  # an earlier evaluation of the same iteration is replaced

    def image(self, name: str, image: Any, iteration: int) -> None:
        """Nothing: images are in OUTPUT_DIR/visualizations."""

    def close(self) -> None:
        """Nothing: files are closed after each record."""

    def _records(self, evaluation: bool) -> list[Record]:
        return [r for r in self.file.records() if bool(r.get("evaluation")) == evaluation]

    def _rewrite(self, evaluation: bool) -> None:
        records = self._records(evaluation)
        columns = [n for n in dict.fromkeys(n for r in records for n in r) if n != "evaluation"]
        self._columns[evaluation] = columns
        with atomic_write(self.paths[evaluation], "w", fsync=False) as file:
            file.write(_table([dict(zip(columns, columns, strict=True)), *records], columns))


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writerows(rows)
    return text.getvalue()


class WeightsAndBiases:
    """A run at Weights & Biases; project, entity and mode are those of wandb's variables.

    WANDB_PROJECT (here `clouds` without it), WANDB_ENTITY, WANDB_MODE (`offline` keeps the files in
    OUTPUT_DIR/wandb, for `wandb sync`) and WANDB_API_KEY are read by wandb. Iterations that a
    resumed run repeats are there twice, since what wandb has is not deleted.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.folder = Path(cfg.OUTPUT_DIR)
        self.config = yaml.safe_load(cfg.dump())
        self._run: Any = None

    @property
    def run(self) -> Any:
        """The run, begun or continued at the first access."""
        if self._run is None:
            import wandb

            file = self.folder / RUN_ID
            name = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "clouds"),
                dir=str(self.folder),
                name=self.folder.resolve().name,
                id=name or None,
                resume="allow",
                config=self.config,
            )
            # Not wandb's own step: a resumed run repeats iterations after its checkpoint.
            self._run.define_metric("*", step_metric="iteration")
            with atomic_write(file, "w") as stream:
                stream.write(self._run.id)
        return self._run

    def start(self, iteration: int) -> None:
        if iteration == 0:
            (self.folder / RUN_ID).unlink(missing_ok=True)

    def training(self, record: Record) -> None:
        self.run.log({"iteration": record["iteration"], **cards(record)})

    def evaluation(self, scores: Mapping[str, float], iteration: int) -> None:
        self.run.log({"iteration": iteration, **cards(scores, evaluation=True)})

    def image(self, name: str, image: Any, iteration: int) -> None:
        import wandb

        self.run.log({"iteration": iteration, f"images/{name}": wandb.Image(image)})

    def close(self) -> None:
        """End the run; further values continue it."""
        if self._run is not None:
            self._run.finish()
            self._run = None


def build_loggers(cfg: CfgNode, file: MetricsFile) -> list[RunLogger]:
    """Those that LOGGER names.

    Args:
        cfg: uses LOGGER and OUTPUT_DIR.
        file: metrics.json.

    Raises:
        ImportError: a package is missing.
    """
    check_loggers(cfg)
    kinds: dict[str, Any] = {
        "tensorboard": lambda: TensorBoard(Path(cfg.OUTPUT_DIR, "tensorboard")),
        "csv": lambda: CSVFiles(file),
        "wandb": lambda: WeightsAndBiases(cfg),
    }
    return [kinds[name]() for name in dict.fromkeys(cfg.LOGGER)]


def check_loggers(cfg: CfgNode) -> None:
    """Raise ImportError if LOGGER names one whose package is missing."""
    if "wandb" in cfg.LOGGER and find_spec("wandb") is None:
        raise ImportError(
            f"LOGGER names wandb, whose package is missing: {install_extra('wandb')}. Or set "
            "LOGGER \"('tensorboard', 'csv')\"."
        )
