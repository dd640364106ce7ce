"""A pinhole camera in a car: metres on the road to pixels in the picture."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, sin
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]

NEAR = 0.6
"""Points nearer than this many metres are moved out to it, so that nothing is behind the lens."""


@dataclass(frozen=True)
class Camera:
    """Where the camera is and what it sees.

    Camera coordinates are metres: right, up from the ground below the camera, forward.

    Attributes:
        rows, columns: size of the picture in pixels.
        focal: focal length in pixels.
        eye: height of the lens above the ground in metres.
        horizon: row of the horizon at the vanishing point's column.
        center: column of the vanishing point of the road's direction.
        roll: rotation of the picture around the vanishing point, radians, clockwise.
    """

    rows: int
    columns: int
    focal: float
    eye: float
    horizon: float
    center: float
    roll: float

    def project(self, points: Floats) -> Floats:
        """Camera coordinates (..., 3) to pixel coordinates (..., 2) as (column, row)."""
        scale = self.focal / np.maximum(points[..., 2], NEAR)
        right = points[..., 0] * scale
        down = (self.eye - points[..., 1]) * scale
        pixels = np.empty((*points.shape[:-1], 2))
        pixels[..., 0] = cos(self.roll) * right - sin(self.roll) * down + self.center
        pixels[..., 1] = sin(self.roll) * right + cos(self.roll) * down + self.horizon
        return pixels

    def project_point(self, point: tuple[float, float, float]) -> tuple[float, float]:
        """`project` for one point."""
        scale = self.focal / max(point[2], NEAR)
        right, down = point[0] * scale, (self.eye - point[1]) * scale
        c, s = cos(self.roll), sin(self.roll)
        return self.center + c * right - s * down, self.horizon + s * right + c * down

    def pixels_per_metre(self, distance: float) -> float:
        """Length in pixels of one metre that faces the camera at a distance in metres."""
        return self.focal / max(distance, NEAR)

    def below_horizon(self, first_row: int) -> Floats:
        """How far below the horizon each pixel is, in pixels: (rows - first_row, columns)."""
        column, row = self._offsets(first_row)
        return np.asarray(cos(self.roll) * row - sin(self.roll) * column, dtype=np.float32)

    def ground(self, first_row: int) -> tuple[Floats, Floats]:
        """The spot on the flat ground that each pixel of the rows from `first_row` on sees.

        Returns:
            right, forward: metres, both (rows - first_row, columns) float32. Pixels on or above
            the horizon get the farthest distance that half a pixel below it would have.
        """
        column, row = self._offsets(first_row)
        down = np.maximum(self.below_horizon(first_row), 0.5)
        forward = np.asarray(self.focal * self.eye / down, dtype=np.float32)
        across = (cos(self.roll) * column + sin(self.roll) * row).astype(np.float32)
        return across * forward * np.float32(1 / self.focal), forward

    def first_ground_row(self) -> int:
        """The first row that holds a pixel below the horizon."""
        lift = abs(np.tan(self.roll)) * max(self.center, self.columns - self.center)
        return int(np.clip(np.floor(self.horizon - lift), 0, self.rows))

    def _offsets(self, first_row: int) -> tuple[Floats, Floats]:
        column = np.arange(self.columns, dtype=np.float32)[None, :] - np.float32(self.center)
        row = np.arange(first_row, self.rows, dtype=np.float32)[:, None] - np.float32(self.horizon)
        return column, row
