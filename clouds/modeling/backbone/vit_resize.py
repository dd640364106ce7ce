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
    count = positions.shape[1] - grid[0] * grid[1]
    prefix, table = positions[:, :count], positions[:, count:]
    if not all(
        isinstance(n, int) for n in size
    ):  # symbols of torch.export, see `_resize_by_matrices`
        table = _resize_by_matrices(table[0].float().reshape(*grid, -1), size, method)
        return torch.cat((prefix, table.flatten(0, 1)[None].to(positions.dtype)), dim=1)
    if size == grid:
        return positions
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


def _resize_by_matrices(table: Tensor, size: tuple[int, int], method: str) -> Tensor:
    """`resize_positions` of a table (h, w, C) to rows and columns that an exported graph computes.

    A graph for images of any size has no branch that asks whether the size is that of the table.
    """
    grid = (table.shape[0], table.shape[1])
    numbers = [torch.scalar_tensor(n, dtype=torch.float32, device=table.device) for n in size]
    factors = [n / g for n, g in zip(numbers, grid, strict=True)]
    if method == "dinov2":
        same = (numbers[0] == grid[0]) & (numbers[1] == grid[1])
        factors = [torch.where(same, f, f + OFFSET / g) for f, g in zip(factors, grid, strict=True)]
    rows, columns = (
        resize_matrix(n, g, factor, method)
        for n, g, factor in zip(size, grid, factors, strict=True)
    )
    return torch.einsum("yh,hwc,xw->yxc", rows, table, columns)


def resize_matrix(size: int, source: int, factor: Tensor, method: str) -> Tensor:
    """What `F.interpolate` computes along one axis, as a matrix (size, source).

    Args:
        size, source: number of values after and before.
        factor: (), float32: distance of the old values, measured in new ones.
        method: see `resize_positions`.
    """
    old = torch.arange(source, dtype=torch.float32, device=factor.device)
    position = (torch.arange(size, dtype=torch.float32, device=factor.device) + 0.5) / factor - 0.5
    if method == "timm":  # antialiasing: the kernel becomes wider where there are fewer new values
        weights = _cubic((old - position[:, None]) * factor.clamp(max=1), -0.5)
        return weights / weights.sum(1, keepdim=True)
    matrix = old.new_zeros(size, source)
    for offset in (-1, 0, 1, 2):
        neighbor = position.floor() + offset
        distance = position - neighbor
        cubic = method != "bilinear"
        weight = _cubic(distance, -0.75) if cubic else (1 - distance.abs()).clamp(min=0)
        is_neighbor = neighbor.clamp(0, source - 1)[:, None] == old
        matrix = matrix + weight[:, None] * is_neighbor
    return matrix


def _cubic(x: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution kernel with the parameter `a`, 0 from a distance of 2 on."""
    x = x.abs()
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x < 1, inner, torch.where(x < 2, outer, 0.0))
