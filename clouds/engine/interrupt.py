"""Stopping in good order: Ctrl-C and SIGTERM become a request that the loop obeys."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):  # noqa: N818 - not an error
    """Training was asked to stop and did so after saving.

    Attributes:
        signal_number: the signal that asked.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StopRequest:
    """Remembers that SIGINT or SIGTERM came, so that the iteration at work is finished first.

    A second SIGINT interrupts at once (KeyboardInterrupt), for whoever does not want to wait.
    Within `at_once()`, where nothing is half done, a signal raises `Interrupted` right away.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._raise_at_once = False
        self._owner = 0

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.signal_number != 0

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle the signals in here; outside they do what they did before.

        Python only lets the main thread handle signals: in another one nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        self.signal_number = 0
        self._owner = os.getpid()
        previous: dict[signal.Signals, Any] = {s: signal.signal(s, self._on) for s in SIGNALS}
        previous[signal.SIGCHLD] = signal.getsignal(signal.SIGCHLD)
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal, also one that came before, raise `Interrupted` in here."""
        if self.requested:
            raise self.interruption()
        self._raise_at_once = True
        try:
            yield
        finally:
            self._raise_at_once = False

    def interruption(self) -> Interrupted:
        """The exception for the signal that came."""
        name = signal.Signals(self.signal_number).name if self.signal_number else "another process"
        return Interrupted(f"stopped by {name}", self.signal_number or signal.SIGTERM)

    def _on(self, number: int, frame: FrameType | None) -> None:
        # Loader processes are forks that inherit this handler, and a terminal sends Ctrl-C to them
        # too; the iteration at work still needs them.
        if os.getpid() != self._owner:
            return
        # They do die of a SIGTERM to the whole process group. Torch raises that wherever this
        # process happens to be, in the midst of the optimizer's step too; now it does not matter.
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        if number == signal.SIGINT and self.signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number
        if self._raise_at_once:
            raise self.interruption()
        # Not through logging: its streams must not be entered twice, and this may be within one.
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: finishing this iteration, then saving a checkpoint\n".encode())
