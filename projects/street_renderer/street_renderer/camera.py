"""A pinhole camera: positions in meters to pixel coordinates."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, sin
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]

NEAR = 0.6
"""Minimum distance of projected points, meters; nearer points are moved to it."""


@dataclass(frozen=True)
class Camera:
    """Position and intrinsics of the camera.

    Camera coordinates are meters: right, up from the ground below the camera, forward.

    Attributes:
        rows, columns: size of the image in pixels.
        focal: focal length in pixels.
        eye: height of the camera above the ground in meters.
        horizon: row of the horizon at the vanishing point's column.
        center: column of the vanishing point of the road's direction.
        roll: rotation of the image around the vanishing point, radians, clockwise.
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

    def pixels_per_meter(self, distance: float) -> float:
        """Length in pixels of one meter parallel to the image plane at a distance in meters."""
        return self.focal / max(distance, NEAR)

    def below_horizon(self, first_row: int) -> Floats:
        """Distance of each pixel below the horizon, in pixels: (rows - first_row, columns)."""
        column, row = self._offsets(first_row)
        return np.asarray(cos(self.roll) * row - sin(self.roll) * column, dtype=np.float32)

    def ground(self, first_row: int) -> tuple[Floats, Floats]:
        """Position on the ground plane of each pixel, for the rows from `first_row`.

        Returns:
            right, forward: meters, both (rows - first_row, columns) float32. Pixels on or above
            the horizon get the distance of half a pixel below it.
        """
        column, row = self._offsets(first_row)
        down = np.maximum(self.below_horizon(first_row), 0.5)
        forward = np.asarray(self.focal * self.eye / down, dtype=np.float32)
        across = (cos(self.roll) * column + sin(self.roll) * row).astype(np.float32)
        return across * forward * np.float32(1 / self.focal), forward

    def first_ground_row(self) -> int:
        """The first row with a pixel below the horizon."""
        lift = abs(np.tan(self.roll)) * max(self.center, self.columns - self.center)
        return int(np.clip(np.floor(self.horizon - lift), 0, self.rows))

    def _offsets(self, first_row: int) -> tuple[Floats, Floats]:
        column = np.arange(self.columns, dtype=np.float32)[None, :] - np.float32(self.center)
        row = np.arange(first_row, self.rows, dtype=np.float32)[:, None] - np.float32(self.horizon)
        return column, row
