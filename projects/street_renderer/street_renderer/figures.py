"""People, bicycles and motorcycles, drawn as strokes between 3D joints.

Joints are meters in the figure's own frame: x to the right, y up, z forward. A stroke is a line of
a given width between two projected joints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import cos, pi, sin
from typing import Literal

import numpy as np

from street_renderer.canvas import Canvas, Color
from street_renderer.meshes import Point, turn

_CIRCLE = [2 * pi * step / 16 for step in range(16)]
_Mark = Literal["strokes", "polygon", "disc", "ring", "transparent"]


@dataclass
class Figure:
    """A figure on the ground; collects marks in its own frame, which `draw` projects.

    Attributes:
        position: of its origin in camera coordinates, meters.
        heading: radians, 0 away from the camera.
        scale: size relative to the model.
        unit: pixels per meter of the model.
    """

    canvas: Canvas
    position: Point
    heading: float
    scale: float
    unit: float = field(init=False)
    _joints: list[Point] = field(default_factory=list)
    _marks: list[tuple[_Mark, int, int, float, Color, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.unit = self.canvas.camera.pixels_per_meter(self.position[2]) * self.scale

    @property
    def faces_camera(self) -> bool:
        """Whether it faces the camera."""
        return cos(self.heading) < 0

    def strokes(self, joints: Sequence[Point], width: float, color: Color, surface: int) -> None:
        """Add a polyline with round ends; width in meters."""
        self._add("strokes", joints, width, color, surface)

    def polygon(self, joints: Sequence[Point], color: Color, surface: int) -> None:
        """Add a filled convex polygon."""
        self._add("polygon", joints, 0.0, color, surface)

    def disc(self, center: Point, radius: float, color: Color, surface: int) -> None:
        """Add a disc; radius in meters."""
        self._add("disc", [center], radius, color, surface)

    def ring(self, joints: Sequence[Point], width: float, color: Color, surface: int) -> None:
        """Add a closed polyline; width in meters."""
        self._add("ring", joints, width, color, surface)

    def transparent(self, joints: Sequence[Point], color: Color, surface: int) -> None:
        """Add a transparent polygon, which is labeled completely."""
        self._add("transparent", joints, 0.35, color, surface)

    def _add(
        self, mark: _Mark, joints: Sequence[Point], size: float, color: Color, surface: int
    ) -> None:
        start = len(self._joints)
        self._joints.extend(joints)
        self._marks.append((mark, start, len(self._joints), size, color, surface))

    def draw(self) -> None:
        """Draw all marks onto the canvas in the order in which they were added, and clear them."""
        world = turn(np.array(self._joints) * self.scale, self.heading) + self.position
        pixels = self.canvas.camera.project(world)
        pairs = pixels.tolist()
        for mark, start, stop, size, color, surface in self._marks:
            if mark == "strokes":
                for a, b in pairwise(pairs[start:stop]):
                    self.canvas.stroke(a, b, size * self.unit, color, surface)
            elif mark == "polygon":
                self.canvas.polygon(pixels[start:stop], color, surface)
            elif mark == "disc":
                self.canvas.disc(pairs[start], size * self.unit, color, surface)
            elif mark == "ring":
                self.canvas.outline(pixels[start:stop], size * self.unit, color, surface)
            elif np.ptp(pixels[start:stop, 0]) > 2:
                self.canvas.tint(pixels[start:stop], color, size, surface)
        self._joints, self._marks = [], []


@dataclass(frozen=True)
class Outfit:
    """Colors of a person's clothes and accessories, RGB 0 to 255."""

    top: Color
    bottom: Color
    skin: Color
    hair: Color
    skirt: bool = False
    bag: Color | None = None
    umbrella: Color | None = None


