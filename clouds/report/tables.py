"""Tables of a report: scores, classes, pseudo-labels, times, configs, versions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from clouds.config.config import get_defaults
from clouds.config.values import flatten
from clouds.data.datasets.builtin import CORRUPTED_PREFIX
from clouds.engine.metrics import Record
from clouds.evaluation.metrics import is_summary
from clouds.evaluation.pseudo_labels import SCORED
from clouds.evaluation.results_file import number
from clouds.report.run import Run

MISSING = "–"
"""Text of a number that is not known or not defined."""

OTHER_KEYS = (
    *("mIoU", "pixel-accuracy", "mean-accuracy", "IoU", "unmapped-classes", "unscored-classes"),
    *("images", "seconds", "images-per-second", "confusion-matrix"),
)
"""Keys of a dataset in results.json that are no score of TEST.METRICS."""

LOWER_IS_BETTER = ("ECE", "FPR95")

WITHOUT_COMPARISON = ("OUTPUT_DIR",)
"""Config keys that differ between any two runs."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: its content.
        delta: difference to the first run, such as `+1.2`, or another note; empty: none.
        tone: 'better' or 'worse' than the first run; empty: neither.
        share: length of a bar behind the text, 0 to 1; None: no bar.
        differs: the text is not that of the first run.
    """

    text: str
    delta: str = ""
    tone: str = ""
    share: float | None = None
    differs: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a table; `is_summary`: a rule is drawn above it."""

    title: str
    cells: tuple[Cell, ...]
    is_summary: bool = False


@dataclass(frozen=True)
class Table:
    """A table with a column per run; `corner`: title of the column of the rows' titles."""

    corner: str
    rows: tuple[Row, ...]


def percent_row(
    title: str,
    values: Sequence[float | None],
    *,
    bars: bool = False,
    is_summary: bool = False,
    lower_is_better: bool = False,
) -> Row:
    """Scores of the runs in percent, with differences to the first run."""
    tones = ("worse", "better") if lower_is_better else ("better", "worse")
    return Row(title, tuple(_percent_cells(values, bars, tones)), is_summary)


def _percent_cells(
    values: Sequence[float | None], bars: bool, tones: tuple[str, str]
) -> list[Cell]:
    """`tones`: of a higher value, and of a lower one."""
    cells = []
    for i, value in enumerate(values):
        if value is None:
            cells.append(Cell(MISSING))
            continue
        delta, tone = "", ""
        if i and values[0] is not None:
            difference = value - values[0]
            same = abs(difference) < 0.05
            delta = "0.0" if same else f"{difference:+.1f}".replace("-", "−")
            tone = "" if same else tones[difference < 0]
        cells.append(Cell(f"{value:.1f}", delta, tone, value / 100 if bars else None))
    return cells


def dataset_names(runs: Sequence[Run]) -> list[str]:
    """Datasets of all runs, in the order of the first that has them; without corrupted ones."""
    names = dict.fromkeys(name for run in runs for name in run.datasets)
    return [name for name in names if not name.startswith(CORRUPTED_PREFIX)]


def shared_datasets(runs: Sequence[Run]) -> list[str]:
    """Those of `dataset_names` that all runs with results have."""
    evaluated = [run for run in runs if run.results]
    return [n for n in dataset_names(runs) if all(n in run.datasets for run in evaluated)]


def score_table(runs: Sequence[Run]) -> Table:
    """mIoU of each dataset, and the mean over the datasets that all runs share."""
    rows = [
        percent_row(name, [number(run.datasets.get(name, {}).get("mIoU")) for run in runs])
        for name in dataset_names(runs)
    ]
    shared = shared_datasets(runs)
    if len(shared) > 1:
        whole = len(shared) == len(rows)
        title = "mean" if whole else f"mean of the {len(shared)} shared datasets"
        rows.append(percent_row(title, [_mean_miou(run, shared) for run in runs], is_summary=True))
    return Table("mIoU in %", tuple(rows))


