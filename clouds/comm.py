"""Processes: who am I, how many are we, and how N of them are started.

A run is one process, N processes that `launch` starts on each machine (--num-gpus), or processes
that torchrun started. All three look the same afterwards: torch.distributed is initialised when
there is more than one process, and the environment variable LOCAL_RANK names the GPU.
GPUs talk over NCCL, CPU processes over gloo.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def get_rank() -> int:
    """Number of this process over all machines, 0 when there is only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def get_world_size() -> int:
    """Processes over all machines."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def get_local_rank() -> int:
    """Number of this process on its machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if get_world_size() > 1 else 0


def is_main_process() -> bool:
    """Whether this process writes files and talks to the console."""
    return get_rank() == 0


def synchronize() -> None:
    """Wait until every process is here."""
    if get_world_size() > 1:
        dist.barrier()


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Mean of `values` over the processes, the same on each of them; a NaN of one reaches all."""
    if get_world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= get_world_size()
    return values


def all_gather(thing: T) -> list[T]:
    """What every process passed, in the order of ranks, on every process."""
    if get_world_size() == 1:
        return [thing]
    things: list[Any] = [None] * get_world_size()
    dist.all_gather_object(things, thing)
    return list(things)


def device_of_process(device: torch.device) -> torch.device:
    """`device`, or this process's own GPU when it is a GPU without a number.

    Raises:
        ValueError: one GPU by number was asked for and several processes would share it, or this
            machine has fewer GPUs than processes.
    """
    if device.type != "cuda" or get_world_size() == 1:
        return device
    number: int | None = device.index
    if number is not None:
        raise ValueError(
            f"MODEL.DEVICE is '{device}', but there are {get_world_size()} processes, each with a "
            "GPU of its own. Use 'cuda' or 'auto'."
        )
    existing = torch.cuda.device_count()
    if get_local_rank() >= existing:
        raise ValueError(
            f"this is process {get_local_rank() + 1} on its machine, which has {existing} GPU(s). "
            "Start at most one process per GPU."
        )
    return torch.device("cuda", get_local_rank())
