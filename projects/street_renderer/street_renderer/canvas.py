"""The canvas: color and surface number of every pixel, always written together.

The canvas has four channels: red, green, blue and the number of the topmost surface. Every
primitive fills all four in one call of the rasterizer, so labels are exact by construction. A table
stores class, distance and material properties of each surface; lighting, fog and grain are applied
with this table after drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from clouds.data.label_space import IGNORE
from street_renderer.camera import Camera, Floats
from street_renderer.style import Look

Bytes = npt.NDArray[np.uint8]
Color = tuple[float, float, float]
Pixel = tuple[float, float]

MAX_SURFACES = 255
_SHIFT = 4
"""Fractional bits of polygon corners: a resolution of 1/16 pixel."""
_LIMIT = float(1 << 14)


@dataclass(frozen=True)
class Surface:
    """One entry of the surface table.

    Attributes:
        label: train id of the class, 255 for unlabeled.
        distance: meters from the camera; None for ground, whose distance varies per pixel.
        grain: strength of the texture noise.
        glowing: emits light, so it keeps its color at night.
        instance: number of the object, 0 for stuff.
    """

    label: int
    distance: float | None
    grain: float = 0.0
    glowing: bool = False
    instance: int = 0


@dataclass(frozen=True)
class Glow:
    """Light around a lamp or on the ground below one.

    Attributes:
        center: (column, row).
        radius: (across, down) in pixels.
    """

    center: Pixel
    radius: tuple[float, float]
    color: Color
    strength: float


class Canvas:
    """An image during rendering.

    Attributes:
        look: appearance of this image.
        camera: shorthand for `look.camera`.
        pixels: (rows, columns, 4) uint8: red, green, blue, surface number.
        surfaces: the table of surfaces; number 0 is the empty canvas.
        glows: lights, drawn in the lighting pass (`weather.apply_light`).
    """

    def __init__(self, look: Look) -> None:
        self.look = look
        self.camera: Camera = look.camera
        self.pixels: Bytes = np.zeros((look.camera.rows, look.camera.columns, 4), np.uint8)
        self.surfaces: list[Surface] = [Surface(IGNORE, None)]
        self.glows: list[Glow] = []
        self._instances = 0

    @property
    def free_surfaces(self) -> int:
        """Number of free surface numbers."""
        return MAX_SURFACES - len(self.surfaces)

    def add_surface(self, surface: Surface) -> int:
        """Add a surface to the table and return its number.

        If the table is full, returns the most similar surface of the same class.
        """
        if len(self.surfaces) >= MAX_SURFACES:
            return self._most_similar(surface)
        self.surfaces.append(surface)
        return len(self.surfaces) - 1

    def add_object(self, label: int, distance: float, grain: float = 0.2) -> tuple[int, int]:
        """Add the surfaces of a new object: its plain parts and its parts that glow at night."""
        self._instances += 1
        plain = self.add_surface(Surface(label, distance, grain, False, self._instances))
        if self.look.time == "day":
            return plain, plain
        return plain, self.add_surface(Surface(label, distance, 0.0, True, self._instances))

    def _most_similar(self, surface: Surface) -> int:
        def difference(number: int) -> tuple[bool, bool, float]:
            other = self.surfaces[number]
            gap = abs((other.distance or 0.0) - (surface.distance or 0.0))
            return (other.label != surface.label, other.glowing != surface.glowing, gap)

        best = min(range(len(self.surfaces)), key=difference)
        assert self.surfaces[best].label == surface.label, "no surface of this class to share"
        return best

    def shade(self, normals: Floats) -> Floats:
        """Brightness factor of faces with unit normals (..., 3) in camera coordinates."""
        direct = self.look.direct
        toward_sun = np.maximum(normals @ np.asarray(self.look.sun), 0.0)
        factor = 1 - 0.45 * direct + 0.7 * direct * toward_sun + 0.07 * normals[..., 1]
        return np.asarray(factor)

    # ------------------------------------------------------------------ primitives
    def polygon(self, corners: Floats | Sequence[Pixel], color: Color, surface: int) -> None:
        """Fill a convex polygon with corners (n, 2) as (column, row)."""
        value = (*color, surface)
        cv2.fillConvexPoly(self.pixels, fixed_point(corners), value, cv2.LINE_8, _SHIFT)

    def fixed_polygon(
        self, corners: npt.NDArray[np.int32], color: Sequence[float], surface: int
    ) -> None:
        """`polygon` for corners converted by `fixed_point`."""
        cv2.fillConvexPoly(self.pixels, corners, (*color, surface), cv2.LINE_8, _SHIFT)

    def shape(self, corners: Floats, color: Color, surface: int) -> None:
        """Fill a polygon that may be concave."""
        value = (*color, surface)
        cv2.fillPoly(self.pixels, [fixed_point(corners)], value, cv2.LINE_8, _SHIFT)

    def stroke(self, start: Pixel, end: Pixel, width: float, color: Color, surface: int) -> None:
        """Draw a line with round ends, `width` pixels wide (at least one)."""
        thick = max(1, round(width))
        cv2.line(self.pixels, _rounded(start), _rounded(end), (*color, surface), thick, cv2.LINE_8)

    def disc(self, center: Pixel, radius: float, color: Color, surface: int) -> None:
        """Fill a circle, at least one pixel."""
        cv2.circle(self.pixels, _rounded(center), max(0, round(radius)), (*color, surface), -1)

    def outline(self, corners: Floats, width: float, color: Color, surface: int) -> None:
        """Draw a closed line through the corners (n, 2)."""
        points = np.rint(np.minimum(np.maximum(corners, -_LIMIT), _LIMIT)).astype(np.int32)
        cv2.polylines(self.pixels, [points], True, (*color, surface), max(1, round(width)))

    # ------------------------------------------------------------------ textures
    def textured(self, corners: Floats, texture: Bytes, surface: int, glowing: int = 0) -> None:
        """Map a texture onto a quadrilateral.

        Args:
            corners: (4, 2) pixel positions of the texture's top left, top right, bottom right
                and bottom left corner.
            texture: (h, w, 4): red, green, blue and 255 where the surface glows, else 0.
            surface, glowing: surface numbers of the plain and of the glowing parts; `glowing` is 0
                if there are none.
        """
        area = self._area(corners)
        if area is None:
            return
        left, top, width, height = area
        if not glowing:
            texture = texture.copy()
            texture[..., 3] = surface  # a constant survives interpolation
        warped = warp(texture, corners - (left, top), (width, height))
        if glowing:
            warped[..., 3] = np.where(warped[..., 3] > 127, glowing, surface)
        mask = _mask(corners - (left, top), width, height)
        cv2.copyTo(warped, mask, self.pixels[top : top + height, left : left + width])

    def see_through(self, corners: Floats, texture: Bytes, surface: int) -> None:
        """`textured` with alpha in the fourth channel, such as a fence.

        The whole quadrilateral gets the label of the surface, as in the datasets' annotations.
        """
        area = self._area(corners)
        if area is None:
            return
        left, top, width, height = area
        warped = warp(texture, corners - (left, top), (width, height)).astype(np.float32)
        mask = _mask(corners - (left, top), width, height)
        region = self.pixels[top : top + height, left : left + width]
        share = warped[..., 3:] * (mask[..., None] * np.float32(1 / 255**2))
        mixed = region[..., :3] + share * (warped[..., :3] - region[..., :3])
        region[..., :3] = mixed
        region[..., 3][mask > 0] = surface

    def stamp(self, top_left: Pixel, colors: Bytes, mask: Bytes, surface: int) -> None:
        """Paste an image (h, w, 3) inside the canvas where its mask (h, w) is not 0."""
        left, top = round(top_left[0]), round(top_left[1])
        height, width = mask.shape
        patch = np.empty((height, width, 4), np.uint8)
        patch[..., :3] = colors
        patch[..., 3] = surface
        cv2.copyTo(patch, mask, self.pixels[top : top + height, left : left + width])

    def tint(self, corners: Floats, color: Color, share: float, surface: int) -> None:
        """Blend a color into a polygon and label all of it as a surface, as for a spoked wheel."""
        area = self._area(corners)
        if area is None:
            return
        left, top, width, height = area
        mask = _mask(corners - (left, top), width, height)
        region = self.pixels[top : top + height, left : left + width]
        inside = mask > 0
        mixed = region[inside].astype(np.float32)
        mixed[:, :3] += share * (np.asarray(color, np.float32) - mixed[:, :3])
        mixed[:, 3] = surface
        region[inside] = mixed

    def _area(self, corners: Floats) -> tuple[int, int, int, int] | None:
        """The part of a polygon's bounding box inside the image: left, top, width, height."""
        low_x, low_y = corners.min(axis=0).tolist()
        high_x, high_y = corners.max(axis=0).tolist()
        left, top = int(max(low_x - 1, 0)), int(max(low_y - 1, 0))
        right = int(min(high_x + 3, self.camera.columns))
        bottom = int(min(high_y + 3, self.camera.rows))
        if left >= right or top >= bottom:
            return None
        return left, top, right - left, bottom - top


