"""The bytes of a tensor, for hashes of weights."""

from __future__ import annotations

from torch import Tensor, uint8


def raw_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor of any type and shape, in order, on the host."""
    values: memoryview = tensor.detach().cpu().contiguous().flatten().view(uint8).numpy().data
    return values
