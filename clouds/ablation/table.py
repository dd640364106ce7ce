"""Tables of settings over seeds, as Markdown, LaTeX or CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tabulate import tabulate

from clouds.ablation.scores import MetricSpecs, RunResults, metric_value
from clouds.ablation.statistics import CONFIDENCE, Difference, paired_difference, summarize
from clouds.files import atomic_write

NONE = "–"
FORMATS = {".md": "markdown", ".tex": "latex", ".csv": "csv"}
"""File name extensions of the formats."""


@dataclass(frozen=True)
class Row:
    """A setting.

    Attributes:
        name: of the setting.
        results: by seed, of the runs that have them.
        planned: number of runs; those without results have failed or have not ended.
        notes: why runs have no results.
    """

    name: str
    results: Mapping[int, RunResults]
    planned: int
    notes: tuple[str, ...] = ()

    def values(self, patterns: Sequence[str]) -> dict[int, float]:
        """A metric by seed, of the runs where it is defined."""
        values = {s: metric_value(patterns, r.scores()) for s, r in sorted(self.results.items())}
        return {seed: value for seed, value in values.items() if value is not None}


@dataclass(frozen=True)
class Table:
    """Settings as rows, metrics as columns.

    Attributes:
        rows: the settings.
        metrics: columns; the difference to the baseline is shown of the first one, in CSV of all.
        baseline: name of a row.
    """

    rows: tuple[Row, ...]
    metrics: MetricSpecs
    baseline: str
    _baseline: Row = field(init=False, repr=False)

    def __post_init__(self) -> None:
        row = next(row for row in self.rows if row.name == self.baseline)
        object.__setattr__(self, "_baseline", row)

    def difference(self, row: Row, metric: str) -> Difference:
        """Paired difference of a metric to the baseline."""
        patterns = self.metrics[metric]
        return paired_difference(row.values(patterns), self._baseline.values(patterns))

    def notes(self) -> list[str]:
        """Sentences below the table."""
        seeds = sorted({seed for row in self.rows for seed in row.results})
        what = "mean ± standard deviation" if len(seeds) > 1 else "one seed"
        text = f"{what} over the seeds {', '.join(map(str, seeds))}" if seeds else "no results"
        first = next(iter(self.metrics), "")
        if len(self.rows) > 1 and len(seeds) > 1:
            text += (
                f"; Δ {first}: mean difference to {self.baseline!r} over common seeds, with its "
                f"{CONFIDENCE:.0%} confidence interval (Student's t)"
            )
        return [f"{text}.", *(note for row in self.rows for note in row.notes)]

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table for readers."""
        with_difference = len(self.rows) > 1
        first = next(iter(self.metrics), "")
        header = ["setting", "seeds", *self.metrics]
        if with_difference:
            header[3:3] = [f"Δ {first}", f"{CONFIDENCE:.0%} interval"]
        rows = []
        for row in self.rows:
            count = len(row.results)
            cells = [row.name, str(count) if count == row.planned else f"{count} of {row.planned}"]
            cells += [_mean_and_std(row.values(patterns)) for patterns in self.metrics.values()]
            if with_difference:
                cells[3:3] = _difference_cells(self, row, first)
            rows.append(cells)
        return header, rows

    def markdown(self) -> str:
        """A Markdown table and its notes."""
        header, rows = self._cells()
        header, *rows = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
        align = ["left", *["right"] * (len(header) - 1)]
        text = tabulate(rows, header, "github", colalign=align, disable_numparse=True)
        return "\n".join([text, "", *self.notes()])

    def latex(self) -> str:
        r"""A LaTeX table for the package booktabs; the notes are comments."""
        header, rows = self._cells()
        align = ["left", *["right"] * (len(header) - 1)]
        text = tabulate(rows, header, "latex_booktabs", colalign=align, disable_numparse=True)
        for sign, command in (("±", r"$\pm$"), ("Δ", r"$\Delta$"), ("−", "$-$"), (NONE, "--")):
            text = text.replace(sign, command)
        lines = [line for note in self.notes() for line in note.splitlines()]
        return "\n".join([*(f"% {line}" for line in lines), text])

    def csv(self) -> str:
        """One line per setting and metric, with all digits; empty: not defined."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(
            (
                *("setting", "metric", "runs", "planned", "seeds", "values", "mean", "std"),
                *("difference", "low", "high", "pairs"),
            )
        )
        for row in self.rows:
            for metric, patterns in self.metrics.items():
                values = row.values(patterns)
                summary, difference = summarize(values), self.difference(row, metric)
                seeds = [" ".join(map(str, values)), " ".join(map(repr, values.values()))]
                numbers = [summary.mean, summary.std, difference.mean, difference.low]
                cells = ["" if math.isnan(n) else repr(n) for n in (*numbers, difference.high)]
                counts = [summary.count, row.planned]
                writer.writerow([row.name, metric, *counts, *seeds, *cells, difference.count])
        return stream.getvalue()

    def formatted(self, name: str) -> str:
        """The table as one of `FORMATS`."""
        return {"markdown": self.markdown, "latex": self.latex, "csv": self.csv}[name]()

    def write(self, path: Path) -> None:
        """Write the table to a file, in the format of its extension.

        Raises:
            ValueError: an extension that is not in `FORMATS`.
            OSError: it cannot be written.
        """
        check_extension(path)
        with atomic_write(path, "w") as file:
            file.write(self.formatted(FORMATS[path.suffix]).rstrip("\n") + "\n")


def check_extension(path: Path) -> None:
    """Raise ValueError if a table cannot be written to a file of this name."""
    if path.suffix not in FORMATS:
        raise ValueError(
            f"{path}: the format of a table follows from the extension of its file, which must be "
            f"one of {', '.join(FORMATS)}"
        )


def _difference_cells(table: Table, row: Row, metric: str) -> list[str]:
    if row.name == table.baseline:
        return [NONE, NONE]
    difference = table.difference(row, metric)
    if math.isnan(difference.low):
        return [_signed(difference.mean), NONE]
    interval = f"{_signed(difference.low)} to {_signed(difference.high)}"
    return [_signed(difference.mean), interval]


def _mean_and_std(values: Mapping[int, float]) -> str:
    summary = summarize(values)
    if not summary.count:
        return NONE
    spread = "" if math.isnan(summary.std) else f" ± {summary.std:.1f}"
    return f"{summary.mean:.1f}{spread}"


def _signed(value: float) -> str:
    return NONE if math.isnan(value) else f"{value:+.1f}".replace("-", "−")
