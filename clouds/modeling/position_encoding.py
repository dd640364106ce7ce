"""Sine position encoding of feature maps."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sine_position_encoding(
    height: int,
    width: int,
    channels: int,
    device: torch.device | str | None = None,
    temperature: float = 10000.0,
) -> Tensor:
    """Encode where a pixel is (DETR, appendix A.4).

    Coordinates run over (0, 2 pi], the last row and column at 2 pi. The first half of the channels
    encodes y, the second x; in each, sines and cosines alternate, their frequencies falling.

    Returns:
        (channels, height, width) float32
    """
    half = channels // 2
    index = torch.arange(half, dtype=torch.float32, device=device)
    wavelength = temperature ** (2 * torch.div(index, 2, rounding_mode="floor") / half)

    def encode(length: int) -> Tensor:
        steps = torch.arange(1, length + 1, dtype=torch.float32, device=device)
        angle = (steps / (length + 1e-6) * 2 * math.pi)[:, None] / wavelength
        return torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=2).flatten(1)

    y = encode(height).T[:, :, None].expand(half, height, width)
    x = encode(width).T[:, None, :].expand(half, height, width)
    return torch.cat((y, x))