def _mean_miou(run: Run, names: Sequence[str]) -> float | None:
    values = [number(run.datasets.get(name, {}).get("mIoU")) for name in names]
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers and len(numbers) == len(values) else None


def class_table(runs: Sequence[Run], dataset: str) -> Table:
    """IoU of each class of a dataset, and its means."""
    scores = [run.datasets.get(dataset, {}) for run in runs]
    names = dict.fromkeys(name for score in scores for name in score.get("IoU", {}))
    rows = [
        percent_row(name, [number(score.get("IoU", {}).get(name)) for score in scores], bars=True)
        for name in names
    ]
    subsets = dict.fromkeys(key for s in scores for key in s if key.startswith("mIoU-"))
    means = {"mIoU": "mIoU", **{key: f"mIoU ({key[5:]} classes)" for key in subsets}}
    means |= {"pixel-accuracy": "pixel accuracy", "mean-accuracy": "mean accuracy"}
    for key, title in means.items():
        values = [number(score.get(key)) for score in scores]
        if any(value is not None for value in values) or key == "mIoU":
            rows.append(percent_row(title, values, is_summary=key == "mIoU"))
    for key in dict.fromkeys(key for score in scores for key in score if _is_metric(key)):
        values = [number(score.get(key)) for score in scores]
        rows.append(percent_row(key, values, lower_is_better=key in LOWER_IS_BETTER))
    images = tuple(Cell(str(s["images"]) if "images" in s else MISSING) for s in scores)
    return Table("IoU in %", (*rows, Row("images", images)))


def _is_metric(key: str) -> bool:
    """Whether a key of a dataset in results.json is a score of TEST.METRICS, not of one class."""
    return key not in OTHER_KEYS and not key.startswith("mIoU-") and is_summary(key)


def corruption_table(runs: Sequence[Run]) -> Table:
    """mIoU of each corruption, mean over its severities, and the mean over the corruptions."""
    scores = [run.results.get("corruptions") or {} for run in runs]
    parts = [score.get("by-corruption") or {} for score in scores]
    names = dict.fromkeys(name for part in parts for name in part)
    rows = [percent_row(name, [number(part.get(name)) for part in parts]) for name in names]
    if rows:
        means = [number(score.get("mIoU")) for score in scores]
        rows.append(percent_row("mean", means, is_summary=True))
        kept = [number(score.get("retention")) for score in scores]
        rows.append(percent_row("part of the mIoU without corruption", kept))
    return Table("mIoU in %", tuple(rows))


def anomaly_table(runs: Sequence[Run]) -> Table:
    """Scores of finding unknown objects, of each set."""
    sets = [run.results.get("anomaly-sets") or {} for run in runs]
    rows = [
        percent_row(
            f"{name}: {key}",
            [number(found.get(name, {}).get(key)) for found in sets],
            lower_is_better=key in LOWER_IS_BETTER,
        )
        for name in dict.fromkeys(name for found in sets for name in found)
        for key in ("AUPR", "FPR95", "AUROC")
    ]
    return Table("%", tuple(rows))


def pseudo_label_table(runs: Sequence[Run]) -> Table:
    """mIoU of the label maps of each generated dataset, and the refiner's share of the pixels."""
    rows = []
    for dataset in dict.fromkeys(name for run in runs for name in run.pseudo_labels):
        scores = [run.pseudo_labels.get(dataset, {}) for run in runs]
        for key in SCORED:
            values = [number((score.get("mIoU") or {}).get(key)) for score in scores]
            rows.append(percent_row(f"{dataset}: {key.replace('-', ' ')}, mIoU", values))
        covered = [number(score.get("covered")) for score in scores]
        rows.append(percent_row(f"{dataset}: pixels in refined masks", covered))
    return Table("%", tuple(rows))


