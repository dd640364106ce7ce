"""The manifest of a folder of generated images: what each of them was painted from.

A generated dataset is a folder with `images/` and beside it `manifest.jsonl`, one JSON object a
line and image, in the order in which the images were finished. A line is written after its image
is in place, so an image without a line is one whose painter was killed in between.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.jsonl"

_BLOCK = 1 << 20  # bytes hashed at a time


@dataclass(frozen=True)
class Entry:
    """How one image came to be.

    Attributes:
        file: the image, relative to the folder `images`, with `/` between folders.
        prompt: the text it was painted from.
        seed: of its own random numbers, at least 0.
        generator: registered name of the generator.
        model: what the generator was loaded with, such as a hub id; empty when it has no weights.
        height, width: size of the image, pixels.
        sha256: of the file's bytes, 64 lowercase hexadecimal digits.

    Raises:
        ValueError: a value is of the wrong type or out of range; the message names the field.
    """

    file: str
    prompt: str
    seed: int
    generator: str
    model: str
    height: int
    width: int
    sha256: str

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kind = int if field.type == "int" else str
            if type(value) is not kind:
                wanted = "a whole number" if kind is int else "a text"
                raise ValueError(f"{field.name} is {value!r}, but must be {wanted}")
        path = PurePosixPath(self.file)
        if str(path) != self.file or path.is_absolute() or ".." in path.parts or not path.name:
            raise ValueError(
                f"file is {self.file!r}, but must be a path below the folder images, such as "
                "'0000001.png'"
            )
        for name, low in (("seed", 0), ("height", 1), ("width", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least {low}")
        if len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            raise ValueError(
                f"sha256 is {self.sha256!r}, but must be 64 lowercase hexadecimal digits"
            )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 lowercase hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(path: Path) -> dict[str, Entry]:
    """The entries of a manifest by their `file`.

    An image that was painted twice has two lines; the later one counts. A last line without its
    end, as a killed painter leaves it, is dropped with a warning.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another line is no entry; the message holds the file and the line's number.
    """
    entries: dict[str, Entry] = {}
    *lines, tail = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = _parse(line)
        except ValueError as error:
            raise ValueError(
                f"{path}:{number}: this line is no entry of a manifest: {error}. Remove the line "
                "and run the generator again: it paints what is missing."
            ) from error
        entries[entry.file] = entry
    if tail.strip():
        try:
            entry = _parse(tail)
        except ValueError:
            logger.warning(
                "%s:%d: dropped the last line, which was not written to its end. Run the "
                "generator again: it paints what is missing.",
                path,
                len(lines) + 1,
            )
        else:
            entries[entry.file] = entry
    return entries


def append_entry(path: Path, entry: Entry) -> None:
    """Add one line at the end; it is on the disk when this returns.

    Several processes may append to one manifest at the same time. What a killed one has left of
    its last line is removed first.

    Raises:
        OSError: the file cannot be written, or the disk is full; the manifest is then as before.
    """
    import fcntl  # not on Windows, where a manifest can still be read

    line = json.dumps(asdict(entry)).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        # held until the file is closed: no other writer's line can be taken for a torn one
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = _end_of_lines(descriptor, path)
        try:
            written = os.write(descriptor, line)
            if written < len(line):
                raise OSError(f"{path}: wrote {written} of {len(line)} bytes; is the disk full?")
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def _end_of_lines(descriptor: int, path: Path) -> int:
    """The size of the file, whose last line is whole when this returns."""
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return size
    content = os.pread(descriptor, size, 0)
    start = content.rfind(b"\n") + 1
    try:
        _parse(content[start:])
    except ValueError:
        logger.warning("%s: removed the last line, which was not written to its end", path)
        os.ftruncate(descriptor, start)
        return start
    os.write(descriptor, b"\n")
    return size + 1


def _parse(line: bytes) -> Entry:
    """One line -> an entry; ValueError says what is wrong with it."""
    try:
        values: Any = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError("it is no UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"it is {values!r}, but must be an object with fields")
    known = [field.name for field in fields(Entry)]
    missing = [name for name in known if name not in values]
    unknown = [name for name in values if name not in known]
    if missing or unknown:
        parts = [f"missing: {', '.join(missing)}"] * bool(missing)
        parts += [f"unknown: {', '.join(unknown)}"] * bool(unknown)
        raise ValueError(f"its fields are not those of an entry ({'; '.join(parts)})")
    return Entry(**values)
