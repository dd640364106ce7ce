"""State of the runs of an ablation, by the files in their folders."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from clouds.ablation.plan import Ablation, Run
from clouds.ablation.scores import (
    RunResults,
    check_comparable,
    check_metrics,
    default_metrics,
    read_run_results,
)
from clouds.ablation.table import Row, Table
from clouds.engine.config_changes import changed_keys
from clouds.engine.run_folder import ITERATIONS, existing
from clouds.evaluation.results_file import RESULTS_FILE
from clouds.messages import format_examples

CONSOLE = "console.txt"
"""What a run prints, in its folder."""

WITHOUT_EFFECT = (
    "DATALOADER.NUM_WORKERS",
    "DATALOADER.TIMEOUT",
    "DIST_TIMEOUT",
    "LOGGER",
    "LOG_PERIOD",
    "MODEL.DEVICE",
    "OUTPUT_DIR",
    "SEED",
    "SOLVER.BEST_ON",
    "SOLVER.CHECKPOINTS_KEPT",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.EVAL_PERIOD",
    "TEST.MASKS_AT_ONCE",
    "TEST.VISUALIZED_IMAGES",
)
"""Keys that may differ between runs of one setting: they change no score of the last weights."""


@dataclass(frozen=True)
class Outcome:
    """The end of a run that was started.

    Attributes:
        status: exit status; negative: minus the number of the signal that ended it.
        message: the last line that it printed.
    """

    status: int
    message: str = ""

    def __str__(self) -> str:
        if self.status < 0:
            number = -self.status
            known = number in set(signal.Signals)
            name = signal.Signals(number).name if known else f"signal {number}"
            end = f"ended by {name}"
        else:
            end = f"exit status {self.status}"
        return f"{end}: {self.message}" if self.message else end


def results_of(run: Run) -> RunResults | None:
    """The results after the last iteration; None if it has not ended.

    Raises:
        ValueError: results.json is damaged.
    """
    try:
        results = read_run_results(run.folder / RESULTS_FILE)
    except FileNotFoundError:
        return None
    # an evaluation in training writes results, too
    iteration = results.iteration
    ended = iteration is not None and iteration + 1 >= run.cfg.SOLVER.MAX_ITER
    return results if ended else None


def unfinished(runs: Sequence[Run]) -> list[Run]:
    """Runs without results, in order."""
    return [run for run in runs if results_of(run) is None]


def start_of(run: Run, runs: Iterable[Run]) -> Run | None:
    """The run among `runs` whose final weights `run` starts from; None: there is none."""
    starts = (other for other in runs if (other.setting, other.seed) == (run.start, run.seed))
    return next(starts, None)


def outcome_of(run: Run, status: int) -> Outcome | None:
    """How a run failed whose process ended with an exit status; None: it has its results."""
    if status:
        return Outcome(status, last_line(run))
    if results_of(run) is None:
        return Outcome(0, f"no {RESULTS_FILE} of its last iteration. {last_line(run)}".rstrip())
    return None


def fail_without_start(waiting: list[Run], failed: dict[Run, Outcome]) -> None:
    """Move the waiting runs that start from failed ones to these."""
    for run in list(waiting):
        if (start := start_of(run, failed)) is not None:
            waiting.remove(run)
            failed[run] = Outcome(1, f"not started, since {start.name} failed")


def check_unchanged(runs: Sequence[Run]) -> None:
    """Check that runs which were started earlier had the present configs.

    Raises:
        ValueError: a config differs; the message tells the keys of one run, and what to do.
    """
    for run in runs:
        saved = run.folder / "config.yaml"
        if not existing(run.folder, ITERATIONS) or not saved.is_file():
            continue
        changes = changed_keys(saved.read_text(encoding="utf-8"), run.cfg, WITHOUT_EFFECT)
        if changes:
            raise ValueError(
                f"'{run.folder}' holds a run of another config than {run.name} has now: "
                f"{format_examples(changes, 6)}. Results of both would be in one table. Take the "
                "change back, give the setting another name, choose another --output, or move the "
                "folder away."
            )


def last_line(run: Run) -> str:
    """The last line that a run printed, at most 300 characters."""
    try:
        text = (run.folder / CONSOLE).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def table_of(
    ablation: Ablation, failed: Mapping[Run, Outcome] | None = None
) -> tuple[Table, list[Run]]:
    """The table of the runs that have ended, and the others.

    Args:
        ablation: its runs.
        failed: how runs that were started ended, for the notes.

    Raises:
        ValueError: runs cannot be compared, or no run has a score that is a metric.
    """
    failed = failed or {}
    found = {run: results_of(run) for run in ablation.runs}
    results = [result for result in found.values() if result is not None]
    check_comparable(results)
    check_metrics(ablation.metrics, results)
    metrics = ablation.metrics or (default_metrics(results[0]) if results else {})
    rows = []
    for name in ablation.settings:
        runs = [run for run in ablation.runs if run.setting == name]
        notes = [
            f"{run.name}: failed, {failed[run]}; log in '{run.folder / CONSOLE}'."
            if run in failed
            else f"{run.name}: no results yet."
            for run in runs
            if found[run] is None
        ]
        ended = {run.seed: r for run in runs if (r := found[run]) is not None}
        rows.append(Row(name, ended, len(runs), tuple(notes)))
    table = Table(tuple(rows), metrics, ablation.baseline)
    return table, [run for run in ablation.runs if found[run] is None]
