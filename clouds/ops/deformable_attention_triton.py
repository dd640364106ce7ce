# ruff: noqa: ANN001, ANN202
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Deformable attention as Triton kernels, for CUDA (or any GPU that Triton supports).

A program computes a block of queries of one head and image. Values may be float32, bfloat16 or
float16; sums are in float32 (float64 where the values are).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from clouds.ops.deformable_attention import Size, compute_dtype, register_attention_op
from clouds.ops.deformable_attention_cpu import value_gradient_deterministic

logger = logging.getLogger(__name__)

# Elements of a corner's tile, queries times channels. The backward pass holds several tiles at
# once; larger ones would need more registers than there are.
FORWARD_TILE, BACKWARD_TILE = 1024, 512
WARPS = 4


@triton.jit
def _corner_of(locations, sample, valid, height, width, dtype: tl.constexpr):
    """Column and row of the pixel at or before each sample, and the distances x and y from it."""
    x = tl.load(locations + 2 * sample, mask=valid, other=0.0).to(dtype) * width - 0.5
    y = tl.load(locations + 2 * sample + 1, mask=valid, other=0.0).to(dtype) * height - 0.5
    # Clamped to the map and two pixels around it, so that indices fit an integer; NaN stays NaN.
    x = tl.where(x < -2, -2.0, tl.where(x > width, width, x)).to(dtype)
    y = tl.where(y < -2, -2.0, tl.where(y > height, height, y)).to(dtype)
    left, top = tl.floor(x), tl.floor(y)
    return left.to(tl.int32), top.to(tl.int32), x - left, y - top


@triton.jit
def _corner_offsets(row, column, height, width, start, pitch, base, valid, has_channel):
    """Offsets of one corner's values, (BLOCK_Q, BLOCK_D), and which of them are in the map."""
    inside = valid & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    position = (start + row * width + column).to(tl.int64)
    return base[None, :] + (position * pitch)[:, None], inside[:, None] & has_channel[None, :]


@triton.jit
def _forward_kernel(
    value,
    levels,
    sampling_locations,
    attention_weights,
    out,
    num_values,
    num_queries,
    num_heads,
    head_dim,
    L: tl.constexpr,
    P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
):
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    head = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    valid, has_channel = query < num_queries, channel < head_dim
    bag = (image * num_queries + query) * num_heads + head
    pitch = num_heads * head_dim
    base = (image * num_values * num_heads + head) * head_dim + channel
    total = tl.zeros((BLOCK_Q, BLOCK_D), dtype=DTYPE)
    for level in range(L):
        height, width = tl.load(levels + 3 * level), tl.load(levels + 3 * level + 1)
        start = tl.load(levels + 3 * level + 2)
        for point in tl.static_range(P):
            sample = bag * (L * P) + level * P + point
            left, top, x, y = _corner_of(sampling_locations, sample, valid, height, width, DTYPE)
            attention = tl.load(attention_weights + sample, mask=valid, other=0.0).to(DTYPE)
            for corner in tl.static_range(4):
                right, down = corner % 2, corner // 2
                at, inside = _corner_offsets(
                    top + down, left + right, height, width, start, pitch, base, valid, has_channel
                )
                row = tl.load(value + at, mask=inside, other=0.0).to(DTYPE)
                weight = (x if right else 1 - x) * (y if down else 1 - y) * attention
                total += weight[:, None] * row
    at = bag[:, None] * head_dim + channel[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=valid[:, None] & has_channel[None, :])


@triton.jit
def _backward_kernel(
    grad_output,
    value,
    levels,
    sampling_locations,
    attention_weights,
    grad_value,
    grad_locations,
    grad_weights,
    num_values,
    num_queries,
    num_heads,
    head_dim,
    L: tl.constexpr,
    P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
    SCATTER: tl.constexpr,
):
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    head = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    valid, has_channel = query < num_queries, channel < head_dim
    bag = (image * num_queries + query) * num_heads + head
    pitch = num_heads * head_dim
    base = (image * num_values * num_heads + head) * head_dim + channel
    at = bag[:, None] * head_dim + channel[None, :]
    in_tile = valid[:, None] & has_channel[None, :]
    grad_out = tl.load(grad_output + at, mask=in_tile, other=0.0).to(DTYPE)
    for level in range(L):
        height, width = tl.load(levels + 3 * level), tl.load(levels + 3 * level + 1)
        start = tl.load(levels + 3 * level + 2)
        for point in tl.static_range(P):
            sample = bag * (L * P) + level * P + point
            left, top, x, y = _corner_of(sampling_locations, sample, valid, height, width, DTYPE)
            attention = tl.load(attention_weights + sample, mask=valid, other=0.0).to(DTYPE)
            grad_attention = tl.zeros((BLOCK_Q,), dtype=DTYPE)
            grad_x, grad_y = tl.zeros((BLOCK_Q,), dtype=DTYPE), tl.zeros((BLOCK_Q,), dtype=DTYPE)
            for corner in tl.static_range(4):
                right, down = corner % 2, corner // 2
                at, inside = _corner_offsets(
                    top + down, left + right, height, width, start, pitch, base, valid, has_channel
                )
                row = tl.load(value + at, mask=inside, other=0.0).to(DTYPE)
                product = tl.sum(row * grad_out, axis=1)
                weight_x, weight_y = (x if right else 1 - x), (y if down else 1 - y)
                grad_attention += weight_x * weight_y * product
                grad_x += (weight_y if right else -weight_y) * product
                grad_y += (weight_x if down else -weight_x) * product
                if SCATTER:
                    grad_row = (weight_x * weight_y * attention)[:, None] * grad_out
                    tl.atomic_add(grad_value + at, grad_row, mask=inside, sem="relaxed")
            grad_attention = grad_attention.to(grad_weights.dtype.element_ty)
            tl.store(grad_weights + sample, grad_attention, mask=valid)
            grad_x = (grad_x * attention * width).to(grad_locations.dtype.element_ty)
            grad_y = (grad_y * attention * height).to(grad_locations.dtype.element_ty)
            tl.store(grad_locations + 2 * sample, grad_x, mask=valid)
            tl.store(grad_locations + 2 * sample + 1, grad_y, mask=valid)


