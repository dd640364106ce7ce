"""Vehicles as polygon meshes.

A mesh is centered on the ground at the origin: x to the right, y up, z forward (its heading),
meters. Faces have the name of a material; colors are chosen when a mesh is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import cos, pi, sin

import numpy as np
import numpy.typing as npt

from street_renderer.camera import Floats
from street_renderer.canvas import Canvas, Color, fixed_point

Point = tuple[float, float, float]
GLOWING = ("tail", "head", "cabin", "display")
"""Materials that emit light at night."""

DETAIL_PIXELS = 9.0
"""Faces of layer 2 and higher are only drawn from this many pixels per meter."""


@dataclass(frozen=True)
class Mesh:
    """Polygons in meters.

    Attributes:
        vertices: (V, 3).
        faces: vertex numbers of every convex face.
        materials: name of each face's material.
        normals, centers: (F, 3), outward normal and center of each face.
        layers: (F,), 0 for bodies, higher for details on them.
        parts: (F,), number of the convex part each face belongs to.
        part_centers: (P, 3).
    """

    vertices: Floats
    faces: tuple[npt.NDArray[np.intp], ...]
    materials: tuple[str, ...]
    normals: Floats
    centers: Floats
    layers: npt.NDArray[np.intp]
    parts: npt.NDArray[np.intp]
    part_centers: Floats


class _Builder:
    """Collects the faces of a mesh by parts, which are (nearly) convex bodies."""

    def __init__(self) -> None:
        self.corners: list[list[Point]] = []
        self.materials: list[str] = []
        self.layers: list[int] = []
        self.parts: list[int] = []
        self.middles: list[Point] = []

    def part(self, middle: Point) -> None:
        self.middles.append(middle)

    def face(self, corners: Sequence[Point], material: str, layer: int = 0) -> None:
        self.corners.append(list(corners))
        self.materials.append(material)
        self.layers.append(layer)
        self.parts.append(len(self.middles) - 1)

    def box(self, low: Point, high: Point, side: str, end: str, top: str) -> None:
        """Add a box as a new part, with materials of its long sides, both ends and the top."""
        (x0, y0, z0), (x1, y1, z1) = low, high
        self.part(((x0 + x1) / 2, (y0 + y1) / 2, (z0 + z1) / 2))
        for x in (x0, x1):
            self.face([(x, y0, z0), (x, y1, z0), (x, y1, z1), (x, y0, z1)], side)
        for z in (z0, z1):
            self.face([(x0, y0, z), (x0, y1, z), (x1, y1, z), (x1, y0, z)], end)
        self.face([(x0, y1, z0), (x0, y1, z1), (x1, y1, z1), (x1, y1, z0)], top)

    def on_side(
        self, x: float, z: tuple[float, float], y: tuple[float, float], material: str,
        layer: int = 1,
    ) -> None:  # fmt: skip
        """Add a rectangle on both long sides, at distance x from the center."""
        for side in (-x, x):
            corners = [
                (side, y[0], z[0]),
                (side, y[1], z[0]),
                (side, y[1], z[1]),
                (side, y[0], z[1]),
            ]
            self.face(corners, material, layer)

    def on_end(
        self, z: float, x: tuple[float, float], y: tuple[float, float], material: str,
        layer: int = 1,
    ) -> None:  # fmt: skip
        """Add a rectangle on the front or the back, at z."""
        corners = [(x[0], y[0], z), (x[0], y[1], z), (x[1], y[1], z), (x[1], y[0], z)]
        self.face(corners, material, layer)

    def wheels(self, x: float, axles: Sequence[float], radius: float, width: float = 0.22) -> None:
        """Add wheels on both sides of each axle, visible from the side and from behind."""
        angles = np.linspace(0, 2 * pi, 12, endpoint=False)
        for axle in axles:
            for side in (-x, x):
                for size, material, layer in ((1.0, "tire", 1), (0.55, "hub", 2)):
                    ring = [
                        (side, radius * (1 + size * sin(a)), axle + radius * size * cos(a))
                        for a in angles
                    ]
                    self.face(ring, material, layer)
        for side in (-1, 1):
            inner, outer = side * (x - width), side * (x - 0.02)
            for axle, reach in ((axles[0], -radius), (axles[-1], radius)):
                z = axle + reach * 0.85
                corners = [(inner, 0, z), (inner, radius * 1.6, z), (outer, radius * 1.6, z)]
                self.face([*corners, (outer, 0, z)], "tire", -1)
        for axle, reach in ((axles[0], -radius), (axles[-1], radius)):
            # The dark area below the bumper between the tires.
            low, high = (-x, 0.42 * radius), (x, 1.5 * radius)
            self.on_end(axle + reach * 0.8, (low[0], high[0]), (low[1], high[1]), "under", -2)

    def mesh(self) -> Mesh:
        middles = np.array(self.middles)
        parts = np.array(self.parts)
        normals, centers = [], []
        for corners, part in zip(self.corners, parts, strict=True):
            points = np.array(corners)
            normal = np.cross(points[1] - points[0], points[2] - points[0])
            normal /= np.linalg.norm(normal)
            center = points.mean(axis=0)
            normals.append(normal if normal @ (center - middles[part]) >= 0 else -normal)
            centers.append(center)
        counts = np.cumsum([0] + [len(c) for c in self.corners])
        return Mesh(
            vertices=np.array([p for corners in self.corners for p in corners], np.float64),
            faces=tuple(np.arange(a, b) for a, b in pairwise(counts)),
            materials=tuple(self.materials),
            normals=np.array(normals),
            centers=np.array(centers),
            layers=np.array(self.layers),
            parts=parts,
            part_centers=middles,
        )


# ---------------------------------------------------------------------- models
@dataclass(frozen=True)
class _CarShape:
    """Side view of a car as (z, y) of its outline from the rear bumper over the roof."""

    length: float
    width: float
    outline: tuple[tuple[float, float], ...]
    belt: float
    roof: float
    wheel: float


_CAR_SHAPES: tuple[_CarShape, ...] = (
    # sedan, hatchback, estate, off-roader, van
    _CarShape(4.6, 1.82, ((-2.28, 0.25), (-2.3, 0.9), (-1.75, 0.98), (-1.05, 1.43), (0.25, 1.45),
                          (1.05, 0.98), (2.2, 0.82), (2.3, 0.27)), 0.95, 0.74, 0.32),
    _CarShape(4.1, 1.78, ((-2.02, 0.25), (-2.05, 0.95), (-1.98, 1.0), (-1.55, 1.45), (0.15, 1.5),
                          (1.0, 1.0), (1.95, 0.86), (2.05, 0.27)), 0.98, 0.76, 0.31),
    _CarShape(4.7, 1.84, ((-2.33, 0.25), (-2.35, 0.95), (-2.3, 1.0), (-1.9, 1.46), (0.2, 1.5),
                          (1.05, 1.0), (2.2, 0.85), (2.35, 0.27)), 0.98, 0.76, 0.33),
    _CarShape(4.6, 1.92, ((-2.28, 0.34), (-2.3, 1.1), (-2.25, 1.15), (-1.95, 1.72), (0.1, 1.76),
                          (0.85, 1.18), (2.15, 1.05), (2.3, 0.36)), 1.14, 0.80, 0.38),
    _CarShape(5.0, 1.98, ((-2.48, 0.30), (-2.5, 1.2), (-2.48, 1.25), (-2.35, 2.05), (1.0, 2.08),
                          (1.75, 1.25), (2.4, 1.0), (2.5, 0.32)), 1.22, 0.88, 0.34),
)  # fmt: skip
CAR_SHAPES = 4
"""Number of passenger cars in `_CAR_SHAPES`; the last shape is a van."""


@cache
def car_mesh(shape: int) -> Mesh:
    """A passenger car, or a van for shape `CAR_SHAPES`."""
    car = _CAR_SHAPES[shape]
    half, roof = car.width / 2, car.width / 2 * car.roof
    outline = car.outline
    low, rear, deck, back, front, cowl, hood, nose = outline
    build = _Builder()
    build.part((0, 0.75, 0))

    def across(first: tuple[float, float], second: tuple[float, float]) -> None:
        (za, ya), (zb, yb) = first, second
        a = roof if ya > car.belt + 0.2 else half
        b = roof if yb > car.belt + 0.2 else half
        build.face([(-a, ya, za), (a, ya, za), (b, yb, zb), (-b, yb, zb)], "paint")

    for a, b in pairwise(outline):
        across(a, b)
    for side in (-1, 1):
        body = [low, rear, deck, cowl, hood, nose]
        build.face([(side * half, y, z) for z, y in body], "paint")
        cabin = [(side * half, *deck[::-1]), (side * roof, *back[::-1]),
                 (side * roof, *front[::-1]), (side * half, *cowl[::-1])]  # fmt: skip
        build.face(cabin, "paint")
        quad = np.array(cabin)
        build.face(_inset(quad, (0.10, 0.46), (0.10, 0.86)), "glass", 1)
        build.face(_inset(quad, (0.50, 0.88), (0.10, 0.86)), "glass", 1)
        build.face([(side * half, y, z) for z, y in
                    ((low[0], low[1]), (low[0], low[1] + 0.12), (nose[0], nose[1] + 0.12),
                     (nose[0], nose[1]))], "trim", 1)  # fmt: skip
    rear_pane = np.array([(-half, deck[1], deck[0]), (-roof, back[1], back[0]),
                          (roof, back[1], back[0]), (half, deck[1], deck[0])])  # fmt: skip
    build.face(_inset(rear_pane, (0.10, 0.90), (0.12, 0.88)), "glass", 1)
    screen = np.array([(-half, cowl[1], cowl[0]), (-roof, front[1], front[0]),
                       (roof, front[1], front[0]), (half, cowl[1], cowl[0])])  # fmt: skip
    build.face(_inset(screen, (0.07, 0.93), (0.08, 0.92)), "glass", 1)
    _car_ends(build, car, half)
    build.wheels(half, (low[0] * 0.62, nose[0] * 0.64), car.wheel)
    return build.mesh()


def _car_ends(build: _Builder, car: _CarShape, half: float) -> None:
    """Add lamps, plates, bumpers and grille."""
    (back, floor), (_, shoulder) = car.outline[0], car.outline[1]
    (nose, chin), (_, hood) = car.outline[-1], car.outline[-2]
    rear, front = back - 0.03, nose + 0.02
    build.on_end(rear, (-half, half), (floor, floor + 0.16), "trim")
    build.on_end(front, (-half, half), (chin, chin + 0.14), "trim")
    for side in (-1, 1):
        outer, inner = side * half * 0.98, side * half * 0.62
        build.on_end(rear, (outer, inner), (shoulder - 0.26, shoulder - 0.06), "tail")
        build.on_end(front, (outer, inner), (hood - 0.24, hood - 0.08), "head")
    build.on_end(rear - 0.01, (-0.26, 0.26), (floor + 0.22, floor + 0.34), "plate", 2)
    build.on_end(front + 0.01, (-0.5, 0.5), (chin + 0.16, hood - 0.14), "grille", 2)


def _inset(quad: Floats, u: tuple[float, float], v: tuple[float, float]) -> list[Point]:
    """A smaller quadrilateral in one with corners bottom-start, top-start, top-end, bottom-end."""
    bottom_start, top_start, top_end, bottom_end = quad
    points = []
    for along, up in ((u[0], v[0]), (u[0], v[1]), (u[1], v[1]), (u[1], v[0])):
        start = bottom_start + up * (top_start - bottom_start)
        end = bottom_end + up * (top_end - bottom_end)
        x, y, z = start + along * (end - start)
        points.append((float(x), float(y), float(z)))
    return points


@cache
def bus_mesh(shape: int) -> Mesh:
    """A city bus (0) or a coach (1), 11.5 m long."""
    half, length, height = 1.26, 11.5, 3.05 + 0.35 * shape
    end = length / 2
    build = _Builder()
    build.box((-half, 0.36, -end), (half, height, end), "paint", "paint", "roof")
    belt, top = (1.15, 2.45) if shape == 0 else (1.7, 2.9)
    build.on_side(half, (-end + 0.3, end - 0.9), (belt, top), "glass")
    for z in np.arange(-end + 1.6, end - 1.0, 1.45):
        build.on_side(half + 0.01, (float(z), float(z) + 0.1), (belt, top), "paint", 2)
    for z in (-end + 2.8, end - 1.9):
        build.on_side(half + 0.01, (z, z + 1.1), (0.45, top), "door", 2)
    build.on_side(half, (-end, end), (0.36, 0.62), "trim")
    build.on_side(half, (-end, end), (height - 0.42, height - 0.22), "stripe", 2)
    build.on_end(-end, (-half * 0.82, half * 0.82), (1.55, 2.55), "glass")
    build.on_end(-end, (-half * 0.6, half * 0.6), (height - 0.38, height - 0.12), "display", 2)
    build.on_end(-end, (-half, half), (0.36, 0.62), "trim")
    build.on_end(-end, (-0.9, 0.9), (0.75, 1.4), "grille", 2)
    build.on_end(end, (-half * 0.93, half * 0.93), (1.05, 2.5), "glass")
    build.on_end(end, (-half * 0.7, half * 0.7), (height - 0.42, height - 0.1), "display", 1)
    build.on_end(end, (-half, half), (0.36, 0.6), "trim")
    for side in (-1, 1):
        outer, inner = side * half * 0.96, side * half * 0.76
        build.on_end(-end - 0.01, (outer, inner), (0.75, 1.25), "tail", 1)
        build.on_end(end + 0.01, (outer, inner), (0.66, 0.9), "head", 1)
    build.wheels(half, (-end + 2.6, end - 2.4), 0.5, 0.35)
    return build.mesh()


@cache
def truck_mesh(shape: int) -> Mesh:
    """A truck of 8.6 m with a box (0), a tank (1) or an open load (2)."""
    half, end = 1.25, 4.3
    build = _Builder()
    if shape == 1:
        _tank(build, -end, 2.0, 1.15)
    else:
        top = 3.5 if shape == 0 else 1.9
        cargo = "cargo" if shape == 0 else "load"
        build.box((-half, 0.95, -end), (half, top, 2.1), cargo, cargo, "roof")
        build.on_side(half, (-end, 2.1), (0.95, 1.08), "trim")
        if shape == 0:
            build.on_side(half, (-end + 0.6, 1.5), (1.9, 2.7), "stripe", 2)
            build.on_end(-end - 0.01, (-0.04, 0.04), (1.0, top), "trim", 2)
            build.on_end(-end - 0.01, (-half, half), (top - 0.12, top), "trim", 2)
        else:
            for z in np.arange(-end + 0.9, 2.0, 1.2):
                build.on_side(half + 0.01, (float(z), float(z) + 0.1), (0.95, top), "trim", 2)
    build.on_end(-end - 0.01, (-half * 0.8, half * 0.8), (0.6, 1.0), "under", -1)
    build.on_side(half * 0.9, (-end, 2.3), (0.6, 1.0), "under", -1)
    build.on_end(-end - 0.02, (-half, half), (0.5, 0.72), "trim")
    for side in (-1, 1):
        outer, inner = side * half * 0.97, side * half * 0.68
        build.on_end(-end - 0.03, (outer, inner), (0.74, 0.92), "tail", 1)
    build.on_end(-end - 0.03, (-0.26, 0.26), (0.55, 0.68), "plate", 2)
    build.wheels(half, (-end + 1.1, -end + 2.2, 2.9), 0.5, 0.4)
    build.box((-half, 0.55, 2.35), (half, 2.9, end), "paint", "paint", "paint")
    build.on_side(half, (2.9, end - 0.15), (1.75, 2.6), "glass")
    build.on_end(end, (-half * 0.9, half * 0.9), (1.75, 2.65), "glass")
    build.on_end(end, (-half * 0.7, half * 0.7), (0.95, 1.55), "grille")
    build.on_end(end, (-half, half), (0.55, 0.8), "trim")
    for side in (-1, 1):
        outer, inner = side * half * 0.95, side * half * 0.68
        build.on_end(end + 0.01, (outer, inner), (0.78, 1.0), "head", 1)
    return build.mesh()


def _tank(build: _Builder, start: float, stop: float, radius: float) -> None:
    """Add a horizontal cylinder as a prism with ten sides."""
    build.part((0, 2.15, (start + stop) / 2))
    angles = np.linspace(0, 2 * pi, 10, endpoint=False) + pi / 10
    ring = [(radius * cos(a), 2.15 + radius * sin(a)) for a in angles]
    for (xa, ya), (xb, yb) in zip(ring, ring[1:] + ring[:1], strict=True):
        build.face([(xa, ya, start), (xb, yb, start), (xb, yb, stop), (xa, ya, stop)], "cargo")
    for z in (start, stop):
        build.face([(x, y, z) for x, y in ring], "cargo")
    inner = [(0.55 * x, 2.15 + 0.55 * (y - 2.15), start - 0.01) for x, y in ring]
    build.face(inner, "stripe", 2)


@cache
def tram_mesh(shape: int) -> Mesh:
    """One car, 13 m long, of a low tram (0) or of a tall train (1, 2)."""
    half, end = 1.28 + 0.12 * (shape > 0), 6.4
    floor, height = (0.22, 3.3) if shape == 0 else (0.75, 3.95)
    build = _Builder()
    build.part((0, height / 2, 0))
    slope = 0.55 if shape < 2 else 1.2
    # Both ends slope inward above the belt line.
    belt = floor + 0.85
    profile = [(-end, floor), (-end, belt), (-end + slope, height), (end - slope, height),
               (end, belt), (end, floor)]  # fmt: skip
    for (za, ya), (zb, yb) in pairwise(profile):
        material = "roof" if ya == yb == height else "paint"
        build.face([(-half, ya, za), (half, ya, za), (half, yb, zb), (-half, yb, zb)], material)
    for side in (-half, half):
        build.face([(side, y, z) for z, y in profile], "paint")
    top = height - 0.6
    build.on_side(half, (-end + slope + 0.2, end - slope - 0.2), (belt + 0.05, top), "glass")
    for z in np.arange(-end + slope + 1.5, end - slope - 0.6, 1.6):
        build.on_side(half + 0.01, (float(z), float(z) + 0.14), (belt, top), "paint", 2)
    for z in (-3.4, 2.1):
        build.on_side(half + 0.02, (z, z + 1.3), (floor + 0.1, top + 0.1), "door", 2)
    build.on_side(half + 0.01, (-end, end), (floor + 0.35, floor + 0.62), "stripe", 1)
    build.on_side(half + 0.01, (-end, end), (floor, floor + 0.16), "trim", 1)
    for sign in (-1, 1):
        low, high = (belt, sign * end), (height, sign * (end - slope))
        slanted = np.array([(-half, *low), (-half, *high), (half, *high), (half, *low)])
        build.face(_inset(slanted, (0.07, 0.93), (0.06, 0.68)), "glass", 1)
        build.face(_inset(slanted, (0.25, 0.75), (0.76, 0.93)), "display", 2)
        z = sign * (end + 0.01)
        build.on_end(z, (-half, half), (floor + 0.35, floor + 0.62), "stripe", 1)
        build.on_end(z, (-half, half), (floor, floor + 0.16), "trim", 1)
        lamp = "head" if sign > 0 else "tail"
        for x in (-half * 0.75, half * 0.75):
            build.on_end(z * 1.001, (x - 0.16, x + 0.16), (floor + 0.66, floor + 0.82), lamp, 2)
    if shape > 0:  # bogies
        build.on_side(half * 0.9, (-end + 0.8, -end + 3.0), (0.1, floor), "tire", -1)
        build.on_side(half * 0.9, (end - 3.0, end - 0.8), (0.1, floor), "tire", -1)
        build.on_end(-end + 0.5, (-half * 0.8, half * 0.8), (0.15, floor), "tire", -1)
        build.on_end(end - 0.5, (-half * 0.8, half * 0.8), (0.15, floor), "tire", -1)
    return build.mesh()


# ---------------------------------------------------------------------- drawing
def turn(points: Floats, heading: float) -> Floats:
    """Rotate points (..., 3) around the vertical axis by a heading."""
    c, s = cos(heading), sin(heading)
    matrix = np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])
    return np.asarray(points @ matrix)


def draw_mesh(
    canvas: Canvas,
    mesh: Mesh,
    position: Point,
    heading: float,
    scale: float,
    colors: Mapping[str, Color],
    surfaces: tuple[int, int],
    snow: float = 0.0,
) -> Floats:
    """Draw a mesh.

    Args:
        position: of its center on the ground, in camera coordinates (right, up, forward), meters.
        heading: radians, 0 away from the camera, pi/2 to the right.
        colors: color by material; other materials have the color of 'paint'.
        surfaces: numbers of the plain and of the glowing surface.
        snow: snow cover of faces that point up, 0 to 1.

    Returns:
        Corners (V, 3) of the mesh in camera coordinates, for shadows and lamps.
    """
    vertices = turn(mesh.vertices * scale, heading) + position
    normals = turn(mesh.normals, heading)
    to_faces = turn(mesh.centers * scale, heading) + position - (0, canvas.camera.eye, 0)
    visible = np.einsum("ij,ij->i", normals, to_faces) < 0
    distance = np.linalg.norm(turn(mesh.part_centers * scale, heading) + position, axis=1)
    if canvas.camera.pixels_per_meter(position[2]) < DETAIL_PIXELS:
        visible &= mesh.layers < 2
    order = np.lexsort((mesh.layers, -distance[mesh.parts]))
    corners = fixed_point(canvas.camera.project(vertices))
    paint = colors["paint"]
    base = np.array([colors.get(name, paint) for name in mesh.materials])
    shaded = base * canvas.shade(normals)[:, None]
    if snow > 0:
        white = (snow * np.clip(2 * normals[:, 1] - 0.6, 0, 1))[:, None]
        shaded += white * (np.array((236, 240, 246)) - shaded)
    shaded = np.clip(shaded, 0, 255)
    plain, glowing = surfaces
    for face in order[visible[order]]:
        lamp = mesh.materials[face] in GLOWING
        color = (base if lamp else shaded)[face].tolist()
        canvas.fixed_polygon(corners[mesh.faces[face]], color, glowing if lamp else plain)
    return np.asarray(vertices)
