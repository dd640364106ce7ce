"""Resizing of what depends on the image and patch size of a vision transformer.

Published segmentation networks resize the patch kernel and the position embeddings bicubically,
without antialiasing; timm resizes the kernel by its pseudo-inverse, which makes the outputs of a 14
pixel kernel that becomes one of 16 smaller by (14 / 16)², and positions with antialiasing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

OFFSET = 0.1
"""Of DINOv2's code, added to the number of patches, see `resize_positions`."""


def resize_kernel(kernel: Tensor, size: int) -> Tensor:
    """A patch kernel (C, 3, p, p), resized bicubically to (C, 3, size, size)."""
    if kernel.shape[-2:] == (size, size):
        return kernel
    shape = (size, size)
    resized = F.interpolate(kernel.float(), shape, mode="bicubic", align_corners=False)
    return resized.to(kernel.dtype)


def grid_of(positions: Tensor) -> tuple[int, int]:
    """Number of class and register tokens, and side of the square grid, of a table (1, T, C).

    Raises:
        ValueError: more tokens than a class token and registers would be left over.
    """
    side = math.isqrt(positions.shape[1])
    prefix = positions.shape[1] - side * side
    if prefix > side:
        raise ValueError(
            f"position embeddings of {positions.shape[1]} tokens are not those of a square image"
        )
    return prefix, side


def resize_positions(
    positions: Tensor, grid: tuple[int, int], size: tuple[int, int], method: str = "bicubic"
) -> Tensor:
    """Position embeddings for another number of patches.

    Args:
        positions: (1, P + h * w, C); the first P, of class and register tokens, are kept.
        grid: (h, w), rows and columns of patches.
        size: rows and columns wanted.
        method: 'bicubic' or 'bilinear', without antialiasing; 'timm': bicubic with antialiasing;
            'dinov2': bicubic, sampled with the factors (rows + 0.1) / h and (columns + 0.1) / w
            instead of rows / h and columns / w, as DINOv2's code does; a square size of the
            table's number of patches is left as it is.

    Returns:
        (1, P + rows * columns, C), in the type of `positions`.
    """
    if size == grid:
        return positions
    count = positions.shape[1] - grid[0] * grid[1]
    prefix, table = positions[:, :count], positions[:, count:]
    table = table.float().reshape(1, *grid, -1).permute(0, 3, 1, 2)
    mode = "bilinear" if method == "bilinear" else "bicubic"
    if method == "dinov2":
        factors = [(n + OFFSET) / g for n, g in zip(size, grid, strict=True)]
        table = F.interpolate(table, scale_factor=factors, mode=mode, align_corners=False)
        assert table.shape[-2:] == size, "an offset of 0.1 does not change the number of patches"
    else:
        antialias = method == "timm"
        table = F.interpolate(table, size, mode=mode, align_corners=False, antialias=antialias)
    return torch.cat((prefix, table.flatten(2).transpose(1, 2).to(positions.dtype)), dim=1)
