"""The output file of prompt writing, which is extended in rounds and can be resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from clouds.files import atomic_write, partial_files
from clouds.generation.prompts import parse_prompts

_SETTINGS_PREFIX = "# written by tools/write_prompts.py: "
_ROUND_END = "# end of round "


class PromptFile:
    """The output file: earlier prompts, a line of settings, then the rounds.

    Args:
        path: the file; created if it does not exist.
        settings: values that the prompts depend on; the file stores them.

    Attributes:
        old: prompts above the line of settings.

    Raises:
        ValueError: the file is not text, or was started with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, object]) -> None:
        self.path = path
        for leftover in partial_files(path.parent, path.name):
            leftover.unlink(missing_ok=True)
        before, stored, body = _split_file(_read(path))
        self._head = before + _SETTINGS_PREFIX + json.dumps(settings) + "\n"
        if stored is None:
            if before and not before.endswith("\n"):
                self._head = before + "\n" + self._head[len(before) :]
            self._write("")
        else:
            _check_same(path, stored, settings)
            self._head = before + _SETTINGS_PREFIX + stored + "\n"
        self.old = [prompt.text for prompt in parse_prompts(before.splitlines())]
        # A line without a newline was being written when the run was interrupted.
        self._lines = [line for line in body.splitlines(keepends=True) if line.endswith("\n")]

    @property
    def new(self) -> list[str]:
        """Prompts below the line of settings."""
        return [prompt.text for prompt in parse_prompts(self._lines)]

    @property
    def rounds(self) -> int:
        """Number of complete rounds."""
        return sum(line.startswith(_ROUND_END) for line in self._lines)

    def drop_incomplete_round(self) -> None:
        """Remove the lines after the last complete round."""
        while self._lines and not self._lines[-1].startswith(_ROUND_END):
            self._lines.pop()
        self._write("".join(self._lines))

    def _write(self, body: str) -> None:
        """Replace the whole file."""
        with atomic_write(self.path, "w") as stream:
            stream.write(self._head + body)

    def append(self, prompts: Sequence[str], round_number: int | None) -> None:
        """Append prompts, and the line that ends a round if it is complete; syncs to disk."""
        lines = [f"{prompt}\n" for prompt in prompts]
        if round_number is not None:
            lines.append(f"{_ROUND_END}{round_number}\n")
        with self.path.open("a", encoding="utf-8", newline="\n") as stream:
            stream.write("".join(lines))
            stream.flush()
            os.fsync(stream.fileno())
        self._lines += lines


def _read(path: Path) -> str:
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder; a file is required")
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text; choose another --output") from error


def _split_file(text: str) -> tuple[str, str | None, str]:
    """The text above the line of settings, the settings, and the text below."""
    before, begin, rest = text.partition(_SETTINGS_PREFIX)
    settings, end, body = rest.partition("\n")
    return (before, settings, body) if begin and end else (before, None, "")


def _check_same(path: Path, stored: str, settings: Mapping[str, object]) -> None:
    """Raise ValueError if the file was started with other settings."""
    try:
        started = json.loads(stored)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: the line of settings is not valid JSON: {stored[:60]!r}"
        ) from error
    requested = json.loads(json.dumps(settings))
    changed = [
        f"{key} {started.get(key)!r} (now {requested.get(key)!r})"
        for key in sorted({*started, *requested})
        if started.get(key) != requested.get(key)
    ]
    if changed:
        raise ValueError(
            f"{path} was started with {', '.join(changed)}. Use the same settings to resume it, or "
            "another --output."
        )
