"""Formatting of log and error messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


def format_examples(items: Sequence[object], limit: int = 5) -> str:
    """The first `limit` items of a list and the number of the others: `a, b and 3 more`."""
    remaining = len(items) - limit
    examples = ", ".join(str(item) for item in items[:limit])
    return f"{examples} and {remaining} more" if remaining > 0 else examples


def repeated(names: Iterable[str]) -> list[str]:
    """The names that occur more than once, sorted."""
    return sorted(name for name, count in Counter(names).items() if count > 1)


def install_extra(extra: str) -> str:
    """The command that installs an extra of this package, such as 'sam'."""
    return f'pip install "clouds-dgss[{extra}]"'
