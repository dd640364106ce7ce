"""Atomic writes: a file appears under its name complete, or not at all.

While it is written, `x.json` is `.x.json.<32 hexadecimal digits>.part` in the same folder. The
digits differ for each writer, so any number of processes, on any number of machines, may write the
same file; the last one to finish wins.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_KINDS = (
    (stat.S_ISREG, "a regular file"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)
_CHUNK = 1 << 20  # bytes hashed at a time
_PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{32}\.part", re.DOTALL)


@contextlib.contextmanager
def atomic_write(
    path: Path, mode: str = "wb", *, parents: bool = True, fsync: bool = True
) -> Iterator[IO[Any]]:
    """Open a partial file for writing that is renamed to `path` at the end of the context.

    On any error the partial file is deleted, and a file that `path` named before is unchanged.

    Args:
        path: the file.
        mode: "wb", or "w" for text: UTF-8, line ends unchanged.
        parents: create its folder if it does not exist.
        fsync: wait until the content is on the disk. Without, a power failure may leave an
            incomplete file under the name, which its reader must detect.

    Raises:
        OSError: it cannot be written.
    """
    assert mode in ("w", "wb"), mode
    if parents:
        path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    encoding, newline = ("utf-8", "") if mode == "w" else (None, None)
    try:
        with partial.open(mode, encoding=encoding, newline=newline) as file:
            yield file
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to raise
            partial.unlink()
        raise


def expand_user(path: str | Path) -> Path:
    """`path` with the home directory in place of a leading `~`.

    Raises:
        ValueError: the directory is not known, as for a user without an account in a container.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"'{path}': ~ cannot be expanded, the home directory is not known. Set HOME, or write "
            "the whole path."
        ) from error


def final_name(name: str) -> str | None:
    """Name that the partial file `name` of `atomic_write` is renamed to; None for other files."""
    match = _PARTIAL.fullmatch(name)
    return match and match[1]


def partial_files(folder: Path, name: str = "") -> list[Path]:
    """Files of `atomic_write` that are being written, or that a killed process left.

    `folder` need not exist. `name`: only those that are to be renamed to it; empty: all.
    """
    names = {path: final_name(path.name) for path in folder.glob(".*.part")}
    return [path for path, final in names.items() if final and name in ("", final)]


def file_sha256(path: Path) -> str:
    """SHA-256 of the contents of a file, 64 lowercase hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """The elements of a tensor of any dtype and shape, in order, on the host; for hashes."""
    from torch import uint8

    flat = tensor.detach().cpu().contiguous().flatten()
    values: memoryview = flat.view(uint8).numpy().data
    return values


def kind_of_file(mode: int) -> str:
    """What a path is by the mode in its status, such as "a FIFO"."""
    return next((kind for is_kind, kind in _KINDS if is_kind(mode)), "no regular file")


def check_regular(path: Path) -> None:
    """Check that a path is no FIFO, socket or device: reading one may wait for ever.

    A folder, and a path that does not exist, are left to the reader.

    Raises:
        ValueError: it is one, or leads to one.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(
            f"{path}: cannot be read, since it is {kind_of_file(path.stat().st_mode)}; allowed "
            "are regular files, and links to them"
        )
