"""What a key's value may be written as: from YAML or a command line to the key's own type."""

from __future__ import annotations

import ast
import math
import shlex
from typing import Any

import yaml

from clouds.config.defaults import Key


def coerce(key: Key, value: Any) -> Any:
    """`value` in the type of the key's default.

    Text is read as Python or YAML would read it, as on a command line: '3', '1e-4', "('a', 'b')",
    '[a, b]'. A whole number is a fine float, a float without fraction a fine whole number, a list
    a fine tuple and the reverse. Nothing else is converted.

    Raises:
        ValueError: it cannot be had; the message says what is expected, with an example.
    """
    try:
        return _convert(value, key.default)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{expected(key)} is expected, for example: {example(key)}") from error


def expected(key: Key) -> str:
    """The type of a key's values, in words."""
    if isinstance(key.default, (list, tuple)):
        return "a list of " + _WORDS_MANY[type(_element(key.default))]
    return _WORDS[type(key.default)]


def example(key: Key) -> str:
    """The key and its default as they stand on a command line."""
    text = key.default if isinstance(key.default, str) else repr(key.default)
    return f"{key.name} {shlex.quote(text)}"


_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
_WORDS_MANY = {int: "whole numbers", float: "numbers", str: "texts"}


def _element(default: list[Any] | tuple[Any, ...]) -> Any:
    """An example of an element; lists that are empty by default hold whole numbers."""
    return default[0] if default else 0


def _convert(value: Any, default: Any) -> Any:
    if isinstance(default, str):
        return _text(value)
    if isinstance(value, str):
        value = _literal(value)
    if isinstance(default, bool):
        return _boolean(value)
    if isinstance(default, int):
        return _whole(value)
    if isinstance(default, float):
        return _real(value)
    if isinstance(default, (list, tuple)):
        if not isinstance(value, (list, tuple)):
            raise TypeError(value)
        return type(default)(_convert(v, _element(default)) for v in value)
    raise TypeError(f"no conversion to {type(default)}")


def _literal(text: str) -> Any:
    """What `text` says in Python, else in YAML, else itself."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1]
    return value


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(value)
    return value


def _whole(value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(value)
    return value


def _real(value: Any) -> float:
    if isinstance(value, str):
        value = float(value)  # 'inf' is no literal
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise TypeError(value)
    return float(value)
