"""Start of the processes of a run: one, N on each machine (--num-gpus), or those of torchrun.

GPU processes communicate by NCCL, CPU processes by gloo.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from clouds.engine.interrupt import SIGNALS

TIMEOUT = timedelta(hours=1)
"""A collective that takes longer fails. It must exceed the duration of an evaluation, in which
processes wait for the slowest."""

STOP_GRACE_SECONDS = 120.0
"""Time for the other processes to write a checkpoint after one has ended."""

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

    Raises:
        ValueError: see `check_launch`.
        SystemExit: with the exit status of a process if that is not 0.
    """
    check_launch(num_gpus, num_machines, machine_rank, dist_url, device)
    if started_by_torchrun():
        with process_group(device, "env://"):
            run(*args)
        return
    if num_gpus * num_machines == 1:
        run(*args)
        return
    if dist_url == "auto":
        dist_url = f"tcp://127.0.0.1:{free_port()}"
    context = start_processes(  # type: ignore[no-untyped-call]
        run_as_rank,
        args=(run, args, num_gpus, num_machines * num_gpus, machine_rank, dist_url, device),
        nprocs=num_gpus,
        join=False,
        start_method="spawn",
    )
    wait_for(context)


def run_as_rank(
    local_rank: int,
    run: Callable[..., None],
    args: tuple[Any, ...],
    num_local: int,
    world_size: int,
    machine_rank: int,
    dist_url: str,
    device: str,
) -> None:
    """Main function of a started process: join the others, then `run(*args)`."""
    os.environ["RANK"] = str(machine_rank * num_local + local_rank)
    os.environ["WORLD_SIZE"] = str(world_size)
    os.environ["LOCAL_RANK"] = str(local_rank)
    with process_group(device, dist_url):
        run(*args)


@contextlib.contextmanager
def process_group(device: str, init_method: str) -> Iterator[None]:
    """Initialize torch.distributed from the variables RANK, WORLD_SIZE and LOCAL_RANK."""
    world_size = int(os.environ["WORLD_SIZE"])
    if world_size == 1:
        yield
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu and int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=init_method,
        rank=int(os.environ["RANK"]),
        world_size=world_size,
        timeout=TIMEOUT,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def wait_for(context: Any) -> None:
    """Wait for the end of started processes, and forward the signals that stop a run to them.

    The terminal sends Ctrl-C to them, too, since they are in its process group. They save and end,
    so this process ignores it and waits.
    """

    def forward(number: int, frame: FrameType | None) -> None:
        for pid in context.pids():
            os.kill(pid, number)

    previous = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in previous.items():
        if handler != signal.SIG_IGN:  # such as SIGHUP under nohup
            signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else forward)
    try:
        while not context.join(grace_period=STOP_GRACE_SECONDS):
            pass
    except ProcessExitedException as error:
        # A negative status is a signal; the shell's convention for it is 128 + number.
        status = error.exit_code
        sys.exit(128 - status if status < 0 else status)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def free_port() -> int:
    """A TCP port that is not in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
