"""The files that runs leave in OUTPUT_DIR: continued, set aside, or kept apart by evaluations."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from clouds.engine.newest_checkpoint import find_newest
from clouds.messages import format_examples

ITERATIONS = ("model_*.pth", "last_checkpoint", "metrics.json", "results.json", "tensorboard")
"""What a folder has after the first iterations of a run, or after its evaluation."""

FILES = (
    *ITERATIONS,
    "metrics.old*.json",
    "metrics.csv",
    "evaluations.csv",
    "wandb",
    "wandb_id.txt",
    "faulty_files.json",
    "per_image.json",
    "visualizations",
    "report.html",
    "average",
    "config.yaml",
    "log.txt",
    "log.txt.rank*",
)
"""All that a run writes, in the order of setting aside: while checkpoints are missing that
`last_checkpoint` names, a run that resumes ends with an error."""

EARLIER = "earlier"
"""Folder in OUTPUT_DIR for the runs that --overwrite set aside."""

EVALUATIONS = "eval"
"""Folder in OUTPUT_DIR for evaluations that are not part of training."""

MAX_NAME = 80
"""Characters of each part of the name of an evaluation's folder."""


def prepare(folder: Path, *, resume: bool, overwrite: bool, weights: str = "") -> Path | None:
    """Make `folder` ready for a run; to be called on one process, which holds its lock.

    A folder without iterations, such as one that has the log and the config of a run which stopped
    at an error in its config, is used as it is.

    Args:
        folder: OUTPUT_DIR; need not exist.
        resume: the run in it is to be continued; if there is none, a new one starts.
        overwrite: the run in it is to be set aside.
        weights: MODEL.WEIGHTS.

    Returns:
        Where the files of the run in it are now, if it was set aside.

    Raises:
        ValueError: there is a run in it, and neither `resume` nor `overwrite`; `overwrite` would
            set aside the file `weights`; there are checkpoints, but none that `resume` can use.
        OSError: a file cannot be renamed.
    """
    if resume:
        find_newest(folder)  # what it raises is raised before the model is built
        return None
    found = existing(folder, ITERATIONS)
    if not found:
        return None
    if not overwrite:
        raise ValueError(
            f"OUTPUT_DIR '{folder}' holds a run ({_names(found)}). To continue it, add --resume. "
            f"To start afresh, --overwrite first moves its files to '{folder / EARLIER}', or set "
            "another folder with OUTPUT_DIR <folder>."
        )
    if weights and Path(weights).resolve() in [path.resolve() for path in found]:
        raise ValueError(
            f"MODEL.WEIGHTS '{weights}' is a file of the run that --overwrite would set aside. Set "
            "another folder with OUTPUT_DIR <folder>, or move the file first."
        )
    return set_aside(folder)


def existing(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Files and folders in `folder` that match one of the patterns, in the order of those."""
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def set_aside(folder: Path) -> Path:
    """Move the files of a run to a new folder `earlier/<date and time>` in `folder`; returns it."""
    date = datetime.now().strftime("%Y-%m-%d_%H%M%S")
    number = 1
    target = folder / EARLIER / date
    while target.exists():
        number += 1
        target = target.with_name(f"{date}_{number}")
    target.mkdir(parents=True)
    for path in existing(folder, FILES):
        path.rename(target / path.name)
    return target


def evaluation_folder(folder: Path, protocol: str, datasets: Sequence[str], weights: str) -> Path:
    """Folder in `folder` for the results of an evaluation that is not part of training.

    Args:
        folder: OUTPUT_DIR.
        protocol: TEST.PROTOCOL.
        datasets: DATASETS.TEST.
        weights: file of the evaluated weights; empty: random weights.

    Returns:
        `eval/<protocol>_<datasets>_<weights>`; to the name of weights that are not in `folder`,
        their folder's name is prefixed.
    """
    path = Path(weights)
    name = path.stem or "random"
    if weights and path.parent.resolve() != folder.resolve():
        name = f"{path.parent.resolve().name}_{name}"
    parts = (protocol, "+".join(datasets), name)
    return folder / EVALUATIONS / "_".join(file_name(part) for part in parts)


def file_name(text: str) -> str:
    """`text` as part of a file name; a long one is cut, with a hash in place of the rest."""
    plain = re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("._")
    if len(plain) <= MAX_NAME:
        return plain
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{plain[: MAX_NAME - 9]}_{digest}"


def _names(paths: Sequence[Path]) -> str:
    return format_examples([path.name for path in paths], 4)
