"""Shadows on the ground: contact shadows, and cast shadows of objects in sunlight.

Shadows are drawn before objects, so only the ground becomes darker.
"""

from __future__ import annotations

from math import cos, sin

import cv2
import numpy as np

from street_renderer.camera import Floats
from street_renderer.canvas import Bytes, Canvas, fixed_point
from street_renderer.layout import Block, SceneLayout, Thing

FOOTPRINTS: dict[str, tuple[float, float, float]] = {
    # half width, half length, height in meters
    "car": (0.9, 2.2, 1.4), "van": (1.0, 2.5, 2.0), "truck": (1.25, 4.3, 3.4),
    "bus": (1.25, 5.7, 3.1), "tram": (1.3, 6.4, 3.3), "railcar": (1.4, 6.4, 3.9),
    "person": (0.25, 0.25, 1.7), "cyclist": (0.25, 0.9, 1.7), "motorcyclist": (0.3, 1.0, 1.6),
    "bicycle": (0.2, 0.9, 0.9), "motorcycle": (0.3, 1.0, 1.0), "tree": (0.3, 0.3, 6.0),
    "bush": (0.8, 0.6, 1.0), "bin": (0.35, 0.35, 1.1), "cabinet": (0.6, 0.3, 1.4),
    "lamp": (0.09, 0.09, 6.0), "light": (0.1, 0.1, 3.2),
}  # fmt: skip
_NEAR = 1.0
_MAX_LENGTH = 9.0
"""Maximum length of the shadow of an object, meters; four times as much for buildings."""


def ground_light(canvas: Canvas, layout: SceneLayout, first_row: int) -> Floats:
    """Share of light that reaches the ground, (rows - first_row, columns) float32, 0 to 1."""
    look = canvas.look
    shape = (canvas.camera.rows - first_row, canvas.camera.columns)
    contact = np.zeros(shape, np.uint8)
    cast = np.zeros(shape, np.uint8)
    sunny = look.direct > 0.15
    fall = -np.array([look.sun[0], look.sun[2]]) / max(look.sun[1], 0.2)
    for thing in layout.things:
        if thing.kind in FOOTPRINTS and thing.distance > 2.0:
            corners = _footprint(layout, thing)
            _fill(canvas, contact, corners, first_row)
            if sunny:
                _cast_shadow(canvas, cast, corners, FOOTPRINTS[thing.kind][2] * fall, first_row)
                if thing.kind == "tree":
                    _cast_crown_shadow(canvas, cast, corners.mean(axis=0), fall, first_row)
    if sunny:
        for block in layout.blocks:
            front = _front(layout, block)
            _cast_shadow(canvas, cast, front, block.height * fall, first_row, 4 * _MAX_LENGTH)
    size = 2 * max(1, shape[0] // 60) + 1
    contact = cv2.blur(contact, (size, size))
    light = 1 - contact * np.float32(0.52 / 255)
    if sunny:
        light *= 1 - cv2.blur(cast, (3, 3)) * np.float32(0.62 * look.direct / 255)
    return np.asarray(light)


def _footprint(layout: SceneLayout, thing: Thing) -> Floats:
    """Corners (4, 2) on the ground, (right, forward) in camera coordinates, meters."""
    half, length, _ = FOOTPRINTS[thing.kind]
    c, s = cos(thing.heading), sin(thing.heading)
    middle = np.array([thing.lateral + layout.bend_at(thing.distance), thing.distance])
    along, across = length * np.array([s, c]), half * np.array([c, -s])
    corners = middle + np.array([-along - across, across - along, along + across, along - across])
    corners[:, 1] = np.maximum(corners[:, 1], _NEAR)
    return np.asarray(corners)


def _front(layout: SceneLayout, block: Block) -> Floats:
    near, far = max(block.near, _NEAR), max(block.far, _NEAR + 0.5)
    return np.array([(block.lateral + layout.bend_at(z), z) for z in (near, far)])


def _fill(canvas: Canvas, mask: Bytes, spots: Floats, first_row: int, darkness: int = 255) -> None:
    points = np.zeros((len(spots), 3))
    points[:, 0], points[:, 2] = spots[:, 0], spots[:, 1]
    pixels = canvas.camera.project(points)
    pixels[:, 1] -= first_row
    cv2.fillConvexPoly(mask, fixed_point(pixels), darkness, cv2.LINE_8, 4)


def _cast_shadow(
    canvas: Canvas, mask: Bytes, spots: Floats, fall: Floats, first_row: int,
    max_length: float = _MAX_LENGTH,
) -> None:  # fmt: skip
    """Fill the area that points sweep when they move by `fall`, (right, forward) meters."""
    length = float(np.hypot(*fall))
    moved = spots + fall * min(1.0, max_length / max(length, 1e-6))
    moved[:, 1] = np.maximum(moved[:, 1], _NEAR)
    both = np.concatenate([spots, moved]).astype(np.float32)
    _fill(canvas, mask, cv2.convexHull(both)[:, 0].astype(np.float64), first_row)


def _cast_crown_shadow(
    canvas: Canvas, mask: Bytes, spot: Floats, fall: Floats, first_row: int
) -> None:
    """Fill the round shadow of a tree's crown."""
    length = float(np.hypot(*fall))
    center = spot + fall * min(5.0, _MAX_LENGTH / max(length, 1e-6))
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    ring = center + 1.9 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    ring[:, 1] = np.maximum(ring[:, 1], _NEAR)
    _fill(canvas, mask, ring, first_row, darkness=170)
