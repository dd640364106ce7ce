"""What the benchmarks share: several ways timed in turns, and the peak memory of a call.

On a CPU the processor's time counts, that of all threads of this process, so that what other
programs take of it does not; on a GPU the time that passes, its queue being empty at both ends.
Ways take turns, so that what disturbs the machine disturbs each.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from clouds.engine.benchmark import PeakMemory, synchronizer

Clock = Callable[[], float]
Way = TypeVar("Way")
Taken = TypeVar("Taken")


class Span:
    """Times what is done inside of the context.

    Args:
        device: where it is computed.
        cpu: seconds of the processor that this process has had.
        wall: seconds from anywhere.

    Attributes:
        cpu, wall: what the block took, seconds.
    """

    def __init__(
        self,
        device: torch.device,
        cpu: Clock = time.process_time,
        wall: Clock = time.perf_counter,
    ) -> None:
        self.on_cpu = device.type == "cpu"
        self.cpu = self.wall = 0.0
        self._synchronize = synchronizer(device)
        self._clocks = (cpu, wall)

    def __enter__(self) -> Span:
        self._synchronize()
        self._start = [now() for now in self._clocks]
        return self

    def __exit__(self, *_: object) -> None:
        self._synchronize()
        passed = (now() - start for now, start in zip(self._clocks, self._start, strict=True))
        self.cpu, self.wall = passed

    @property
    def seconds(self) -> float:
        """What counts: the processor's on a CPU, else what passed."""
        return self.cpu if self.on_cpu else self.wall


class Peak:
    """Measures the memory of what is done inside of the context, see `PeakMemory`.

    What was freed before is given back to the operating system first, so it does not hide a part
    of what the block takes.

    Args:
        device: where it is computed.

    Attributes:
        more: the largest memory above that just before the block, MiB.
        total: the largest memory, MiB.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.more = self.total = 0.0
        self._memory = PeakMemory(device)

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):  # glibc
            ctypes.CDLL(None).malloc_trim(0)
        self._memory.restart()
        # Right after a restart the resident peak is what is resident now.
        self._before = (
            torch.cuda.memory_allocated(self.device) / 2**20
            if self.device.type == "cuda"
            else 1024 * self._memory.gib()
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.total = 1024 * self._memory.gib()
        self.more = self.total - self._before


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, see `Span`."""
    with Span(device) as span:
        call()
    return span.seconds


def in_turns(
    ways: Mapping[str, Way], take: Callable[[Way], Taken], rounds: int, untimed: int = 0
) -> dict[str, list[Taken]]:
    """Each way once a round.

    Args:
        ways: by name, in the order of a round.
        take: what a way gives.
        rounds: that count.
        untimed: rounds before them.

    Returns:
        Name -> what was taken in the rounds that count.
    """
    taken: dict[str, list[Taken]] = {name: [] for name in ways}
    for number in range(untimed + rounds):
        for name, way in ways.items():
            one = take(way)
            if number >= untimed:
                taken[name].append(one)
    return taken


def timed(
    ways: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    untimed: int = 0,
) -> dict[str, list[float]]:
    """Name -> seconds of each round, see `in_turns`."""
    return in_turns(ways, lambda way: seconds_of(way, device), rounds, untimed)


def report(
    times: Mapping[str, Sequence[float]],
    unit: str = "s",
    besides: Mapping[str, str] | None = None,
) -> str:
    """A line a way: median, least and most, and how many times as fast as the first way it is.

    Args:
        times: name -> durations, in `unit`.
        unit: of the durations.
        besides: name -> what else there is to say of a way.
    """
    width = max(map(len, times))
    first = statistics.median(next(iter(times.values())))
    lines = []
    for name, taken in times.items():
        median = statistics.median(taken)
        spread = f"{min(taken):#.4g} to {max(taken):#.4g}"
        line = f"{name:>{width}}: {median:#.4g} {unit} ({spread}), {first / median:.2f} x"
        lines.append("; ".join([line, besides[name]]) if besides else line)
    return "\n".join(lines)


def machine(device: torch.device) -> str:
    """Device, torch's threads and version, for the head of a report."""
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows a script's docstring as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def silence_all_but_peaks() -> None:
    """No warnings of random weights; that a peak cannot be counted anew is still told."""
    logging.getLogger("clouds").setLevel(logging.ERROR)
    logging.getLogger(PeakMemory.__module__).setLevel(logging.WARNING)