def times(color: Color, factor: float) -> Color:
    """A color multiplied by a factor, at most 255."""
    red, green, blue = (min(value * factor, 255.0) for value in color)
    return red, green, blue


def mixed(color: Color, other: Color, share: float) -> Color:
    """Linear interpolation from a color to another one."""
    red, green, blue = (a + share * (b - a) for a, b in zip(color, other, strict=True))
    return red, green, blue


def fixed_point(corners: Floats | Sequence[Pixel]) -> npt.NDArray[np.int32]:
    """Corners as fixed-point numbers of OpenCV, clipped to the range of its rasterizer."""
    clipped = np.minimum(np.maximum(corners, -_LIMIT), _LIMIT)
    return np.asarray(np.rint(clipped * (1 << _SHIFT)), dtype=np.int32)


def warp(texture: Bytes, corners: Floats, size: tuple[int, int]) -> Bytes:
    """Perspective warp of a texture to four corners; size is (width, height)."""
    height, width = texture.shape[:2]
    source = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32) - 0.5
    matrix = cv2.getPerspectiveTransform(source, corners.astype(np.float32))
    warped: Bytes = cv2.warpPerspective(
        texture, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    return warped


def _mask(corners: Floats, width: int, height: int) -> Bytes:
    mask = np.zeros((height, width), np.uint8)
    cv2.fillConvexPoly(mask, fixed_point(corners), 255, cv2.LINE_8, _SHIFT)
    return mask


def _rounded(point: Pixel) -> tuple[int, int]:
    x, y = point
    return round(min(max(x, -_LIMIT), _LIMIT)), round(min(max(y, -_LIMIT), _LIMIT))
