"""Start of the processes of a run: one, N on each machine (--num-gpus), or those of torchrun.

GPU processes communicate by NCCL, CPU processes by gloo.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing.connection
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.multiprocessing.spawn import (
    ProcessExitedException,
    ProcessRaisedException,
    start_processes,
)

from clouds.engine.interrupt import SIGNALS
from clouds.engine.watchdog import ProcessGroupError, Watchdog

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT = 3600.0
"""Seconds; DIST_TIMEOUT in configs."""

STOP_GRACE_SECONDS = 120.0
"""Time for the other processes to write a checkpoint after one has ended."""

KILL_SECONDS = 5.0
"""Time from the second Ctrl-C to the end of processes that have not ended by themselves."""

SETTLE_SECONDS = 0.5
"""Time after the end of a process in which others that end are not a consequence of it."""

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def started_by_torchrun() -> bool:
    """Whether torchrun, or a launcher that sets the same variables, started this process."""
    return all(name in os.environ for name in TORCHRUN_VARIABLES)


def check_launch(
    num_gpus: int, num_machines: int, machine_rank: int, dist_url: str, device: str
) -> None:
    """Check the arguments of `launch`; under torchrun they have no effect.

    Raises:
        ValueError: invalid numbers or ranks, more GPUs than exist, a missing address.
    """
    if started_by_torchrun():
        return
    if num_gpus < 1:
        raise ValueError(f"--num-gpus is {num_gpus}; it must be at least 1.")
    available = torch.cuda.device_count()
    if num_gpus > max(available, 1) and device != "cpu":
        raise ValueError(
            f"--num-gpus is {num_gpus}, but this machine has {available} usable GPU(s). "
            f"Use at most that many, or add `MODEL.DEVICE cpu` for {num_gpus} CPU processes."
        )
    if not 0 <= machine_rank < num_machines:
        raise ValueError(
            f"--machine-rank is {machine_rank} and --num-machines {num_machines}; there must be at "
            "least one machine, and ranks count from 0."
        )
    if num_machines > 1 and dist_url == "auto":
        raise ValueError(
            "--num-machines above 1 needs --dist-url tcp://HOST:PORT, an address of machine 0 "
            "that the others can connect to."
        )


def launch(
    run: Callable[..., None],
    args: tuple[Any, ...] = (),
    *,
    num_gpus: int = 1,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    device: str = "auto",
    timeout: float = DEFAULT_TIMEOUT,
) -> None:
    """Call `run(*args)` in every process of the run.

    Args:
        run: importable by name, since new processes import it.
        args: picklable arguments.
        num_gpus: processes on each machine; no effect under torchrun.
        num_machines, machine_rank: each machine calls `launch` with its own number, from 0.
        dist_url: tcp://host:port of machine 0, to which all processes connect; 'auto': a free port
            of this machine, if it is the only one.
        device: MODEL.DEVICE.
        timeout: seconds that processes wait for each other, in a collective and at the start. It
            must exceed the duration of an evaluation, after which they wait for the slowest.

    Raises:
        ValueError: see `check_launch`.
        ProcessGroupError: under torchrun, see `process_group`.
        ProcessRaisedException: an exception ended a process; it has the traceback.
        SystemExit: with the exit status of a process if that is not 0.
    """
    check_launch(num_gpus, num_machines, machine_rank, dist_url, device)
    if started_by_torchrun():
        with process_group(device, "env://", timeout):
            run(*args)
        return
    if num_gpus * num_machines == 1:
        run(*args)
        return
    if dist_url == "auto":
        dist_url = f"tcp://127.0.0.1:{free_port()}"
    context = start_processes(  # type: ignore[no-untyped-call]
        run_as_rank,
        args=(
            *(run, args, num_gpus, num_machines * num_gpus),
            *(machine_rank, dist_url, device, timeout),
        ),
        nprocs=num_gpus,
        join=False,
        start_method="spawn",
    )
    wait_for(context, machine_rank * num_gpus)


def run_as_rank(
    local_rank: int,
    run: Callable[..., None],
    args: tuple[Any, ...],
    num_local: int,
    world_size: int,
    machine_rank: int,
    dist_url: str,
    device: str,
    timeout: float,
) -> None:
    """Main function of a started process: join the others, then `run(*args)`."""
    os.environ["RANK"] = str(machine_rank * num_local + local_rank)
    os.environ["WORLD_SIZE"] = str(world_size)
    os.environ["LOCAL_RANK"] = str(local_rank)
    with process_group(device, dist_url, timeout):
        run(*args)


@contextlib.contextmanager
def process_group(
    device: str, init_method: str, timeout: float = DEFAULT_TIMEOUT
) -> Iterator[None]:
    """Initialize torch.distributed from the variables RANK, WORLD_SIZE and LOCAL_RANK.

    Raises:
        ProcessGroupError: another process did not join or come within `timeout` seconds, or ended;
            the message says where each process was.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size == 1:
        yield
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu and int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    limit = timedelta(seconds=timeout)
    try:
        store, _, _ = next(rendezvous(init_method, rank, world_size, timeout=limit))
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=limit,
        )
    except RuntimeError as error:
        raise ProcessGroupError(
            f"rank {rank} could not connect to all of the {world_size} processes at {init_method} "
            f"within DIST_TIMEOUT {timeout:g} s: {error}. Check that all were started, that "
            "--dist-url is an address of machine 0 and its port is reachable."
        ) from error
    watchdog = Watchdog(store, rank, world_size, timeout)
    try:
        with watchdog.watching():
            yield
    except RuntimeError as error:
        if not _is_of_collective(error):
            raise
        raise ProcessGroupError(
            f"rank {rank} waited for another process, which did not come within DIST_TIMEOUT "
            f"{timeout:g} s, or ended: {error}\nThe processes:\n{watchdog.last_report}\nFind out "
            "why a rank that is elsewhere did not come; if it was only slow, set DIST_TIMEOUT "
            "higher."
        ) from error
    finally:
        dist.destroy_process_group()


