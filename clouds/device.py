"""Devices and autocast contexts as the config names them."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from clouds.d2 import CfgNode


def resolve_device(name: str, setting: str = "MODEL.DEVICE") -> torch.device:
    """The torch device of a name.

    Args:
        name: 'auto' (CUDA if it is available, else the CPU), 'cpu', 'cuda' or 'cuda:N'.
        setting: key or flag that has the name, for messages.

    Raises:
        ValueError: another name, or a GPU that does not exist.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]*))?", name):
        raise ValueError(f"{setting} is {name!r}; allowed are 'auto', 'cpu', 'cuda' and 'cuda:N'.")
    index = int(name.partition(":")[2] or 0)
    if name != "cpu" and index >= torch.cuda.device_count():
        raise ValueError(
            f"{setting} is {name!r}, but this machine has {torch.cuda.device_count()} usable "
            "CUDA GPUs. Use 'auto' or 'cpu'."
        )
    return torch.device(name)


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which autocast does not apply on `device`; the meta device has no autocast."""
    import torch

    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def autocast(cfg: CfgNode, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A new autocast context as set by SOLVER.AMP; one without effect if it is not enabled.

    Raises:
        ValueError: fp16 on a CPU, in a config that is not from `load_config`.
    """
    import torch

    if not cfg.SOLVER.AMP.ENABLED:
        return contextlib.nullcontext()
    if cfg.SOLVER.AMP.DTYPE == "fp16" and device.type == "cpu":
        raise ValueError("SOLVER.AMP.DTYPE fp16 needs a GPU; on a CPU use bf16.")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[cfg.SOLVER.AMP.DTYPE]
    return torch.autocast(device.type, dtype)
