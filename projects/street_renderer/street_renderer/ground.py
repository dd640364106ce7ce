"""The ground: road, markings, footpaths, grass, computed per pixel from its ground position."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from street_renderer.camera import Floats
from street_renderer.canvas import Bytes, Canvas, Surface
from street_renderer.layout import CLASSES, Ground, SceneLayout
from street_renderer.shadows import ground_light
from street_renderer.textures import GROUND_TILE, noise_tile

_KINDS: tuple[Ground, ...] = ("road", "parking", "curb", "sidewalk", "terrain", "soil")
_LABELS: dict[Ground, str] = {
    "road": "road", "parking": "road", "curb": "sidewalk", "sidewalk": "sidewalk",
    "terrain": "terrain", "soil": "terrain",
}  # fmt: skip
_ROUGHNESS = (0.075, 0.09, 0.05, 0.07, 0.24, 0.20)
"""Texture strength of each type of ground."""
_WET = (0.68, 0.68, 0.8, 0.78, 0.85, 0.8)
"""Brightness factor of each type of ground when wet."""
_ROAD, _PARKING, _CURB, _SIDEWALK = range(4)

_REACH = 45.0
"""Range of the lookup tables over lateral positions, meters to each side."""
_STEPS = 50
"""Entries of the lookup tables per meter."""
_LINE_WIDTH = 0.15
_DASH, _PERIOD = 4.0, 9.0
_SLAB = 0.9
"""Length of a paving slab, meters."""


@dataclass(frozen=True)
class _View:
    """Ground positions of the pixels from row `first_row`; arrays are (rows, columns).

    Attributes:
        lateral, forward: position across and along the road, meters.
        entry: index into the tables over lateral positions.
        kind: index of the type of ground in `_KINDS`.
    """

    first_row: int
    lateral: Floats
    forward: Floats
    entry: npt.NDArray[np.int32]
    kind: Bytes


def draw_ground(canvas: Canvas, rng: np.random.Generator, layout: SceneLayout) -> Floats:
    """Draw the ground, with the shadows on it, over the lower part of the canvas.

    Returns:
        Distance of the ground in every pixel, meters, (rows, columns) float32; infinite above
        the horizon.
    """
    camera = canvas.camera
    distance = np.full((camera.rows, camera.columns), np.inf, np.float32)
    first = camera.first_ground_row()
    if first >= camera.rows:
        return distance
    view = _ground_view(canvas, layout, first)
    distance[first:] = view.forward
    planes = _lookup(view.kind, _surface_colors(canvas, rng))
    gain = _texture(canvas, rng, view)
    _darken_joints(canvas, view, gain)
    _darken_wear(rng, layout, view, gain)
    _draw_marks(canvas, rng, layout, view, planes)
    if canvas.look.weather == "snow":
        _cover_with_snow(rng, view, planes, gain)
    planes *= gain * ground_light(canvas, layout, first)
    np.minimum(planes, 255, out=planes)
    numbers = np.zeros(256, np.uint8)
    for number, kind in enumerate(_KINDS):
        label = CLASSES.index(_LABELS[kind])
        numbers[number] = canvas.add_surface(Surface(label, None))
    drawn = cv2.merge([*planes.astype(np.uint8), cv2.LUT(view.kind, numbers)])
    below = (camera.below_horizon(first) > 0).astype(np.uint8)
    cv2.copyTo(drawn, below, canvas.pixels[first:])
    return distance


def _ground_view(canvas: Canvas, layout: SceneLayout, first: int) -> _View:
    right, forward = canvas.camera.ground(first)
    lateral = right - layout.bend(forward).astype(np.float32)
    entry = np.minimum(np.maximum(lateral, -_REACH), _REACH - 0.1)
    entry = ((entry + np.float32(_REACH)) * np.float32(_STEPS)).astype(np.int32)
    table = np.zeros(round(2 * _REACH * _STEPS), np.uint8)
    for band in layout.bands:
        start, end = (round((x + _REACH) * _STEPS) for x in (band.start, band.end))
        table[max(start, 0) : max(end, 0)] = _KINDS.index(band.ground)
    kind = table[entry]
    if layout.crossing is not None:
        near, far = layout.crossing
        kind[(forward > near) & (forward < far)] = _ROAD
    return _View(first, lateral, forward, entry, kind)


def _lookup(kind: Bytes, table: Floats) -> Floats:
    """Planes (C, rows, columns) float32 from a table (K, C), indexed by kind (rows, columns)."""
    planes = np.empty((table.shape[1], *kind.shape), np.float32)
    for plane, column in zip(planes, table.T, strict=True):
        cv2.LUT(kind, np.pad(column.astype(np.float32), (0, 256 - len(column))), plane)
    return planes


def _surface_colors(canvas: Canvas, rng: np.random.Generator) -> Floats:
    look = canvas.look
    road = np.array(look.color(rng, "asphalt"))
    colors = [road, road * rng.uniform(0.88, 1.08)]
    colors += [np.array(look.color(rng, kind)) for kind in _KINDS[2:]]
    table = np.array(colors)
    if look.weather == "rain":
        table *= np.array(_WET)[:, None]
    return np.asarray(table * (0.92 + 0.22 * look.direct * look.sun[1]))


def _texture(canvas: Canvas, rng: np.random.Generator, view: _View) -> Floats:
    """Brightness factors around 1: grain that decreases with distance, and large patches."""
    shift = rng.uniform(0, GROUND_TILE, 4).astype(np.float32)
    across, along = view.lateral * 42 + shift[0], view.forward * 42 + shift[1]
    tile = noise_tile("grain", GROUND_TILE)
    near = cv2.remap(tile, across, along, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    near *= np.minimum(np.float32(16.0) / view.forward, 1)
    near += np.float32(0.6) * _patches(view, (9.0, 4.0), (float(shift[2]), float(shift[3])))
    strength = np.float32(0.25 + canvas.look.style.texture)
    amount = _lookup(view.kind, np.array(_ROUGHNESS)[:, None] * strength)[0]
    near *= amount
    near += 1
    return np.asarray(near)


def _patches(view: _View, scale: tuple[float, float], shift: tuple[float, float]) -> Floats:
    """Smooth noise on the ground, computed at half resolution."""
    rows, columns = view.lateral.shape
    small = cv2.remap(
        noise_tile("patches", GROUND_TILE),
        view.lateral[::2, ::2] * np.float32(scale[0]) + np.float32(shift[0]),
        view.forward[::2, ::2] * np.float32(scale[1]) + np.float32(shift[1]),
        cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP,
    )  # fmt: skip
    return np.asarray(cv2.resize(small, (columns, rows), interpolation=cv2.INTER_LINEAR))


def _darken_joints(canvas: Canvas, view: _View, gain: Floats) -> None:
    """Darken the joints between slabs of footpaths and curbs near the camera."""
    farthest = 22.0
    rows = _rows_nearer(view, farthest)
    paved = (view.kind[rows] == _SIDEWALK) | (view.kind[rows] == _CURB)
    if not paved.any():
        return
    forward = view.forward[rows]
    # 32 units per slab: the remainder is a bit mask.
    unit = np.float32(32 / _SLAB)
    across = ((forward * unit).astype(np.int16) & 31) < 2
    along = ((view.lateral[rows] * unit).astype(np.int16) & 31) < 2
    fade = np.maximum(1.25 - forward * np.float32(1.25 / farthest), 0)
    strength = np.float32(0.12 + 0.16 * canvas.look.style.texture)
    gain[rows] -= strength * fade * (paved & (across | along))


def _darken_wear(rng: np.random.Generator, layout: SceneLayout, view: _View, gain: Floats) -> None:
    """Darken wheel tracks, repaired patches of asphalt and tram rails."""
    positions = np.arange(-_REACH, _REACH, 1 / _STEPS)
    tracks = (1 - 0.045 * np.cos(positions * (2 * np.pi / 1.7))).astype(np.float32)
    road = view.kind <= _PARKING
    gain *= np.where(road, tracks[view.entry], np.float32(1))
    left, right = layout.road
    for _ in range(int(rng.integers(0, 5))):
        x, z = rng.uniform(left, right), rng.uniform(4, 25)
        wide, long = rng.uniform(0.4, 1.8), rng.uniform(0.8, 6)
        tone = np.float32(rng.uniform(0.82, 1.1))
        rows = _rows_between(view, z - long, z + long)
        inside = (np.abs(view.forward[rows] - np.float32(z)) < long) & road[rows]
        inside &= np.abs(view.lateral[rows] - np.float32(x)) < wide
        gain[rows][inside] *= tone
    rows = _rows_nearer(view, 70.0)
    for middle in layout.rails:
        for rail in (middle - 0.72, middle + 0.72):
            width = np.maximum(np.float32(0.05), view.forward[rows] * np.float32(0.0016))
            on_rail = np.abs(view.lateral[rows] - np.float32(rail)) < width
            gain[rows][on_rail & road[rows]] *= np.float32(0.55)


_WHITE, _WHITE_DASHED, _CENTER, _CENTER_DASHED = range(1, 5)


def _mark_tables(layout: SceneLayout) -> tuple[Floats, Bytes]:
    """For every lateral position: distance to the nearest line in meters, and its type."""
    positions = np.arange(-_REACH, _REACH, 1 / _STEPS, dtype=np.float32) + 0.5 / _STEPS
    gap = np.full(len(positions), 99.0, np.float32)
    sort = np.zeros(len(positions), np.uint8)
    for mark in layout.marks:
        away = np.abs(positions - np.float32(mark.lateral))
        nearer = away < gap
        gap[nearer] = away[nearer]
        sort[nearer] = (_CENTER if mark.center else _WHITE) + mark.dashed
    return gap, sort


def _draw_marks(
    canvas: Canvas, rng: np.random.Generator, layout: SceneLayout, view: _View, planes: Floats
) -> None:
    """Draw lane marks, crosswalk and stop line."""
    look = canvas.look
    gaps, types = _mark_tables(layout)
    gap, sort = gaps[view.entry], types[view.entry]
    # Coverage of the pixel: lines may be thinner than a pixel.
    per_meter = np.float32(canvas.camera.focal) / view.forward
    cover = np.minimum(np.maximum((_LINE_WIDTH / 2 - gap) * per_meter + 0.5, 0), 1)
    cover *= np.minimum(per_meter * np.float32(_LINE_WIDTH), 1)
    start = np.float32(rng.uniform(0, _PERIOD))
    phase = (view.forward + start) * np.float32(1 / _PERIOD)
    visible = (phase - np.floor(phase)) < _DASH / _PERIOD
    cover *= visible | (sort == _WHITE) | (sort == _CENTER)
    if layout.crossing is not None:
        near, far = layout.crossing
        cover *= (view.forward < near - 1) | (view.forward > far + 1)
    _mark_crossing(layout, view, cover, sort)
    cover *= np.float32(rng.uniform(0.6, 0.98)) * (view.kind == _ROAD)
    white, center = look.color(rng, "marking"), look.color(rng, "center")
    colors = _lookup(sort, np.array([white, white, white, center, center]))
    colors -= planes
    colors *= cover
    planes += colors


def _mark_crossing(layout: SceneLayout, view: _View, cover: Floats, sort: Bytes) -> None:
    """Add crosswalk and stop line to coverage and line type."""
    left, right = layout.road
    if layout.crosswalk is not None:
        near, far = layout.crosswalk
        rows = _rows_between(view, near, far)
        lateral, forward = view.lateral[rows], view.forward[rows]
        stripes = (lateral % np.float32(1.1)) < 0.55
        stripes &= (forward > near) & (forward < far) & (lateral > left) & (lateral < right)
        cover[rows][stripes], sort[rows][stripes] = 1, _WHITE
    if layout.crossing is not None:
        line = (layout.crosswalk or layout.crossing)[0] - 1.2
        rows = _rows_between(view, line - 0.35, line)
        lateral, forward = view.lateral[rows], view.forward[rows]
        stop = (forward > line - 0.35) & (forward < line) & (lateral > -1.6) & (lateral < right)
        cover[rows][stop], sort[rows][stop] = 1, _WHITE


def _cover_with_snow(rng: np.random.Generator, view: _View, planes: Floats, gain: Floats) -> None:
    """Cover the ground with snow; thinner on the road, with wheel tracks."""
    shift = rng.uniform(0, GROUND_TILE, 2)
    patches = _patches(view, (20.0, 6.0), (float(shift[0]), float(shift[1])))
    depth = rng.uniform(0.15, 0.8)
    cover = np.array([depth, depth + 0.25, 0.75, 0.82, 0.95, 0.92])
    share = _lookup(view.kind, cover[:, None])[0] + np.float32(0.2) * patches
    tracks = (np.cos(view.lateral * np.float32(2 * np.pi / 1.7)) + 0.25 * patches) > 0.25
    share[tracks & (view.kind == _ROAD)] -= 0.5
    np.clip(share, 0, 1, out=share)
    for plane, white in zip(planes, (226.0, 230.0, 238.0), strict=True):
        plane += share * (white - plane)
    gain -= np.float32(0.55) * share * (gain - 1)  # snow reduces the texture below it


def _rows_nearer(view: _View, distance: float) -> slice:
    """The rows with ground nearer than a distance in meters."""
    return _rows_between(view, 0.0, distance)


def _rows_between(view: _View, near: float, far: float) -> slice:
    """The rows that may contain ground between two distances (the horizon may be tilted)."""
    ends = view.forward[:, [0, -1]]
    inside = np.flatnonzero((ends.min(axis=1) < far) & (ends.max(axis=1) > near))
    return slice(int(inside[0]), int(inside[-1]) + 1) if len(inside) else slice(0, 0)
