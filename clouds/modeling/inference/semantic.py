"""From the head's predictions to a score for every class and pixel (MaskFormer, section 3.4)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from clouds.modeling.inference.class_map import ClassMapBuilder

Size = tuple[int, int]

CACHE_ELEMENTS = 1 << 20
"""In work on a CPU for each thread (float32: 4 MiB, of which a part is in use at a time)."""

_COPIES = 3
"""Of masks in work: logits with their neighbors, between their rows, between their columns."""


class SemanticMap:
    """Per class and pixel, the sum over the queries of class probability times mask probability.

    Mask logits are stretched bilinearly (align_corners False) to the padded image by a whole
    factor f. Every f-th pixel of a row lies equally far from the two logits beside it, so that
    these pixels, of many rows, are stretched, squashed and summed as long vectors with one weight,
    and only the sums or the classes are sorted into the picture. Masks at full size exist for a
    few rows at a time. No gradient flows.

    Args:
        probabilities: (Q, C), void left out.
        mask_logits: (Q, h, w), of the padded image.
        padded_size: (height, width) of the image that the network saw, multiples of h and w.
        image_size: (height, width) of the picture in its upper left corner.
        masks_at_once: masks and scores in work take no more memory than this many masks of
            `image_size` in float32, or else what a row of logits takes; on a CPU less: what its
            cache holds.
    """

    def __init__(
        self,
        probabilities: Tensor,
        mask_logits: Tensor,
        padded_size: Size,
        image_size: Size,
        masks_at_once: int,
    ) -> None:
        queries, height, width = (int(n) for n in mask_logits.shape)
        assert padded_size[0] % height == 0 and padded_size[1] % width == 0, (
            f"masks of {height}x{width} do not fit an image of {padded_size[0]}x{padded_size[1]}"
        )
        self.image_size = image_size
        self._factors = padded_size[0] // height, padded_size[1] // width
        self._logits = mask_logits.detach()
        self._weights = probabilities.detach().float().T.contiguous()
        # rows and columns of logits that the picture covers
        self._rows, self._columns = (
            -(-n // f) for n, f in zip(image_size, self._factors, strict=True)
        )
        elements = masks_at_once * image_size[0] * image_size[1]
        if mask_logits.device.type == "cpu":
            elements = min(elements, CACHE_ELEMENTS * torch.get_num_threads())
        masks = _COPIES * queries * (self._columns + 2)
        scores = len(self._weights) * self._factors[0] * self._factors[1] * self._columns
        self._step = max(1, (elements - 2 * masks) // (masks + scores))

    def scores(self) -> Tensor:
        """(C, *image_size) float32."""
        scores = self._weights.new_empty(len(self._weights), *self.image_size)
        for band, pieces in self._bands():
            for rows, columns, piece in pieces:
                scores[:, band][:, rows, columns] = piece
        return scores

    def classes(self, size: Size) -> Tensor:
        """The best class of every pixel at `size` (height, width), uint8.

        The class map of `scores` resized bilinearly, which are never in memory together.
        """
        if size == self.image_size:
            return self._classes()
        builder = ClassMapBuilder(self.image_size, size, self._weights.device)
        height, width = self._step * self._factors[0], self.image_size[1]
        scores = self._weights.new_empty(len(self._weights), height, width)
        for band, pieces in self._bands():
            part = scores[:, : band.stop - band.start]
            for rows, columns, piece in pieces:
                part[:, rows, columns] = piece
            builder.add(part)
        return builder.result

    def _classes(self) -> Tensor:
        found = torch.empty(self.image_size, dtype=torch.uint8, device=self._weights.device)
        for band, pieces in self._bands():
            for rows, columns, piece in pieces:
                # on a CPU several times faster than argmax
                found[band][rows, columns] = piece.max(0).indices
        return found

    def _bands(self) -> Iterator[tuple[slice, Iterator[tuple[slice, slice, Tensor]]]]:
        """Bands of the picture from top to bottom: its rows, and its scores in pieces."""
        factor, height = self._factors[0], self.image_size[0]
        for first in range(0, self._rows, self._step):
            last = min(first + self._step, self._rows)
            band = slice(first * factor, min(last * factor, height))
            yield band, self._pieces(first, last, band.stop - band.start)

    def _pieces(self, first: int, last: int, height: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """Scores of the band that the rows first..last of logits make up.

        Args:
            height: of the band, pixels.

        Yields:
            Rows (counted from the band's first) and columns of pixels, and their scores (C, number
            of rows, number of columns), until the next piece takes their place; together every
            pixel of the band once.
        """
        logits = self._with_neighbors(first, last)
        shape = (logits.shape[0], last - first, self._columns)
        masks = logits.new_empty(shape)
        sums = masks.new_empty(len(self._weights), shape[1] * shape[2])
        width = self.image_size[1]
        for y in range(min(self._factors[0], height)):
            level = _between(logits, 1, y, self._factors[0])
            rows = slice(y, height, self._factors[0])
            for x in range(min(self._factors[1], width)):
                _between(level, 2, x, self._factors[1], out=masks).sigmoid_()
                # into a given tensor: autocast would round to half precision otherwise
                torch.mm(self._weights, masks.flatten(1), out=sums)
                columns = slice(x, width, self._factors[1])
                piece = sums.view(-1, *shape[1:])
                yield rows, columns, piece[:, : _length(rows), : _length(columns)]

    def _with_neighbors(self, first: int, last: int) -> Tensor:
        """Rows first..last of logits in float32, with a row and a column more at each side.

        Beyond the edge of the padded image its last row or column comes once more.
        """
        queries, height, width = self._logits.shape
        top, bottom = max(first - 1, 0), min(last + 1, height)
        right = min(self._columns + 1, width)
        band = self._logits.new_empty(
            queries, last - first + 2, self._columns + 2, dtype=torch.float32
        )
        start = top - first + 1
        band[:, start : start + bottom - top, 1 : right + 1] = self._logits[:, top:bottom, :right]
        if top == first:
            band[:, 0] = band[:, 1]
        if bottom == last:
            band[:, -1] = band[:, -2]
        band[..., 0] = band[..., 1]
        if right == self._columns:
            band[..., -1] = band[..., -2]
        return band


def _between(
    values: Tensor, dim: int, phase: int, factor: int, out: Tensor | None = None
) -> Tensor:
    """Pixel number `phase` of the `factor` pixels of every value along `dim`.

    Args:
        values: along `dim` with a neighbor more at each end.
        out: takes the result.
    """
    count = values.shape[dim] - 2
    offset = (phase + 0.5) / factor - 0.5  # from the value's center, in -0.5..0.5
    start, share = (0, 1 + offset) if offset < 0 else (1, offset)
    one, next_one = (values.narrow(dim, start + i, count) for i in (0, 1))
    return torch.lerp(one, next_one, share, out=out)


def _length(taken: slice) -> int:
    return len(range(taken.start, taken.stop, taken.step))
