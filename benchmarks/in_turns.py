"""Shared by the benchmarks: alternating timings of implementations, and the peak memory of a call.

On a CPU, durations are processor time of all threads of this process, which other processes do not
affect; on a GPU, wall-clock time with synchronization at both ends. Implementations alternate, so
that disturbances of the machine affect all of them.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

sys.path.insert(0, str(Path(__file__).parent))
from part_clock import PeakMemory, synchronizer

Clock = Callable[[], float]
Way = TypeVar("Way")
Taken = TypeVar("Taken")


class Span:
    """Measures the duration of the context.

    Args:
        device: of the computation.
        cpu: processor time of this process, seconds.
        wall: wall-clock time, seconds.

    Attributes:
        cpu, wall: duration of the context, seconds.
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
        """Processor time on a CPU, else wall-clock time."""
        return self.cpu if self.on_cpu else self.wall


class Peak:
    """Measures the peak memory of the context, see `PeakMemory`.

    Free memory of the allocator is returned to the operating system first; else the context could
    reuse it without increasing the peak.

    Args:
        device: of the computation.

    Attributes:
        more: peak memory minus memory before the context, MiB.
        total: peak memory, MiB.
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
        self._memory.reset()
        # Right after a reset, the peak of resident memory is its present value.
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
    """Measure each implementation once per round.

    Args:
        ways: implementations by name, in the order of a round.
        take: measures an implementation.
        rounds: number of rounds.
        untimed: additional rounds before them, whose measurements are dropped.

    Returns:
        Name -> measurements of the rounds.
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


@contextmanager
def without_tf32() -> Iterator[None]:
    """Convolutions on a GPU in full float32 within the context, for comparisons of results.

    By default torch computes them in TF32, but not matrix products.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def report(
    times: Mapping[str, Sequence[float]],
    unit: str = "s",
    besides: Mapping[str, str] | None = None,
) -> str:
    """A line per implementation: median, minimum, maximum, and speed relative to the first one.

    Args:
        times: name -> durations, in `unit`.
        unit: of the durations.
        besides: name -> further text of the line.
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
    """Device, number of threads and version of torch, for the heading of a report."""
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help has a script's docstring with its line breaks."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def silence_all_but_peaks() -> None:
    """Disable warnings of random weights, but not those of peaks that cannot be reset."""
    logging.getLogger("clouds").setLevel(logging.ERROR)
    logging.getLogger(PeakMemory.__module__).setLevel(logging.WARNING)
