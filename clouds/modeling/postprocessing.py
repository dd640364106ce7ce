"""From class and mask predictions to semantic maps and class maps (MaskFormer, section 3.4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clouds.d2 import CfgNode
from clouds.data.datasets import get_dataset
from clouds.data.structures import Domain

Size = tuple[int, int]

STRIPE_ELEMENTS = 1 << 24
"""Scores held at the wanted size at a time, in elements (float32: 64 MiB)."""

CLASS_MAP_CACHE_ELEMENTS = 1 << 18
"""The same on a CPU for each thread: what stays in a core's cache is more than twice as fast."""


def class_map(scores: Tensor, size: Size, *, stripe_elements: int | None = None) -> Tensor:
    """Resize scores bilinearly and take the best class of every pixel.

    The result is that of `F.interpolate(scores[None], size, mode="bilinear",
    align_corners=False)[0].argmax(0)` up to rounding of the scores, but the resized scores exist
    only a stripe of rows at a time: 19 classes of a 6000x4000 image would take 1.8 GB at once.

    Args:
        scores: (C, h, w) of any floating type, C at most 256; computed with in float32.
        size: height and width of the class map, pixels.
        stripe_elements: see `ClassMapBuilder`.

    Returns:
        (height, width) uint8 on the device of `scores`.
    """
    source = (int(scores.shape[1]), int(scores.shape[2]))
    builder = ClassMapBuilder(source, size, scores.device, stripe_elements=stripe_elements)
    builder.add(scores)
    return builder.result