def _is_of_collective(error: RuntimeError) -> bool:
    """Whether an operation between processes failed, in gloo or NCCL."""
    # gloo's errors are RuntimeErrors with the file of its source in their text
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def wait_for(context: Any, first_rank: int = 0) -> None:
    """Wait for the end of started processes, and forward the signals that stop a run to them.

    The terminal sends Ctrl-C to them, too, since they are in its process group. They save and end,
    so this process waits. A second Ctrl-C ends them within KILL_SECONDS.

    Args:
        context: torch's ProcessContext.
        first_rank: rank of its first process.
    """
    stop = _Stop(context)
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    for signal_number, handler in previous.items():
        if handler != signal.SIG_IGN:  # such as SIGHUP under nohup
            handle = stop.interrupt if signal_number == signal.SIGINT else stop.forward
            signal.signal(signal_number, handle)
    killed: dict[int, int] = {}
    try:
        killed = _killed_first(context)
        while not context.join(grace_period=STOP_GRACE_SECONDS):
            pass
    except (ProcessExitedException, ProcessRaisedException) as error:
        if stop.interrupts > 1:
            sys.exit(128 + signal.SIGINT)
        if killed:
            for index, number in killed.items():
                _log_killed(first_rank + index, context.processes[index].pid, number)
            sys.exit(128 + next(iter(killed.values())))
        if isinstance(error, ProcessRaisedException):
            raise _cause(context, error) from None
        # A negative status is a signal; the shell's convention for it is 128 + number.
        status = error.exit_code
        sys.exit(128 - status if status < 0 else status)
    finally:
        stop.cancel()
        for signal_number, handler in previous.items():
            signal.signal(signal_number, handler)


class _Stop:
    """Signal handlers of the process that waits for others."""

    def __init__(self, context: Any) -> None:
        self.processes = context.processes
        self.interrupts = 0
        self._timer: threading.Timer | None = None

    def forward(self, number: int, frame: FrameType | None) -> None:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupts += 1
        if self.interrupts == 2:
            os.write(2, f"\nprocesses that do not end in {KILL_SECONDS:g} s are killed\n".encode())
            self._timer = threading.Timer(KILL_SECONDS, self._kill)
            self._timer.daemon = True
            self._timer.start()

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()


def _killed_first(context: Any) -> dict[int, int]:
    """Wait for the first process that fails; those that a signal has ended by then, by index.

    Those that end later may be ended by `ProcessContext.join`. SIGTERM is not counted: it stops a
    run as it should.
    """
    running = {process.sentinel: process for process in context.processes}
    while running:
        ready = multiprocessing.connection.wait(list(running))
        ended = [running.pop(sentinel) for sentinel in ready if isinstance(sentinel, int)]
        if any(process.exitcode for process in ended):
            time.sleep(SETTLE_SECONDS)
            break
    codes = {index: process.exitcode for index, process in enumerate(context.processes)}
    return {i: -c for i, c in codes.items() if c is not None and c < 0 and c != -signal.SIGTERM}


def _cause(context: Any, error: ProcessRaisedException) -> ProcessRaisedException:
    """The error of a process that did not end because it waited for another, if there is one."""
    for index, (process, file) in enumerate(
        zip(context.processes, context.error_files, strict=True)
    ):
        # torch has each process write its traceback into a file
        text = pickle.loads(Path(file).read_bytes()) if os.access(file, os.R_OK) else ""
        if text and ProcessGroupError.__name__ not in text:
            message = f"\n\n-- Process {index} terminated with the following error:\n{text}"
            return ProcessRaisedException(message, index, process.pid)
    return error


def _log_killed(rank: int, pid: int, number: int) -> None:
    reason = ""
    if number == signal.SIGKILL:
        reason = " The system does so when memory runs out (`dmesg` tells), schedulers at limits."
    logger.error(
        "rank %d (process %d) was killed by %s; the other processes were ended.%s",
        rank,
        pid,
        signal.Signals(number).name,
        reason,
    )


def free_port() -> int:
    """A TCP port that is not in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
