"""Where numbers go: metrics.json, the console line and TensorBoard.

metrics.json has one JSON object per line. A training record is
`{"iteration", "total_loss", <losses>, "grad_norm", "lr", …}`, with losses and gradient norm as
means over the iterations since the record before; an evaluation record has
`{"iteration", "evaluation": true, <metrics>}`. Numbers that are not finite are null.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import resource
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clouds.files import written_whole

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

logger = logging.getLogger(__name__)

Record = dict[str, Any]


class MetricsFile:
    """metrics.json of a run, which a resumed run goes on with.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def records(self) -> list[Record]:
        """What is in the file. A line that a kill cut short is left out."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                logger.warning("%s: left out an incomplete line: %.80s", self.path, line)
        return records

    def keep(self, wanted: Callable[[Record], bool]) -> None:
        """Drop the records that `wanted` refuses."""
        records = self.records()
        kept = [record for record in records if wanted(record)]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        if not self.path.exists() or text == self.path.read_text():
            return
        logger.info("%s: dropped %d records", self.path, len(records) - len(kept))
        with written_whole(self.path, "w") as file:
            file.write(text)

    def start_from(self, iteration: int) -> None:
        """Drop what a run that goes on with `iteration` will write again."""
        self.keep(lambda record: record["iteration"] < iteration)

    def set_aside(self) -> None:
        """Keep the file of an earlier run under another name."""
        if self.path.exists():
            number = 1 + sum(1 for _ in self.path.parent.glob(f"{self.path.stem}.old*.json"))
            other = self.path.with_name(f"{self.path.stem}.old{number}.json")
            self.path.rename(other)
            logger.warning("kept the metrics of an earlier run as %s", other)

    def write(self, record: Record) -> None:
        """Append one record."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({key: plain(value) for key, value in record.items()}) + "\n")

    def write_evaluation(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Append the evaluation after `iteration`, in place of an earlier one of it."""
        self.keep(lambda r: not (r.get("evaluation") and r["iteration"] == iteration))
        self.write({"iteration": iteration, "evaluation": True, **metrics})

    def has_evaluation(self, iteration: int) -> bool:
        """Whether there is an evaluation record of `iteration`."""
        return any(r.get("evaluation") and r["iteration"] == iteration for r in self.records())


def plain(value: Any) -> Any:
    """`value` as JSON has it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoard:
    """TensorBoard files in a folder, opened at the first thing written.

    Args:
        folder: of the event files.
        start: iteration that the run goes on with; what is there from it on is hidden.
    """

    def __init__(self, folder: Path, start: int) -> None:
        self.folder = folder
        self.start = start
        self._writer: SummaryWriter | None = None

    @property
    def writer(self) -> SummaryWriter:
        """The writer, whose import takes seconds."""
        if self._writer is None:
            from torch.utils.tensorboard.writer import SummaryWriter

            purge = self.start or None
            self._writer = SummaryWriter(str(self.folder), purge_step=purge)
        return self._writer

    def scalars(self, values: Mapping[str, Any], iteration: int) -> None:
        """Write the finite numbers among `values`."""
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self.writer.add_scalar(name, value, iteration)
        self.writer.flush()

    def picture(self, name: str, image: Any, iteration: int) -> None:
        """Write an image, uint8 (H, W, 3) RGB."""
        self.writer.add_image(name, image, iteration, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: of the GPU when it has one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def console_line(record: Record, max_iter: int, seconds_left: float) -> str:
    """A training record as one line.

    Of the losses, the total and those of the last decoder layer (no number at the end of the
    name) are shown; metrics.json has all.
    """
    shown = [
        f"{name.removeprefix('loss_')} {value:.3f}"
        for name, value in record.items()
        if name.startswith("loss_") and name != "loss_scale" and not re.search(r"_\d+$", name)
    ]
    share = record["data_seconds"] / record["seconds"] if record["seconds"] else 0.0
    parts = [
        f"iteration {record['iteration'] + 1}/{max_iter}",
        f"ETA {timedelta(seconds=round(seconds_left))}",
        f"loss {record['total_loss']:.4g}" + (f" ({', '.join(shown)})" if shown else ""),
        f"grad {record['grad_norm']:.3g}",
        f"lr {record['lr']:.3g}",
        f"{record['images_per_second']:.3g} img/s",
        f"data {record['data_seconds']:.3f} s ({share:.0%})",
        f"mem {record['memory_gib']:.1f} GiB",
    ]
    return "  ".join(parts)


def tensorboard_folder(output_dir: str | os.PathLike[str]) -> Path:
    """Where the event files of a run lie."""
    return Path(output_dir, "tensorboard")
