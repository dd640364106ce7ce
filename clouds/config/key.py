"""Types of the key table: a configuration key and the rule that its values obey."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """The values that a key allows.

    Attributes:
        description: the rule as text that follows "allowed is"; empty: every value of the type.
        is_valid: whether a value of the key's type is allowed.
    """

    description: str
    is_valid: Callable[[Any], bool]


def one_of(*allowed: object) -> Rule:
    """One of the given values."""
    return Rule(f"one of {', '.join(map(repr, allowed))}", lambda value: value in allowed)


def some_of(*allowed: object) -> Rule:
    """A list of the given values, or an empty one."""
    names = ", ".join(map(repr, allowed))
    return Rule(f"a list of {names}, or ()", lambda value: set(value) <= set(allowed))


def at_least(low: float) -> Rule:
    """A number >= `low`."""
    return Rule(f"at least {low}", lambda value: value >= low)


def above(low: float) -> Rule:
    """A number > `low`."""
    return Rule(f"greater than {low}", lambda value: value > low)


def within(low: float, high: float) -> Rule:
    """A number in the closed interval [`low`, `high`]."""
    return Rule(f"between {low} and {high}", lambda value: low <= value <= high)


all_positive = Rule("numbers greater than 0", lambda value: all(v > 0 for v in value))
some_positive = Rule(
    "one or more numbers greater than 0", lambda value: bool(value) and all(v > 0 for v in value)
)
sizes = Rule(
    "pairs of height and width, both 0 or both above 0",
    lambda value: all(len(size) == 2 and (min(size) > 0 or size == (0, 0)) for size in value),
)
no_or_three_numbers = Rule(
    "empty, or three numbers, red green blue", lambda value: len(value) in (0, 3)
)
no_or_three_positive = Rule(
    "empty, or three numbers greater than 0, red green blue",
    lambda value: len(value) in (0, 3) and all(v > 0 for v in value),
)
blocks = Rule(
    "empty, or four indices in rising order",
    lambda value: len(value) in (0, 4) and all(v >= 0 for v in value) and sorted(value) == [*value],
)
positive_pair = Rule(
    "two numbers greater than 0", lambda value: len(value) == 2 and all(v > 0 for v in value)
)
not_empty = Rule("any value that is not empty", lambda value: len(value) > 0)
any_value = Rule("", lambda value: True)


@dataclass(frozen=True)
class Key:
    """One configuration key.

    Attributes:
        name: dotted name, as in a YAML file or on the command line.
        default: value when nothing sets it; its type is the type of all values of the key.
        doc: meaning, unit and source.
        rule: allowed values.
        is_path: the value is a file or folder: a leading `~` is replaced by the home directory
            when the config is read.
        allow_inf: a float may be infinite.
        element: an element of a list that is empty by default, as an example and for its type.
    """

    name: str
    default: Any
    doc: str
    rule: Rule = any_value
    is_path: bool = False
    allow_inf: bool = False
    element: Any = 0


def sections(names: Iterable[str]) -> set[str]:
    """The sections of dotted names: A and A.B of A.B.C."""
    parts = (name.split(".") for name in names)
    return {".".join(part[:n]) for part in parts for n in range(1, len(part))}
