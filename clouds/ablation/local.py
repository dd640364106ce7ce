"""Runs on this machine: one after another, or one on each GPU."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType

from clouds.ablation.plan import Run
from clouds.ablation.runs import CONSOLE, Outcome, fail_without_start, outcome_of, start_of
from clouds.engine.interrupt import SIGNALS

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
VISIBLE = "CUDA_VISIBLE_DEVICES"


def gpu_slots(num_gpus: int, gpus_per_run: int, jobs: int | None) -> list[dict[str, str]]:
    """Environment variables of each run at a time: the GPUs that it uses.

    Args:
        num_gpus: usable GPUs of this machine; 0: runs are on the CPU.
        gpus_per_run: GPUs of each run.
        jobs: runs at a time; None: as many as there are GPUs for, one on a CPU.

    Raises:
        ValueError: there are fewer GPUs than that needs, or a number is below 1.
    """
    if gpus_per_run < 1 or (jobs is not None and jobs < 1):
        raise ValueError("--jobs and --gpus-per-run must be at least 1")
    if not num_gpus:
        return [{} for _ in range(jobs or 1)]
    known = [word.strip() for word in os.environ.get(VISIBLE, "").split(",") if word.strip()]
    names = (known or [str(i) for i in range(num_gpus)])[:num_gpus]
    possible = num_gpus // gpus_per_run
    if possible < (jobs or 1):
        raise ValueError(
            f"--jobs {jobs or 1} with --gpus-per-run {gpus_per_run} needs "
            f"{(jobs or 1) * gpus_per_run} GPUs, and this machine has {num_gpus} usable. Use fewer "
            "at a time, or MODEL.DEVICE cpu."
        )
    groups = [names[i * gpus_per_run : (i + 1) * gpus_per_run] for i in range(jobs or possible)]
    return [{VISIBLE: ",".join(group)} for group in groups]


@dataclass
class LocalRunner:
    """Starts runs as processes of their own, at most one for each of `slots`.

    A signal that stops training (Ctrl-C, SIGTERM, …) is passed on as SIGTERM: runs save and end,
    no further ones start. A second one kills them.

    Attributes:
        slots: environment variables of each run at a time.
        gpus_per_run: processes of each run.
        stopped_by: number of the signal that arrived; 0: none.
    """

    slots: Sequence[Mapping[str, str]]
    gpus_per_run: int = 1
    stopped_by: int = 0
    _running: dict[int, tuple[Run, subprocess.Popen[bytes], float]] = field(default_factory=dict)
    _asked: set[int] = field(default_factory=set)  # processes that were asked to stop
    _kill: bool = False

    def run(self, runs: Sequence[Run]) -> dict[Run, Outcome]:
        """Start all runs, wait for them, and return how those ended that failed."""
        waiting, failed = list(runs), dict[Run, Outcome]()
        done = 0
        with self._handling_signals():
            while self._running or (waiting and not self.stopped_by):
                fail_without_start(waiting, failed)
                for slot in range(len(self.slots)):
                    if slot not in self._running and not self.stopped_by:
                        self._start_next(slot, waiting)
                self._stop_running()
                for slot, (run, process, since) in list(self._running.items()):
                    if process.poll() is None:
                        continue
                    del self._running[slot]
                    done += 1
                    self._end(run, process.returncode, since, f"{done} of {len(runs)}", failed)
                time.sleep(POLL_SECONDS)
        return failed

    def _start_next(self, slot: int, waiting: list[Run]) -> None:
        """Start the first run that does not wait for the weights of another one."""
        before = [*waiting, *(run for run, _, _ in self._running.values())]
        ready = [run for run in waiting if start_of(run, before) is None]
        if ready:
            waiting.remove(ready[0])
            self._start(slot, ready[0])

    def _start(self, slot: int, run: Run) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        with (run.folder / CONSOLE).open("ab") as console:
            # in a process group of its own, which the terminal's Ctrl-C does not reach
            process = subprocess.Popen(
                run.command(self.gpus_per_run),
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.slots[slot]},
                start_new_session=True,
            )
        self._running[slot] = (run, process, time.monotonic())
        where = self.slots[slot].get(VISIBLE)
        on = f" on GPU {where}" if where else ""
        logger.info("%s: started%s, in '%s'", run.name, on, run.folder)

    def _end(
        self, run: Run, status: int, since: float, number: str, failed: dict[Run, Outcome]
    ) -> None:
        minutes = (time.monotonic() - since) / 60
        outcome = outcome_of(run, status)
        if outcome is None:
            logger.info("%s: ended after %.1f minutes (%s)", run.name, minutes, number)
        elif self.stopped_by:
            logger.info("%s: stopped after %.1f minutes", run.name, minutes)
        else:
            failed[run] = outcome
            logger.error("%s: failed, %s (%s)", run.name, outcome, number)

    @contextlib.contextmanager
    def _handling_signals(self) -> Iterator[None]:
        previous = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in previous.items():
            if handler != signal.SIG_IGN:  # such as SIGHUP under nohup
                signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._kill = bool(self.stopped_by)
        self.stopped_by = self.stopped_by or number
        once_more = b"\nthe runs are killed\n"
        text = once_more if self._kill else b"\nthe runs save and stop; once more: kill\n"
        with contextlib.suppress(OSError):  # a closed terminal
            os.write(2, text)

    def _stop_running(self) -> None:
        """Stop the runs if a signal arrived; not in its handler, where a run may just start."""
        for _, process, _ in self._running.values() if self.stopped_by else ():
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                if self._kill:
                    os.killpg(process.pid, signal.SIGKILL)
                elif process.pid not in self._asked:
                    self._asked.add(process.pid)
                    os.kill(process.pid, signal.SIGTERM)
