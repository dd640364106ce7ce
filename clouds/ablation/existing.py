"""Tables of runs that exist: which of them are one row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clouds.ablation.runs import WITHOUT_EFFECT
from clouds.ablation.scores import (
    MetricSpecs,
    RunResults,
    check_comparable,
    check_metrics,
    default_metrics,
    read_run_results,
)
from clouds.ablation.table import Row, Table
from clouds.config.values import flatten
from clouds.evaluation.results_file import RESULTS_FILE
from clouds.files import expand_user
from clouds.messages import format_examples

BASELINE = "baseline"
"""Name of the row of the first run, where configs name the rows."""

MAX_VALUE = 60
"""Characters of a value in the name of a row."""


def compare(
    runs: Sequence[Path],
    groups: Mapping[str, Sequence[Path]],
    metrics: MetricSpecs,
    baseline: str | None = None,
) -> Table:
    """The table of runs.

    Args:
        runs: folders with results.json, or such files; rows follow from their configs.
        groups: rows by name, with their runs.
        metrics: columns; empty: the default ones.
        baseline: name of a row; None: the first.

    Raises:
        FileNotFoundError: a run has no results.
        ValueError: runs cannot be compared, one is named twice, two of a row have the same seed, or
            a name is unknown.
    """
    files = [results_file(run) for run in (*runs, *(r for g in groups.values() for r in g))]
    seen: dict[Path, Path] = {}
    for file in files:
        if seen.setdefault(file.resolve(), file) is not file:
            raise ValueError(f"the run '{file.parent}' is named twice")
    found = {file: read_run_results(file) for file in files}
    check_comparable(list(found.values()))
    named = {name: [found[results_file(r)] for r in group] for name, group in groups.items()}
    by_config = group_by_config([found[results_file(run)] for run in runs])
    both = [name for name in by_config if name in named]
    if both:
        raise ValueError(f"--group {both[0]}=… has the name of another row; choose another one")
    rows = tuple(_row(name, group) for name, group in (*named.items(), *by_config.items()))
    baseline = baseline or rows[0].name
    if baseline not in [row.name for row in rows]:
        names = ", ".join(repr(row.name) for row in rows)
        raise ValueError(f"--baseline is {baseline!r}; the rows are {names}")
    check_metrics(metrics, list(found.values()))
    return Table(rows, metrics or default_metrics(next(iter(found.values()))), baseline)


def results_file(run: Path) -> Path:
    """The results.json of a run.

    Raises:
        FileNotFoundError: there is none.
    """
    file = run if run.is_file() else run / RESULTS_FILE
    if not file.is_file():
        others = [f"'{p.parent}'" for p in sorted(run.glob(f"*/**/{RESULTS_FILE}"))]
        hint = f" There are some in {format_examples(others, 3)}." if others else ""
        what = (
            f"has no {RESULTS_FILE}: it has not been evaluated"
            if run.is_dir()
            else "does not exist"
        )
        raise FileNotFoundError(f"the run '{run}' {what}.{hint}")
    return file


def parse_groups(words: Sequence[str]) -> dict[str, list[Path]]:
    """Rows from NAME=RUN,RUN.

    Raises:
        ValueError: a word of another form, or a name that occurs twice.
    """
    groups: dict[str, list[Path]] = {}
    for word in words:
        name, equals, runs = word.partition("=")
        folders = [expand_user(run) for run in runs.split(",") if run]
        if not equals or not name or not folders:
            raise ValueError(f"--group is {word!r}; expected is NAME=RUN,RUN")
        if name in groups:
            raise ValueError(f"--group {name}=… is given twice; name all of its runs in one")
        groups[name] = folders
    return groups


def group_by_config(results: Sequence[RunResults]) -> dict[str, list[RunResults]]:
    """Runs of the same config but the seed, by the difference to the first one's.

    Raises:
        ValueError: the differences of two configs are the same text.
    """
    groups: list[tuple[dict[str, Any], list[RunResults]]] = []
    for result in results:
        config = {k: v for k, v in flatten(result.config) if k not in WITHOUT_EFFECT}
        same = [members for other, members in groups if other == config]
        if same:
            same[0].append(result)
        else:
            groups.append((config, [result]))
    named: dict[str, list[RunResults]] = {}
    for i, (config, members) in enumerate(groups):
        name = BASELINE if i == 0 else difference(config, groups[0][0])
        if name in named:  # values are equal in the characters that are shown
            raise ValueError(
                f"'{members[0].path.parent}' and '{named[name][0].path.parent}' have different "
                f"configs, and both rows would have the name {name!r}; name them by --group"
            )
        named[name] = members
    return named


def difference(config: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    """What a config has that the baseline has not: `KEY value, KEY value`."""
    changed = [key for key in sorted({*config, *baseline}) if config.get(key) != baseline.get(key)]
    return ", ".join(f"{key} {_short(config.get(key, '(absent)'))}" for key in changed)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= MAX_VALUE else f"{text[: MAX_VALUE - 1]}…"


def _row(name: str, results: Sequence[RunResults]) -> Row:
    by_seed: dict[int, RunResults] = {}
    for result in results:
        other = by_seed.setdefault(result.seed, result)
        if other is not result:
            raise ValueError(
                f"'{other.path.parent}' and '{result.path.parent}' are both of the row {name!r} "
                f"and have the seed {result.seed}; leave one out, or give each a --group. (Results "
                "of `clouds eval` have the SEED of its command.)"
            )
    notes = tuple(note for result in results if (note := unfinished_note(result)))
    return Row(name, by_seed, len(by_seed), notes)


def unfinished_note(result: RunResults) -> str:
    """A sentence if the results are of an evaluation before the end of training; else empty."""
    iterations = result.config.get("SOLVER", {}).get("MAX_ITER")
    if iterations is None or result.iteration is None or result.iteration + 1 >= iterations:
        return ""
    return (
        f"'{result.path.parent}' was evaluated after {result.iteration + 1} of {iterations} "
        "iterations."
    )
