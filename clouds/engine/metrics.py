"""Metrics of a run: scalar storage, metrics.json, and what the console shows.

metrics.json has one JSON object per line. A training record is
`{"iteration", "total_loss", <losses>, "grad_norm", "lr", …}`, with losses and gradient norm as
means over the iterations since the previous record; an evaluation record is
`{"iteration", "evaluation": true, <metrics>}`. Numbers that are not finite are null.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from clouds.evaluation.report import plain
from clouds.files import atomic_write

logger = logging.getLogger(__name__)

Record = dict[str, Any]


class ScalarStorage:
    """Scalars by name, with the methods of Detectron2's `EventStorage` that hooks call.

    Attributes:
        iter: the current iteration, which the trainer sets.
    """

    def __init__(self) -> None:
        self.iter = 0
        self._latest: dict[str, tuple[float, int]] = {}
        self._unread: tuple[Callable[[], Mapping[str, float]], int] | None = None
        self._smoothing_hints: dict[str, bool] = {}

    def put_scalar(
        self, name: str, value: Any, smoothing_hint: bool = True, cur_iter: int | None = None
    ) -> None:
        """Store the value of a scalar in an iteration.

        Args:
            name: its name in metrics.json; for the name of its card see `loggers.training_tag`.
            value: a number, or a tensor with one element.
            smoothing_hint: records have the mean since the previous record, not the last value.
            cur_iter: the iteration; None: the current one.
        """
        self._latest[name] = float(value), self.iter if cur_iter is None else cur_iter
        self._smoothing_hints[name] = smoothing_hint

    def put_scalars(
        self, *, smoothing_hint: bool = True, cur_iter: int | None = None, **scalars: Any
    ) -> None:
        """`put_scalar` for several scalars."""
        for name, value in scalars.items():
            self.put_scalar(name, value, smoothing_hint, cur_iter)

    def put_later(self, scalars: Callable[[], Mapping[str, float]]) -> None:
        """Store scalars of the current iteration that are read when they are needed.

        At the latest that is at the next call. Values that are put in the same iteration replace
        them.
        """
        self.latest()
        self._unread = scalars, self.iter

    def latest(self, read: bool = True) -> dict[str, tuple[float, int]]:
        """Name of each scalar -> its last value, and the iteration of that value.

        On a GPU this waits for the losses of the current iteration, unless `read` is False.
        """
        if read and self._unread is not None:
            (scalars, iteration), self._unread = self._unread, None
            for name, value in scalars().items():
                if self._latest.get(name, (0.0, -1))[1] < iteration:
                    self.put_scalar(name, value, cur_iter=iteration)
        return self._latest

    def smoothing_hints(self) -> dict[str, bool]:
        """Name of each scalar -> its last smoothing hint."""
        return self._smoothing_hints


class MetricsFile:
    """metrics.json of a run, to which a resumed run appends."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def records(self) -> list[Record]:
        """All records of the file, without lines that are incomplete or damaged after a kill."""
        if not self.path.exists():
            return []
        records = []
        for number, line in enumerate(self.path.read_bytes().splitlines(), 1):
            record = _parse(line)
            if record is None:
                message = "%s:%d: skipped a line that is incomplete or no record: %.80r"
                logger.warning(message, self.path, number, line)
            else:
                records.append(record)
        return records

    def keep(self, wanted: Callable[[Record], bool]) -> None:
        """Delete the records for which `wanted` returns False."""
        records = self.records()
        kept = [record for record in records if wanted(record)]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        if not self.path.exists() or text.encode() == self.path.read_bytes():
            return
        logger.info("%s: deleted %d records", self.path, len(records) - len(kept))
        with atomic_write(self.path, "w") as file:
            file.write(text)

    def start_from(self, iteration: int) -> None:
        """Delete the records that a run starting at `iteration` will write again."""
        self.keep(lambda record: record["iteration"] < iteration)

    def set_aside(self) -> None:
        """Rename the file of an earlier run, if there is one."""
        if self.path.exists():
            names = (f"{self.path.stem}.old{number}.json" for number in itertools.count(1))
            other = next(p for name in names if not (p := self.path.with_name(name)).exists())
            self.path.rename(other)
            logger.warning("renamed the metrics of an earlier run to %s", other)

    def write(self, record: Record) -> None:
        """Append one record."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(plain(record)) + "\n")

    def write_evaluation(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Append the evaluation after `iteration`; an earlier record of it is deleted."""
        self.keep(lambda r: not (r.get("evaluation") and r["iteration"] == iteration))
        self.write({"iteration": iteration, "evaluation": True, **metrics})

    def has_evaluation(self, iteration: int) -> bool:
        """Whether there is an evaluation record of `iteration`."""
        return any(r.get("evaluation") and r["iteration"] == iteration for r in self.records())


def _parse(line: bytes) -> Record | None:
    """A line of metrics.json as a record; None if it is no JSON object with an int `iteration`."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("iteration")) is int else None


def is_last_layer_loss(name: str) -> bool:
    """Whether a number in a training record is a loss of the last decoder layer.

    Those of the other layers end in their number, such as `loss_ce_3`; `loss_scale` is no loss.
    """
    return name.startswith("loss_") and name != "loss_scale" and not re.search(r"_\d+$", name)


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: allocated on a GPU, else resident; nan on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ModuleNotFoundError:  # Windows lacks it
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


class ProgressLine:
    """The progress of training in one line on a terminal, in color; elsewhere nothing.

    Args:
        total, start: number of iterations, and of those that are done.
    """

    def __init__(self, total: int, start: int) -> None:
        self.is_shown = sys.stdout.isatty() and sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=start,
            desc="training",
            unit="it",
            colour="green",
            dynamic_ncols=True,
            disable=not self.is_shown,
        )

    def update(self) -> None:
        """One more iteration is done."""
        self._bar.update()

    def show(self, record: Record) -> None:
        """Show numbers of a training record until the next."""
        facts = f"loss {record['total_loss']:.4g}, lr {record['lr']:.3g}"
        self._bar.set_postfix_str(f"{facts}, mem {record['memory_gib']:.1f} GiB", refresh=False)

    def close(self) -> None:
        """Leave the line as it is."""
        self._bar.close()


def console_line(record: Record, max_iter: int, seconds_left: float) -> str:
    """A training record as one line, of the losses those of the last decoder layer (no number)."""
    shown = [
        f"{name.removeprefix('loss_')} {value:.3f}"
        for name, value in record.items()
        if is_last_layer_loss(name)
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
