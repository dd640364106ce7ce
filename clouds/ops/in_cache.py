"""A function of a batch in inference on a CPU, one item after the other.

Maps of one item fit a core's cache between two layers; those of a batch do not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def in_cache(function: Callable[..., Tensor], *batches: Tensor) -> Tensor:
    """`function(*batches)`, (N, ...), of a function that treats the items of a batch independently.

    Args:
        batches: (N, ...) each, N >= 1. On a CPU without gradients `function` gets slices of them
            with N = 1, so that it must not keep or change them.
    """
    if torch.is_grad_enabled() or batches[0].device.type != "cpu":
        return function(*batches)
    items = zip(*(torch.split(batch, 1) for batch in batches), strict=True)
    return torch.cat([function(*item) for item in items])
