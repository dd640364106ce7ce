"""Deformable attention on a CPU, as sums of weighted rows of a table.

A bilinear sample is the weighted sum of four neighboring pixels. So all samples of a query and
head together are a sum of 4 * L * P rows (L levels, P points) of a table whose rows are the D
channels of a pixel and head. Three operations on such rows suffice, each of which a library has:

- forward: the weighted sum, `embedding_bag`;
- gradient of weights and locations: products of rows with the output's gradient, a sampled product
  of a sparse with a dense matrix;
- gradient of the values: the transposed sum, a product of a sparse with a dense matrix.

Samples are never stored, and only the three inputs are kept for the backward pass.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from clouds.ops.deformable_attention import Size, compute_dtype, register_attention_op

CORNERS = 4

MARGIN = 2
"""Pixels of zero padding around each map.

Locations are clamped to the padded map, where every corner of a sample that is not a pixel of the
map is zero. So neither values nor derivatives need a mask.
"""

QUERIES_PER_BLOCK = 1024
"""Queries computed at a time: their rows and weights fit into a core's second-level cache."""


@dataclass(frozen=True)
class PaddedLayout:
    """Where the pixels of several zero-padded maps are in one table of positions.

    The padding on the right of a row is also the padding on the left of the next row.

    Attributes:
        spatial_shapes: (height, width) of each map.
        pitches: of each map, positions from a pixel to the one below it.
        origins: of each map, the position of its first pixel.
        num_positions: of the whole table.
    """

    spatial_shapes: tuple[Size, ...]
    pitches: tuple[int, ...]
    origins: tuple[int, ...]
    num_positions: int

    @classmethod
    def of(cls, spatial_shapes: Sequence[Size]) -> PaddedLayout:
        pitches, origins, end = [], [], MARGIN
        for height, width in spatial_shapes:
            pitches.append(width + MARGIN)
            origins.append(end + MARGIN * pitches[-1])
            end += (height + 2 * MARGIN) * pitches[-1]
        return cls(tuple(spatial_shapes), tuple(pitches), tuple(origins), end)

    def maps(self, table: Tensor) -> list[Tensor]:
        """(positions, M, D) -> views of it, one per map, (H, W, M, D)."""
        return [
            table[origin : origin + height * pitch].view(height, pitch, *table.shape[1:])[:, :width]
            for (height, width), pitch, origin in zip(
                self.spatial_shapes, self.pitches, self.origins, strict=True
            )
        ]

    def pad(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """(S, M, D) -> (positions, M, D)."""
        table = value.new_zeros((self.num_positions, *value.shape[1:]), dtype=dtype)
        areas = [height * width for height, width in self.spatial_shapes]
        for padded, level in zip(self.maps(table), torch.split(value, areas), strict=True):
            padded.copy_(level.view_as(padded))
        return table

    def crop(self, table: Tensor, out: Tensor) -> None:
        """(positions, M, D) -> `out`, (S, M, D)."""
        areas = [height * width for height, width in self.spatial_shapes]
        for padded, level in zip(self.maps(table), torch.split(out, areas), strict=True):
            level.view_as(padded).copy_(padded)


class SampleConstants:
    """What each sample of a query needs of its map, the same for every query.

    Vectors have M * L * P elements, in the order of heads, levels and points.

    Args:
        layout: of the table.
        value, sampling_locations: as in `deformable_attention`, for sizes, type and device.

    Attributes:
        dtype: in which locations are computed.
    """

    def __init__(self, layout: PaddedLayout, value: Tensor, sampling_locations: Tensor) -> None:
        num_heads, num_points, device = value.shape[2], sampling_locations.shape[4], value.device
        self.dtype = dtype = compute_dtype(value, sampling_locations)

        def per_sample(per_level: Sequence[int], dtype: torch.dtype) -> Tensor:
            values = torch.tensor(per_level, dtype=dtype, device=device)
            return values.repeat_interleave(num_points).repeat(num_heads)

        self.num_heads, self.num_samples = num_heads, len(layout.spatial_shapes) * num_points
        self.height = per_sample([height for height, _ in layout.spatial_shapes], dtype)
        self.width = per_sample([width for _, width in layout.spatial_shapes], dtype)
        self.pitch = per_sample(layout.pitches, dtype)
        self.half, self.minimum = torch.tensor([-0.5, -MARGIN], dtype=dtype, device=device)
        head = torch.arange(num_heads, dtype=torch.int32, device=device)
        head = head.repeat_interleave(self.num_samples)
        self.first_row = per_sample(layout.origins, torch.int32) * num_heads + head
        below = per_sample(layout.pitches, torch.int32)[: self.num_samples]
        right = torch.ones_like(below)
        self.steps = [num_heads * step for step in (0 * below, right, below, below + right)]

    def corner_rows(self, sampling_locations: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            sampling_locations: (B, M * L * P, 2) as in `deformable_attention`.
            rows: (B * M, 4, L * P) int32; the table's rows of the four corners are written to it.

        Returns:
            Distances x and y of each sample from its upper left corner in pixels,
            (B * M, L * P) each, in [0, 1).
        """
        left, x = self._split(sampling_locations[..., 0], self.width)
        top, y = self._split(sampling_locations[..., 1], self.height)
        position = left.addcmul_(top, self.pitch).to(torch.int32)
        corner = position.mul_(self.num_heads).add_(self.first_row).view(-1, self.num_samples)
        for i, step in enumerate(self.steps):
            torch.add(corner, step, out=rows[:, i])
        return x.view(-1, self.num_samples), y.view(-1, self.num_samples)

    def _split(self, coordinate: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates in [0, 1], (B, M * L * P) -> pixel at or before them, distance from it."""
        pixel = torch.addcmul(self.half, coordinate, size)
        torch.clamp(pixel, self.minimum, size, out=pixel)
        before = pixel.floor()
        pixel -= before
        # NaN stays in the distance, and so in the result; it must not become an index.
        return before.nan_to_num_(0.0), pixel


def corner_weights(x: Tensor, y: Tensor, attention: Tensor, out: Tensor) -> None:
    """Bilinear weights times attention, (B * M, L * P) each, into `out`, (B * M, 4, L * P)."""
    lower = y * attention
    upper = attention - lower
    for i, side in ((0, upper), (2, lower)):
        torch.mul(side, x, out=out[:, i + 1])
        torch.sub(side, out[:, i + 1], out=out[:, i])


def sample_gradients(
    products: Tensor, x: Tensor, y: Tensor, attention: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the attention weights and of x and y in pixels, (B * M, L * P) each.

    Args:
        products: (B * M, 4, L * P), dot products of the corners' rows with the output's gradient.
        x, y, attention: (B * M, L * P)
    """
    upper_left, upper_right, lower_left, lower_right = products.unbind(1)
    upper, lower = torch.lerp(upper_left, upper_right, x), torch.lerp(lower_left, lower_right, x)
    grad_x = torch.lerp(upper_right - upper_left, lower_right - lower_left, y)
    return torch.lerp(upper, lower, y), grad_x.mul_(attention), (lower - upper).mul_(attention)


def row_products(rows: Tensor, table: Tensor, gradient: Tensor, scratch: Tensor) -> Tensor:
    """Dot products of K rows of a table (R, D) with the gradient of each of B outputs.

    Args:
        rows: (B, K) int32
        gradient: (B, D)
        scratch: (B, K); the result is written to it and returned.
    """
    num_outputs, length = rows.shape
    starts = torch.arange(0, num_outputs * length + 1, length, dtype=torch.int32)
    _suppress_beta_warning()
    scratch.zero_()  # it is multiplied by beta = 0 and added, and 0 * inf would be NaN
    pattern = torch.sparse_csr_tensor(
        starts,
        rows.view(-1),
        scratch.view(-1),
        size=(num_outputs, table.shape[0]),
        check_invariants=False,
    )
    torch.sparse.sampled_addmm(pattern, gradient, table.t(), beta=0.0, out=pattern)
    return pattern.values().view(num_outputs, length)


@functools.cache
def _suppress_beta_warning() -> None:
    """Trigger PyTorch's warning that sparse CSR tensors are in beta state, once in a process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        torch.zeros(1, 1).to_sparse_csr()


def scatter_rows(rows: Tensor, weights: Tensor, gradient: Tensor, count: int) -> Tensor:
    """Add each output's gradient, weighted, to the K rows of the table that it is a sum of.

    Rows (B, K) int32, weights (B, K) and gradient (B, D) -> the table (count, D).
    """
    # SciPy's product is one pass over the entries; PyTorch's sorts them first, 20 times as slow.
    from scipy.sparse import csc_matrix

    num_outputs, length = rows.shape
    starts = torch.arange(0, num_outputs * length + 1, length, dtype=torch.int32)
    entries = (weights.view(-1).numpy(), rows.view(-1).numpy(), starts.numpy())
    matrix = csc_matrix(entries, shape=(count, num_outputs))
    return torch.from_numpy(matrix @ gradient.contiguous().numpy())


def scatter_rows_deterministic(
    rows: Tensor, weights: Tensor, gradient: Tensor, count: int
) -> Tensor:
    """`scatter_rows` on any device, in a fixed order of summation."""
    entries, order = rows.flatten().sort(stable=True)
    starts = torch.searchsorted(entries, torch.arange(count + 1, device=rows.device))
    return F.embedding_bag(
        order // rows.shape[1],
        gradient,
        starts,
        per_sample_weights=weights.flatten()[order],
        mode="sum",
        include_last_offset=True,
    )


class _Image:
    """One image: its table of padded values, its samples, and its blocks of queries."""

    def __init__(
        self,
        value: Tensor,
        layout: PaddedLayout,
        constants: SampleConstants,
        sampling_locations: Tensor,
        attention_weights: Tensor,
    ) -> None:
        self.dtype = constants.dtype
        self.constants = constants
        self.num_heads = attention_weights.shape[1]
        self.table = layout.pad(value, self.dtype).flatten(0, 1)
        self.locations = sampling_locations.flatten(1, 3)
        self.attention = attention_weights.reshape(-1, constants.num_samples)

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Slices of queries, and the same slices of queries times heads."""
        for start in range(0, len(self.locations), QUERIES_PER_BLOCK):
            end = min(start + QUERIES_PER_BLOCK, len(self.locations))
            yield slice(start, end), slice(start * self.num_heads, end * self.num_heads)

    def compute_entries(
        self, queries: slice, bags: slice, rows: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Write a block's rows and weights, (B * M, 4, L * P); return x, y and attention."""
        x, y = self.constants.corner_rows(self.locations[queries].to(self.dtype), rows)
        attention = self.attention[bags].to(self.dtype)
        corner_weights(x, y, attention, weights)
        return x, y, attention


def forward(
    value: Tensor,
    spatial_shapes: Sequence[Size],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """See `deformable_attention`; the tensors are contiguous."""
    n, _, num_heads, head_dim = value.shape
    num_queries, layout = sampling_locations.shape[1], PaddedLayout.of(spatial_shapes)
    constants = SampleConstants(layout, value, sampling_locations)
    dtype = constants.dtype
    shape = (min(num_queries, QUERIES_PER_BLOCK) * num_heads, CORNERS, constants.num_samples)
    rows, weights = torch.empty(shape, dtype=torch.int32), torch.empty(shape, dtype=dtype)
    out = value.new_empty((n, num_queries * num_heads, head_dim))
    for i in range(n):
        image = _Image(value[i], layout, constants, sampling_locations[i], attention_weights[i])
        for block, bags in image.blocks():
            count = bags.stop - bags.start
            image.compute_entries(block, bags, rows[:count], weights[:count])
            out[i, bags] = F.embedding_bag(
                rows[:count].flatten(1),
                image.table,
                per_sample_weights=weights[:count].flatten(1),
                mode="sum",
            )
    return out.view(n, num_queries, num_heads * head_dim)


def backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[Size],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of values, locations and weights, given that of the output, (N, Q, M * D)."""
    n, _, num_heads, head_dim = value.shape
    num_queries, layout = sampling_locations.shape[1], PaddedLayout.of(spatial_shapes)
    constants = SampleConstants(layout, value, sampling_locations)
    dtype = constants.dtype
    shape = (num_queries * num_heads, CORNERS, constants.num_samples)
    rows, weights = torch.empty(shape, dtype=torch.int32), torch.empty(shape, dtype=dtype)
    block_size = min(num_queries, QUERIES_PER_BLOCK) * num_heads
    scratch = torch.empty((block_size, *shape[1:]), dtype=dtype)
    inputs = (value, sampling_locations, attention_weights)
    grad_value, grad_locations, grad_weights = map(torch.empty_like, inputs)
    for i in range(n):
        image = _Image(value[i], layout, constants, sampling_locations[i], attention_weights[i])
        grad_rows = grad_output[i].reshape(-1, head_dim).to(dtype)
        for block, bags in image.blocks():
            x, y, attention = image.compute_entries(block, bags, rows[bags], weights[bags])
            products = row_products(
                rows[bags].flatten(1), image.table, grad_rows[bags], scratch[: len(x)].flatten(1)
            )
            gradients = sample_gradients(products.view_as(rows[bags]), x, y, attention)
            grad_attention, grad_x, grad_y = gradients
            grad_weights[i].view(-1, constants.num_samples)[bags] = grad_attention
            grad_location = grad_locations[i].view(num_queries, -1, 2)[block]
            grad_location[..., 0] = grad_x.view(grad_location.shape[:2]).mul_(constants.width)
            grad_location[..., 1] = grad_y.view(grad_location.shape[:2]).mul_(constants.height)
        table = scatter_rows(rows.flatten(1), weights.flatten(1), grad_rows, len(image.table))
        layout.crop(table.view(-1, num_heads, head_dim), grad_value[i])
    return grad_value, grad_locations, grad_weights


def value_gradient_deterministic(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[Size],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """The gradient of the values, (N, S, M, D), on any device, in a fixed order of summation."""
    n, _, num_heads, head_dim = value.shape
    num_queries, layout = sampling_locations.shape[1], PaddedLayout.of(spatial_shapes)
    constants = SampleConstants(layout, value, sampling_locations)
    dtype = constants.dtype
    shape = (num_queries * num_heads, CORNERS, constants.num_samples)
    rows = torch.empty(shape, dtype=torch.int32, device=value.device)
    weights = torch.empty(shape, dtype=dtype, device=value.device)
    grad_value = torch.empty_like(value, dtype=dtype)
    for i in range(n):
        x, y = constants.corner_rows(sampling_locations[i].flatten(1, 3).to(dtype), rows)
        attention = attention_weights[i].reshape(-1, constants.num_samples).to(dtype)
        corner_weights(x, y, attention, weights)
        grad_rows = grad_output[i].reshape(-1, head_dim).to(dtype)
        table = scatter_rows_deterministic(
            rows.flatten(1), weights.flatten(1), grad_rows, layout.num_positions * num_heads
        )
        layout.crop(table.view(-1, num_heads, head_dim), grad_value[i])
    return grad_value


deformable_attention_cpu = register_attention_op("deformable_attention_cpu", forward, backward)
