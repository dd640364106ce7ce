"""Scores in the results.json of runs, by name, and the metrics that are computed from them.

Scores have the names of `metrics.json`: `<dataset>/mIoU`, `<dataset>/IoU-<class>`, `mean/mIoU`,
`<generated dataset>/teacher-mIoU`.
"""

from __future__ import annotations

import difflib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from clouds.data.yaml_section import DescriptionError, Section
from clouds.evaluation.results_file import damaged, read_results

MetricSpecs = dict[str, tuple[str, ...]]
"""Name of a column -> names of the scores whose mean it is; `*` stands for any text."""

DATASETS = "datasets"
NOT_SCORES = ("images", "seconds", "images-per-second")
MAX_NAMES = 12
MAX_DATASETS = 8
"""Datasets that have columns of their own unless metrics are named."""


@dataclass(frozen=True)
class RunResults:
    """A results.json.

    Attributes:
        path: of the file.
        content: of the file.
    """

    path: Path
    content: Mapping[str, Any]

    @property
    def seed(self) -> int:
        """SEED."""
        return int(self.content["seed"])

    @property
    def config(self) -> Mapping[str, Any]:
        """The config of the run."""
        config: Mapping[str, Any] = self.content["config"]
        return config

    @property
    def iteration(self) -> int | None:
        """The last training iteration before the evaluation; None: not evaluated in training."""
        iteration: int | None = self.content["iteration"]
        return iteration

    def scores(self) -> dict[str, float]:
        """All scores that are defined, in percent, by name (`Results.flat`)."""
        found: dict[str, float | None] = {
            f"mean/{name}": value for name, value in self.content["mean"].items()
        }
        for dataset, scores in self.content[DATASETS].items():
            for name, value in scores.items():
                if isinstance(value, Mapping):  # IoU by class; other metrics by their names
                    found |= {f"{dataset}/{name}-{key}": number for key, number in value.items()}
                elif name not in NOT_SCORES and not isinstance(value, list):
                    found[f"{dataset}/{name}"] = value
        for dataset, labels in self.content.get("pseudo-labels", {}).items():
            found |= {f"{dataset}/{name}-mIoU": value for name, value in labels["mIoU"].items()}
            found[f"{dataset}/refined-covered"] = labels.get("covered")
            for name, classes in labels.get("IoU", {}).items():
                found |= {f"{dataset}/{name}-IoU-{c}": value for c, value in classes.items()}
        for name, scores in self.content.get("anomaly-sets", {}).items():
            found |= {f"{name}/{key}": v for key, v in scores.items() if key not in NOT_SCORES}
        return {name: value for name, value in found.items() if value is not None}


def read_run_results(path: Path) -> RunResults:
    """Read a results.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or another file.
    """
    content = read_results(path)
    wanted = ("mean", "protocol", "seed", "config", "iteration")
    missing = [name for name in wanted if name not in content]
    if missing:
        raise damaged(path, f"it has no {', '.join(missing)}")
    return RunResults(path, content)


def check_comparable(results: Sequence[RunResults]) -> None:
    """Check that runs were scored on the same data in the same way.

    Raises:
        ValueError: datasets, numbers of their images, scored classes, or protocols differ.
    """
    if not results:
        return
    first = results[0]
    for other in results[1:]:
        for what, here, there in zip(_BASIS, _basis(first), _basis(other), strict=True):
            if here != there:
                raise ValueError(
                    f"scores of these runs cannot be compared: {what} of {first.path.parent}: "
                    f"{here}; of {other.path.parent}: {there}. Evaluate them alike with "
                    "`clouds eval`, and compare those results."
                )


_BASIS = ("the protocol", "the datasets", "the numbers of images", "the scored classes")


def _basis(results: RunResults) -> tuple[object, ...]:
    datasets = results.content[DATASETS]
    classes = {
        name: [c for c in scores.get("IoU", {}) if c not in scores.get("unscored-classes", ())]
        for name, scores in datasets.items()
    }
    images = {name: scores.get("images") for name, scores in datasets.items()}
    return results.content["protocol"], sorted(datasets), images, classes


def default_metrics(results: RunResults) -> MetricSpecs:
    """The mean mIoU, and the mIoU of each dataset if there are several, up to MAX_DATASETS."""
    names = list(results.content[DATASETS])
    each = {name: (f"{name}/mIoU",) for name in names}
    return {"mIoU": ("mean/mIoU",), **(each if 1 < len(names) <= MAX_DATASETS else {})}


def metric_value(patterns: Sequence[str], scores: Mapping[str, float]) -> float | None:
    """The mean of the scores whose name is one of `patterns`; None: there are none."""
    values = [value for name, value in scores.items() if any(_matches(name, p) for p in patterns)]
    return statistics.fmean(values) if values else None


def _matches(name: str, pattern: str) -> bool:
    """Whether a score has a name; `*` does not stand for `mean`, which is over the datasets."""
    if name == pattern:
        return True
    return fnmatchcase(name, pattern) and (not name.startswith("mean/") or pattern[:5] == "mean/")


def read_metrics(section: Section) -> MetricSpecs:
    """The entry `metrics` of a file: a mapping from columns to one name, or a list of names."""
    if "metrics" not in section:
        return {}
    entry = section.section("metrics")
    return {name: entry.texts(name, ()) for name in entry.names()}


def parse_metrics(words: Sequence[str]) -> MetricSpecs:
    """Metrics of a command line: `SCORE`, or `COLUMN=SCORE,SCORE`.

    Raises:
        ValueError: a word is of another form, or a column is named twice.
    """
    metrics: MetricSpecs = {}
    for word in words:
        column, equals, names = word.partition("=")
        scores = tuple(filter(None, names.split(","))) if equals else (word,)
        if not column or not scores:
            raise ValueError(f"{word!r} is given; expected is SCORE, or COLUMN=SCORE,SCORE")
        if column in metrics:
            raise ValueError(f"the column {column!r} is given twice")
        metrics[column] = scores
    return metrics


def check_metrics(metrics: MetricSpecs, results: Sequence[RunResults]) -> None:
    """Check that each metric has a score in some run.

    Raises:
        DescriptionError: one has none; the message has similar names.
    """
    names = sorted({name for result in results for name in result.scores()})
    for column, patterns in metrics.items():
        for pattern in patterns:
            if results and not any(_matches(n, pattern) for n in names):
                near = difflib.get_close_matches(pattern, names, n=4) or names[:MAX_NAMES]
                raise DescriptionError(
                    f"metric {column!r}: no run has a score {pattern!r}; there are, among others, "
                    f"{', '.join(near)}"
                )