def draw_walker(figure: Figure, outfit: Outfit, swing: float, surface: int) -> None:
    """Add a standing or walking person, 1.75 m tall; swing is the angle of the legs, radians."""
    small = figure.unit < 9
    reach = 0.85 * sin(swing)
    shade = tuple(0.72 * v for v in outfit.bottom)
    shoe: Color = (38, 34, 32)
    for side, forward, color in ((-1, reach, shade), (1, -reach, outfit.bottom)):
        hip = (0.09 * side, 0.88, 0.0)
        knee = (0.10 * side, 0.48, 0.55 * forward)
        foot = (0.10 * side, 0.06, 0.9 * forward)
        figure.strokes([hip, knee, foot], 0.15, color, surface)  # type: ignore[arg-type]
        if not small:
            figure.strokes([foot, (foot[0], 0.05, foot[2] + 0.16)], 0.09, shoe, surface)
    if outfit.skirt:
        skirt = [(-0.17, 0.95, 0.0), (0.17, 0.95, 0.0), (0.25, 0.5, 0.0), (-0.25, 0.5, 0.0)]
        figure.polygon(skirt, outfit.bottom, surface)
    _torso(figure, outfit, 0.9, 1.42, 0.0, surface)
    dark: Color = (0.8 * outfit.top[0], 0.8 * outfit.top[1], 0.8 * outfit.top[2])
    for side, forward in ((-1, -reach), (1, reach)):
        shoulder = (0.22 * side, 1.38, 0.0)
        elbow = (0.27 * side, 1.12, 0.3 * forward)
        hand = (0.26 * side, 0.9, 0.65 * forward)
        figure.strokes([shoulder, elbow, hand], 0.10, dark, surface)
        if not small:
            figure.disc(hand, 0.045, outfit.skin, surface)
    _head(figure, outfit, (0.0, 1.62, 0.02), surface)
    if outfit.bag is not None and not small:
        figure.polygon(
            [(-0.17, 1.38, -0.2), (0.17, 1.38, -0.2), (0.17, 0.98, -0.22), (-0.17, 0.98, -0.22)],
            outfit.bag, surface,
        )  # fmt: skip
    if outfit.umbrella is not None:
        top = [(0.62 * cos(a), 1.9 + 0.34 * sin(a), 0.0) for a in np.linspace(0, pi, 9)]
        figure.polygon(top, outfit.umbrella, surface)
        figure.strokes([(0.1, 1.2, 0.1), (0.05, 2.2, 0.0)], 0.03, (40, 40, 44), surface)


def _torso(
    figure: Figure, outfit: Outfit, low: float, high: float, lean: float, surface: int
) -> None:
    """Add chest and hips; lean moves the shoulders forward, meters."""
    figure.strokes([(0, low, 0), (0, high - 0.1, lean)], 0.24, outfit.top, surface)
    corners = [(-0.15, low, 0.0), (-0.23, high, lean), (0.23, high, lean), (0.15, low, 0.0)]
    figure.polygon(corners, outfit.top, surface)


def _head(figure: Figure, outfit: Outfit, center: Point, surface: int) -> None:
    x, y, z = center
    figure.strokes([(x, y - 0.16, z), (x, y - 0.05, z)], 0.10, outfit.skin, surface)
    toward = figure.faces_camera
    figure.disc(center, 0.125, outfit.skin if toward else outfit.hair, surface)
    if figure.unit > 14 and toward:
        figure.strokes(
            [(x - 0.08, y + 0.09, z), (x + 0.08, y + 0.09, z)], 0.09, outfit.hair, surface
        )


def draw_bicycle(figure: Figure, frame: Color, surface: int) -> None:
    """Add a bicycle, 1.75 m long; the insides of the wheels belong to it, as in the datasets."""
    tire: Color = (34, 34, 36)
    for z in (-0.53, 0.53):
        wheel = [(0.0, 0.34 + 0.33 * sin(a), z + 0.33 * cos(a)) for a in _CIRCLE]
        figure.transparent(wheel, (120, 122, 124), surface)
        figure.ring(wheel, 0.055, tire, surface)
    saddle, crank, bars = (0.0, 0.92, -0.22), (0.0, 0.32, -0.06), (0.0, 0.95, 0.36)
    rear, front = (0.0, 0.34, -0.53), (0.0, 0.34, 0.53)
    figure.strokes([rear, crank, bars, saddle, crank], 0.05, frame, surface)
    figure.strokes([rear, (0.0, 0.8, -0.2)], 0.04, frame, surface)
    figure.strokes([bars, front], 0.05, frame, surface)
    figure.strokes([(-0.28, 1.02, 0.34), (0.28, 1.02, 0.34)], 0.05, tire, surface)
    figure.strokes([(0, 0.96, -0.3), (0, 0.96, -0.1)], 0.09, tire, surface)


