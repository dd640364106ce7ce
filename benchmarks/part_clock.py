"""Time of nested parts of a computation, and peak memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import torch

from clouds.engine.metrics import memory_gib

logger = logging.getLogger(__name__)

RESET_PEAK = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


class PartClock:
    """Measures the time of nested parts; time counts for the innermost open part.

    Args:
        synchronize: waits until the work submitted to the device is complete.
        now: current time, seconds.

    Attributes:
        seconds: total time of each part, in the order in which they were first opened.
    """

    def __init__(
        self, synchronize: Callable[[], None], now: Callable[[], float] = perf_counter
    ) -> None:
        self.synchronize = synchronize
        self.now = now
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @property
    def current(self) -> str | None:
        """The innermost open part."""
        return self._open[-1] if self._open else None

    def enter(self, name: str) -> None:
        """Open a part within the current one."""
        self._account()
        self._open.append(name)
        self.seconds.setdefault(name, 0.0)

    def leave(self) -> None:
        """Close the current part."""
        self._account()
        self._open.pop()

    def switch(self, name: str) -> None:
        """Close the current part and open another."""
        self.leave()
        self.enter(name)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Open a part for the duration of the context."""
        self.enter(name)
        yield
        self.leave()

    def _account(self) -> None:
        self.synchronize()
        now = self.now()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


class PeakMemory:
    """Peak memory of this process since `reset`: allocated by torch on a GPU, else resident.

    Only on Linux can a process reset its peak of resident memory. On other systems, and if it is
    not permitted, which is logged, the peak is that since the start of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> None:
        """Reset the peak; on Linux, that of `getrusage`, too."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            RESET_PEAK.write_text("5")  # man 5 proc: sets the peak to the present value
        except OSError as error:
            logger.warning("peak memory is that since the start of the process: %s", error)

    def gib(self) -> float:
        """The peak in GiB."""
        if self.device.type != "cuda" and STATUS.exists():
            # Not getrusage, which initially has the peak of the parent process.
            for line in STATUS.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 2**20
        return memory_gib(self.device)


def synchronizer(device: torch.device) -> Callable[[], None]:
    """A function that waits until the work submitted to `device` is complete."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None
