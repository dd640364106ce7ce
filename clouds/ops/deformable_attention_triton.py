# ruff: noqa: ANN001, ANN202
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Deformable attention as Triton kernels, for CUDA (or any GPU that Triton knows).

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

from clouds.ops.deformable_attention import Size, attention_op, compute_type
from clouds.ops.deformable_attention_cpu import scatter_gradient

logger = logging.getLogger(__name__)

# Numbers of a corner's tile, queries times channels. The backward pass holds several at once, and
# with larger ones it would run out of registers.
FORWARD_TILE, BACKWARD_TILE = 1024, 512
WARPS = 4


@triton.jit
def _place(locations, sample, live, height, width, kind: tl.constexpr):
    """Upper left pixel of each place, and how far right of and below it the place is."""
    x = tl.load(locations + 2 * sample, mask=live, other=0.0).to(kind) * width - 0.5
    y = tl.load(locations + 2 * sample + 1, mask=live, other=0.0).to(kind) * height - 0.5
    # Held near the map, where a pixel's number fits an integer; nan stays nan.
    x = tl.where(x < -2, -2.0, tl.where(x > width, width, x)).to(kind)
    y = tl.where(y < -2, -2.0, tl.where(y > height, height, y)).to(kind)
    left, top = tl.floor(x), tl.floor(y)
    return left.to(tl.int32), top.to(tl.int32), x - left, y - top


@triton.jit
def _corner(row, column, height, width, start, pitch, base, live, has):
    """Offsets of one corner's values, (BLOCK_Q, BLOCK_D), and which of them are in the map."""
    inside = live & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    position = (start + row * width + column).to(tl.int64)
    return base[None, :] + (position * pitch)[:, None], inside[:, None] & has[None, :]


@triton.jit
def _forward(
    value,
    levels,
    locations,
    weights,
    out,
    area,
    queries,
    heads,
    channels,
    L: tl.constexpr,
    P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KIND: tl.constexpr,
):
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    head = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    live, has = query < queries, channel < channels
    bag = (image * queries + query) * heads + head
    pitch = heads * channels
    base = (image * area * heads + head) * channels + channel
    total = tl.zeros((BLOCK_Q, BLOCK_D), dtype=KIND)
    for level in range(L):
        height, width = tl.load(levels + 3 * level), tl.load(levels + 3 * level + 1)
        start = tl.load(levels + 3 * level + 2)
        for point in tl.static_range(P):
            sample = bag * (L * P) + level * P + point
            left, top, x, y = _place(locations, sample, live, height, width, KIND)
            attention = tl.load(weights + sample, mask=live, other=0.0).to(KIND)
            for corner in tl.static_range(4):
                right, down = corner % 2, corner // 2
                at, inside = _corner(
                    top + down, left + right, height, width, start, pitch, base, live, has
                )
                row = tl.load(value + at, mask=inside, other=0.0).to(KIND)
                share = (x if right else 1 - x) * (y if down else 1 - y) * attention
                total += share[:, None] * row
    at = bag[:, None] * channels + channel[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=live[:, None] & has[None, :])


@triton.jit
def _backward(
    gradient,
    value,
    levels,
    locations,
    weights,
    by_value,
    by_place,
    by_weight,
    area,
    queries,
    heads,
    channels,
    L: tl.constexpr,
    P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KIND: tl.constexpr,
    SCATTER: tl.constexpr,
):
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    head = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    live, has = query < queries, channel < channels
    bag = (image * queries + query) * heads + head
    pitch = heads * channels
    base = (image * area * heads + head) * channels + channel
    at = bag[:, None] * channels + channel[None, :]
    into = tl.load(gradient + at, mask=live[:, None] & has[None, :], other=0.0).to(KIND)
    for level in range(L):
        height, width = tl.load(levels + 3 * level), tl.load(levels + 3 * level + 1)
        start = tl.load(levels + 3 * level + 2)
        for point in tl.static_range(P):
            sample = bag * (L * P) + level * P + point
            left, top, x, y = _place(locations, sample, live, height, width, KIND)
            attention = tl.load(weights + sample, mask=live, other=0.0).to(KIND)
            by_attention = tl.zeros((BLOCK_Q,), dtype=KIND)
            by_x = tl.zeros((BLOCK_Q,), dtype=KIND)
            by_y = tl.zeros((BLOCK_Q,), dtype=KIND)
            for corner in tl.static_range(4):
                right, down = corner % 2, corner // 2
                at, inside = _corner(
                    top + down, left + right, height, width, start, pitch, base, live, has
                )
                row = tl.load(value + at, mask=inside, other=0.0).to(KIND)
                product = tl.sum(row * into, axis=1)
                share_x, share_y = (x if right else 1 - x), (y if down else 1 - y)
                by_attention += share_x * share_y * product
                by_x += (share_y if right else -share_y) * product
                by_y += (share_x if down else -share_x) * product
                if SCATTER:
                    share = share_x * share_y * attention
                    tl.atomic_add(by_value + at, share[:, None] * into, mask=inside, sem="relaxed")
            tl.store(by_weight + sample, by_attention.to(by_weight.dtype.element_ty), mask=live)
            by_x = (by_x * attention * width).to(by_place.dtype.element_ty)
            by_y = (by_y * attention * height).to(by_place.dtype.element_ty)
            tl.store(by_place + 2 * sample, by_x, mask=live)
            tl.store(by_place + 2 * sample + 1, by_y, mask=live)


