"""From class scores to a class map of another size, in bounded memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]

STRIPE_ELEMENTS = 1 << 24
"""Scores held at the wanted size at a time, in elements (float32: 64 MiB)."""

CACHE_ELEMENTS = 1 << 18
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
    return min(STRIPE_ELEMENTS, CACHE_ELEMENTS * torch.get_num_threads())
