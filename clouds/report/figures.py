"""Curves of a report, as plotly's JSON: a line per run, in the run's color."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from clouds.engine.metrics import Record, is_last_layer_loss
from clouds.evaluation.pseudo_labels import SCORED
from clouds.evaluation.results_file import number
from clouds.report.run import Run

COLORS = ("#0072b2", "#d55e00", "#009e73", "#b0589a", "#8a7000", "#7f7f7f")
"""Colors of the runs. They differ for color-blind readers, and have a contrast of 3:1 or more to
the white and to the black background."""

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
"""Dashes of the lines of one run."""

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
MAX_LINES = 12
"""Lines of a figure; with more, those of single datasets are left out."""


@dataclass(frozen=True)
class Figure:
    """A figure: its title, what its lines are, and plotly's `data` and `layout`."""

    title: str
    caption: str
    spec: dict[str, Any]


def color_of(number_of_run: int) -> str:
    """Color of a run by its number in the report, from 0."""
    return COLORS[number_of_run % len(COLORS)]


def figures(runs: Sequence[Run]) -> list[Figure]:
    """The figures that the records of the runs have values for."""
    found = [
        _training_figure(
            runs, "Loss", ["total_loss"], "Sum of all losses, mean since the previous record."
        ),
        _training_figure(
            runs,
            "Parts of the loss",
            _loss_parts(runs),
            "Losses of the last decoder layer, with their weights.",
        ),
        _miou_figure(runs),
        _training_figure(
            runs, "Learning rate", _rates(runs), "Of the head, and of the backbone if it differs."
        ),
        _training_figure(
            runs, "Gradient norm", ["grad_norm"], "Before clipping; logarithmic.", log=True
        ),
        _pseudo_label_figure(runs),
    ]
    return [figure for figure in found if figure is not None]


def _loss_parts(runs: Sequence[Run]) -> list[str]:
    """Names of the losses of the last decoder layer."""
    names = dict.fromkeys(name for run in runs for record in run.training for name in record)
    return [name for name in names if is_last_layer_loss(name)]


def _rates(runs: Sequence[Run]) -> list[str]:
    """Names of the learning rates; that of the backbone only where it is another one."""
    records = [record for run in runs for record in run.training]
    other = any(r.get("lr_backbone", r.get("lr")) != r.get("lr") for r in records)
    return ["lr", "lr_backbone"] if other else ["lr"]


def _line(
    run: int, name: str, points: Iterable[tuple[int, float | None]], style: int, *, markers: bool
) -> dict[str, Any] | None:
    """A trace; values that are not finite are gaps. None if there is no other value."""
    iterations, values = zip(*points, strict=True) if (points := list(points)) else ((), ())
    if not any(value is not None for value in values):
        return None
    return {
        "type": "scatter",
        "name": name,
        "x": list(iterations),
        "y": list(values),
        "mode": "lines+markers" if markers else "lines",
        "line": {"color": color_of(run), "dash": DASHES[style % len(DASHES)], "width": 2},
        "marker": {"symbol": SYMBOLS[style % len(SYMBOLS)], "size": 7},
    }


def _points(records: Sequence[Record], key: str) -> list[tuple[int, float | None]]:
    """Completed iterations and values of the records that have `key`."""
    return [(r["iteration"] + 1, number(r[key])) for r in records if key in r]


def _training_figure(
    runs: Sequence[Run], title: str, keys: Sequence[str], caption: str, *, log: bool = False
) -> Figure | None:
    lines = [
        _line(i, _name(runs, run, key if len(keys) > 1 else ""), points, style, markers=False)
        for i, run in enumerate(runs)
        for style, key in enumerate(keys)
        if (points := _points(run.training, key))
    ]
    return _figure(title, caption, lines, log=log)


def _name(runs: Sequence[Run], run: Run, what: str) -> str:
    """Name of a line: what it is, with several runs after the name of the run."""
    what = what.removeprefix("loss_").replace("-", " ")
    return " · ".join(part for part in (run.name if len(runs) > 1 else "", what) if part)


def _miou_figure(runs: Sequence[Run]) -> Figure | None:
    """mIoU of each dataset at each evaluation, and the mean over the datasets."""
    lines = _score_lines(runs, "mIoU")
    caption = "At each evaluation, in percent; mean over the datasets, and each dataset."
    if len(lines) > MAX_LINES:
        lines = _score_lines(runs, "mIoU", only="mean")
        caption = "At each evaluation, in percent; mean over the datasets."
    return _figure("mIoU", caption, lines)


def _pseudo_label_figure(runs: Sequence[Run]) -> Figure | None:
    """mIoU of the label maps of generated images at each evaluation."""
    lines = [line for i, key in enumerate(SCORED) for line in _score_lines(runs, f"{key}-mIoU", i)]
    caption = "mIoU of the labels of generated images with a true label, in percent."
    return _figure("Pseudo-labels", caption, lines[:MAX_LINES])


def _score_lines(
    runs: Sequence[Run], score: str, style: int | None = None, only: str = ""
) -> list[dict[str, Any]]:
    """A line for each run and dataset: the score `<dataset>/<score>` of the evaluations."""
    lines = []
    for i, run in enumerate(runs):
        for j, dataset in enumerate([only] if only else _evaluated(run, score)):
            points = _points(run.evaluations, f"{dataset}/{score}")
            title = dataset if score == "mIoU" else f"{dataset} {score.removesuffix('-mIoU')}"
            name = _name(runs, run, title)
            line = _line(i, name, points, j if style is None else style, markers=True)
            if line is not None:
                lines.append(line)
    return lines


def _evaluated(run: Run, score: str) -> list[str]:
    """Datasets of the score `<dataset>/<score>`; the mean over them first, without averages."""
    keys = dict.fromkeys(key for record in run.evaluations for key in record)
    names = [key.removesuffix(f"/{score}") for key in keys if key.endswith(f"/{score}")]
    return sorted((name for name in names if "/" not in name), key=lambda name: name != "mean")


def _figure(
    title: str, caption: str, lines: Sequence[dict[str, Any] | None], *, log: bool = False
) -> Figure | None:
    data = [line for line in lines if line is not None]
    if not data:
        return None
    last = max(iteration for line in data for iteration in line["x"])
    axis: dict[str, Any] = {"zeroline": False, "automargin": True, "fixedrange": True}
    layout = {
        "height": 280 + 12 * len(data),
        "margin": {"l": 48, "r": 16, "t": 8, "b": 44},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "inherit", "size": 12},
        "hovermode": "x unified",
        "showlegend": len(data) > 1,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "xaxis": {**axis, "title": {"text": "iteration", "standoff": 8}, "range": [0, 1.03 * last]},
        "yaxis": {**axis, "type": "log" if log else "linear"},
    }
    return Figure(title, caption, {"data": data, "layout": layout})
