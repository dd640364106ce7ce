"""The files below a folder: symbolic links are followed, and what cannot be used is named."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clouds.files import kind_of_file


@dataclass
class Scan:
    """Files found, and what cannot be used.

    Attributes:
        files: by path relative to the folder without prefix and suffix: the file, and the number
            of its suffix.
        unusable: a line per path that is no regular file, leads nowhere or cannot be listed.
        repeated: a line per link to a folder that is listed under another name.
        times: modification time in ns of each folder that was listed, without the first; -1: it
            does not exist.
    """

    files: dict[str, tuple[Path, int]] = field(default_factory=dict)
    unusable: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    times: dict[str, int] = field(default_factory=dict)


def scan_files(top: Path, suffixes: Sequence[str], prefix: str = "") -> Scan:
    """The files below `top` whose names begin with `prefix` and end with one of `suffixes`.

    `top` need not exist. The prefix and the suffix are not part of a file's key.

    The first suffix that fits a name counts, and of several files with the same key the one whose
    suffix comes first. Names that begin with a dot are left out. Only regular files count, also
    through links; nothing is opened. Each folder is listed once, so links in circles end; folders
    that are no links come first, so that a file keeps the name that it has without links.
    """
    scan = Scan()
    seen: dict[tuple[int, int], str] = {}
    waiting, links = [str(top)], list[str]()
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        if folder != str(top):
            scan.times[folder] = modified(folder)
        try:
            status = os.stat(folder)  # noqa: PTH116 (called for each folder)
            identity = status.st_dev, status.st_ino
            if identity in seen:
                scan.repeated.append(f"{folder}, the same folder as {seen[identity]}")
                continue
            seen[identity] = folder
            entries = _entries(folder)
        except FileNotFoundError:
            continue
        except OSError as error:
            scan.unusable.append(f"{folder} (a folder that cannot be read: {error.strerror})")
            continue
        subfolders, linked = [], []
        for entry in entries:
            if not entry.is_symlink() and entry.is_dir(follow_symlinks=False):
                subfolders.append(entry.path)
            elif _leads_to_folder(entry):
                linked.append(entry.path)
            else:
                _add_file(scan, entry, top, suffixes, prefix)
        waiting += reversed(subfolders)
        links += linked
    return scan


def modified(path: str) -> int:
    """Modification time in ns; -1: there is no such path, or it cannot be looked up."""
    try:
        return os.stat(path).st_mtime_ns  # noqa: PTH116 (called for each folder, often)
    except OSError:
        return -1


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as iterator:
        return sorted(iterator, key=lambda entry: entry.name)


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or through a folder that cannot be searched
        return False


def _add_file(
    scan: Scan, entry: os.DirEntry[str], top: Path, suffixes: Sequence[str], prefix: str
) -> None:
    if entry.name.startswith(".") or not entry.name.startswith(prefix):
        return
    number = next((i for i, end in enumerate(suffixes) if entry.name.endswith(end)), None)
    if number is None and not entry.is_symlink():
        return
    problem = _problem(entry, wanted=number is not None)
    if problem:
        scan.unusable.append(f"{entry.path} ({problem})")
    elif number is not None:
        path = Path(entry.path)
        relative = path.relative_to(top).as_posix()
        folder, slash, stem = relative[: len(relative) - len(suffixes[number])].rpartition("/")
        key = folder + slash + stem.removeprefix(prefix)
        if key not in scan.files or number < scan.files[key][1]:
            scan.files[key] = path, number


def _problem(entry: os.DirEntry[str], wanted: bool) -> str:
    """Why an entry that is no folder cannot be used; empty: it can, or is not needed.

    A link that leads nowhere may have been one to a folder, so that it is named in any case.
    """
    try:
        if entry.is_file():  # without links this asks the disk for nothing more
            return ""
        mode = entry.stat().st_mode
    except FileNotFoundError:
        return f"a link to {os.readlink(entry.path)}, which does not exist"  # noqa: PTH115
    except OSError as error:
        return f"cannot be looked up: {error.strerror}"
    return kind_of_file(mode) if wanted else ""
