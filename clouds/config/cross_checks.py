"""Conditions on several keys of a config: their list, and the decorator that adds one."""

from __future__ import annotations

from collections.abc import Callable

CROSS_CHECKS: list[tuple[tuple[str, ...], Callable[..., str | None]]] = []
"""Conditions on several keys: their names, and a function of their values.

The function returns None, or a message about the first key.
"""


def cross_check(*keys: str) -> Callable[[Callable[..., str | None]], Callable[..., str | None]]:
    """Add the decorated function to `CROSS_CHECKS`."""

    def add(check: Callable[..., str | None]) -> Callable[..., str | None]:
        CROSS_CHECKS.append((keys, check))
        return check

    return add
