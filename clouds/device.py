"""What a setting that names a device means."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from clouds.d2 import CfgNode


def resolve_device(name: str, setting: str = "MODEL.DEVICE") -> torch.device:
    """The device of a name.

    Args:
        name: 'auto' (CUDA when this machine has it, else the CPU) or any name torch knows.
        setting: where the name comes from, for messages.

    Raises:
        ValueError: torch does not know the name, or it names a GPU that is not there.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"{setting} is {name!r}; allowed are 'auto', 'cpu', 'cuda' and 'cuda:N'."
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"{setting} is {name!r}, but this machine has {torch.cuda.device_count()} usable "
            "CUDA GPUs. Use 'auto' or 'cpu'."
        )
    return device


def autocast(cfg: CfgNode, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A fresh autocast context as SOLVER.AMP says; one that does nothing when it is off.

    Raises:
        ValueError: fp16 on a CPU.
    """
    import torch

    if not cfg.SOLVER.AMP.ENABLED:
        return contextlib.nullcontext()
    if cfg.SOLVER.AMP.DTYPE == "fp16" and device.type == "cpu":
        raise ValueError("SOLVER.AMP.DTYPE fp16 needs a GPU; on a CPU use bf16.")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[cfg.SOLVER.AMP.DTYPE]
    return torch.autocast(device.type, dtype)