class ClassMapBuilder:
    """What `class_map` does, for scores that come a few rows at a time.

    Pixel centers are at half-integers in both sizes (align_corners False): row y of the result
    lies at (y + 0.5) * h / height - 0.5 of the scores, held inside their first and last row.

    Args:
        source: height and width of the scores.
        size: height and width of the class map, pixels.
        device: of the scores and of the class map.
        stripe_elements: most elements (C x rows x width) of resized scores at a time; a stripe has
            at least a row. None: as suits the device.

    Attributes:
        result: (height, width) uint8; complete once all rows of scores were added.
    """

    def __init__(
        self,
        source: Size,
        size: Size,
        device: torch.device,
        *,
        stripe_elements: int | None = None,
    ) -> None:
        self.source, self.size = source, size
        self.result = torch.empty(size, dtype=torch.uint8, device=device)
        self._elements = stripe_elements or _stripe_elements(device)
        self._received = 0  # rows of scores
        self._finished = 0  # rows of the result
        self._last: Tensor | None = None
        y = torch.arange(size[0], dtype=torch.float32)
        source_y = ((y + 0.5) * (source[0] / size[0]) - 0.5).clamp(0, source[0] - 1)
        # on the CPU, where asking how far one may go makes no device wait
        self._above = source_y.floor().long()
        self._share = source_y - self._above

    def add(self, rows: Tensor) -> None:
        """Take the next rows of scores, (C, n, w) of any floating type, C at most 256."""
        assert rows.shape[0] <= 256, f"a uint8 class map cannot hold {rows.shape[0]} classes"
        first, received = self._received, self._received + int(rows.shape[1])
        assert received <= self.source[0], f"{received} rows of {self.source[0]}"
        if self._last is not None:
            self._classify(torch.cat((self._last, rows[:, :1]), dim=1), first - 1)
        self._classify(rows, first)
        self._received = received
        if self.source[0] != self.size[0] and received < self.source[0]:
            # what lies between this last row and the next one has to wait for it
            self._last = rows[:, -1:].clone()

    def _classify(self, rows: Tensor, first: int) -> None:
        """Finish what follows from `rows`, of which the first is number `first` of all."""
        stretched = self.source[0] != self.size[0]
        start, stop = self._finished, self._within_reach(first + int(rows.shape[1]))
        step = max(1, self._elements // (rows.shape[0] * max(self.size[1], self.source[1])))
        for top in range(start, stop, step):
            bottom = min(top + step, stop)
            if stretched:
                stripe = self._stretched(rows, first, top, bottom)
            else:
                stripe = rows[:, top - first : bottom - first].float()
            if self.source[1] != self.size[1]:
                # one row after the other, as a line: all weights of other rows would be 0
                stripe = F.interpolate(
                    stripe.flatten(0, 1)[None], self.size[1], mode="linear", align_corners=False
                ).view(*stripe.shape[:2], -1)
            # on a CPU several times faster than argmax
            self.result[top:bottom] = stripe.max(0).indices
        self._finished = stop

    def _within_reach(self, received: int) -> int:
        """How many rows of the result follow from so many rows of scores."""
        if received == self.source[0]:
            return self.size[0]
        if self.source[0] == self.size[0]:
            return received
        return int(torch.searchsorted(self._above, received - 1))

    def _stretched(self, rows: Tensor, first: int, top: int, bottom: int) -> Tensor:
        """Rows top..bottom of the scores at the result's height, (C, bottom - top, w) float32.

        Args:
            rows: scores, of which the first row is number `first` of all.
        """
        above = self._above[top:bottom]
        below = (above + 1).clamp(max=self.source[0] - 1)
        above, below, share = (
            part.to(rows.device, non_blocking=True)
            for part in (above - first, below - first, self._share[top:bottom, None])
        )
        return torch.lerp(
            rows.index_select(1, above).float(), rows.index_select(1, below).float(), share
        )


def _stripe_elements(device: torch.device) -> int:
    if device.type != "cpu":
        return STRIPE_ELEMENTS
    return min(STRIPE_ELEMENTS, CLASS_MAP_CACHE_ELEMENTS * torch.get_num_threads())


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


@dataclass(frozen=True)
class EnsembleOptions:
    """What `geometric_ensemble` needs beside logits.

    Attributes:
        seen: per class, whether it occurs in a training dataset.
        alpha, beta: exponents of CLIP's probability for seen and for other classes.
        valid_masks_only: leave queries alone whose mask has no pixel.
    """

    seen: tuple[bool, ...]
    alpha: float
    beta: float
    valid_masks_only: bool = False

    @classmethod
    def from_config(cls, cfg: CfgNode) -> EnsembleOptions:
        """Exponents as configured; seen are the classes of the labelled training datasets."""
        options = cfg.MODEL.CLOUDS
        datasets = [get_dataset(name) for name in cfg.DATASETS.TRAIN]
        labelled = [dataset for dataset in datasets if dataset.domain is not Domain.GENERATED]
        present = {c for dataset in labelled for c in dataset.classes_present}
        seen = tuple(c in present for c in range(cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES))
        return cls(
            seen,
            options.GEOMETRIC_ENSEMBLE_ALPHA,
            options.GEOMETRIC_ENSEMBLE_BETA,
            options.ENSEMBLE_ON_VALID_MASK,
        )


def geometric_ensemble(
    in_vocabulary: Tensor,
    out_of_vocabulary: Tensor,
    seen: Tensor,
    alpha: float,
    beta: float,
    ensembled: Tensor | None = None,
) -> Tensor:
    """Combine what was learned with what CLIP knows, per query and class.

    Args:
        in_vocabulary: the head's class logits (N, Q, C + 1), void last.
        out_of_vocabulary: CLIP's zero-shot logits (N, Q, C + 1), void last.
        seen: bool (C,), the classes that occur in training.
        alpha: exponent of CLIP's probability for seen classes; the head's has 1 - alpha.
        beta: the same for the others.
        ensembled: bool (N, Q), queries to combine; the others keep the head's probabilities, void
            and all. None: every query.

    Returns:
        (N, Q, C + 1) probabilities; void keeps the head's.
    """
    void = in_vocabulary.softmax(-1)[..., -1:]
    exponent = torch.where(seen, alpha, beta)
    if ensembled is not None:
        exponent = exponent * ensembled[..., None]
    # Sums of log-probabilities stay finite where products of probabilities underflow.
    combined = (1 - exponent) * in_vocabulary[..., :-1].log_softmax(-1)
    combined = combined + exponent * out_of_vocabulary[..., :-1].log_softmax(-1)
    return torch.cat((combined.softmax(-1) * (1 - void), void), dim=-1)
