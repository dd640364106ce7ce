"""The files below a folder: which are data, and what is told of the others.

Every path below the folder that is no folder is one of these: a file that is data, a further file
with the same key, an unused file, in an unused folder, or one that cannot be used.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from clouds.files import kind_of_file

FOREIGN_FOLDERS = frozenset(
    ("@eadir", "__macosx", "$recycle.bin", "lost+found", "system volume information")
)
"""Folders of file systems, of network storage and of archives, in lower case; not data."""


class FoundFile(NamedTuple):
    """A file that is data.

    Attributes:
        path: the file.
        number: of its suffix.
        identity: device and inode; the same for two names of one file.
    """

    path: str
    number: int
    identity: tuple[int, int]


class UnusedFolder(NamedTuple):
    """A hidden folder, or one of `FOREIGN_FOLDERS`; its files are no data.

    Attributes:
        path: the folder.
        num_files: number of files in it and its subfolders; links count as files.
    """

    path: str
    num_files: int


@dataclass
class Scan:
    """Files found, and what cannot be used.

    Attributes:
        files: by path relative to the folder without suffix and prefix, the key.
        others: further files with the same key, which are not used.
        unused: files that are no data: hidden, or with another suffix.
        unused_folders: see `UnusedFolder`.
        unusable: a line per path that is no regular file, leads nowhere or cannot be listed.
        repeated: a line per link to a folder that is listed under another name.
        times: modification time in ns of each folder that was listed, without the first; -1: it
            does not exist.
    """

    files: dict[str, FoundFile] = field(default_factory=dict)
    others: dict[str, list[FoundFile]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    unused_folders: list[UnusedFolder] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    times: dict[str, int] = field(default_factory=dict)


def same_files(files: Iterable[tuple[str, tuple[int, int]]]) -> tuple[str, ...]:
    """A line per file that is, by a link, the same as one before it.

    Args:
        files: path, and device and inode, of each.
    """
    first: dict[tuple[int, int], str] = {}
    lines = []
    for path, identity in files:
        other = first.setdefault(identity, path)
        # not all file systems list an inode that is unique
        if other != path and os.path.samefile(other, path):  # noqa: PTH121
            lines.append(f"{path}, the same file as {other}")
    return tuple(lines)


def files_beside(files: Collection[str]) -> tuple[str, ...]:
    """Files that are in the folders of `files`, not in their subfolders, and none of them."""
    beside: list[str] = []
    for folder in dict.fromkeys(os.path.dirname(file) for file in files):  # noqa: PTH120
        try:
            entries = _entries(folder)
        except OSError:  # a file that does not exist is told elsewhere
            continue
        beside += [entry.path for entry in entries if not _leads_to_folder(entry)]
    named = set(files)
    return tuple(path for path in beside if path not in named)


def scan_files(top: Path, suffixes: Sequence[str], prefix: str = "") -> Scan:
    """The files below `top` with one of `suffixes`, in any case; `top` need not exist.

    Names that do not begin with `prefix` are no data; it is not part of the key. The first suffix
    that fits a name counts. Of several files with the same key the one whose suffix comes first is
    used, of these the one with the suffix in its own case, else the first. Names that begin with a
    dot and `FOREIGN_FOLDERS` are no data. Only regular files count, also through links; nothing is
    opened. Each folder is listed once, so links in circles end; folders that are no links come
    first, so that a file keeps the name that it has without links.
    """
    scanner = _Scanner(top, suffixes, prefix)
    scan = scanner.scan
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
        subfolders, linked = scanner.add(entries, status.st_dev)
        waiting += reversed(subfolders)
        links += linked
    return scan


def is_foreign_folder(name: str) -> bool:
    """Whether a folder of this name is hidden or one of `FOREIGN_FOLDERS`."""
    return name.startswith(".") or name.lower() in FOREIGN_FOLDERS


def modified(path: str) -> int:
    """Modification time in ns; -1: there is no such path, or it cannot be looked up."""
    try:
        return os.stat(path).st_mtime_ns  # noqa: PTH116 (called for each folder, often)
    except OSError:
        return -1


class _Scanner:
    """Sorts the entries of folders into a `Scan`.

    Args:
        top, suffixes, prefix: as of `scan_files`.
    """

    def __init__(self, top: Path, suffixes: Sequence[str], prefix: str) -> None:
        self.scan = Scan()
        self.suffixes = suffixes
        self.prefix = prefix
        self.endings = tuple(suffix.lower() for suffix in suffixes)
        self.key_start = len(os.path.join(top, ""))  # noqa: PTH118 (with the separator)

    def add(self, entries: Sequence[os.DirEntry[str]], device: int) -> tuple[list[str], list[str]]:
        """Add the files of a folder on `device`; returns its subfolders, and links to folders."""
        subfolders: list[str] = []
        linked: list[str] = []
        for entry in entries:
            name, is_link = entry.name, entry.is_symlink()
            is_folder = _leads_to_folder(entry) if is_link else entry.is_dir(follow_symlinks=False)
            if is_folder and is_foreign_folder(name):
                count = 1 if is_link else _count_files(entry.path)
                self.scan.unused_folders.append(UnusedFolder(entry.path, count))
            elif is_folder:
                (linked if is_link else subfolders).append(entry.path)
            elif name.startswith("."):
                self.scan.unused.append(entry.path)
            elif name.lower().endswith(self.endings) and name.startswith(self.prefix):
                self._add_data(entry, device, is_link)
            # a link that leads nowhere may have been one to a folder
            elif is_link and (problem := _problem(entry, wanted=False)):
                self.scan.unusable.append(f"{entry.path} ({problem})")
            else:
                self.scan.unused.append(entry.path)
        return subfolders, linked

    def _add_data(self, entry: os.DirEntry[str], device: int, is_link: bool) -> None:
        path, files, others = entry.path, self.scan.files, self.scan.others
        if problem := _problem(entry, wanted=True):
            self.scan.unusable.append(f"{path} ({problem})")
            return
        number = 0
        while not path.lower().endswith(self.endings[number]):
            number += 1
        identity = device, entry.inode()
        if is_link:
            status = entry.stat()
            identity = status.st_dev, status.st_ino
        file = FoundFile(path, number, identity)
        key = path[self.key_start : -len(self.suffixes[number])]
        if self.prefix:
            folder, slash, stem = key.rpartition("/")
            key = folder + slash + stem.removeprefix(self.prefix)
        if key not in files:
            files[key] = file
        elif self._rank(file) < self._rank(files[key]):
            others.setdefault(key, []).append(files[key])
            files[key] = file
        else:
            others.setdefault(key, []).append(file)

    def _rank(self, file: FoundFile) -> tuple[int, bool]:
        """Lower: preferred among files with the same key; they are added in the order of names."""
        return file.number, not file.path.endswith(self.suffixes[file.number])


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as iterator:
        return sorted(iterator, key=lambda entry: entry.name)


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or through a folder that cannot be searched
        return False


def _count_files(folder: str) -> int:
    """Number of files in a folder and its subfolders; what cannot be listed is not counted."""
    total = 0
    for path, folders, files in os.walk(folder):
        links = sum(os.path.islink(os.path.join(path, name)) for name in folders)  # noqa: PTH114, PTH118
        total += len(files) + links
    return total


def _problem(entry: os.DirEntry[str], wanted: bool) -> str:
    """Why an entry that is no folder cannot be used; empty: it can, or is not needed."""
    try:
        if entry.is_file():  # without links this asks the disk for nothing more
            return ""
        mode = entry.stat().st_mode
    except FileNotFoundError:
        return f"a link to {os.readlink(entry.path)}, which does not exist"  # noqa: PTH115
    except OSError as error:
        return f"cannot be looked up: {error.strerror}"
    return kind_of_file(mode) if wanted else ""
