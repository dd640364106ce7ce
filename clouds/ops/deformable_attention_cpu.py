"""Deformable attention on a CPU: what a query sees is a sum of weighted rows of a table.

A bilinear sample is the weighted sum of four neighbouring pixels, so that all samples of a query
and head together are a sum of 4 · levels · points rows, D floats each. Sums of rows, their
products with a gradient, and the transposed sum are three loops that libraries have; no sample is
ever held in memory, and nothing is kept for the backward pass but the three inputs.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from clouds.ops.deformable_attention import Size, attention_op, compute_type

CORNERS = 4
# Zeros around a map: places are held within them, and every corner of a held place that is not a
# pixel of the map is then a zero, so that neither values nor derivatives need a mask.
MARGIN = 2
# Queries of a step: rows and weights of so many stay in a core's second-level cache.
QUERIES_AT_ONCE = 1024


@dataclass(frozen=True)
class Layout:
    """Where the pixels of several maps lie in one table of positions, zeros around every map.

    The zeros on the right of a row are also those on the left of the next.

    Attributes:
        sizes: (height, width) of each map.
        pitches: positions from a pixel of each map to the one below.
        origins: position of each map's first pixel.
        positions: of the whole table.
    """

    sizes: tuple[Size, ...]
    pitches: tuple[int, ...]
    origins: tuple[int, ...]
    positions: int

    @classmethod
    def of(cls, sizes: Sequence[Size]) -> Layout:
        pitches, origins, end = [], [], MARGIN
        for height, width in sizes:
            pitches.append(width + MARGIN)
            origins.append(end + MARGIN * pitches[-1])
            end += (height + 2 * MARGIN) * pitches[-1]
        return cls(tuple(sizes), tuple(pitches), tuple(origins), end)

    def pixels(self, table: Tensor) -> list[Tensor]:
        """(positions, M, D) -> views of it, one per map, (H, W, M, D)."""
        return [
            table[origin : origin + height * pitch].view(height, pitch, *table.shape[1:])[:, :width]
            for (height, width), pitch, origin in zip(
                self.sizes, self.pitches, self.origins, strict=True
            )
        ]

    def pad(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """(S, M, D) -> (positions, M, D)."""
        table = value.new_zeros((self.positions, *value.shape[1:]), dtype=dtype)
        areas = [height * width for height, width in self.sizes]
        for pixels, level in zip(self.pixels(table), torch.split(value, areas), strict=True):
            pixels.copy_(level.view_as(pixels))
        return table

    def crop(self, table: Tensor, out: Tensor) -> None:
        """(positions, M, D) -> `out`, (S, M, D)."""
        areas = [height * width for height, width in self.sizes]
        for pixels, level in zip(self.pixels(table), torch.split(out, areas), strict=True):
            level.view_as(pixels).copy_(pixels)


class Columns:
    """What is the same for every query: numbers per head, level and point, one after another.

    Args:
        layout: of the table.
        heads, points: M and P.
        dtype: in which places are computed.
    """

    def __init__(
        self, layout: Layout, heads: int, points: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        def per_column(numbers: Sequence[int], dtype: torch.dtype) -> Tensor:
            per_level = torch.tensor(numbers, dtype=dtype, device=device)
            return per_level.repeat_interleave(points).repeat(heads)

        self.heads, self.samples = heads, len(layout.sizes) * points
        self.height = per_column([height for height, _ in layout.sizes], dtype)
        self.width = per_column([width for _, width in layout.sizes], dtype)
        self.pitch = per_column(layout.pitches, dtype)
        self.half, self.least = torch.tensor([-0.5, -MARGIN], dtype=dtype, device=device)
        head = torch.arange(heads, dtype=torch.int32, device=device).repeat_interleave(self.samples)
        self.first = per_column(layout.origins, torch.int32) * heads + head
        below = per_column(layout.pitches, torch.int32)[: self.samples]
        right = torch.ones_like(below)
        self.steps = [heads * step for step in (0 * below, right, below, below + right)]

    def pixels(self, share: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Shares (B, M·L·P) of a side -> pixel before the place, and how far behind it."""
        place = torch.addcmul(self.half, share, size)
        torch.clamp(place, self.least, size, out=place)
        before = place.floor()
        place -= before
        # A place that is not a number makes a weight that is none, but it must not make an index.
        return before.nan_to_num_(0.0), place

    def look_up(self, locations: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            locations: (B, M·L·P, 2) as in `deformable_attention`.
            rows: (B·M, 4, L·P) int32; the table's rows of the corners are written into it.

        Returns:
            How far every place is right of and below its upper left corner, (B·M, L·P), [0, 1).
        """
        left, x = self.pixels(locations[..., 0], self.width)
        top, y = self.pixels(locations[..., 1], self.height)
        position = left.addcmul_(top, self.pitch).to(torch.int32)
        corner = position.mul_(self.heads).add_(self.first).view(-1, self.samples)
        for i, step in enumerate(self.steps):
            torch.add(corner, step, out=rows[:, i])
        return x.view(-1, self.samples), y.view(-1, self.samples)


def corner_weights(x: Tensor, y: Tensor, attention: Tensor, out: Tensor) -> None:
    """Bilinear weights times attention, (B·M, L·P) each, into `out`, (B·M, 4, L·P)."""
    lower = y * attention
    upper = attention - lower
    for i, side in ((0, upper), (2, lower)):
        torch.mul(side, x, out=out[:, i + 1])
        torch.sub(side, out[:, i + 1], out=out[:, i])


def slope(
    products: Tensor, x: Tensor, y: Tensor, attention: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by attention and by x and y in pixels, (B·M, L·P) each.

    Args:
        products: (B·M, 4, L·P), the scalar products of the corners' rows with the gradient.
        x, y, attention: (B·M, L·P)
    """
    upper_left, upper_right, lower_left, lower_right = products.unbind(1)
    upper, lower = torch.lerp(upper_left, upper_right, x), torch.lerp(lower_left, lower_right, x)
    by_x = torch.lerp(upper_right - upper_left, lower_right - lower_left, y)
    return torch.lerp(upper, lower, y), by_x.mul_(attention), (lower - upper).mul_(attention)


def row_products(rows: Tensor, table: Tensor, gradient: Tensor, scratch: Tensor) -> Tensor:
    """Scalar products of K of a table's rows with the gradient of each of B outputs.

    Args:
        rows: (B, K) int32
        table: (R, D)
        gradient: (B, D)
        scratch: (B, K); the result lies in it.

    Returns:
        (B, K)
    """
    bags, length = rows.shape
    starts = torch.arange(0, bags * length + 1, length, dtype=torch.int32)
    _silence_beta_notice()
    scratch.zero_()  # it is multiplied by 0 and added, which nan and inf would outlive
    pattern = torch.sparse_csr_tensor(
        starts,
        rows.view(-1),
        scratch.view(-1),
        size=(bags, table.shape[0]),
        check_invariants=False,
    )
    torch.sparse.sampled_addmm(pattern, gradient, table.t(), beta=0.0, out=pattern)
    return pattern.values().view(bags, length)


@functools.cache
def _silence_beta_notice() -> None:
    """PyTorch says once in a process that sparse tensors are in beta state: here, unheard."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        torch.zeros(1, 1).to_sparse_csr()


def scatter_rows(rows: Tensor, weights: Tensor, gradient: Tensor, count: int) -> Tensor:
    """The transposed sum: each output's gradient, weighted, onto the K rows that it was made of.

    Args:
        rows: (B, K) int32
        weights: (B, K)
        gradient: (B, D)
        count: rows of the table.

    Returns:
        (count, D)
    """
    # SciPy's product is one pass over the entries; PyTorch's sorts them first, 20 times as slow.
    from scipy.sparse import csc_matrix

    bags, length = rows.shape
    starts = torch.arange(0, bags * length + 1, length, dtype=torch.int32)
    entries = (weights.view(-1).numpy(), rows.view(-1).numpy(), starts.numpy())
    matrix = csc_matrix(entries, shape=(count, bags))
    return torch.from_numpy(matrix @ gradient.contiguous().numpy())


def scatter_rows_sorted(rows: Tensor, weights: Tensor, gradient: Tensor, count: int) -> Tensor:
    """As `scatter_rows`, on any device, always in the same order of summation."""
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
    """What forward and backward share: one image's table, and its blocks of queries.

    Args:
        value: (S, M, D)
        layout, columns: of the table.
        locations: (Q, M, L, P, 2)
        weights: (Q, M, L, P)
    """

    def __init__(
        self, value: Tensor, layout: Layout, columns: Columns, locations: Tensor, weights: Tensor
    ) -> None:
        self.dtype = columns.width.dtype
        self.columns = columns
        self.heads = weights.shape[1]
        self.table = layout.pad(value, self.dtype).flatten(0, 1)
        self.places = locations.flatten(1, 3)
        self.weights = weights.reshape(-1, columns.samples)

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Slices of queries, and the same ones of queries times heads."""
        for start in range(0, len(self.places), QUERIES_AT_ONCE):
            end = min(start + QUERIES_AT_ONCE, len(self.places))
            yield slice(start, end), slice(start * self.heads, end * self.heads)

    def entries(
        self, queries: slice, bags: slice, rows: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A block's rows and weights, (B·M, 4, L·P), are written; x, y and attention come back."""
        x, y = self.columns.look_up(self.places[queries].to(self.dtype), rows)
        attention = self.weights[bags].to(self.dtype)
        corner_weights(x, y, attention, weights)
        return x, y, attention


def sum_of_rows(value: Tensor, sizes: Sequence[Size], locations: Tensor, weights: Tensor) -> Tensor:
    """See `deformable_attention`; the tensors are contiguous."""
    n, _, heads, channels = value.shape
    queries, dtype = locations.shape[1], compute_type(value, locations)
    layout = Layout.of(sizes)
    columns = Columns(layout, heads, locations.shape[4], dtype, value.device)
    shape = (min(queries, QUERIES_AT_ONCE) * heads, CORNERS, columns.samples)
    rows, shares = torch.empty(shape, dtype=torch.int32), torch.empty(shape, dtype=dtype)
    out = value.new_empty((n, queries * heads, channels))
    for i in range(n):
        image = _Image(value[i], layout, columns, locations[i], weights[i])
        for block, bags in image.blocks():
            count = bags.stop - bags.start
            image.entries(block, bags, rows[:count], shares[:count])
            out[i, bags] = F.embedding_bag(
                rows[:count].flatten(1),
                image.table,
                per_sample_weights=shares[:count].flatten(1),
                mode="sum",
            )
    return out.view(n, queries, heads * channels)


def sum_of_rows_backward(
    gradient: Tensor, value: Tensor, sizes: Sequence[Size], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by value, locations and weights.

    Args:
        gradient: (N, Q, M * D)
        value, sizes, locations, weights: as for the forward pass.
    """
    n, _, heads, channels = value.shape
    queries, dtype = locations.shape[1], compute_type(value, locations)
    layout = Layout.of(sizes)
    columns = Columns(layout, heads, locations.shape[4], dtype, value.device)
    shape = (queries * heads, CORNERS, columns.samples)
    rows, shares = torch.empty(shape, dtype=torch.int32), torch.empty(shape, dtype=dtype)
    scratch = torch.empty((min(queries, QUERIES_AT_ONCE) * heads, *shape[1:]), dtype=dtype)
    by_value, by_place, by_weight = map(torch.empty_like, (value, locations, weights))
    for i in range(n):
        image = _Image(value[i], layout, columns, locations[i], weights[i])
        into = gradient[i].reshape(-1, channels).to(dtype)
        for block, bags in image.blocks():
            x, y, attention = image.entries(block, bags, rows[bags], shares[bags])
            products = row_products(
                rows[bags].flatten(1), image.table, into[bags], scratch[: len(x)].flatten(1)
            )
            by_attention, by_x, by_y = slope(products.view_as(rows[bags]), x, y, attention)
            by_weight[i].view(-1, columns.samples)[bags] = by_attention
            place = by_place[i].view(queries, -1, 2)[block]
            place[..., 0] = by_x.view(place.shape[:2]).mul_(columns.width)
            place[..., 1] = by_y.view(place.shape[:2]).mul_(columns.height)
        table = scatter_rows(rows.flatten(1), shares.flatten(1), into, len(image.table))
        layout.crop(table.view(-1, heads, channels), by_value[i])
    return by_value, by_place, by_weight


def scatter_gradient(
    gradient: Tensor, value: Tensor, sizes: Sequence[Size], locations: Tensor, weights: Tensor
) -> Tensor:
    """The gradient by value alone, (N, S, M, D), on any device, in a fixed order of summation."""
    n, _, heads, channels = value.shape
    dtype = compute_type(value, locations)
    layout = Layout.of(sizes)
    columns = Columns(layout, heads, locations.shape[4], dtype, value.device)
    shape = (locations.shape[1] * heads, CORNERS, columns.samples)
    rows = torch.empty(shape, dtype=torch.int32, device=value.device)
    shares = torch.empty(shape, dtype=dtype, device=value.device)
    by_value = torch.empty_like(value, dtype=dtype)
    for i in range(n):
        x, y = columns.look_up(locations[i].flatten(1, 3).to(dtype), rows)
        corner_weights(x, y, weights[i].reshape(-1, columns.samples).to(dtype), shares)
        into = gradient[i].reshape(-1, channels).to(dtype)
        table = scatter_rows_sorted(
            rows.flatten(1), shares.flatten(1), into, layout.positions * heads
        )
        layout.crop(table.view(-1, heads, channels), by_value[i])
    return by_value


deformable_attention_cpu = attention_op(
    "deformable_attention_cpu", sum_of_rows, sum_of_rows_backward
)
