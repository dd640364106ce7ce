"""Stopping by Ctrl-C or SIGTERM: signals set a request, on which the loop saves and ends."""

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
    """Training was stopped by the signal `signal_number`."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StopRequest:
    """Records SIGINT and SIGTERM, so that the current iteration is completed before stopping.

    A second SIGINT raises KeyboardInterrupt at once. Within `at_once()`, which is for code that can
    be interrupted anywhere, a signal raises `Interrupted` at once.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._raise_at_once = False
        self._owner = 0

    @property
    def requested(self) -> bool:
        """Whether a signal arrived."""
        return self.signal_number != 0

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle the signals within the context; afterwards, previous handlers are restored.

        Python allows signal handlers in the main thread only: in another one nothing changes.
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
        """Raise `Interrupted` at a signal within the context, or if one arrived before."""
        if self.requested:
            raise self.interruption()
        self._raise_at_once = True
        try:
            yield
        finally:
            self._raise_at_once = False

    def interruption(self) -> Interrupted:
        """The exception for the signal that arrived."""
        name = signal.Signals(self.signal_number).name if self.signal_number else "another process"
        return Interrupted(f"stopped by {name}", self.signal_number or signal.SIGTERM)

    def _on(self, number: int, frame: FrameType | None) -> None:
        # Loader processes are forks that inherit this handler, and a terminal sends Ctrl-C to them
        # too; the current iteration still needs them.
        if os.getpid() != self._owner:
            return
        # A SIGTERM to the process group does end them. Torch's SIGCHLD handler would raise an error
        # at any point of this process, even within the optimizer's step.
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        if number == signal.SIGINT and self.signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number
        if self._raise_at_once:
            raise self.interruption()
        # Not by logging, whose streams are not reentrant: a signal may arrive while one is in use.
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: finishing this iteration, then saving a checkpoint\n".encode())