def forward(
    value: Tensor,
    spatial_shapes: Sequence[Size],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """See `deformable_attention`; the tensors are contiguous."""
    n, _, num_heads, head_dim = value.shape
    out = value.new_empty((n, sampling_locations.shape[1], num_heads * head_dim))
    grid, sizes, constants = _launch(value, sampling_locations, FORWARD_TILE)
    with _on(value.device):
        _forward_kernel[grid](
            value,
            level_table(tuple(spatial_shapes), value.device),
            sampling_locations,
            attention_weights,
            out,
            *sizes,
            **constants,
        )
    return out


def backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[Size],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of values, locations and weights.

    That of the values is added up with atomic additions, in no fixed order; with
    `torch.use_deterministic_algorithms` in a fixed order, by sorting.
    """
    grad_locations = torch.empty_like(sampling_locations)
    grad_weights = torch.empty_like(attention_weights)
    grid, sizes, constants = _launch(value, sampling_locations, BACKWARD_TILE)
    deterministic = torch.are_deterministic_algorithms_enabled()
    grad_value = torch.zeros_like(value, dtype=compute_dtype(value, sampling_locations))
    with _on(value.device):
        _backward_kernel[grid](
            grad_output,
            value,
            level_table(tuple(spatial_shapes), value.device),
            sampling_locations,
            attention_weights,
            grad_value,
            grad_locations,
            grad_weights,
            *sizes,
            **constants,
            SCATTER=not deterministic,
        )
    if deterministic:
        grad_value = value_gradient_deterministic(
            grad_output, value, spatial_shapes, sampling_locations, attention_weights
        )
    return grad_value.to(value.dtype), grad_locations, grad_weights


def _launch(
    value: Tensor, sampling_locations: Tensor, tile: int
) -> tuple[tuple[int, int, int], tuple[int, ...], dict[str, Any]]:
    """The grid of programs, the sizes of the tensors, and the constants of a kernel."""
    n, num_values, num_heads, head_dim = value.shape
    num_queries, _, num_levels, num_points = sampling_locations.shape[1:5]
    block_d = triton.next_power_of_2(head_dim)
    block_q = max(1, min(tile // block_d, triton.next_power_of_2(num_queries)))
    double = compute_dtype(value, sampling_locations) == torch.float64
    constants = {
        "L": num_levels,
        "P": num_points,
        "BLOCK_Q": block_q,
        "BLOCK_D": block_d,
        "DTYPE": tl.float64 if double else tl.float32,
        "num_warps": WARPS,
    }
    grid = (triton.cdiv(num_queries, block_q), num_heads, n)
    return grid, (num_values, num_queries, num_heads, head_dim), constants


@functools.lru_cache(maxsize=256)
def level_table(spatial_shapes: tuple[Size, ...], device: torch.device) -> Tensor:
    """(L, 3) int32: height, width and first position of each map.

    Cached, because the host waits for the copy to the device.
    """
    rows, start = [], 0
    for height, width in spatial_shapes:
        rows.append((height, width, start))
        start += height * width
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _on(device: torch.device) -> torch.cuda.device:
    """Make the tensors' device the current one, on which Triton launches its kernels."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


deformable_attention_triton = register_attention_op(
    "deformable_attention_triton", forward, backward
)


@functools.cache
def trial_run_problem(device: torch.device) -> str:
    """Run both kernels once on one pixel and return the error as text; empty if they run.

    Triton compiles kernels at their first use, for which it needs a C compiler and a GPU that it
    supports. Which exception it raises without them differs from version to version.
    """
    value = torch.ones(1, 1, 1, 16, device=device, requires_grad=True)
    sampling_locations = torch.full((1, 1, 1, 1, 1, 2), 0.5, device=device)
    attention_weights = torch.ones(1, 1, 1, 1, 1, device=device)
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            out = deformable_attention_triton(
                value, [(1, 1)], sampling_locations, attention_weights
            )
            torch.autograd.backward(out.sum())
    except Exception as error:
        logger.debug("Triton's trial run", exc_info=True)
        return f"a trial run of Triton failed ({type(error).__name__}: {error})"
    return ""
