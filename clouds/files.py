"""Files that appear under their name whole or not at all.

While it is being written, `x.json` is `.x.json.<32 hexadecimal digits>.part` beside it. The digits
are another's for each writer, so any number of processes, on any number of machines, may write the
same file; the last one to finish wins.
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{32}\.part", re.DOTALL)


@contextlib.contextmanager
def written_whole(
    path: Path, mode: str = "wb", *, parents: bool = True, synced: bool = True
) -> Iterator[IO[Any]]:
    """Open a file for writing that appears under its name, or replaces what was there, at the end.

    On any error what was there before stays, and nothing is left beside it.

    Args:
        path: the file.
        mode: "wb", or "w" for text: UTF-8, lines as they are.
        parents: make its folder if there is none.
        synced: wait until the content is on the disk. Without, a power cut may leave a torn file
            under the name, which its reader must recognize.

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
            if synced:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            partial.unlink()
        raise


def name_when_whole(name: str) -> str | None:
    """The name that a file is to have which `written_whole` is writing; None for other files."""
    match = _PARTIAL.fullmatch(name)
    return match and match[1]


def unfinished(folder: Path, name: str = "") -> list[Path]:
    """What is being written in a folder, or was when a process was killed.

    Args:
        folder: need not be there.
        name: only what is to have this name.
    """
    targets = {path: name_when_whole(path.name) for path in folder.glob(".*.part")}
    return [path for path, target in targets.items() if target and name in ("", target)]


def raw_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor of any type and shape, in order, on the host; for hashes."""
    from torch import uint8

    flat = tensor.detach().cpu().contiguous().flatten()
    values: memoryview = flat.view(uint8).numpy().data
    return values
