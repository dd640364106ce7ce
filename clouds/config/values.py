"""Settings, and the conversion of what they say to the type of their key."""

from __future__ import annotations

import ast
import math
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clouds.config.key import Key
from clouds.yaml_core import CoreLoader


@dataclass(frozen=True)
class Setting:
    """One value that a file or the command line gives to a key.

    Attributes:
        name: dotted name of the key.
        value: as YAML reads it, or the text of an override.
        origin: file and line, or "override", for messages.
    """

    name: str
    value: Any
    origin: str


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every leaf of nested dictionaries."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def coerce(key: Key, value: Any) -> Any:
    """`value` in the type of the key's default.

    Text is read as a Python literal, else as YAML 1.2, as on a command line: '3', '1e-4',
    "('a', 'b')", '[a, b]'. An int is accepted for a float, a float without fraction for an int, a
    list for a tuple and the reverse. Nothing else is converted.

    Raises:
        ValueError: it cannot be converted; the message says what is expected, with an example.
    """
    try:
        return _convert(value, _pattern(key), key.allow_inf)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{expected(key)} is expected, for example: {example(key)}") from error


def expand_home(key: Key, value: Any) -> Any:
    """`value` with the home directory in place of a leading `~`, if the key is a path.

    Raises:
        ValueError: there is no such user.
    """
    if not key.is_path or not value.startswith("~"):
        return value
    try:
        return str(Path(value).expanduser())
    except RuntimeError as error:
        raise ValueError("~ cannot be expanded: the home directory is not known") from error


def expected(key: Key) -> str:
    """The type of a key's values as text."""
    if isinstance(key.default, (list, tuple)):
        return "a list of " + _plural(_pattern(key)[0])
    if isinstance(key.default, float) and key.allow_inf:
        return "a number"
    return _TYPES[type(key.default)]


def example(key: Key) -> str:
    """The key and its default, or of an empty list one with an element, as on a command line."""
    text = key.default if isinstance(key.default, str) else repr(_pattern(key))
    return f"{key.name} {shlex.quote(text)}"


_TYPES = {bool: "True or False", int: "a whole number", float: "a finite number", str: "text"}
_PLURALS = {int: "whole numbers", float: "finite numbers", str: "texts"}


def _plural(element: Any) -> str:
    """The type of elements as text."""
    if isinstance(element, tuple):
        return f"lists of {_plural(element[0])}"
    return _PLURALS[type(element)]


def _pattern(key: Key) -> Any:
    """A value that has the type of the key's values, and is not an empty list."""
    if isinstance(key.default, (list, tuple)) and not key.default:
        return type(key.default)([key.element])
    return key.default


def _convert(value: Any, pattern: Any, allow_inf: bool) -> Any:
    if isinstance(pattern, str):
        return _text(value)
    if isinstance(value, str):
        value = _literal(value)
    if isinstance(pattern, (list, tuple)):
        if not isinstance(value, (list, tuple)):
            raise TypeError(value)
        return type(pattern)(_convert(v, pattern[0], allow_inf) for v in value)
    if isinstance(value, bool) != isinstance(pattern, bool):
        raise TypeError(value)
    if isinstance(pattern, float):
        return _float(value, allow_inf)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, type(pattern)):
        raise TypeError(value)
    return value


def _literal(text: str) -> Any:
    """The value of `text` as a Python literal, else as YAML, else `text`."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass
    try:
        return yaml.load(text, CoreLoader)
    except yaml.YAMLError:
        return text


def _text(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:  # no file name has the character 0
        raise TypeError(value)
    os.fsencode(value)  # raises for halves of surrogate pairs, a ValueError
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1]
    return value


def _float(value: Any, allow_inf: bool) -> float:
    if isinstance(value, str):
        value = float(value)  # 'inf' is neither a Python literal nor a number in YAML
    if not isinstance(value, (int, float)):
        raise TypeError(value)
    number = float(value)
    if math.isnan(number) or (math.isinf(number) and not allow_inf):
        raise ValueError(value)
    return number
