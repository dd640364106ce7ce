"""Reading what a run, or an evaluation, has left in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clouds.config.load import read_yaml
from clouds.config.values import flatten
from clouds.engine.metrics import MetricsFile, Record
from clouds.evaluation.image_scores import relative_names
from clouds.evaluation.results_file import (
    IMAGE_SCORES_FILE,
    RESULTS_FILE,
    read_image_scores,
    read_results,
)
from clouds.messages import format_examples

METRICS_FILE = "metrics.json"
CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class Run:
    """A run, or an evaluation of a checkpoint.

    Attributes:
        name: short name, different for each run of a report.
        folder: its OUTPUT_DIR, or the folder of the evaluation.
        results: contents of results.json; empty if there is none.
        training: training records of metrics.json, by iteration.
        evaluations: evaluation records of metrics.json, by iteration.
        config: its config by dotted names; empty if it is not known.
        command: the command line that started it; empty if it is not known.
        image_scores: mIoU in percent by dataset and file, None where it is not defined; empty if
            there is no per_image.json.
    """

    name: str
    folder: Path
    results: dict[str, Any]
    training: tuple[Record, ...]
    evaluations: tuple[Record, ...]
    config: dict[str, Any]
    command: str
    image_scores: dict[str, dict[str, float | None]]

    @property
    def datasets(self) -> dict[str, dict[str, Any]]:
        """Scores in results.json by the name of the dataset."""
        datasets: dict[str, dict[str, Any]] = self.results.get("datasets", {})
        return datasets

    @property
    def pseudo_labels(self) -> dict[str, dict[str, Any]]:
        """Scores of pseudo-labels in results.json by the name of the generated dataset."""
        return dict(self.results.get("pseudo-labels") or {})

    @property
    def iterations(self) -> int:
        """Number of completed iterations that metrics.json has records of."""
        return max((r["iteration"] + 1 for r in (*self.training, *self.evaluations)), default=0)

    @property
    def max_iter(self) -> int | None:
        """SOLVER.MAX_ITER; None if the config is not known."""
        value = self.config.get("SOLVER.MAX_ITER")
        return value if isinstance(value, int) else None

    @property
    def is_complete(self) -> bool:
        """Whether it has the results it was started for."""
        if not self.results:
            return False
        evaluated = self.results.get("iteration")
        return evaluated is None or self.max_iter is None or evaluated + 1 >= self.max_iter

    def status(self) -> str:
        """What the run has done, as a sentence without an end."""
        evaluated: int | None = self.results.get("iteration")
        if self.results and evaluated is None and not self.training:
            weights = (self.results.get("weights") or {}).get("file")
            return f"evaluation of {weights}" if weights else "evaluation of random weights"
        done = f"{max(self.iterations, 0 if evaluated is None else evaluated + 1):,}"
        if self.max_iter is not None:
            done += f" of {self.max_iter:,}"
        if self.is_complete:
            return f"complete: {done} iterations"
        reason = "interrupted, or still running"
        if self.max_iter is not None and self.iterations >= self.max_iter:
            reason = "its last evaluation is missing"
        scores = "there are no results yet"
        if evaluated is not None:
            scores = f"the scores are those after {evaluated + 1:,} iterations"
        return f"not complete ({reason}): {done} iterations; {scores}"


def read_runs(folders: Sequence[Path]) -> tuple[Run, ...]:
    """Read several runs; raises as `read_run`.

    Raises:
        ValueError: there is no folder, or one is named twice.
    """
    if not folders:
        raise ValueError("no run is given; name the folder of at least one (its OUTPUT_DIR)")
    resolved = [folder.resolve() for folder in folders]
    repeated = sorted({str(folder) for folder in resolved if resolved.count(folder) > 1})
    if repeated:
        raise ValueError(f"{', '.join(repeated)} is given more than once; name each run once")
    names = short_names(resolved)
    return tuple(read_run(folder, name) for folder, name in zip(folders, names, strict=True))


def short_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names if they differ, else their paths below the folder they share."""
    names = [folder.name or str(folder) for folder in folders]
    if len(set(names)) == len(names):
        return names
    relative = relative_names([folder / "run" for folder in folders])
    return [relative[str(folder / "run")].removesuffix("/run") for folder in folders]


def read_run(folder: Path, name: str) -> Run:
    """Read the files of a run.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is a file, holds no run, or a file in it is damaged.
    """
    _check_folder(folder)
    results_file, scores_file = folder / RESULTS_FILE, folder / IMAGE_SCORES_FILE
    results = read_results(results_file) if results_file.is_file() else {}
    records = MetricsFile(folder / METRICS_FILE).records()
    records.sort(key=lambda record: record["iteration"])
    config, command = _read_config(folder / CONFIG_FILE)
    return Run(
        name=name,
        folder=folder,
        results=results,
        training=tuple(r for r in records if not r.get("evaluation")),
        evaluations=tuple(r for r in records if r.get("evaluation")),
        config=config or dict(flatten(results.get("config") or {})),
        command=command,
        image_scores=read_image_scores(scores_file) if scores_file.is_file() else {},
    )


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise FileNotFoundError(f"run '{folder}' does not exist; name the folder of a run")
    if not folder.is_dir():
        raise ValueError(f"run '{folder}' is a file; name the folder of the run")
    if any((folder / name).is_file() for name in (RESULTS_FILE, METRICS_FILE)):
        return
    inside = sorted(
        {
            path.parent.relative_to(folder).as_posix()
            for depth in ("*", "*/*")
            for name in (RESULTS_FILE, METRICS_FILE)
            for path in folder.glob(f"{depth}/{name}")
        }
    )
    hint = f" There are runs in it: {format_examples(inside)}." if inside else ""
    raise ValueError(
        f"run '{folder}' has neither {RESULTS_FILE} nor {METRICS_FILE}, so there is nothing to "
        "report. Name the OUTPUT_DIR of `clouds train`, which has its first record after "
        f"LOG_PERIOD iterations, or a folder of `clouds eval` (OUTPUT_DIR/eval/…).{hint}"
    )


def _read_config(path: Path) -> tuple[dict[str, Any], str]:
    """Config by dotted names, and the command in the comment that precedes it."""
    if not path.is_file():
        return {}, ""
    settings = read_yaml(path)
    lines = path.read_text("utf-8", "replace").splitlines()
    commands = [line.removeprefix("# command: ") for line in lines if line.startswith("# command:")]
    return {setting.name: setting.value for setting in settings}, "".join(commands[:1])
