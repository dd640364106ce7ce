"""What a setting that names a device means."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


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