def forward(value: Tensor, sizes: Sequence[Size], locations: Tensor, weights: Tensor) -> Tensor:
    """See `deformable_attention`; the tensors are contiguous."""
    n, _, heads, channels = value.shape
    out = value.new_empty((n, locations.shape[1], heads * channels))
    grid, sides, blocks = _launch(value, locations, FORWARD_TILE)
    with _on(value.device):
        _forward[grid](
            value,
            level_table(tuple(sizes), value.device),
            locations,
            weights,
            out,
            *sides,
            **blocks,
        )
    return out


def backward(
    gradient: Tensor, value: Tensor, sizes: Sequence[Size], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by value, locations and weights; the first is added up in no fixed order.

    Where PyTorch is to use deterministic algorithms it is added up in a fixed one, by sorting.
    """
    by_place, by_weight = torch.empty_like(locations), torch.empty_like(weights)
    grid, sides, blocks = _launch(value, locations, BACKWARD_TILE)
    in_order = torch.are_deterministic_algorithms_enabled()
    by_value = torch.zeros_like(value, dtype=compute_type(value, locations))
    with _on(value.device):
        _backward[grid](
            gradient,
            value,
            level_table(tuple(sizes), value.device),
            locations,
            weights,
            by_value,
            by_place,
            by_weight,
            *sides,
            **blocks,
            SCATTER=not in_order,
        )
    if in_order:
        by_value = scatter_gradient(gradient, value, sizes, locations, weights)
    return by_value.to(value.dtype), by_place, by_weight


def _launch(
    value: Tensor, locations: Tensor, tile: int
) -> tuple[tuple[int, int, int], tuple[int, ...], dict[str, Any]]:
    """The grid of programs, the sides of the tensors, and the constants of a kernel."""
    n, area, heads, channels = value.shape
    queries, _, levels, points = locations.shape[1:5]
    block_d = triton.next_power_of_2(channels)
    block_q = max(1, min(tile // block_d, triton.next_power_of_2(queries)))
    exact = compute_type(value, locations) == torch.float64
    constants = {
        "L": levels,
        "P": points,
        "BLOCK_Q": block_q,
        "BLOCK_D": block_d,
        "KIND": tl.float64 if exact else tl.float32,
        "num_warps": WARPS,
    }
    return (triton.cdiv(queries, block_q), heads, n), (area, queries, heads, channels), constants


@functools.lru_cache(maxsize=256)
def level_table(sizes: tuple[Size, ...], device: torch.device) -> Tensor:
    """(L, 3) int32: height, width and first position of each map; kept, as copying it waits."""
    rows, start = [], 0
    for height, width in sizes:
        rows.append((height, width, start))
        start += height * width
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _on(device: torch.device) -> torch.cuda.device:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


deformable_attention_triton = attention_op("deformable_attention_triton", forward, backward)


@functools.cache
def try_out(device: torch.device) -> str:
    """Run both kernels once, on next to nothing: empty if they run, else what went wrong.

    Triton compiles at the first use, for which it wants a C compiler and a GPU that it knows; what
    it raises without them differs from version to version.
    """
    value = torch.ones(1, 1, 1, 16, device=device, requires_grad=True)
    locations = torch.full((1, 1, 1, 1, 1, 2), 0.5, device=device)
    weights = torch.ones(1, 1, 1, 1, 1, device=device)
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            out = deformable_attention_triton(value, [(1, 1)], locations, weights)
            torch.autograd.backward(out.sum())
    except Exception as error:
        logger.debug("Triton's trial run", exc_info=True)
        return f"a trial run of Triton failed ({type(error).__name__}: {error})"
    return ""