def draw_cyclist(figure: Figure, outfit: Outfit, pedal: float, surface: int) -> None:
    """Add a person on a bicycle; pedal is the angle of the crank, radians."""
    hip, crank = (0.0, 0.98, -0.2), (0.0, 0.32, -0.06)
    for side, angle in ((-1, pedal), (1, pedal + pi)):
        foot = (0.1 * side, crank[1] + 0.17 * sin(angle), crank[2] + 0.17 * cos(angle))
        knee = (0.11 * side, 0.5 * (hip[1] + foot[1]) + 0.08, 0.5 * (hip[2] + foot[2]) + 0.22)
        figure.strokes([(0.08 * side, hip[1], hip[2]), knee, foot], 0.14, outfit.bottom, surface)
    _lean_forward(figure, outfit, hip, 0.28, (1.02, 0.34), surface)


def draw_motorcycle(figure: Figure, paint: Color, surface: int, lamp: int) -> None:
    """Add a motorcycle, 2.1 m long; `lamp` is the surface number of its lights."""
    tire: Color = (30, 30, 32)
    for z in (-0.68, 0.68):
        wheel = [(0.0, 0.32 + 0.31 * sin(a), z + 0.31 * cos(a)) for a in _CIRCLE]
        figure.polygon(wheel, (66, 66, 70), surface)
        figure.ring(wheel, 0.13, tire, surface)
    figure.strokes([(0, 0.32, 0.68), (0, 0.95, 0.42)], 0.10, (150, 150, 154), surface)
    figure.strokes([(0, 0.42, -0.2), (0, 0.45, 0.25)], 0.36, (58, 58, 62), surface)  # engine
    figure.strokes([(0, 0.78, 0.42), (0, 0.82, 0.1)], 0.30, paint, surface)  # tank
    figure.strokes([(0, 0.78, -0.05), (0, 0.82, -0.7)], 0.20, tire, surface)  # seat
    figure.strokes([(0, 0.72, -0.62), (0, 0.62, -0.85)], 0.16, paint, surface)  # tail
    figure.strokes([(-0.36, 1.05, 0.36), (0.36, 1.05, 0.36)], 0.06, tire, surface)
    if figure.faces_camera:
        figure.disc((0, 0.88, 0.55), 0.11, (250, 246, 226), lamp)
    else:
        figure.disc((0, 0.70, -0.9), 0.06, (220, 40, 36), lamp)


def draw_motorcyclist(figure: Figure, outfit: Outfit, helmet: Color, surface: int) -> None:
    """Add a person with a helmet on a motorcycle."""
    hip = (0.0, 0.88, -0.25)
    for side in (-1, 1):
        knee, foot = (0.24 * side, 0.72, 0.15), (0.2 * side, 0.36, -0.08)
        figure.strokes([(0.1 * side, 0.88, -0.25), knee, foot], 0.16, outfit.bottom, surface)
    _lean_forward(figure, outfit, hip, 0.24, (1.05, 0.34), surface)
    figure.disc((0.0, 1.58, 0.04), 0.15, helmet, surface)
    if figure.faces_camera and figure.unit > 10:
        figure.strokes([(-0.07, 1.58, 0.16), (0.07, 1.58, 0.16)], 0.09, (30, 34, 40), surface)


def _lean_forward(
    figure: Figure, outfit: Outfit, hip: Point, lean: float, bars: tuple[float, float],
    surface: int,
) -> None:  # fmt: skip
    """Add torso, arms to the handlebar at (height, forward) and head of a rider."""
    shoulder = hip[2] + lean
    figure.strokes([hip, (0, hip[1] + 0.42, shoulder)], 0.26, outfit.top, surface)
    corners = [(-0.16, hip[1], hip[2]), (-0.22, hip[1] + 0.5, shoulder),
               (0.22, hip[1] + 0.5, shoulder), (0.16, hip[1], hip[2])]  # fmt: skip
    figure.polygon(corners, outfit.top, surface)
    dark: Color = (0.8 * outfit.top[0], 0.8 * outfit.top[1], 0.8 * outfit.top[2])
    for side in (-1, 1):
        elbow = (0.28 * side, hip[1] + 0.26, shoulder + 0.14)
        hand = (0.26 * side, *bars)
        figure.strokes([(0.21 * side, hip[1] + 0.46, shoulder), elbow, hand], 0.10, dark, surface)
    _head(figure, outfit, (0.0, hip[1] + 0.70, shoulder + 0.06), surface)
