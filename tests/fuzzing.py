"""Feeding mutated inputs to the library, and counting how each of them ends.

Each input ends in one of three ways: it is accepted, it is refused in one line as the commands do
it, or it ends in a traceback, which fails the test.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from clouds.cli import command_line

ACCEPTED, REFUSED, TRACEBACK = OUTCOMES = ("accepted", "refused", "traceback")

COUNTS: dict[str, Counter[str]] = {}
"""Kind of input -> outcome -> number of inputs of this session."""

SLOW_INPUTS: dict[str, int] = {}
"""Kind of input -> number of inputs of its slow test."""

FAST_INPUTS = 25
"""Number of inputs per kind in the fast tests, unless more are asked for."""

Outcome = tuple[str, Any]
"""ACCEPTED and the result, or REFUSED and the message."""


def fuzz(
    kind: str, count: int, few: int = FAST_INPUTS, **strategies: st.SearchStrategy[Any]
) -> Callable[..., Any]:
    """Two tests of the decorated function: `few` inputs, and marked slow `count` inputs.

    The decorated function takes one argument, a dictionary of what is drawn from `strategies`; it
    is called with it after the function's fixtures.
    """
    SLOW_INPUTS[kind] = count

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @pytest.mark.parametrize(
            "inputs",
            [pytest.param(few, id="few"), pytest.param(count, id="many", marks=SLOW)],
        )
        def test(inputs: int, tmp_path: Any, fast_and_quiet: None) -> None:
            @settings(
                max_examples=inputs,
                derandomize=True,
                database=None,
                deadline=None,
                phases=(Phase.generate, Phase.shrink),
                suppress_health_check=list(HealthCheck),
            )
            @given(**strategies)
            def run(**drawn: Any) -> None:
                function(Attempts(kind), tmp_path, **drawn)

            run()

        test.__name__ = test.__qualname__ = function.__name__
        test.__module__ = function.__module__
        test.__doc__ = function.__doc__
        return test

    return decorate


SLOW = pytest.mark.slow


class Attempts:
    """Runs calls and counts how they end, under one kind of input.

    Attributes:
        also: further types of errors that are refusals.
    """

    def __init__(self, kind: str) -> None:
        self.also: tuple[type[Exception], ...] = ()
        self.counter = COUNTS.setdefault(kind, Counter())

    def __call__(self, call: Callable[[], Any], *names: str) -> Outcome:
        """How `call` ends, with its result or its message.

        A refusal must be one `error: …` that contains one of `names`: the file or the key.
        """
        shown = io.StringIO()
        try:
            with contextlib.redirect_stderr(shown):
                result = run_command(call, self.also)
        except SystemExit as stop:
            if stop.code == command_line.USER_ERROR:
                return self.refused(shown.getvalue(), names)
            self.counter[TRACEBACK] += 1
            raise AssertionError(f"exit status {stop.code!r}") from stop
        except BaseException:
            self.counter[TRACEBACK] += 1
            raise
        self.counter[ACCEPTED] += 1
        return ACCEPTED, result

    def refused(self, text: str, names: tuple[str, ...]) -> Outcome:
        _, begin, message = text.partition("error: ")
        good = bool(begin) and "Traceback" not in text
        good = good and (not names or any(name in message for name in names))
        self.counter[REFUSED if good else TRACEBACK] += 1
        assert good, f"the message names none of {names}: {text!r}"
        return REFUSED, message.strip()


def run_command(call: Callable[[], Any], also: tuple[type[Exception], ...] = ()) -> Any:
    """The result of `call`, with the errors that a command shows in one line as exit status 2."""
    with command_line.user_errors_in_one_line(*also):
        return call()


@cache
def own_packages() -> frozenset[str]:
    """Those of the command line, looked up once: it takes 10 ms."""
    return frozenset(_own_packages())


_own_packages = command_line.own_packages


# ---------------------------------------------------------------------- mutations
def mutations(seeds: int, largest: int = 3) -> st.SearchStrategy[tuple[int, list[Any]]]:
    """A number below `seeds` and a list of mutations for `mutate`."""
    position = st.integers(0, 2**16 - 1)
    change = st.tuples(st.integers(0, 7), position, position, st.integers(0, 255))
    return st.tuples(st.integers(0, seeds - 1), st.lists(change, max_size=largest))


INTERESTING = (
    b"\x00",
    b"\xff",
    b"\xff\xff\xff\x7f",
    b"\x80",
    b"\n",
    b"-1",
    b"1e999",
    b"null",
    b"[",
)


def mutate(data: bytes, changes: list[tuple[int, int, int, int]]) -> bytes:
    """`data` with bytes replaced, removed, repeated, inserted, or cut off."""
    for what, first, second, value in changes:
        at = first * len(data) >> 16
        length = second % 64
        if what == 0:
            data = data[:at] + bytes([value]) + data[at + 1 :]
        elif what == 1:
            data = data[:at]
        elif what == 2:
            data = data[:at] + data[at + length :]
        elif what == 3:
            data = data[:at] + data[at : at + length] * (2 + value % 8) + data[at + length :]
        elif what == 4:
            data = data[:at] + INTERESTING[value % len(INTERESTING)] + data[at:]
        elif what == 5 and at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << value % 8)]) + data[at + 1 :]
        elif what == 6:
            other = second * len(data) >> 16
            data = data[:at] + data[other : other + value] + data[at + value :]
        else:
            data = data[:at] + bytes(length) + data[at + length :]
    return data


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "nan", "inf", "1e999", "~", "[", "{", "../..", "\x00", "é\ud800"[:1]]),
)
VALUES = st.recursive(
    SCALARS,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3),
    max_leaves=4,
)
"""Any value that JSON can hold."""
