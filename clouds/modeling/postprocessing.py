"""From class and mask predictions to semantic maps and class maps (MaskFormer, section 3.4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clouds.d2 import CfgNode
from clouds.data.datasets import Datasets
from clouds.modeling.backbone.base import TextEncoder
from clouds.modeling.text_classifier import TextEmbeddings
from clouds.modeling.transformer_decoder.decoder import Predictions
from clouds.self_training.pseudo_labeler import confidence_of

Size = tuple[int, int]
"""Height and width, pixels."""

SEMANTIC_MAP_CACHE_ELEMENTS = 1 << 20
"""Elements of masks and scores that `SemanticMap` computes at a time, per thread of a CPU.

In float32 4 MiB, of which a part is in use at a time.
"""

MASK_BUFFERS = 3
"""Buffers of masks in `SemanticMap`: logits with neighbors, interpolated rows, and columns."""

STRIPE_ELEMENTS = 1 << 24
"""Elements (C x rows x width) of resized scores that `ClassMapBuilder` computes at a time, at least
one row (float32: 64 MiB)."""

CLASS_MAP_CACHE_ELEMENTS = 1 << 18
"""The same per thread of a CPU: what fits into a core's cache is more than twice as fast."""


class SemanticMap:
    """Per class and pixel, the sum over the queries of class probability times mask probability.

    Mask logits are resized bilinearly (align_corners False) to the padded image by an integer
    factor f. Every f-th pixel of a row has the same interpolation weights. So all these pixels of
    many rows are interpolated, passed through the sigmoid and summed as one long vector, and only
    the sums or the classes are written to their positions in the image. Masks at full size exist
    for a few rows at a time. No gradient flows.

    Args:
        probabilities: (Q, C), without no_object.
        mask_logits: (Q, h, w), of the padded image.
        padded_size: of the network's input, multiples of h and w.
        image_size: of the image in the upper left corner of the padded image.
        masks_at_once: masks and scores in memory take at most as much as this many masks of
            `image_size` in float32, or what one row of logits takes if that is more; on a CPU
            at most what fits into its cache.
    """

    def __init__(
        self,
        probabilities: Tensor,
        mask_logits: Tensor,
        padded_size: Size,
        image_size: Size,
        masks_at_once: int,
    ) -> None:
        num_queries, height, width = (int(n) for n in mask_logits.shape)
        assert padded_size[0] % height == 0 and padded_size[1] % width == 0, (
            f"masks of {height}x{width} do not fit an image of {padded_size[0]}x{padded_size[1]}"
        )
        self.image_size, self.padded_size = image_size, padded_size
        self._masks_at_once = masks_at_once
        self._factors = padded_size[0] // height, padded_size[1] // width
        self._logits = mask_logits.detach()
        self._probabilities = probabilities.detach().float().T.contiguous()  # (C, Q)
        # rows and columns of logits that the image covers
        self._rows, self._columns = (
            -(-n // f) for n, f in zip(image_size, self._factors, strict=True)
        )
        elements = masks_at_once * image_size[0] * image_size[1]
        if mask_logits.device.type == "cpu":
            elements = min(elements, SEMANTIC_MAP_CACHE_ELEMENTS * torch.get_num_threads())
        masks = MASK_BUFFERS * num_queries * (self._columns + 2)
        scores = len(self._probabilities) * self._factors[0] * self._factors[1] * self._columns
        self._rows_per_band = max(1, (elements - 2 * masks) // (masks + scores))

    def check_finite(self, name: str) -> None:
        """Raise ValueError, naming the image, if a score is not finite; waits for the device."""
        if not self._probabilities.isfinite().all() & self._logits.isfinite().all():
            raise ValueError(
                f"{name}: the model's scores are not finite, so there is no class map. If its "
                "weights diverged, use an earlier checkpoint; with SOLVER.AMP.DTYPE fp16 they may "
                "exceed its range: use bf16, or SOLVER.AMP.ENABLED False."
            )

    def query_confidence(self) -> Tensor:
        """(), mean over the queries of the largest class probability, of no object, too."""
        no_object = 1 - self._probabilities.sum(0)
        return torch.maximum(self._probabilities.amax(0), no_object).mean()

    def scores(self) -> Tensor:
        """(C, *image_size) float32."""
        scores = self._probabilities.new_empty(len(self._probabilities), *self.image_size)
        for band, pieces in self._bands():
            for rows, columns, piece in pieces:
                scores[:, band][:, rows, columns] = piece
        return scores

    def resized_scores(self, size: Size) -> Tensor:
        """`scores`, resized bilinearly: float32 (C, height, width)."""
        return resize_scores(self.scores(), size)

    def cpu(self) -> SemanticMap:
        """A copy in the host's memory, without the rest of the batch: Q x h x w mask logits."""
        logits = self._logits.to("cpu", copy=True)
        sizes = self.padded_size, self.image_size
        return SemanticMap(self._probabilities.T.cpu(), logits, *sizes, self._masks_at_once)

    def classes(self, size: Size) -> Tensor:
        """The class of the largest score of each pixel at `size`, uint8 (height, width).

        Scores of another size are resized bilinearly; they are never in memory all together.
        """
        return self._classify(size, None)

    def classes_and_confidence(self, size: Size) -> tuple[Tensor, Tensor]:
        """`classes`, and their confidence (`label_from_scores`), float32 (height, width)."""
        confidence = self._probabilities.new_empty(size)
        return self._classify(size, confidence), confidence

    def _classify(self, size: Size, confidence: Tensor | None) -> Tensor:
        """`classes`; their confidence is written to `confidence`, if it is wanted."""
        if size == self.image_size:
            return self._classify_unresized(confidence)
        device = self._probabilities.device
        builder = ClassMapBuilder(self.image_size, size, device, confidence)
        height, width = self._rows_per_band * self._factors[0], self.image_size[1]
        buffer = self._probabilities.new_empty(len(self._probabilities), height, width)
        for band, pieces in self._bands():
            scores = buffer[:, : band.stop - band.start]
            for rows, columns, piece in pieces:
                scores[:, rows, columns] = piece
            builder.add(scores)
        return builder.result

    def _classify_unresized(self, confidence: Tensor | None) -> Tensor:
        """`_classify` at the size of the image."""
        classes = torch.empty(self.image_size, dtype=torch.uint8, device=self._probabilities.device)
        for band, pieces in self._bands():
            for rows, columns, piece in pieces:
                best = piece.max(0)  # on a CPU several times as fast as argmax
                classes[band][rows, columns] = best.indices
                if confidence is not None:
                    confidence[band][rows, columns] = confidence_of(best.values, piece)
        return classes

    def _bands(self) -> Iterator[tuple[slice, Iterator[tuple[slice, slice, Tensor]]]]:
        """Bands of the image from top to bottom: the rows of each, and its scores in pieces."""
        factor, height = self._factors[0], self.image_size[0]
        for first in range(0, self._rows, self._rows_per_band):
            last = min(first + self._rows_per_band, self._rows)
            band = slice(first * factor, min(last * factor, height))
            yield band, self._pieces(first, last, band.stop - band.start)

    def _pieces(self, first: int, last: int, height: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """Scores of the band, `height` pixels high, of the rows first..last of logits.

        Yields rows (relative to the band) and columns of pixels, and their scores (C, number of
        rows, number of columns), valid until the next piece; each pixel of the band once.
        """
        logits = self._with_neighbors(first, last)
        shape = (logits.shape[0], last - first, self._columns)
        masks = logits.new_empty(shape)
        sums = masks.new_empty(len(self._probabilities), shape[1] * shape[2])
        width = self.image_size[1]
        for y in range(min(self._factors[0], height)):
            at_rows = _interpolate_phase(logits, 1, y, self._factors[0])
            rows = slice(y, height, self._factors[0])
            for x in range(min(self._factors[1], width)):
                _interpolate_phase(at_rows, 2, x, self._factors[1], out=masks).sigmoid_()
                # with `out`: autocast would round to half precision otherwise
                torch.mm(self._probabilities, masks.flatten(1), out=sums)
                columns = slice(x, width, self._factors[1])
                piece = sums.view(-1, *shape[1:])
                yield rows, columns, piece[:, : _length(rows), : _length(columns)]

    def _with_neighbors(self, first: int, last: int) -> Tensor:
        """Rows first..last of logits in float32, with one more row or column on each side.

        At the edge of the padded image its outermost row or column is repeated.
        """
        num_queries, height, width = self._logits.shape
        top, bottom = max(first - 1, 0), min(last + 1, height)
        right = min(self._columns + 1, width)
        band = self._logits.new_empty(
            num_queries, last - first + 2, self._columns + 2, dtype=torch.float32
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


def _interpolate_phase(
    values: Tensor, dim: int, phase: int, factor: int, out: Tensor | None = None
) -> Tensor:
    """Pixel `phase` of the `factor` pixels of every value but the first and last along `dim`."""
    count = values.shape[dim] - 2
    offset = (phase + 0.5) / factor - 0.5  # from the value's center, in -0.5..0.5
    start, fraction = (0, 1 + offset) if offset < 0 else (1, offset)
    before, after = (values.narrow(dim, start + i, count) for i in (0, 1))
    return torch.lerp(before, after, fraction, out=out)


def _length(indices: slice) -> int:
    return len(range(indices.start, indices.stop, indices.step))


def resize_scores(scores: Tensor, size: Size) -> Tensor:
    """Scores (C, h, w), resized bilinearly to `size`: (C, height, width)."""
    return F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0]


def class_map(scores: Tensor, size: Size) -> Tensor:
    """Resize scores bilinearly and take the class of the largest score of each pixel.

    The result is that of `F.interpolate(scores[None], size, mode="bilinear",
    align_corners=False)[0].argmax(0)` up to rounding of the scores, but the resized scores exist
    only for a stripe of rows at a time: 19 classes of a 6000x4000 image would take 1.8 GB.

    Args:
        scores: (C, h, w) of any floating type, C at most 256; computed in float32.
        size: height and width of the class map, pixels.

    Returns:
        (height, width) uint8 on the device of `scores`.
    """
    builder = ClassMapBuilder((int(scores.shape[1]), int(scores.shape[2])), size, scores.device)
    builder.add(scores)
    return builder.result


def class_map_with_confidence(scores: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """`class_map`, and the confidence of its classes (`confidence_of`), float32 (height, width)."""
    confidence = torch.empty(size, dtype=torch.float32, device=scores.device)
    source = (int(scores.shape[1]), int(scores.shape[2]))
    builder = ClassMapBuilder(source, size, scores.device, confidence)
    builder.add(scores)
    return builder.result, confidence


class ClassMapBuilder:
    """`class_map` of scores that are added a few rows at a time.

    Pixel centers are at half-integers in both sizes (align_corners False): row y of the result
    is at (y + 0.5) * h / height - 0.5 of the scores, clamped to their first and last row.

    Args:
        source: height and width of the scores.
        size: height and width of the class map, pixels.
        device: of the scores and of the class map.
        confidence: float32 (height, width), where the confidence of the classes is written; None:
            it is not computed.

    Attributes:
        result: (height, width) uint8; complete once all rows of scores were added.
    """

    def __init__(
        self, source: Size, size: Size, device: torch.device, confidence: Tensor | None = None
    ) -> None:
        self.source, self.size, self._confidence = source, size, confidence
        self.result = torch.empty(size, dtype=torch.uint8, device=device)
        self._stripe_elements = STRIPE_ELEMENTS
        if device.type == "cpu":
            elements = CLASS_MAP_CACHE_ELEMENTS * torch.get_num_threads()
            self._stripe_elements = min(STRIPE_ELEMENTS, elements)
        self._received = 0  # rows of scores
        self._finished = 0  # rows of the result
        self._last_row: Tensor | None = None
        y = torch.arange(size[0], dtype=torch.float32)
        source_y = ((y + 0.5) * (source[0] / size[0]) - 0.5).clamp(0, source[0] - 1)
        # on the CPU, where reading a value makes no device wait
        self._row_above = source_y.floor().long()
        self._fraction = source_y - self._row_above

    def add(self, rows: Tensor) -> None:
        """Add the next rows of scores, (C, n, w) of any floating type, C at most 256."""
        assert rows.shape[0] <= 256, f"a uint8 class map cannot hold {rows.shape[0]} classes"
        first, received = self._received, self._received + int(rows.shape[1])
        assert received <= self.source[0], f"{received} rows of {self.source[0]}"
        if self._last_row is not None:
            self._classify(torch.cat((self._last_row, rows[:, :1]), dim=1), first - 1)
        self._classify(rows, first)
        self._received = received
        if self.source[0] != self.size[0] and received < self.source[0]:
            # rows of the result between this row and the next one need both
            self._last_row = rows[:, -1:].clone()

    def _classify(self, rows: Tensor, first: int) -> None:
        """Compute the rows of the result that `rows`, beginning with row `first`, determine."""
        start, stop = self._finished, self._num_computable(first + int(rows.shape[1]))
        row_elements = rows.shape[0] * max(self.size[1], self.source[1])
        step = max(1, self._stripe_elements // row_elements)
        for top in range(start, stop, step):
            bottom = min(top + step, stop)
            if self.source[0] != self.size[0]:
                stripe = self._resize_rows(rows, first, top, bottom)
            else:
                stripe = rows[:, top - first : bottom - first].float()
            if self.source[1] != self.size[1]:
                # as one-dimensional signals: no weights of other rows, which would be 0
                stripe = F.interpolate(
                    stripe.flatten(0, 1)[None], self.size[1], mode="linear", align_corners=False
                ).view(*stripe.shape[:2], -1)
            best = stripe.max(0)  # on a CPU several times as fast as argmax
            self.result[top:bottom] = best.indices
            if self._confidence is not None:
                self._confidence[top:bottom] = confidence_of(best.values, stripe)
        self._finished = stop

    def _num_computable(self, received: int) -> int:
        """Number of rows of the result that the first `received` rows of scores determine."""
        if received == self.source[0]:
            return self.size[0]
        if self.source[0] == self.size[0]:
            return received
        return int(torch.searchsorted(self._row_above, received - 1))

    def _resize_rows(self, rows: Tensor, first: int, top: int, bottom: int) -> Tensor:
        """Rows top..bottom of the scores at the result's height, (C, bottom - top, w) float32."""
        above = self._row_above[top:bottom]
        below = (above + 1).clamp(max=self.source[0] - 1)
        above, below, fraction = (
            index.to(rows.device, non_blocking=True)
            for index in (above - first, below - first, self._fraction[top:bottom, None])
        )
        return torch.lerp(
            rows.index_select(1, above).float(), rows.index_select(1, below).float(), fraction
        )


@dataclass(frozen=True)
class EnsembleOptions:
    """Options of `geometric_ensemble`.

    Attributes:
        seen: per class, whether it occurs in a training dataset.
        alpha, beta: exponents of CLIP's probability for seen and for other classes.
        valid_masks_only: do not ensemble queries whose mask is empty.
    """

    seen: tuple[bool, ...]
    alpha: float
    beta: float
    valid_masks_only: bool = False

    @classmethod
    def from_config(cls, cfg: CfgNode) -> EnsembleOptions:
        """From MODEL.CLOUDS; seen are the classes of the labelled datasets of DATASETS.TRAIN."""
        options = cfg.MODEL.CLOUDS
        datasets = Datasets.from_config(cfg)
        present = {c for name in datasets.labelled for c in datasets.get(name).classes_present}
        seen = tuple(c in present for c in range(cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES))
        exponents = options.GEOMETRIC_ENSEMBLE_ALPHA, options.GEOMETRIC_ENSEMBLE_BETA
        return cls(seen, *exponents, options.ENSEMBLE_ON_VALID_MASK)


def ensemble_probabilities(
    encoder: nn.Module,
    features: Mapping[str, Tensor],
    predictions: Predictions,
    text: TextEmbeddings,
    options: EnsembleOptions,
) -> Tensor:
    """Class probabilities (N, Q, C + 1), averaged with zero-shot ones, no_object last.

    Args:
        encoder: the backbone, a `TextEncoder`.
        features: its output.
        predictions: the last one is used.
        text: embeddings of the classes.
        options: exponents, and which queries are averaged.
    """
    class_logits, mask_logits = predictions.final
    assert isinstance(encoder, TextEncoder), "checked when the model is built"
    embeddings, has_pixels = encoder.embed_masks(features, mask_logits)
    zero_shot = text.logits(embeddings, encoder.logit_scale)
    return geometric_ensemble(
        class_logits.float(),
        zero_shot.float(),
        torch.tensor(options.seen, device=class_logits.device),
        options.alpha,
        options.beta,
        has_pixels if options.valid_masks_only else None,
    )


def geometric_ensemble(
    in_vocabulary: Tensor,
    out_of_vocabulary: Tensor,
    seen: Tensor,
    alpha: float,
    beta: float,
    ensembled: Tensor | None = None,
) -> Tensor:
    """Weighted geometric mean of the head's and CLIP's class probabilities, as in FC-CLIP.

    Args:
        in_vocabulary: the head's class logits (N, Q, C + 1), no_object last.
        out_of_vocabulary: CLIP's zero-shot logits (N, Q, C + 1), no_object last.
        seen: bool (C,), the classes that occur in training.
        alpha, beta: see `EnsembleOptions`; the head's exponents are 1 - alpha and 1 - beta.
        ensembled: bool (N, Q), the queries to ensemble; the others keep the head's probabilities,
            that of no_object included. None: every query.

    Returns:
        (N, Q, C + 1) probabilities; that of no_object is the head's.
    """
    no_object = in_vocabulary.softmax(-1)[..., -1:]
    exponent = torch.where(seen, alpha, beta)
    if ensembled is not None:
        exponent = exponent * ensembled[..., None]
    # Sums of log-probabilities stay finite where products of probabilities underflow.
    log_mean = (1 - exponent) * in_vocabulary[..., :-1].log_softmax(-1)
    log_mean = log_mean + exponent * out_of_vocabulary[..., :-1].log_softmax(-1)
    return torch.cat((log_mean.softmax(-1) * (1 - no_object), no_object), dim=-1)
