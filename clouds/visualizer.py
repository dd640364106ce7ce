"""Panels to look at: pictures side by side, captioned, with a legend of the classes in them.

Pictures are (H, W, 3) uint8 RGB in and out; label maps are (H, W) uint8 train ids and are painted
with the palette of `clouds.data.label_space`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from clouds.data.label_space import CITYSCAPES_19, IGNORE

UInt8Array = npt.NDArray[np.uint8]

_MARGIN = 12
_SWATCH = 14
_CAPTION_HEIGHT = 22
_TITLE_HEIGHT = 26
_LEGEND_ROW = 22
_PAPER = (255, 255, 255)
_INK = (32, 33, 36)
_FAINT = (128, 134, 139)


@dataclass(frozen=True)
class Tile:
    """One picture of a panel.

    Attributes:
        caption: one short line that stands over it.
        picture: (H, W, 3) uint8 RGB.
    """

    caption: str
    picture: UInt8Array


def compare(
    image: UInt8Array,
    label: UInt8Array | None,
    prediction: UInt8Array,
    *,
    title: str = "",
    tile_width: int = 480,
) -> UInt8Array:
    """Panel of an image, its label and its prediction, over a legend of their classes.

    Args:
        image: (H, W, 3) RGB.
        label: (H', W') train ids, 255 where ignored (black); None: no such tile.
        prediction: (H', W') train ids.
        title: line above everything, such as the dataset and file.
        tile_width: of each picture in the panel, pixels.

    Returns:
        (height, width, 3) RGB; the same arguments give the same panel.
    """
    height = max(1, round(tile_width * image.shape[0] / image.shape[1]))
    maps = {} if label is None else {"label": label}
    maps["prediction"] = prediction
    # label maps are shrunk before they are painted: colors must not be averaged
    tiles = [Tile("image", image)]
    for name, classes in maps.items():
        small = _fit(classes, height, tile_width, cv2.INTER_NEAREST)
        tiles.append(Tile(name, CITYSCAPES_19.colorize(small)))
    present = np.unique(np.concatenate([np.unique(classes) for classes in maps.values()]))
    return side_by_side(tiles, title=title, legend=present.tolist(), tile_width=tile_width)


def side_by_side(
    tiles: Sequence[Tile],
    *,
    title: str = "",
    legend: Sequence[int] = (),
    tile_width: int = 480,
) -> UInt8Array:
    """Pictures in a row, each under its caption.

    Args:
        tiles: at least one; they may differ in size and are scaled to `tile_width`.
        title: line above everything; empty: none.
        legend: train ids whose names and colors are listed below; 255 stands for "ignored".
        tile_width: of each picture in the panel, pixels.

    Returns:
        (height, width, 3) RGB, width = tiles x (tile_width + margin) + margin.
    """
    pictures = [_fit_width(tile.picture, tile_width) for tile in tiles]
    width = len(tiles) * (tile_width + _MARGIN) + _MARGIN
    font = _font(15)
    rows = _legend_rows(legend, width - 2 * _MARGIN, font)
    top = _MARGIN + (_TITLE_HEIGHT if title else 0)
    pictures_top = top + _CAPTION_HEIGHT
    legend_top = pictures_top + max(picture.shape[0] for picture in pictures) + _MARGIN
    height = legend_top + len(rows) * _LEGEND_ROW + (_MARGIN // 2 if rows else 0)

    panel = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(panel)
    if title:
        large = _font(17)
        draw.text((_MARGIN, _MARGIN), _shorten(title, width - 2 * _MARGIN, large), _INK, large)
    for i, (tile, picture) in enumerate(zip(tiles, pictures, strict=True)):
        left = _MARGIN + i * (tile_width + _MARGIN)
        draw.text((left, top), _shorten(tile.caption, tile_width, font), _FAINT, font)
        panel.paste(Image.fromarray(picture), (left, pictures_top))
    for i, row in enumerate(rows):
        _draw_legend_row(draw, row, legend_top + i * _LEGEND_ROW, font)
    return np.asarray(panel)


def mark_points(
    picture: UInt8Array, points: npt.NDArray[np.float32], radius: int = 2
) -> UInt8Array:
    """A copy of a picture (H, W, 3) with a ringed dot at each point (M, 2), (x, y) pixels."""
    marked: UInt8Array = np.ascontiguousarray(picture).copy()
    for x, y in np.rint(points).astype(int).tolist():
        cv2.circle(marked, (x, y), radius + 1, _INK, cv2.FILLED, cv2.LINE_AA)
        cv2.circle(marked, (x, y), radius, (255, 214, 0), cv2.FILLED, cv2.LINE_AA)
    return marked


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font: the same on every machine."""
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size))


def _fit(picture: UInt8Array, height: int, width: int, interpolation: int) -> UInt8Array:
    if picture.shape[:2] == (height, width):
        return picture
    return np.asarray(cv2.resize(picture, (width, height), interpolation=interpolation), np.uint8)


def _fit_width(picture: UInt8Array, width: int) -> UInt8Array:
    if picture.shape[1] == width:
        return picture
    height = max(1, round(width * picture.shape[0] / picture.shape[1]))
    shrinks = width < picture.shape[1]
    return _fit(picture, height, width, cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _shorten(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """Cut `text` in the middle, so that it is at most `width` pixels wide."""
    kept = len(text)
    short = text
    while font.getlength(short) > width and kept > 2:
        kept -= 1
        short = text[: (kept + 1) // 2] + "…" + text[len(text) - kept // 2 :]
    return short


@dataclass(frozen=True)
class _Entry:
    left: int
    name: str
    color: tuple[int, int, int]


def _legend_rows(
    classes: Sequence[int], width: int, font: ImageFont.FreeTypeFont
) -> list[list[_Entry]]:
    """Legend entries from left to right, as many in a row as fit."""
    rows: list[list[_Entry]] = []
    left = width + 1
    for train_id in classes:
        if train_id == IGNORE:
            name, color = "ignored", (0, 0, 0)
        else:
            name, color = CITYSCAPES_19.names[train_id], CITYSCAPES_19.colors[train_id]
        entry_width = _SWATCH + 6 + int(font.getlength(name)) + 16
        if left + entry_width - 16 > width:
            rows.append([])
            left = 0
        rows[-1].append(_Entry(_MARGIN + left, name, color))
        left += entry_width
    return rows


def _draw_legend_row(
    draw: ImageDraw.ImageDraw, row: list[_Entry], top: int, font: ImageFont.FreeTypeFont
) -> None:
    for entry in row:
        right, bottom = entry.left + _SWATCH, top + 2 + _SWATCH
        draw.rounded_rectangle((entry.left, top + 2, right, bottom), 3, entry.color)
        draw.text((right + 6, top), entry.name, _INK, font)
