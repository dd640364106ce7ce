"""Starting the processes of a run: one, N on each machine (--num-gpus), or those of torchrun."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

TIMEOUT = timedelta(hours=1)
"""A collective that waits longer means that another process is lost. Evaluation, in which ranks
wait for the slowest, has to fit."""

STOP_GRACE_SECONDS = 120.0
"""Time for the other processes to write a checkpoint once one has left."""

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def started_by_torchrun(environment: Mapping[str, str]) -> bool:
    """Whether torchrun (or anything that speaks its variables) started this process."""
    return all(name in environment for name in TORCHRUN_VARIABLES)


def check_launch(
    num_gpus: int, num_machines: int, machine_rank: int, dist_url: str, device: str
) -> None:
    """Reject what `launch` cannot do; its arguments. Under torchrun they have no say.

    Raises:
        ValueError: counts or ranks that cannot be, more GPUs than there are, no meeting place.
    """
    if started_by_torchrun(os.environ):
        return
    if num_gpus < 1:
        raise ValueError(f"--num-gpus is {num_gpus}; it must be at least 1.")
    existing = torch.cuda.device_count()
    if num_gpus > max(existing, 1) and device != "cpu":
        raise ValueError(
            f"--num-gpus is {num_gpus}, but this machine has {existing} usable GPU(s). "
            f"Use at most that many, or add `MODEL.DEVICE cpu` for {num_gpus} CPU processes."
        )
    if not 0 <= machine_rank < num_machines:
        raise ValueError(
            f"--machine-rank is {machine_rank} and --num-machines {num_machines}; there must be a "
            "machine at least, and ranks count from 0."
        )
    if num_machines > 1 and dist_url == "auto":
        raise ValueError(
            "--num-machines above 1 needs --dist-url tcp://HOST:PORT, an address of machine 0 "
            "that the others can reach."
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
        run: importable by name, since fresh processes import it.
        args: picklable arguments.
        num_gpus: processes on each machine. Under torchrun it has no say.
        num_machines: machines; each calls `launch` with its own `machine_rank`.
        machine_rank: number of this machine, from 0.
        dist_url: where the processes meet, tcp://host:port of machine 0; 'auto' picks a free port
            when there is one machine.
        device: MODEL.DEVICE.

    Raises:
        ValueError: see `check_launch`.
        SystemExit: a process left with an exit status other than 0; that status.
    """
    check_launch(num_gpus, num_machines, machine_rank, dist_url, device)
    if started_by_torchrun(os.environ):
        join_processes(device, "env://")
        try:
            run(*args)
        finally:
            leave_processes()
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
    local: int,
    run: Callable[..., None],
    args: tuple[Any, ...],
    num_local: int,
    num_total: int,
    machine_rank: int,
    dist_url: str,
    device: str,
) -> None:
    """Body of one started process: join the others, then `run(*args)`."""
    os.environ["RANK"] = str(machine_rank * num_local + local)
    os.environ["WORLD_SIZE"] = str(num_total)
    os.environ["LOCAL_RANK"] = str(local)
    join_processes(device, dist_url)
    try:
        run(*args)
    finally:
        leave_processes()


def join_processes(device: str, init_method: str) -> None:
    """Initialise torch.distributed from the variables RANK, WORLD_SIZE and LOCAL_RANK."""
    total = int(os.environ["WORLD_SIZE"])
    if total == 1:
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu and int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=init_method,
        rank=int(os.environ["RANK"]),
        world_size=total,
        timeout=TIMEOUT,
    )


def leave_processes() -> None:
    """Undo `join_processes`."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wait_for(context: Any) -> None:
    """Wait for started processes, passing SIGTERM on to them.

    Ctrl-C reaches them by itself (they are in the terminal's process group), and they save and
    leave, so this process only has to stay until they have.
    """

    def pass_on(number: int, frame: FrameType | None) -> None:
        for pid in context.pids():
            os.kill(pid, number)

    previous = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on),
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
    }
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
    """A TCP port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
