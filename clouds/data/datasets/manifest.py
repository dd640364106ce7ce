"""The manifest of a folder of generated images: how each of them was generated.

A generated dataset is a folder with `images/` and `manifest.jsonl`, one JSON object per line and
image, in the order in which the images were finished. A line is written after its image, so an
image without a line is one whose generator was killed in between.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.jsonl"

APPROXIMATE = "approximate"
"""Kind of labels that an image was generated for, and that it may differ from."""


@dataclass(frozen=True)
class Entry:
    """One line of a manifest: how an image was generated.

    Attributes:
        file: the image, relative to the folder `images`, with `/` between folders.
        prompt: text prompt.
        seed: seed of its random numbers, at least 0.
        generator: registered name of the generator.
        model: weights of the generator, such as a hub id; empty when it has no weights.
        height, width: size of the image, pixels.
        sha256: SHA-256 of the image file, 64 lowercase hexadecimal digits.
        redraws: number of images of one color that were drawn before, with other seeds; a line
            without it means 0.
        labels: 'approximate' if the image was generated for its label, so that edges and small
            objects may differ; a line without it means a label that is exact, or none.
        condition: name of the label file that it was generated for; a line without it means none.

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
    redraws: int = 0
    labels: str = ""
    condition: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            expected_type = int if field.type == "int" else str
            if type(value) is not expected_type:
                expected = "an integer" if expected_type is int else "a string"
                raise ValueError(f"{field.name} is {value!r}, but must be {expected}")
        path = PurePosixPath(self.file)
        if str(path) != self.file or path.is_absolute() or ".." in path.parts or not path.name:
            raise ValueError(
                f"file is {self.file!r}, but must be a path below the folder images, such as "
                "'0000001.png'"
            )
        for name, low in (("seed", 0), ("height", 1), ("width", 1), ("redraws", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least {low}")
        if self.labels not in ("", APPROXIMATE):
            raise ValueError(f"labels is {self.labels!r}, but must be {APPROXIMATE!r} or empty")
        if len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            raise ValueError(
                f"sha256 is {self.sha256!r}, but must be 64 lowercase hexadecimal digits"
            )


def read_manifest(path: Path) -> dict[str, Entry]:
    """The entries of a manifest by their `file`.

    An image that was generated twice has two lines; the later one counts. An incomplete last line,
    which a killed generator leaves behind, is dropped with a warning.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another line is not a valid entry; the message contains file and line number.
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
                f"{path}:{number}: not a valid manifest entry: {error}. Remove the line and run "
                "the generator again: it generates the missing images."
            ) from error
        entries[entry.file] = entry
    if tail.strip():
        try:
            entry = _parse(tail)
            entries[entry.file] = entry
        except ValueError:
            logger.warning(
                "%s:%d: dropped the last line, which is incomplete. Run the generator again: it "
                "generates the missing images.",
                path,
                len(lines) + 1,
            )
    return entries


def append_entry(path: Path, entry: Entry) -> None:
    """Append one line and flush it to disk.

    Several processes may append to one manifest at the same time. An incomplete last line of a
    killed process is removed first.

    Raises:
        OSError: the file cannot be written, or the disk is full; the manifest is unchanged.
    """
    import fcntl  # does not exist on Windows, where a manifest can still be read

    optional = {field.name for field in fields(Entry) if field.default is not MISSING}
    values = {key: v for key, v in asdict(entry).items() if v or key not in optional}
    line = json.dumps(values).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        # held until the file is closed, so that no other process sees an incomplete line
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = _repair_last_line(descriptor, path)
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


def _repair_last_line(descriptor: int, path: Path) -> int:
    """Complete or remove an incomplete last line; returns the size of the file."""
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return size
    content = os.pread(descriptor, size, 0)
    start = content.rfind(b"\n") + 1
    try:
        _parse(content[start:])
    except ValueError:
        logger.warning("%s: removed the last line, which was incomplete", path)
        os.ftruncate(descriptor, start)
        return start
    os.write(descriptor, b"\n")
    return size + 1


def _parse(line: bytes) -> Entry:
    """One line -> an entry; ValueError with the reason if it is not valid."""
    try:
        values: Any = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"it is {values!r}, but must be a JSON object")
    known = [field.name for field in fields(Entry)]
    missing = [f.name for f in fields(Entry) if f.default is MISSING and f.name not in values]
    unknown = [name for name in values if name not in known]
    if missing or unknown:
        parts = [f"missing: {', '.join(missing)}"] * bool(missing)
        parts += [f"unknown: {', '.join(unknown)}"] * bool(unknown)
        raise ValueError(f"wrong fields ({'; '.join(parts)})")
    return Entry(**values)
