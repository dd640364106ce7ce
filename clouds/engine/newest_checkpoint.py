"""Which checkpoint of a run's folder `--resume` uses: the newest one that is whole."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clouds.messages import format_examples
from clouds.weights_io import DamagedFileError, read_checkpoint

TAG = "last_checkpoint"
"""File in a run's folder with the name of its newest checkpoint."""

_NUMBERED = re.compile(r".+_(\d+)\.pth")


@dataclass(frozen=True)
class NewestCheckpoint:
    """A checkpoint that was read.

    Attributes:
        path: the file.
        entries: see `read_checkpoint`.
        warning: why this is not the file that `last_checkpoint` names; empty: it is.
    """

    path: Path
    entries: dict[str, Any]
    warning: str


def read_newest(folder: Path, mmap: bool = False) -> NewestCheckpoint | None:
    """Read the newest checkpoint of a run, or the newest whole one before it.

    Args:
        folder: of the run.
        mmap: see `read_checkpoint`.

    Returns:
        None if there is no checkpoint.

    Raises:
        FileNotFoundError: the file that `last_checkpoint` names does not exist.
        DamagedFileError: that file, and all before it, are damaged.
        ValueError: see `find_newest` and `read_checkpoint`.
    """
    path = find_newest(folder)
    if path is None:
        return None
    if not path.is_file():
        raise FileNotFoundError(
            f"'{folder / TAG}' names '{path.name}', which does not exist. Write the name of one "
            "of the folder's .pth files into it."
        )
    warnings = []
    if tagged_checkpoint(folder) is None:
        warnings.append(f"'{folder}' has no {TAG}; '{path.name}' is its newest checkpoint.")
    for candidate in (path, *numbered_checkpoints(folder, before=_number_of(path))):
        try:
            entries = read_checkpoint(candidate, mmap)
        except DamagedFileError as error:
            warnings.append(str(error))
            continue
        if candidate != path:
            iteration = entries.get("iteration", "unknown")
            warnings.append(
                f"The checkpoint before it is used: '{candidate}' (iteration {iteration})."
            )
        return NewestCheckpoint(candidate, entries, "\n".join(warnings))
    raise DamagedFileError(
        "\n".join(warnings) + f"\nThere is no whole checkpoint before it in '{folder}', so there "
        "is none for --resume. Leave --resume out; to train from the start, add --overwrite."
    )


def find_newest(folder: Path) -> Path | None:
    """The file that `last_checkpoint` names, or the newest numbered one if there is no such file.

    A kill between the two files of the first checkpoint, or a copy of some files, leaves a folder
    without `last_checkpoint`.

    Returns:
        A path, which need not exist; None if there is no checkpoint.

    Raises:
        ValueError: `last_checkpoint` is empty or not text; it is missing, and there are
            checkpoints, but no numbered one.
    """
    tagged = tagged_checkpoint(folder)
    if tagged is not None:
        return tagged
    found = sorted(path.name for path in folder.glob("model_*.pth"))
    numbered = numbered_checkpoints(folder, "model_")
    if found and not numbered:
        raise ValueError(
            f"--resume: '{folder}' has {format_examples(found, 4)}, but no file {TAG}, which names "
            "the checkpoint to resume from. Write its name into that file, or start afresh with "
            "--overwrite."
        )
    return numbered[0] if numbered else None


def tagged_checkpoint(folder: Path) -> Path | None:
    """The file that `last_checkpoint` names, whether it exists or not; None: no `last_checkpoint`.

    Raises:
        ValueError: `last_checkpoint` is empty or not text.
    """
    try:
        name = (folder / TAG).read_text("utf-8").strip()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise _no_name(folder, "not text in UTF-8") from error
    if not name:
        raise _no_name(folder, "empty")
    return folder / name


def _no_name(folder: Path, fault: str) -> ValueError:
    return ValueError(
        f"'{folder / TAG}' is damaged: it is {fault}. Write the name of one of the folder's .pth "
        "files into it."
    )


def _number_of(path: Path) -> int | None:
    """The iteration in the name of a checkpoint; None: there is none, as in model_final.pth."""
    match = _NUMBERED.fullmatch(path.name)
    return match and int(match[1])


def numbered_checkpoints(folder: Path, prefix: str = "", before: int | None = None) -> list[Path]:
    """Checkpoints with an iteration in their names, the newest first.

    Args:
        folder: where they are.
        prefix: of their names.
        before: only those of an earlier iteration; None: all.
    """
    numbers = {path: _number_of(path) for path in folder.glob("*.pth")}
    found = [
        (number, path)
        for path, number in numbers.items()
        if number is not None
        and path.name.startswith(prefix)
        and (before is None or number < before)
    ]
    return [path for _, path in sorted(found, reverse=True)]