def time_table(runs: Sequence[Run]) -> Table:
    """Time of the parts of each run with its share in percent, and the speed of training."""
    parts = [_seconds_by_part(run) for run in runs]
    names = dict.fromkeys(name for part in parts for name in part)
    rows = []
    for name in names:
        cells = []
        for part in parts:
            seconds, total = part.get(name), sum(part.values())
            if seconds is None:
                cells.append(Cell(MISSING))
            else:
                cells.append(Cell(duration(seconds), f"{100 * seconds / max(total, 1e-9):.0f} %"))
        rows.append(Row(name, tuple(cells)))
    totals = tuple(Cell(duration(sum(part.values())) if part else MISSING) for part in parts)
    rows.append(Row("sum of these", totals, is_summary=True))
    speeds: dict[str, tuple[str, Callable[[float], str]]] = {
        "seconds of an iteration, median": ("seconds", lambda value: f"{value:.3g}"),
        "images per second, median": ("images_per_second", lambda value: f"{value:.3g}"),
        "peak memory, GiB": ("memory_gib", lambda value: f"{value:.1f}"),
    }
    for title, (key, text) in speeds.items():
        values = [_values(run.training, key) for run in runs]
        merge = max if key == "memory_gib" else median
        cells = [Cell(text(merge(found)) if found else MISSING) for found in values]
        if any(values):
            rows.append(Row(title, tuple(cells)))
    return Table("time", tuple(rows))


def _values(records: Sequence[Record], key: str) -> list[float]:
    return [value for r in records if (value := number(r.get(key))) is not None]


def _seconds_by_part(run: Run) -> dict[str, float]:
    """Seconds of training, without and with waiting, and of the last evaluation, by dataset.

    Records have means over the iterations since the previous record.
    """
    parts: dict[str, float] = {}
    previous = -1
    for record in run.training:
        count = record["iteration"] - previous
        previous = record["iteration"]
        seconds, waiting = number(record.get("seconds")), number(record.get("data_seconds"))
        if seconds is None or waiting is None:
            continue
        steps = "training steps"
        parts[steps] = parts.get(steps, 0.0) + count * (seconds - waiting)
        waits = "waiting for training data"
        parts[waits] = parts.get(waits, 0.0) + count * waiting
    for name, scores in run.datasets.items():
        if (seconds := number(scores.get("seconds"))) is not None:
            parts[f"evaluation: {name}"] = seconds
    return parts


def duration(seconds: float) -> str:
    """Seconds as text: `0.8 s`, `42 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def config_table(runs: Sequence[Run]) -> Table:
    """Keys whose values differ between the runs; of one run, those that differ from defaults."""
    configs: list[Mapping[str, Any]] = [run.config for run in runs]
    if len(runs) == 1:
        configs = [dict(flatten(get_defaults())), *configs]
    names = sorted({name for config in configs for name in config} - {*WITHOUT_COMPARISON})
    rows = []
    for name in names:
        texts = [_value_text(config[name]) if name in config else MISSING for config in configs]
        if len(set(texts)) > 1:
            rows.append(Row(name, tuple(Cell(text, differs=text != texts[0]) for text in texts)))
    return Table("key", tuple(rows))


def _value_text(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def environment_table(runs: Sequence[Run]) -> Table:
    """Where the numbers are from: weights, seed, date, machine, versions."""
    facts = [_facts(run) for run in runs]
    rows = []
    for name in dict.fromkeys(name for fact in facts for name in fact):
        values = [fact.get(name) for fact in facts]
        texts = [MISSING if value in (None, "") else str(value) for value in values]
        cells = [Cell(text, differs=text not in (MISSING, texts[0])) for text in texts]
        rows.append(Row(name, tuple(cells)))
    return Table("", tuple(rows))


def _facts(run: Run) -> dict[str, Any]:
    weights = run.results.get("weights") or {}
    return {
        "folder": run.folder,
        "command": run.command,
        "protocol": run.results.get("protocol"),
        "weights": weights.get("file"),
        "SHA-256 of the model": str(weights.get("model_sha256") or "")[:16],
        "seed": run.results.get("seed", run.config.get("SEED")),
        "device": run.config.get("MODEL.DEVICE"),
        "date of the evaluation": run.results.get("date"),
        **(run.results.get("versions") or {}),
    }
