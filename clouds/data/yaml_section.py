"""Reading of YAML mappings: each value has a type, and unknown names are errors."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from clouds.yaml_core import CoreLoader

MAX_ID = 65535
"""Greatest id of a label file: they have up to 16 bits."""

Color = tuple[int, int, int]


class DescriptionError(ValueError):
    """A description of a dataset, or a label space, is not valid; the message names the entry."""


def read_text(path: Path) -> str:
    """Content of a text file.

    Raises:
        FileNotFoundError: it does not exist.
        DescriptionError: it is no text file.
    """
    if not path.is_file():
        if path.exists():
            raise DescriptionError(f"{path}: a YAML file is expected, and this is none")
        raise FileNotFoundError(f"{path} does not exist (working directory: {Path.cwd()})")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DescriptionError(f"{path}: not a YAML text file: {error}") from error


def parse(text: str, origin: str) -> Section:
    """The mapping that a YAML document consists of.

    Args:
        text: the document.
        origin: its file, for messages.

    Raises:
        DescriptionError: not valid YAML, or no mapping.
    """
    try:
        content = yaml.load(text, CoreLoader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise DescriptionError(f"{origin}{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise DescriptionError(f"{origin}: not valid YAML: {error}") from error
    return Section(content, origin)


class Section:
    """A mapping in a YAML file. Each method reads one entry; `done` raises on the ones not read.

    Args:
        content: the mapping.
        origin: file and place in it, for messages.
    """

    def __init__(self, content: Any, origin: str) -> None:
        if not isinstance(content, Mapping):
            raise DescriptionError(
                f"{origin}: a mapping (name: value) is expected, not {content!r}"
            )
        self.content = content
        self.origin = origin
        self._known: set[str] = set()

    def __contains__(self, name: str) -> bool:
        self._known.add(name)
        return self.content.get(name) is not None

    def error(self, name: str, allowed: str) -> DescriptionError:
        """The error of an entry whose value is not `allowed`."""
        value = self.content.get(name)
        found = "is missing" if value is None else f"is {value!r}"
        return DescriptionError(f"{self.origin}: '{name}' {found}; allowed is {allowed}")

    def done(self) -> None:
        """Raise DescriptionError if the mapping has entries that nothing has read."""
        for name in self.content:
            if name not in self._known:
                near = difflib.get_close_matches(str(name), self._known, n=1)
                hint = f"did you mean '{near[0]}'?" if near else ""
                allowed = ", ".join(sorted(self._known))
                raise DescriptionError(
                    f"{self.origin}: '{name}' is not known here{'; ' + hint if hint else ''}; "
                    f"allowed are {allowed}"
                )

    def text(self, name: str, default: str | None = None, allowed: str = "text") -> str:
        """A text that is not empty; `default` where there is no entry, None: it is required."""
        value = self.content[name] if name in self else default
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            raise self.error(name, allowed)
        return value.strip()

    def choice(self, name: str, values: Sequence[str], default: str) -> str:
        """One of several texts."""
        value = self.content[name] if name in self else default
        if value not in values:
            raise self.error(name, " or ".join(values))
        return str(value)

    def flag(self, name: str) -> bool:
        """true or false; false where there is no entry."""
        value = self.content[name] if name in self else False
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def texts(self, name: str, default: Sequence[str]) -> tuple[str, ...]:
        """One text or a list of texts, none of them empty or repeated."""
        value = self.content[name] if name in self else list(default)
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(v, str) and v.strip() for v in values) or not values:
            raise self.error(name, "a text, or a list of texts")
        if len(set(values)) < len(values):
            raise self.error(name, "a list of different texts")
        return tuple(values)

    def ids(self, name: str, default: Sequence[int | str] = ()) -> tuple[int, ...]:
        """Ids of label files: a number, or a list of numbers and of ranges such as 0-6."""
        value = self.content[name] if name in self else list(default)
        ids: list[int] = []
        for entry in value if isinstance(value, list) else [value]:
            span = _id_range(entry)
            if span is None:
                raise self.error(
                    name, f"a list of ids from 0 to {MAX_ID} and of ranges of them, such as 7, 9-12"
                )
            ids += span
        return tuple(dict.fromkeys(ids))

    def color(self, name: str) -> Color | None:
        """RGB, 0-255; None where there is no entry."""
        if name not in self:
            return None
        color = _color(self.content[name])
        if color is None:
            raise self.error(name, "a color [red, green, blue], each 0 to 255")
        return color

    def colors(self, name: str) -> tuple[Color, ...]:
        """A list of RGB colors, or one color; empty where there is no entry."""
        value = self.content[name] if name in self else []
        if value == []:
            return ()
        single = _color(value)
        colors = (
            [single]
            if single
            else [_color(v) for v in value]
            if isinstance(value, list)
            else [None]
        )
        valid = tuple(color for color in colors if color is not None)
        if len(valid) < len(colors):
            raise self.error(name, "a list of colors [red, green, blue], each 0 to 255")
        return valid

    def sections(self, name: str) -> list[Section]:
        """A list of mappings, at least one."""
        value = self.content[name] if name in self else None
        if not isinstance(value, list) or not value:
            raise self.error(name, "a list of mappings")
        return [Section(v, f"{self.origin}: {name}[{i}]") for i, v in enumerate(value)]

    def section(self, name: str) -> Section:
        """A mapping; its own names are free, see `names`."""
        if name not in self:
            raise self.error(name, "a mapping")
        return Section(self.content[name], f"{self.origin}: {name}")

    def names(self) -> list[str]:
        """The names in this mapping, which are texts and not empty."""
        for name in self.content:
            if not isinstance(name, str) or not name.strip():
                raise DescriptionError(f"{self.origin}: {name!r} is not a name; a text is expected")
        return list(self.content)


def _color(value: Any) -> Color | None:
    if not isinstance(value, list) or len(value) != 3:
        return None
    if not all(type(v) is int and 0 <= v <= 255 for v in value):
        return None
    return value[0], value[1], value[2]


def _id_range(entry: Any) -> range | None:
    """The ids of a number or of a range 'a-b'; None: it is neither."""
    if type(entry) is int:
        first = last = entry
    elif isinstance(entry, str) and len(ends := entry.split("-")) == 2:
        if not all(end.strip().isdecimal() and len(end) < 9 for end in ends):
            return None
        first, last = (int(end) for end in ends)
    else:
        return None
    return range(first, last + 1) if 0 <= first <= last <= MAX_ID else None
