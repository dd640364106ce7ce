"""Noise tiles, leaf sprites and facade patterns.

Tiles and sprites are computed on first use, from fixed seeds, and cached for the process. Scenes
use different parts of them, so an image depends on its own seed only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import cos, pi, sin
from typing import Literal

import cv2
import numpy as np

from street_renderer.camera import Floats
from street_renderer.canvas import Bytes, Color, times

TILE = 1024
GROUND_TILE = 256
"""Side of the noise tile of the ground, small enough for the CPU cache."""
Noise = Literal["fine", "grain", "patches", "clouds"]
_FALLOFF: dict[str, float] = {"fine": 0.0, "grain": 0.55, "patches": 1.15, "clouds": 1.6}


@cache
def noise_tile(kind: Noise, side: int = TILE) -> Floats:
    """Seamless noise (side, side) float32, mean 0, standard deviation 1, clipped to ±3.

    The spectrum falls with the frequency f as f^-a; a is 0 for `fine` (white noise) and grows
    over `grain` and `patches` to `clouds`.
    """
    seed = sorted(_FALLOFF).index(kind)
    white = np.random.default_rng((7411, seed)).standard_normal((side, side), dtype=np.float32)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    frequency[0, 0] = 1.0
    spectrum = np.fft.rfft2(white) * frequency ** -_FALLOFF[kind]
    spectrum[0, 0] = 0.0
    tile = np.fft.irfft2(spectrum, s=(side, side))
    tile = np.asarray(np.clip(tile / tile.std(), -3, 3), dtype=np.float32)
    tile.setflags(write=False)
    return tile


def noise_patch(rng: np.random.Generator, kind: Noise, rows: int, columns: int) -> Floats:
    """A random read-only crop of a noise tile, which is repeated for sizes above `TILE`."""
    tile = noise_tile(kind)
    if rows > TILE or columns > TILE:
        tile = np.tile(tile, (-(-rows // TILE), -(-columns // TILE)))
    top = int(rng.integers(tile.shape[0] - rows + 1))
    left = int(rng.integers(tile.shape[1] - columns + 1))
    return tile[top : top + rows, left : left + columns]


# ---------------------------------------------------------------------- plants
@dataclass(frozen=True)
class Sprite:
    """Mask (0 or 255) and light (0 to 255) of a plant, both (h, w) uint8."""

    mask: Bytes
    light: Bytes


Species = Literal["round", "tall", "conifer", "bush", "palm", "bare"]
_VARIANTS = 6
_SIDE = 144


@cache
def plant_sprites(species: Species) -> tuple[Sprite, ...]:
    """Six sprites of a species: crowns only, except for palms and bare trees."""
    makers = {"conifer": _conifer, "palm": _palm, "bare": _bare}
    sprites = []
    for variant in range(_VARIANTS):
        # Seeded with the species' letters: hash() differs between processes.
        rng = np.random.default_rng((911, variant, *species.encode()))
        maker = makers.get(species)
        sprites.append(_leafy(rng, species) if maker is None else maker(rng))
    return tuple(sprites)


def _leafy(rng: np.random.Generator, species: Species) -> Sprite:
    """A crown of overlapping leaf clumps, lit from above."""
    field = np.zeros((_SIDE, _SIDE), np.float32)
    light = np.full((_SIDE, _SIDE), 60, np.float32)
    spread_x, spread_y = {"tall": (22, 44), "bush": (48, 30)}.get(species, (40, 36))
    clumps = [
        (72 + spread_x * cos(a) * r, 72 + spread_y * sin(a) * r, rng.uniform(13, 25))
        for a, r in zip(rng.uniform(0, 2 * pi, 30), np.sqrt(rng.uniform(0, 1, 30)), strict=True)
    ]
    clumps.sort(key=lambda clump: -clump[1])  # lower clumps are behind upper ones
    rows, columns = np.mgrid[0:_SIDE, 0:_SIDE].astype(np.float32)
    for x, y, radius in clumps:
        inside = 1 - np.hypot(columns - x, rows - y) / radius
        field = np.maximum(field, inside)
        height = np.clip(0.5 - (rows - y) / (2 * radius) - (columns - x) / (4 * radius), 0, 1)
        clump_light = 70 + 120 * height - 0.7 * (y - 72)
        light = np.where(inside > 0.08, clump_light, light)
    noise = cv2.GaussianBlur(noise_patch(rng, "fine", _SIDE, _SIDE), (0, 0), 1.6)
    # Noise changes only the outline: there are no leaves far from all clumps.
    mask = ((field + 0.30 * noise > 0.10) & (field > 0.005)).astype(np.uint8) * 255
    mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    speckle = cv2.GaussianBlur(noise_patch(rng, "fine", _SIDE, _SIDE), (0, 0), 1.3)
    light = cv2.GaussianBlur(light, (0, 0), 1.5) + 75 * speckle
    return _trimmed(mask, light)


def _conifer(rng: np.random.Generator) -> Sprite:
    """Layers of drooping branches that become narrower towards the top."""
    mask = np.zeros((_SIDE, _SIDE), np.uint8)
    light = np.full((_SIDE, _SIDE), 70, np.float32)
    for layer in range(11):
        top = 4 + layer * 11
        reach = (8 + layer * 4.6) * rng.uniform(0.85, 1.1)
        for branch in np.linspace(-1, 1, 9):
            tip = (72 + reach * branch, top + 20 + 6 * (1 - abs(branch)) + rng.uniform(-2, 4))
            corners = np.array([[72, top], tip, [72 + 0.5 * reach * branch, top + 24]], np.int32)
            cv2.fillConvexPoly(mask, corners, 255)
            shade = 90 + 60 * (branch < 0) + rng.uniform(-15, 15)
            cv2.fillConvexPoly(light, corners, float(shade))
    speckle = cv2.GaussianBlur(noise_patch(rng, "fine", _SIDE, _SIDE), (0, 0), 1.0)
    return _trimmed(mask, light + 45 * speckle)


def _palm(rng: np.random.Generator) -> Sprite:
    """A thin trunk with hanging fronds."""
    mask = np.zeros((2 * _SIDE, _SIDE), np.uint8)
    light = np.zeros((2 * _SIDE, _SIDE), np.float32)
    lean = rng.uniform(-10, 10)
    for canvas, value in ((mask, 255.0), (light, 20.0)):
        corners = [[72 + lean - 2, 62], [72 + lean + 2, 62], [75, 2 * _SIDE], [69, 2 * _SIDE]]
        cv2.fillConvexPoly(canvas, np.array(corners, np.int32), value)
    for angle in np.concatenate([np.linspace(0.1, pi - 0.1, 9), rng.uniform(-0.4, pi + 0.4, 7)]):
        length = rng.uniform(42, 62)
        steps = np.linspace(0, 1, 9)
        x = 72 + lean + length * cos(angle) * steps
        y = 58 - length * 0.75 * sin(angle) * steps + 44 * steps**2
        points = np.stack([x, y], axis=1).round().astype(np.int32)
        for canvas, value in ((mask, 255.0), (light, float(rng.uniform(90, 215)))):
            for step, (a, b) in enumerate(pairwise(points)):
                cv2.line(canvas, a.tolist(), b.tolist(), value, 7 - step // 2)
    return _trimmed(mask, light)


def _bare(rng: np.random.Generator) -> Sprite:
    """A leafless tree with recursive branches; light 20 is bark."""
    mask = np.zeros((_SIDE, _SIDE), np.uint8)

    def grow(x: float, y: float, angle: float, length: float, width: int) -> None:
        tip_x, tip_y = x + length * cos(angle), y - length * sin(angle)
        cv2.line(mask, (round(x), round(y)), (round(tip_x), round(tip_y)), 255, max(width, 1))
        if length > 7:
            for turn in rng.uniform(0.15, 0.7, 2) * (1, -1):
                grow(tip_x, tip_y, angle + turn, length * rng.uniform(0.68, 0.82), width - 2)
            grow(tip_x, tip_y, angle + rng.uniform(-0.2, 0.2), length * 0.7, width - 2)

    grow(72.0, float(_SIDE), pi / 2, 40.0, 8)
    return _trimmed(mask, np.full((_SIDE, _SIDE), 20, np.float32))


def _trimmed(mask: Bytes, light: Floats) -> Sprite:
    x, y, width, height = cv2.boundingRect(mask)
    box = (slice(y, y + height), slice(x, x + width))
    brightness = np.clip(light, 0, 255).astype(np.uint8)
    return Sprite(mask[box].copy(), brightness[box].copy())


# ---------------------------------------------------------------------- facades and barriers
Pattern = Literal["punched", "ribbon", "curtain", "balcony", "house", "hall"]


@dataclass(frozen=True)
class FacadeColors:
    """Colors of one building."""

    wall: Color
    glass: Color
    frame: Color
    shop: Color

    def times(self, factor: float) -> FacadeColors:
        """All colors multiplied by a factor."""
        return FacadeColors(
            *(times(color, factor) for color in (self.wall, self.glass, self.frame, self.shop))
        )


_OPENINGS: dict[Pattern, tuple[float, float, float, float]] = {
    # left, right, top, bottom of the window as shares of one cell of the wall
    "punched": (0.26, 0.74, 0.22, 0.74),
    "ribbon": (0.03, 0.97, 0.26, 0.70),
    "curtain": (0.06, 0.94, 0.06, 0.94),
    "balcony": (0.18, 0.82, 0.16, 0.80),
    "house": (0.30, 0.70, 0.30, 0.72),
    "hall": (0.12, 0.88, 0.20, 0.36),
}


def facade(
    rng: np.random.Generator,
    pattern: Pattern,
    colors: FacadeColors,
    cells: tuple[int, int],
    cell_size: tuple[int, int],
    roughness: float,
    lit: float,
    shops: bool,
) -> Bytes:
    """Draw the facade of a building.

    Args:
        cells: (floors, windows per floor).
        cell_size: (height, width) of one cell in pixels; below 3, windows become a mean color.
        roughness: strength of plaster noise and brick joints, 0 to 1.
        lit: share of lit windows.
        shops: whether the ground floor has shop windows and signs.

    Returns:
        (floors * height, windows * width, 4) uint8: RGB, and 255 where a window is lit.
    """
    floors, columns = cells
    height, width = cell_size
    gain = np.ones((floors * height, columns * width), np.float32)
    if roughness > 0:
        _roughen(rng, gain, roughness)
    if pattern != "hall" and floors > 1:
        _draw_ledges(gain, height, shops)
    wall = cv2.merge([gain * np.float32(value) for value in colors.wall])
    lamps = np.zeros(gain.shape, np.uint8)
    grid = wall.reshape(floors, height, columns, width, 3)
    lights = lamps.reshape(floors, height, columns, width)
    if min(height, width) < 3:
        left, right, top, bottom = _OPENINGS[pattern]
        share = np.float32(0.9 * (right - left) * (bottom - top))
        wall += share * (np.asarray(colors.glass, np.float32) - wall)
    else:
        _draw_windows(rng, grid, lights, pattern, colors, lit)
        if shops:
            _draw_shops(rng, grid[-1], lights[-1], colors, lit)
    np.clip(wall, 0, 255, out=wall)
    return np.asarray(cv2.merge([*cv2.split(wall.astype(np.uint8)), lamps]))


def _roughen(rng: np.random.Generator, gain: Floats, roughness: float) -> None:
    rows, columns = gain.shape
    gain += np.float32(0.05 * roughness) * noise_patch(rng, "patches", rows, columns)
    gain += np.float32(0.03 * roughness) * noise_patch(rng, "grain", rows, columns)
    if rng.random() < 0.45:  # brick courses
        gain[::3] *= 1 - 0.12 * roughness
        gain[1::6, ::5] *= 1 - 0.10 * roughness
    gain[-max(1, rows // 24) :] *= 1 - 0.18 * roughness  # dirt near the ground


def _draw_windows(
    rng: np.random.Generator, grid: Floats, lights: Bytes, pattern: Pattern, colors: FacadeColors,
    lit: float,
) -> None:  # fmt: skip
    """Draw windows: grid (floors, height, columns, width, 3), lights without the last axis."""
    floors, height, columns, width = lights.shape
    left, right, top, bottom = _OPENINGS[pattern]
    y0, y1 = round(top * height), max(round(bottom * height), round(top * height) + 1)
    x0, x1 = round(left * width), max(round(right * width), round(left * width) + 1)
    frame = np.asarray(colors.frame, np.float32)
    if min(height, width) >= 7:  # frame and sill
        grid[:, max(y0 - 1, 0) : y1 + 1, :, max(x0 - 1, 0) : x1 + 1] = frame
        grid[:, y1 : y1 + 1, :, x0:x1] *= 0.72
    each = (floors, 1, columns, 1)
    reflection = rng.normal(1.0, 0.16, each).astype(np.float32)
    panes = np.asarray(colors.glass, np.float32) * reflection[..., None]
    drawn = rng.random(each) < 0.25  # curtains
    panes[drawn] += 0.5 * (np.array((225, 220, 208), np.float32) - panes[drawn])
    on = rng.random(each) < lit
    warmth = rng.uniform(0.7, 1.0, (*each, 1)).astype(np.float32)
    panes = np.where(on[..., None], warmth * np.array((255, 214, 140), np.float32), panes)
    grid[:, y0:y1, :, x0:x1] = panes
    lights[:, y0:y1, :, x0:x1] = np.where(on, np.uint8(255), np.uint8(0))
    if y1 - y0 >= 6:  # reflection of the sky
        grid[:, y0 : y0 + (y1 - y0) // 3, :, x0:x1] *= 1.18
    if x1 - x0 >= 6 and pattern != "ribbon":  # mullion
        bar = grid[:, y0:y1, :, (x0 + x1) // 2]
        bar += 0.5 * (frame - bar)
    if pattern == "balcony":
        rail = slice(round(0.70 * height), round(0.96 * height))
        grid[:, rail, ::2] = frame * 0.82
        lights[:, rail, ::2] = 0
        grid[:, rail, ::2, ::3] *= 0.72


def _draw_shops(
    rng: np.random.Generator, ground: Floats, lights: Bytes, colors: FacadeColors, lit: float
) -> None:
    """Draw shop windows, doors and signs into the ground floor (height, columns, width, 3)."""
    height, columns, width = lights.shape
    ground *= 0.82
    glow = 255 if lit > 0 else 0
    lights[:] = 0
    edge = max(1, width // 10)
    inside = slice(edge, width - edge)
    window = slice(round(0.34 * height), round(0.88 * height))
    pane = np.array((255, 226, 170) if glow else [0.85 * v for v in colors.glass], np.float32)
    ground[window, :, inside] = pane * rng.uniform(0.75, 1.1, (1, columns, 1, 1)).astype(np.float32)
    lights[window, :, inside] = glow
    doors = rng.random(columns) < 0.25
    below = slice(round(0.34 * height), height)
    ground[below, doors, inside] = np.asarray(colors.frame, np.float32) * 0.55
    lights[below, doors, inside] = 0
    signs = np.repeat(rng.random((columns + 2) // 3) < 0.7, 3)[:columns]
    first, last = round(0.12 * height), round(0.32 * height)
    ground[first:last, signs] = colors.shop
    lights[first:last, signs] = glow
    if width >= 8 and height >= 12:  # lettering
        letters = slice(first + (last - first) // 3, last - (last - first) // 4)
        ink = 255.0 - 0.6 * np.asarray(colors.shop, np.float32)
        ground[letters, signs, width // 5 : width - width // 5 : 2] = ink


def _draw_ledges(gain: Floats, height: int, shops: bool) -> None:
    """Draw a cornice below the roof and, above shops, a ledge."""
    thick = max(1, height // 7)
    gain[:thick] *= 1.15
    gain[thick : thick + 1] *= 0.75
    if shops:
        row = gain.shape[0] - height
        gain[row : row + max(1, thick // 2)] *= 1.15


def masonry(
    rng: np.random.Generator, color: Color, size: tuple[int, int],
    kind: Literal["concrete", "brick", "stone"], roughness: float,
) -> Bytes:  # fmt: skip
    """Texture of a free-standing wall, (rows, columns, 4) uint8; the fourth channel is unused."""
    rows, columns = size
    wall = np.zeros((rows, columns, 4), np.float32)
    noise = 0.05 * noise_patch(rng, "patches", rows, columns)
    noise = noise + 0.05 * noise_patch(rng, "grain", rows, columns)
    wall[..., :3] = np.asarray(color, np.float32) * (1 + (0.3 + roughness) * noise)[..., None]
    if kind == "concrete":
        wall[:, :: max(6, columns // 6), :3] *= 0.72
        wall[rows // 2 : rows // 2 + 1, :, :3] *= 0.9
    else:
        course = 3 if kind == "brick" else 6
        wall[::course, :, :3] *= 0.74
        for row in range(0, rows, course):
            start = (row // course % 2) * course
            wall[row : row + course, start :: 2 * course, :3] *= 0.76
            if kind == "stone":
                tone = rng.uniform(0.82, 1.14, columns // (2 * course) + 2)
                blocks = np.repeat(tone, 2 * course)[2 * course - start :][:columns]
                wall[row : row + course, :, :3] *= blocks[None, :, None]
    wall[: max(1, rows // 12), :, :3] *= 1.22  # coping
    return np.clip(wall, 0, 255).astype(np.uint8)


FenceKind = Literal["pickets", "bars", "mesh", "railing"]


def fence_pattern(kind: FenceKind, color: Color, posts: int, size: tuple[int, int]) -> Bytes:
    """Texture of a fence, (rows, columns, 4) uint8 with alpha in the fourth channel.

    Args:
        posts: number of fields between posts.
        size: (rows, columns) of the texture.
    """
    rows, columns = size
    fence = np.zeros((rows, columns, 4), np.uint8)
    fence[..., :3] = np.asarray(color, np.uint8)
    cover = fence[..., 3]
    thin = max(1, rows // 24)
    if kind == "pickets":
        step = 5
        for shift in range(3):
            cover[rows // 10 :, shift::step] = 255
    elif kind == "bars":
        cover[:, ::4] = 255
    elif kind == "mesh":
        cover[:] = 60
        cover[::4] = 120
        cover[:, ::4] = 120
    else:  # railing: horizontal bars
        for row in np.linspace(0, rows - thin - 1, 4).astype(int):
            cover[row : row + thin] = 255
    cover[: 2 * thin] = 255
    if kind in ("pickets", "bars"):
        cover[rows * 3 // 4 : rows * 3 // 4 + thin] = 255
    width = max(2, columns // (posts * 14))
    for post in np.linspace(0, columns - width, posts + 1).astype(int):
        cover[:, post : post + width] = 255
        fence[:, post : post + width, :3] = np.asarray(color) * 0.72
    return fence


def hedge_pattern(rng: np.random.Generator, color: Color, size: tuple[int, int]) -> Bytes:
    """Texture of a hedge, (rows, columns, 4) uint8; the fourth channel is unused."""
    rows, columns = size
    leaves = np.zeros((rows, columns, 4), np.float32)
    speckle = cv2.GaussianBlur(noise_patch(rng, "fine", rows, columns), (0, 0), 0.9)
    clumps = noise_patch(rng, "patches", rows, columns)
    fall = np.linspace(1.25, 0.65, rows, dtype=np.float32)[:, None]
    light = fall * (1 + 0.55 * speckle + 0.12 * clumps)
    leaves[..., :3] = np.asarray(color, np.float32) * light[..., None]
    return np.clip(leaves, 0, 255).astype(np.uint8)
