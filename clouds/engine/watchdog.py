"""Where every process of a run is, for the message when one of them does not come.

Each process has a thread that writes the place of its main thread into the store of
torch.distributed, and reads those of the others. So the message needs no cooperation of the main
threads, and works with gloo and NCCL.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from torch.distributed.distributed_c10d import PrefixStore, Store

logger = logging.getLogger(__name__)

MAX_BEAT = 10.0
"""Largest number of seconds between two reports of a process."""

_PACKAGE = str(Path(__file__).resolve().parents[1])

Place = tuple[tuple[str, int, str], ...]
"""File, line and function of each frame, innermost first."""


class ProcessGroupError(RuntimeError):
    """A process did not come, or ended, while another one waited for it."""


def place_of(frame: FrameType | None) -> Place:
    """The stack of a frame."""
    frames = []
    while frame is not None:
        frames.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return tuple(frames)


def shown(place: Place) -> str:
    """The innermost call of a stack, and the innermost three of this package."""
    own = [frame for frame in place if frame[0].startswith(_PACKAGE)][:3]
    frames = list(dict.fromkeys([*place[:1], *own]))
    parts = [f"{'/'.join(Path(file).parts[-2:])}:{line} in {name}" for file, line, name in frames]
    return ", called from ".join(parts) or "nowhere"


class Watchdog:
    """Reports the place of this process, and warns when it does not change for a long time.

    Args:
        store: of the process group.
        rank, world_size: number of this process, and of all.
        timeout: seconds after which a collective fails. The warning comes after half of them.
    """

    def __init__(self, store: Store, rank: int, world_size: int, timeout: float) -> None:
        self.store = PrefixStore("clouds_places", store)
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.beat = min(MAX_BEAT, timeout / 10)
        self._main = threading.main_thread().ident
        self._place: Place = ()
        self._since = time.monotonic()
        self._warned = False
        self._stop = threading.Event()
        # of each process: what it wrote last, and when this process read it first
        self._heard: dict[int, tuple[bytes, float]] = {}
        self.last_report = ""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Run the thread within the context; `last_report` is the one at its end."""
        thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.last_report = self.report()
            self._stop.set()
            thread.join(self.beat)

    def report(self) -> str:
        """A line per process: for how long it has been at which place."""
        now, lines = time.monotonic(), []
        for rank in range(self.world_size):
            if rank not in self._heard:
                lines.append(f"  rank {rank}: no report yet")
                continue
            text, heard = self._heard[rank]
            entry = json.loads(text)
            silent = now - heard
            line = f"  rank {rank}: for {entry['seconds'] + silent:.0f} s at {entry['place']}"
            if silent > 3 * self.beat:
                line = (
                    f"  rank {rank}: silent for {silent:.0f} s (it has ended, or is stopped); "
                    f"last at {entry['place']}"
                )
            lines.append(line + " (this process)" * (rank == self.rank))
        return "\n".join(lines)

    def _run(self) -> None:
        number = 0
        while not self._stop.wait(self.beat if number else 0):
            number += 1
            self._look()
            try:
                self._exchange(number)
            except RuntimeError as error:  # also of a store whose process has ended
                logger.debug("the store of the process group does not answer: %s", error)
                return
            if time.monotonic() - self._since > self.timeout / 2 and not self._warned:
                self._warned = True
                logger.warning(
                    "no progress for %.0f s; DIST_TIMEOUT is %g s. The processes:\n%s",
                    time.monotonic() - self._since,
                    self.timeout,
                    self.report(),
                )

    def _look(self) -> None:
        frame = sys._current_frames().get(self._main or 0)
        place = place_of(frame)
        if place != self._place:
            self._place, self._since, self._warned = place, time.monotonic(), False

    def _exchange(self, number: int) -> None:
        seconds = time.monotonic() - self._since
        entry = {"number": number, "seconds": seconds, "place": shown(self._place)}
        self.store.set(str(self.rank), json.dumps(entry))
        for rank in range(self.world_size):
            if self.store.check([str(rank)]):
                text = self.store.get(str(rank))
                if rank not in self._heard or self._heard[rank][0] != text:
                    self._heard[rank] = text, time.monotonic()
