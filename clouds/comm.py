"""Ranks and collectives of the processes of a run, as in Detectron2's `comm`, and sharded tensors.

A run is one process, N processes that `clouds.engine.launch` starts on each machine (--num-gpus),
or processes that torchrun started. If there are several, torch.distributed is initialized and the
environment variable LOCAL_RANK is the number of the process's GPU.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

T = TypeVar("T")


def get_rank() -> int:
    """Rank of this process among those of all machines; 0 if there is only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def get_world_size() -> int:
    """Number of processes on all machines."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def get_local_rank() -> int:
    """Rank of this process on its machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if get_world_size() > 1 else 0


def is_main_process() -> bool:
    """Whether this process writes files and prints to the console: rank 0."""
    return get_rank() == 0


def synchronize() -> None:
    """Wait until all processes have called this function."""
    if get_world_size() > 1:
        dist.barrier()


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Mean of `values` over the processes, on all of them; NaN if it is NaN in one of them."""
    if get_world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= get_world_size()
    return values


def max_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Maximum of `values` over the processes, on all of them."""
    if get_world_size() > 1:
        values = values.clone()
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def all_gather(data: T) -> list[T]:
    """The `data` of each process in the order of ranks, on all processes; it must be picklable."""
    if get_world_size() == 1:
        return [data]
    gathered: list[Any] = [None] * get_world_size()
    dist.all_gather_object(gathered, data)
    return list(gathered)


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether each process has a part of the tensor only."""
    return isinstance(tensor, DTensor)


def own_part(values: T) -> T:
    """A tensor, or nested dictionaries and lists, with this process's part of sharded tensors.

    Parts are in the memory of the sharded tensors.
    """
    part: T = tree_map_only(DTensor, lambda tensor: tensor.detach().to_local(), values)
    return part


def sharded_like(reference: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, sharded as `reference` is, without communication.

    If `reference` is not sharded, the tensor itself.
    """
    if not isinstance(reference, DTensor):
        return value
    value = value.to(reference.device, reference.dtype)
    mesh, placements = reference.device_mesh, reference.placements
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def gather_whole(values: Any, keep: bool = True) -> Any:
    """Nested dictionaries and lists with whole tensors, on the CPU, in place of sharded ones.

    A collective operation.

    Args:
        values: the same names in all processes.
        keep: whether this process needs the result; if not, it has None for each sharded tensor.
    """

    def whole(tensor: DTensor) -> Tensor | None:
        with torch.no_grad():
            gathered = tensor.full_tensor()
        return gathered.cpu() if keep else None

    return tree_map_only(DTensor, whole, values)


def device_of_process(device: torch.device) -> torch.device:
    """`device`; this process's GPU if it is CUDA without a number and there are several processes.

    Raises:
        ValueError: several processes would share the GPU of a given number, or this machine has
            fewer GPUs than processes.
    """
    if device.type != "cuda" or get_world_size() == 1:
        return device
    index: int | None = device.index
    if index is not None:
        raise ValueError(
            f"MODEL.DEVICE is '{device}', but there are {get_world_size()} processes, which need "
            "one GPU each. Use 'cuda' or 'auto'."
        )
    num_gpus = torch.cuda.device_count()
    if get_local_rank() >= num_gpus:
        raise ValueError(
            f"this is process {get_local_rank() + 1} on its machine, which has {num_gpus} GPU(s). "
            "Start at most one process per GPU."
        )
    return torch.device("cuda", get_local_rank())
