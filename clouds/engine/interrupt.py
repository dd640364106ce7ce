"""Stopping by Ctrl-C or a signal: it sets a request, on which the loop saves and ends."""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
"""Signals that stop a run: Ctrl-C, schedulers, a closed terminal, SLURM's --signal."""

SIGNALS = tuple(signal.Signals[name] for name in NAMES if hasattr(signal, name))
"""Those of `NAMES` that this system has."""

GRACE_SECONDS = 5.0
"""After a second Ctrl-C: time for the process to end, before it is ended."""


class Interrupted(Exception):  # noqa: N818 - not an error
    """Training was stopped by the signal `signal_number`."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StopRequest:
    """Records `SIGNALS`, so that the current iteration is completed before stopping.

    A second SIGINT raises KeyboardInterrupt at once; if the process is not back in Python code
    after `GRACE_SECONDS`, since it waits for another process or a device, it is ended with status
    130. Within `at_once()`, which is for code that can be interrupted anywhere, a signal raises
    `Interrupted` at once. SIGHUP remains ignored if it is, as under `nohup`.

    Attributes:
        signal_number: of the signal that arrived; 0: none.
        twice: a second SIGINT arrived.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self.twice = False
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
        self.twice = False
        self._owner = os.getpid()
        previous: dict[signal.Signals, Any] = {s: signal.getsignal(s) for s in SIGNALS}
        if hasattr(signal, "SIGHUP") and previous[signal.SIGHUP] == signal.SIG_IGN:
            del previous[signal.SIGHUP]
        for number in previous:
            signal.signal(number, self._on)
        if hasattr(signal, "SIGCHLD"):
            previous[signal.SIGCHLD] = signal.getsignal(signal.SIGCHLD)
        try:
            with ending_at_second_interrupt():
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
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, lambda number, frame: None)
        if number == signal.SIGINT and self.signal_number == signal.SIGINT:
            self.twice = True
            raise KeyboardInterrupt
        self.signal_number = number
        if self._raise_at_once:
            raise self.interruption()
        # Not by logging, whose streams are not reentrant: a signal may arrive while one is in use.
        name = signal.Signals(number).name
        with suppress(OSError):  # a closed terminal
            os.write(2, f"\n{name}: finishing this iteration, then saving a checkpoint\n".encode())


@contextmanager
def ending_at_second_interrupt() -> Iterator[None]:
    """End the process with status 130 if it is still in the context after a second SIGINT.

    Python calls signal handlers between two steps of Python code only, and a process that waits in
    a collective or for a device takes none. The system writes the signals' numbers to a pipe in any
    case, from which a thread reads them.
    """
    if hasattr(os, "register_at_fork"):
        _forget_pipe_in_forks()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    left = threading.Event()
    thread = threading.Thread(target=_watch, args=(reading, left), name="Ctrl-C", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        left.set()
        with suppress(BlockingIOError):  # full: the thread has ended
            os.write(writing, b"\0")  # closing is no end for it: forks have copies of the pipe
        thread.join()
        os.close(writing)
        os.close(reading)


def _watch(reading: int, left: threading.Event) -> None:
    """Read signal numbers until 0, or until a second SIGINT and the time after it."""
    interrupts = 0
    while number := os.read(reading, 1)[0]:
        interrupts += number == signal.SIGINT
        if interrupts == 2:
            if not left.wait(GRACE_SECONDS):
                os.write(2, b"\nsecond Ctrl-C: ended without saving\n")
                os._exit(128 + signal.SIGINT)
            return


@functools.cache
def _forget_pipe_in_forks() -> None:
    """Let loader processes, which are forks and get Ctrl-C too, not write to the pipe."""
    os.register_at_fork(after_in_child=functools.partial(signal.set_wakeup_fd, -1))
