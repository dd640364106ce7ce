"""Reading of label files: where the ids of pixels are stored, and the train ids that they mean.

The pixels of a label file are ids, palette indices or colors, by `LabelFormat`. What a palette file
means depends on its palette, because programs that shrink PNG files exchange gray values or
indices for others with the same color: see `_ids_of_palette`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

from clouds.data.label_space import IGNORE
from clouds.data.reading import read_image, read_stored
from clouds.data.yaml_section import Color
from clouds.messages import format_examples

UInt8Array = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]
RawLabel = npt.NDArray[np.integer]

Channel = Literal["index", "red", "color"]
"""Where a label file stores its ids: 'index': in its only channel, as value or, with a palette, as
index; 'red': in the first of several channels, 8 or 16 bits deep (SYNTHIA); 'color': in the color
of the pixel, by `LabelFormat.colors`."""

MAX_RAW_ID = 65535
"""Ids in label files have up to 16 bits."""

_SAVE_AS_GRAY = "Save the ids as a gray PNG without a palette."


@dataclass(frozen=True)
class LabelMapping:
    """Lookup from the ids in the label files of a dataset ("raw" ids) to train ids.

    Attributes:
        name: name of the ids in messages.
        raw_ids: train id -> the raw ids that are mapped to it, the most typical one first.
        ignore_ids: raw ids that are mapped to `IGNORE`, the most typical one first.

    Raises:
        ValueError: a raw id is not in 0..`MAX_RAW_ID`, or a train id not in 0..254.
    """

    name: str
    raw_ids: Mapping[int, tuple[int, ...]]
    ignore_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        raws = [*self.ignore_ids, *(raw for raws in self.raw_ids.values() for raw in raws)]
        for kind, ids, high in (("raw", raws, MAX_RAW_ID), ("train", self.raw_ids, IGNORE - 1)):
            if outside := [i for i in ids if not 0 <= i <= high]:
                raise ValueError(
                    f"{self.name}: the {kind} ids {format_examples(outside)} are not allowed; "
                    f"allowed are 0 to {high}"
                )

    @cached_property
    def _lut(self) -> UInt8Array:
        lut = np.full(MAX_RAW_ID + 1, IGNORE, np.uint8)
        for train_id, raws in self.raw_ids.items():
            lut[list(raws)] = train_id
        return lut

    @cached_property
    def _unknown(self) -> UInt8Array:
        unknown = np.ones(MAX_RAW_ID + 1, np.uint8)
        for raws in (*self.raw_ids.values(), self.ignore_ids):
            unknown[list(raws)] = 0
        return unknown

    @property
    def classes(self) -> tuple[int, ...]:
        """Train ids of which the dataset has a raw id, ascending."""
        return tuple(sorted(self.raw_ids))

    def apply(self, raw: npt.NDArray[np.integer]) -> UInt8Array:
        """Train ids, uint8 (H, W), of raw ids (H, W) of any integer type.

        `IGNORE` where a raw id is one of `ignore_ids` or undefined.
        """
        if (narrow := _as_unsigned(raw)) is not None:
            return _look_up(narrow, self._lut)
        inside = (raw >= 0) & (raw <= MAX_RAW_ID)
        train_ids = self._lut[np.where(inside, raw, 0)]
        train_ids[~inside] = IGNORE
        return train_ids

    def unknown_ids(self, raw: npt.NDArray[np.integer]) -> tuple[int, ...]:
        """The ids in `raw` (H, W) that the dataset does not define, ascending."""
        if raw.size == 0:
            return ()
        narrow = _as_unsigned(raw)
        # a lookup is much faster than sorting, which is only needed when there are unknown ids
        if narrow is not None and not cv2.countNonZero(_look_up(narrow, self._unknown)):
            return ()
        present = np.unique(raw)
        return tuple(int(i) for i in present if not 0 <= i <= MAX_RAW_ID or self._unknown[i])

    def inverse(self) -> dict[int, int]:
        """One raw id for each train id that the dataset has, and one for `IGNORE`."""
        typical = {train_id: self.raw_ids[train_id][0] for train_id in self.classes}
        return typical | {IGNORE: self.ignore_ids[0]}


def _as_unsigned(raw: npt.NDArray[np.integer]) -> npt.NDArray[np.unsignedinteger] | None:
    """Ids as contiguous uint8 or uint16; None where an id does not fit, or there are none."""
    if raw.dtype not in (np.uint8, np.uint16):
        if raw.size == 0 or raw.min() < 0 or raw.max() > MAX_RAW_ID:
            return None
        return np.ascontiguousarray(raw, np.uint16)
    return np.ascontiguousarray(raw)


def _look_up(ids: npt.NDArray[np.unsignedinteger], lut: UInt8Array) -> UInt8Array:
    """`lut`[ids], uint8, of ids (H, W), uint8 or uint16, and a table of 65536 values."""
    if ids.dtype == np.uint8:
        return np.asarray(cv2.LUT(ids, lut[:256]), np.uint8)
    return np.asarray(lut.take(ids), np.uint8)


@dataclass(frozen=True)
class LabelFormat:
    """How the ids in the label files of a dataset are stored and mapped.

    Attributes:
        suffix: end of the names of these files.
        ids: mapping of the ids.
        channel: where they are stored.
        advice: end of the message about other ids.
        colors: pairs of a raw id and its published color, RGB 0-255. The channel 'color' needs
            them; with 'index' they tell palettes whose order was changed.

    Raises:
        ValueError: a color or its id is not allowed, or with the channel 'color' there are none,
            or ids of different classes have the same color.
    """

    suffix: str
    ids: LabelMapping
    channel: Channel = "index"
    advice: str = "A label that was converted to train ids must be named *_labelTrainIds.png."
    colors: tuple[tuple[int, Color], ...] = ()

    def __post_init__(self) -> None:
        where = f"label format {self.suffix!r}, {self.ids.name}"
        if bad := [c for _, c in self.colors if len(c) != 3 or not all(0 <= v <= 255 for v in c)]:
            raise ValueError(
                f"{where}: the colors {format_examples(bad)} are not allowed; a color is three "
                "numbers from 0 to 255: red, green, blue"
            )
        if unknown := self.ids.unknown_ids(np.array([i for i, _ in self.colors], np.int64)):
            raise ValueError(
                f"{where}: the ids {format_examples(unknown)} have a color, but are not mapped"
            )
        if self.channel != "color":
            return
        if not self.colors:
            raise ValueError(f"{where}: its channel is 'color', so it needs `colors`")
        if shared := [c for c, ids in self.ids_of_color.items() if not self._same_class(ids)]:
            raise ValueError(
                f"{where}: ids of different classes have the color {format_examples(shared)}, so "
                "it does not tell them. Give it to one of them only"
            )

    @cached_property
    def ids_of_color(self) -> dict[Color, tuple[int, ...]]:
        """Color -> the ids with this color, in the order of `colors`."""
        found: dict[Color, tuple[int, ...]] = {}
        for raw_id, color in self.colors:
            found[color] = (*found.get(color, ()), raw_id)
        return found

    def _same_class(self, ids: tuple[int, ...]) -> bool:
        return len(set(self.ids.apply(np.array(ids)).tolist())) == 1

    def id_of_color(self, color: Color) -> int | None:
        """The id of a color; None if none has it, or ids of different classes."""
        ids = self.ids_of_color.get(color, ())
        return ids[0] if ids and self._same_class(ids) else None


def read_train_ids(path: Path, label_format: LabelFormat, dataset: str) -> UInt8Array:
    """Read a label file: train ids, uint8 (H, W), `IGNORE` where a pixel does not count.

    Raises:
        ValueError: the file has ids that `dataset` does not define; or as `read_label`.
    """
    raw = read_label(path, label_format)
    unknown = label_format.ids.unknown_ids(raw)
    if unknown:
        raise ValueError(
            f"{path}: contains the ids {format_examples(unknown, 10)}, which are not among the "
            f"{label_format.ids.name}. Is it a label of {dataset}? {label_format.advice}"
        )
    return label_format.ids.apply(raw)


def read_label(path: Path, label_format: LabelFormat) -> RawLabel:
    """Read the raw ids of a label file.

    Gray values of 1, 2 or 4 bits are ids as they are stored, 0-15, not scaled to 0-255 as for
    display. For palettes see `_ids_of_palette`.

    Args:
        path: file of a lossless format, usually PNG.
        label_format: where its ids are stored.

    Returns:
        (H, W), uint8 or a wider integer type.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, truncated, not an image, perhaps lossy, or its pixels are
            not what `label_format` says; the message names it.
    """
    try:
        if label_format.channel == "color":
            return _ids_of_colors(read_image(path, lossless=True), label_format)
        pixels, palette = read_stored(path)
        if pixels.ndim == 3:
            return _id_channel(pixels, label_format.channel)
        if palette is None or label_format.channel == "red":
            return pixels
        return _ids_of_palette(np.asarray(pixels, np.uint8), palette, label_format)
    except UnclearIdsError as error:
        raise ValueError(f"{path}: {error}") from error


class UnclearIdsError(ValueError):
    """The pixels of a file do not tell their ids; the message does not name the file."""


def _id_channel(channels: RawLabel, channel: Channel) -> RawLabel:
    """The channel (H, W) with the ids of (H, W, C) in the order R, G, B[, A]."""
    red = np.ascontiguousarray(channels[..., 0])
    others = channels[..., 1 : min(3, channels.shape[2])]
    if channel == "index" and not np.array_equal(
        np.broadcast_to(red[..., None], others.shape), others
    ):
        raise UnclearIdsError(
            f"expected one channel of label ids, but this is a color image with "
            f"{channels.shape[2]} channels. It may be the colored version of the label, made for "
            "display; use the file with the ids."
        )
    return red


# ---------------------------------------------------------------------- palettes
def _ids_of_palette(
    indices: UInt8Array, palette: UInt8Array, label_format: LabelFormat
) -> RawLabel:
    """Raw ids (H, W) of palette indices (H, W) and the colors (N, 3) of the palette.

    Ids are stored as indices, with any colors. Programs that shrink PNG files change that: they
    store a gray image with a palette of the gray values in it, and they leave out and reorder the
    entries of palettes. So with a palette of grays that are not 0, 1, 2, …, the gray values are the
    ids. And if the format has published `colors`, and some are found, but not at their index, they
    are the ids; of several ids with the same color, which the index tells only in files that were
    not reordered, there is none.

    Raises:
        UnclearIdsError: more than one reading is possible.
    """
    gray = bool((palette == palette[:, :1]).all())
    if gray and np.array_equal(palette[:, 0], np.arange(len(palette))):
        return indices
    if not gray and not _moved(palette, range(len(palette)), label_format):
        return indices
    used = np.flatnonzero(cv2.calcHist([indices], [0], None, [256], [0, 256]))
    if len(used) and used[-1] >= len(palette):
        raise UnclearIdsError(
            f"a pixel has the palette index {used[-1]}, but the palette has {len(palette)} colors. "
            f"{_SAVE_AS_GRAY}"
        )
    read = _ids_of_grays if gray else _ids_of_palette_colors
    ids = read(palette, used, label_format)
    if np.array_equal(ids, used):
        return indices
    lut = np.zeros(256, np.uint16)
    lut[used] = ids
    return np.asarray(cv2.LUT(indices, lut), np.uint16)


def _moved(palette: UInt8Array, entries: Iterable[int], label_format: LabelFormat) -> list[int]:
    """The entries of a palette whose color is published, but not for the id of their index."""
    known = label_format.ids_of_color
    return [i for i in entries if i not in known.get(_color(palette[i]), (i,))]


def _color(values: UInt8Array) -> Color:
    red, green, blue = values.tolist()
    return red, green, blue


def _ids_of_grays(palette: UInt8Array, used: IntArray, label_format: LabelFormat) -> IntArray:
    """Ids of the used entries of a palette of grays that is not the identity."""
    grays = palette[used, 0].astype(np.int64)
    readings: dict[str, IntArray] = {"gray values": grays}
    length = int(np.flatnonzero(palette[:, 0]).max(initial=0)) + 1  # the rest is padding
    if np.allclose(palette[:length, 0], np.linspace(0, 255, length), rtol=0, atol=1):
        readings["indices, shown as grays from 0 to 255,"] = used
    by_color = [label_format.id_of_color(_color(palette[i])) for i in used]
    if None not in by_color:
        readings["published colors"] = np.array(by_color, np.int64)
    possible = {
        name: label_format.ids.apply(ids).tobytes()
        for name, ids in readings.items()
        if not label_format.ids.unknown_ids(ids)
    }
    if len(set(possible.values())) > 1:
        raise UnclearIdsError(
            f"its palette has only grays, and both its {' and its '.join(possible)} are possible "
            f"ids. {_SAVE_AS_GRAY}"
        )
    return readings[next(iter(possible), "gray values")]


def _ids_of_palette_colors(
    palette: UInt8Array, used: IntArray, label_format: LabelFormat
) -> IntArray:
    """Ids of the used entries of a palette in which a published color is not at its index."""
    moved = _moved(palette, used, label_format)
    if not moved:
        return used
    colors = [_color(palette[i]) for i in used]
    where = f"the color {_color(palette[moved[0]])} of its palette has the index {moved[0]}, " + (
        f"but belongs to id {format_examples(label_format.ids_of_color[_color(palette[moved[0]])])}"
    )
    if foreign := [color for color in colors if color not in label_format.ids_of_color]:
        raise UnclearIdsError(
            f"{where}, and the colors {format_examples(foreign, 3)} to none, so neither indices "
            f"nor colors are surely the ids. {_SAVE_AS_GRAY}"
        )
    # a palette that was reordered by color has each once; others were made for these indices
    last = max(int(used[-1]), *(int(i) for i in np.flatnonzero(palette.any(axis=1))), 0)
    if len(np.unique(palette[: last + 1], axis=0)) < last + 1:
        raise UnclearIdsError(
            f"{where}, and its palette has a color twice, so neither indices nor colors are surely "
            f"the ids. {_SAVE_AS_GRAY}"
        )
    ids = [label_format.id_of_color(color) for color in colors]
    if None in ids:
        shared = colors[ids.index(None)]
        raise UnclearIdsError(
            f"{where}: the order of its palette was changed, and {shared} is the color of the ids "
            f"{format_examples(label_format.ids_of_color[shared])}. Use the original file."
        )
    return np.array(ids, np.int64)


# ---------------------------------------------------------------------- colors
def _ids_of_colors(rgb: UInt8Array, label_format: LabelFormat) -> RawLabel:
    """Raw ids, uint16 (H, W), of an image (H, W, 3) of published colors.

    Raises:
        UnclearIdsError: a pixel has another color.
    """
    codes = _packed(rgb).ravel()
    table = _packed(np.array([list(label_format.ids_of_color)], np.uint8)).ravel()
    ids = np.array([ids[0] for ids in label_format.ids_of_color.values()], np.uint16)
    order = np.argsort(table)
    # neighbours mostly have the same color, so only the first of them is searched
    starts = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]]))
    first = codes[starts]
    found = order[np.searchsorted(table, first, sorter=order).clip(max=len(table) - 1)]
    lengths = np.diff(starts, append=codes.size)
    if len(unknown := np.flatnonzero(table[found] != first)):
        raise UnclearIdsError(_unknown_colors(rgb, starts[unknown], lengths[unknown], label_format))
    return np.repeat(ids[found], lengths).reshape(rgb.shape[:2])


def _packed(rgb: UInt8Array) -> npt.NDArray[np.uint32]:
    """One number (H, W) per color of an image (H, W, 3)."""
    opaque = np.asarray(cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2RGBA), np.uint8)
    return np.asarray(opaque.view(np.uint32)[..., 0])


def _unknown_colors(
    rgb: UInt8Array, starts: IntArray, lengths: IntArray, label_format: LabelFormat
) -> str:
    """The message about runs of pixels of other colors, the most frequent ones first."""
    colors, which = np.unique(rgb.reshape(-1, 3)[starts], axis=0, return_inverse=True)
    counts = np.bincount(which.ravel(), weights=lengths)
    listed = [_color(colors[i]) for i in np.argsort(-counts, kind="stable")]
    share = 100 * lengths.sum() / (rgb.shape[0] * rgb.shape[1])
    allowed = [f"{color} (id {ids[0]})" for color, ids in label_format.ids_of_color.items()]
    return (
        f"{share:.3g} % of its pixels have the colors {format_examples(listed, 3)}, which no id of "
        f"the {label_format.ids.name} has; allowed are {format_examples(allowed, 4)}. Was it "
        "resized with interpolation, or saved with compression? Use the original file."
    )
