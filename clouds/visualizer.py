"""Panels: captioned images side by side, above a legend of the classes in them.

Images are (H, W, 3) uint8 RGB. Label maps are (H, W) uint8 train ids and are drawn in the colors
of a label space.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from clouds.data.label_space import LabelSpace

UInt8Array = npt.NDArray[np.uint8]
Color = tuple[int, int, int]

_MARGIN = 12
_SWATCH = 14
_CAPTION_HEIGHT = 22
_TITLE_HEIGHT = 26
_LEGEND_ROW = 22
_LEGEND_FONT = 15  # to which _SWATCH and _LEGEND_ROW belong
_MIN_FONT = 13
_MIN_LEGEND_WIDTH = 240
_WHITE: Color = (255, 255, 255)
_BLACK: Color = (0, 0, 0)
_DARK_GRAY: Color = (32, 33, 36)
_GRAY: Color = (128, 134, 139)
_YELLOW: Color = (255, 214, 0)


class Tile(NamedTuple):
    """One image of a panel, (H, W, 3) uint8 RGB, and the line drawn above it."""

    caption: str
    image: UInt8Array


class LegendEntry(NamedTuple):
    """Name and color of a class in a legend."""

    name: str
    color: Color


def legend_of(label_space: LabelSpace, train_ids: Iterable[int]) -> list[LegendEntry]:
    """Legend entries of classes; `label_space.ignore` is listed as "ignored" in black."""
    return [
        LegendEntry("ignored", _BLACK)
        if train_id == label_space.ignore
        else LegendEntry(label_space.names[train_id], label_space.colors[train_id])
        for train_id in train_ids
    ]


def present_ids(label_maps: Iterable[UInt8Array]) -> list[int]:
    """The train ids that occur in any of the label maps (H, W), ascending."""
    return sorted(set().union(*(np.unique(label).tolist() for label in label_maps)))


def compare(
    image: UInt8Array,
    label: UInt8Array | None,
    prediction: UInt8Array,
    label_space: LabelSpace,
    *,
    title: str = "",
    tile_width: int = 480,
) -> UInt8Array:
    """Panel of an image, its label and its prediction, above a legend of their classes.

    Args:
        image: (H, W, 3) RGB.
        label: (H', W') train ids; ignored pixels are black. None: no label is drawn.
        prediction: (H', W') train ids.
        label_space: names and colors of the classes in `label` and `prediction`.
        title, tile_width: see `side_by_side`.

    Returns:
        (height, width, 3) RGB; the same arguments give the same panel.
    """
    height = max(1, round(tile_width * image.shape[0] / image.shape[1]))
    label_maps = {} if label is None else {"label": label}
    label_maps["prediction"] = prediction
    # label maps are resized before they are colored: colors must not be averaged
    tiles = [Tile("image", image)]
    for caption, label_map in label_maps.items():
        resized = _resize(label_map, height, tile_width, cv2.INTER_NEAREST)
        tiles.append(Tile(caption, label_space.colorize(resized)))
    legend = legend_of(label_space, present_ids(label_maps.values()))
    return side_by_side(tiles, title=title, legend=legend, tile_width=tile_width)


def side_by_side(
    tiles: Sequence[Tile],
    *,
    title: str = "",
    legend: Sequence[LegendEntry] = (),
    tile_width: int = 480,
) -> UInt8Array:
    """Panel of images in a row, each below its caption.

    Args:
        tiles: at least one; their sizes may differ, each is resized to `tile_width`.
        title: first line of the panel; empty: none.
        legend: classes listed below the images.
        tile_width: width of each image in the panel, pixels.

    Returns:
        (height, width, 3) RGB, width = number of tiles x (tile_width + margin) + margin.
    """
    images = [_resize_to_width(tile.image, tile_width) for tile in tiles]
    width = len(tiles) * (tile_width + _MARGIN) + _MARGIN
    font = _font(15)
    rows = _legend_rows(legend, width - 2 * _MARGIN, font)
    caption_top = _MARGIN + (_TITLE_HEIGHT if title else 0)
    image_top = caption_top + _CAPTION_HEIGHT
    legend_top = image_top + max(image.shape[0] for image in images) + _MARGIN
    height = legend_top + len(rows) * _LEGEND_ROW + (_MARGIN // 2 if rows else 0)

    panel = Image.new("RGB", (width, height), _WHITE)
    draw = ImageDraw.Draw(panel)
    if title:
        large = _font(17)
        text = _shorten(title, width - 2 * _MARGIN, large)
        draw.text((_MARGIN, _MARGIN), text, _DARK_GRAY, large)
    for i, (tile, image) in enumerate(zip(tiles, images, strict=True)):
        left = _MARGIN + i * (tile_width + _MARGIN)
        draw.text((left, caption_top), _shorten(tile.caption, tile_width, font), _GRAY, font)
        panel.paste(Image.fromarray(image), (left, image_top))
    for i, row in enumerate(rows):
        _draw_legend_row(draw, row, legend_top + i * _LEGEND_ROW, font)
    return np.asarray(panel)


def overlay(
    image: UInt8Array, label: UInt8Array, label_space: LabelSpace, alpha: float
) -> UInt8Array:
    """Blend an image (H, W, 3) with the colors of a label map (H, W).

    Args:
        alpha: weight of the colors, in [0, 1]; 0: the image alone, 1: the colors alone.
    """
    blended = cv2.addWeighted(label_space.colorize(label), alpha, image, 1 - alpha, 0)
    return np.asarray(blended, np.uint8)


def with_legend(image: UInt8Array, legend: Sequence[LegendEntry]) -> UInt8Array:
    """An image (H, W, 3), at its own size, above a legend on white.

    The letters grow with the image, so that they are legible when a large one is shown smaller.

    Returns:
        (height, width, 3) RGB with the image in the upper left corner; a narrow image is padded
        at the right to _MIN_LEGEND_WIDTH pixels. The size depends on that of the image and on the
        legend alone.
    """
    height, width = image.shape[:2]
    font = _font(max(_MIN_FONT, round((height * width) ** 0.5 / 45)))
    total = max(width, _MIN_LEGEND_WIDTH)
    margin = _scaled(_MARGIN, font)
    rows = _legend_rows(legend, total - 2 * margin, font)
    legend_height = len(rows) * _scaled(_LEGEND_ROW, font) + margin if rows else 0
    panel = Image.new("RGB", (total, height + legend_height), _WHITE)
    panel.paste(Image.fromarray(image), (0, 0))
    draw = ImageDraw.Draw(panel)
    for i, row in enumerate(rows):
        _draw_legend_row(draw, row, height + margin // 2 + i * _scaled(_LEGEND_ROW, font), font)
    return np.asarray(panel)


def draw_points(image: UInt8Array, points: npt.NDArray[np.float32], radius: int = 2) -> UInt8Array:
    """A copy of an image (H, W, 3) with a yellow dot at each point (M, 2), (x, y) in pixels."""
    drawn: UInt8Array = np.ascontiguousarray(image).copy()
    for x, y in np.rint(points).astype(int).tolist():
        cv2.circle(drawn, (x, y), radius + 1, _DARK_GRAY, cv2.FILLED, cv2.LINE_AA)
        cv2.circle(drawn, (x, y), radius, _YELLOW, cv2.FILLED, cv2.LINE_AA)
    return drawn


def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font that Pillow ships, which does not depend on the system."""
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size))


def _resize(image: UInt8Array, height: int, width: int, interpolation: int) -> UInt8Array:
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(cv2.resize(image, (width, height), interpolation=interpolation), np.uint8)


def _resize_to_width(image: UInt8Array, width: int) -> UInt8Array:
    if image.shape[1] == width:
        return image
    height = max(1, round(width * image.shape[0] / image.shape[1]))
    shrinks = width < image.shape[1]
    return _resize(image, height, width, cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _shorten(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """Replace the middle of `text` by an ellipsis if it is more than `width` pixels wide."""
    num_kept, short = len(text), text
    while font.getlength(short) > width and num_kept > 2:
        num_kept -= 1
        short = text[: (num_kept + 1) // 2] + "…" + text[len(text) - num_kept // 2 :]
    return short


def _legend_rows(
    legend: Sequence[LegendEntry], width: int, font: ImageFont.FreeTypeFont
) -> list[list[tuple[int, LegendEntry]]]:
    """Rows of (left edge in pixels, entry), as many entries in a row as `width` allows."""
    gap = _scaled(16, font)
    before_name = _scaled(_SWATCH, font) + _scaled(6, font)
    rows: list[list[tuple[int, LegendEntry]]] = []
    left = width + 1
    for entry in legend:
        entry = entry._replace(name=_shorten(entry.name, width - before_name, font))
        entry_width = before_name + int(font.getlength(entry.name))
        if left + entry_width > width:
            rows.append([])
            left = 0
        rows[-1].append((_scaled(_MARGIN, font) + left, entry))
        left += entry_width + gap
    return rows


def _draw_legend_row(
    draw: ImageDraw.ImageDraw,
    row: Sequence[tuple[int, LegendEntry]],
    top: int,
    font: ImageFont.FreeTypeFont,
) -> None:
    swatch, offset = _scaled(_SWATCH, font), _scaled(2, font)
    for left, entry in row:
        right, bottom = left + swatch, top + offset + swatch
        draw.rounded_rectangle((left, top + offset, right, bottom), 3, entry.color)
        draw.text((right + _scaled(6, font), top), entry.name, _DARK_GRAY, font)


def _scaled(length: int, font: ImageFont.FreeTypeFont) -> int:
    """A length of the legend, pixels at _LEGEND_FONT, at the size of `font`."""
    return round(length * font.size / _LEGEND_FONT)
