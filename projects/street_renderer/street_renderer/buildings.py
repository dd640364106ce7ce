"""Buildings along the street, walls, fences and hedges, and the background at the horizon."""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot

import numpy as np

from street_renderer.camera import Floats
from street_renderer.canvas import Canvas, Color, Surface, mixed, times
from street_renderer.layout import CLASSES, FAR, Barrier, Block, SceneLayout
from street_renderer.style import Look
from street_renderer.textures import (
    FacadeColors,
    FenceKind,
    Pattern,
    facade,
    fence_pattern,
    hedge_pattern,
    masonry,
)

GroundPoint = tuple[float, float]
"""A position on the ground: (lateral, distance) in meters."""

_BUILDING, _WALL, _FENCE, _TREES = (
    CLASSES.index(name) for name in ("building", "wall", "fence", "vegetation")
)
_NEAR_CLIP = 1.2
"""Near clipping distance of fronts, meters; nearer parts are outside the image."""
_FLOOR = 3.1
"""Height of a story, meters."""
_LIT = {"day": 0.0, "dusk": 0.18, "night": 0.32}
"""Share of lit windows."""
_RISE = {"tower": 0.0, "flats": 0.0, "terrace": 0.3, "house": 0.3, "hall": 0.0}
"""Maximum height of the roof, as a share of the building's depth."""
_PATTERNS: dict[str, tuple[Pattern, ...]] = {
    "tower": ("curtain", "ribbon", "punched", "balcony"),
    "flats": ("punched", "balcony", "punched", "ribbon"),
    "terrace": ("punched", "punched", "house"),
    "house": ("house",),
    "hall": ("hall", "ribbon"),
}


def _upright_quad(
    layout: SceneLayout, start: GroundPoint, end: GroundPoint, low: float, high: float
) -> Floats:  # fmt: skip
    """Corners (4, 3) of a vertical rectangle over two (lateral, distance) points.

    Order: top at start, top at end, bottom at end, bottom at start.
    """
    xa, xb = (point[0] + layout.bend_at(point[1]) for point in (start, end))
    return np.array([(xa, high, start[1]), (xb, high, end[1]), (xb, low, end[1]),
                     (xa, low, start[1])])  # fmt: skip


def _brightness(canvas: Canvas, quad: Floats, toward: GroundPoint) -> float:
    """Shading of a vertical face as seen from the point `toward`, (right, forward) meters."""
    along_x, _, along_z = (quad[1] - quad[0]).tolist()
    length = max(hypot(along_x, along_z), 1e-9)
    normal = np.array([-along_z / length, 0.0, along_x / length])
    middle = 0.5 * (quad[0] + quad[1])
    if normal[0] * (toward[0] - middle[0]) + normal[2] * (toward[1] - middle[2]) < 0:
        normal = -normal
    return float(canvas.shade(normal))


def _pixels(canvas: Canvas, quad: Floats) -> tuple[Floats, float, float]:
    """Projected corners, and mean height and width in pixels."""
    corners = canvas.camera.project(quad)
    height = 0.5 * (abs(corners[3, 1] - corners[0, 1]) + abs(corners[2, 1] - corners[1, 1]))
    return corners, float(height), float(abs(corners[1, 0] - corners[0, 0]))


def _in_image(canvas: Canvas, corners: Floats) -> bool:
    (left, top), (right, bottom) = corners.min(axis=0), corners.max(axis=0)
    camera = canvas.camera
    return bool(right > 0 and left < camera.columns and bottom > 0 and top < camera.rows)


@dataclass(frozen=True)
class VisibleBlock:
    """A building, and which of its two faces are visible: along the street, facing the camera."""

    number: int
    block: Block
    front: bool
    end: bool


def visible_blocks(canvas: Canvas, layout: SceneLayout) -> list[VisibleBlock]:
    """The buildings that are at least partly visible.

    A building occludes, in its columns, everything behind it up to its own top.
    """
    columns = np.arange(canvas.camera.columns)
    hidden_below = np.full(len(columns), float(canvas.camera.rows))
    result = []
    for index in sorted(range(len(layout.blocks)), key=lambda i: layout.blocks[i].near):
        block = layout.blocks[index]
        near, far = _span(block)
        roof = canvas.camera.pixels_per_meter(near) * _RISE[block.kind] * block.depth
        back = block.lateral + (block.depth if block.lateral > 0 else -block.depth)
        faces = [[(block.lateral, near), (block.lateral, far)]]
        if block.near >= _NEAR_CLIP:
            faces.append([(back, near), (block.lateral, near)])
        tops, visible = [], [False, False]
        for number, spots in enumerate(faces):
            points = [(x + layout.bend_at(z), block.height, z) for x, z in spots]
            left, right = sorted(canvas.camera.project(np.array(points)).tolist())
            first, last = (int(min(max(x, 0), len(columns))) for x in (left[0], right[0] + 1))
            inside = slice(first, last)
            slope = (right[1] - left[1]) / max(right[0] - left[0], 1e-6)
            top = left[1] + slope * (columns[inside] - left[0])
            visible[number] = bool((top - roof < hidden_below[inside]).any())
            tops.append((inside, top))
        for inside, top in tops:
            hidden_below[inside] = np.minimum(hidden_below[inside], top)
        if any(visible):
            result.append(VisibleBlock(index, block, *visible))
    return result


def _span(block: Block) -> tuple[float, float]:
    """Distances of the part of a building's street front in front of the camera."""
    return max(block.near, _NEAR_CLIP), max(block.far, _NEAR_CLIP + 0.5)


def draw_block(
    canvas: Canvas, rng: np.random.Generator, layout: SceneLayout, visible: VisibleBlock
) -> None:
    """Draw a building: the wall along the street, the wall facing the camera and the roof."""
    block = visible.block
    near, far = _span(block)
    patterns = _PATTERNS[block.kind]
    pattern = patterns[int(rng.integers(len(patterns)))]
    bay = float(rng.uniform(2.0, 3.4)) * (1.6 if block.kind == "hall" else 1.0)
    colors = _facade_colors(canvas.look, rng, glassy=pattern == "curtain")
    plain = canvas.add_surface(Surface(_BUILDING, 0.5 * (near + far), 0.5))
    glowing = 0
    if canvas.look.time != "day":
        glowing = canvas.add_surface(Surface(_BUILDING, 0.5 * (near + far), 0.5, glowing=True))

    def face(
        start: GroundPoint, end: GroundPoint, pattern: Pattern, toward: GroundPoint, shops: bool
    ) -> None:
        quad = _upright_quad(layout, start, end, 0, block.height)
        corners, height, width = _pixels(canvas, quad)
        length = hypot(end[0] - start[0], end[1] - start[1])
        cells = max(1, round(block.height / _FLOOR)), max(1, round(length / bay))
        size = _cell(height / cells[0]), _cell(width / cells[1])
        shaded = colors.times(_brightness(canvas, quad, toward))
        lit, rough = _LIT[canvas.look.time], canvas.look.style.texture
        texture = facade(rng, pattern, shaded, cells, size, rough, lit, shops)
        canvas.textured(corners, texture, plain, glowing)

    if visible.end:
        back = block.lateral + (block.depth if block.lateral > 0 else -block.depth)
        plainer: Pattern = "punched" if pattern == "balcony" else pattern
        face((back, near), (block.lateral, near), plainer, (0.0, 0.0), False)
    if visible.front:
        toward = (layout.bend_at(near), near)
        face((block.lateral, near), (block.lateral, far), pattern, toward, block.shops)
    if _RISE[block.kind]:
        _draw_roof(canvas, rng, layout, block, plain)


def _facade_colors(look: Look, rng: np.random.Generator, glassy: bool) -> FacadeColors:
    wall, glass, frame, shop = (look.color(rng, m) for m in ("facade", "glass", "curb", "shop"))
    # Glass towers: the wall color is close to that of the glass.
    return FacadeColors(mixed(wall, glass, 0.6) if glassy else wall, glass, frame, shop)


def _draw_roof(
    canvas: Canvas, rng: np.random.Generator, layout: SceneLayout, block: Block, surface: int
) -> None:
    """Draw a pitched roof with its ridge along the street."""
    look = canvas.look
    near, far = _span(block)
    out = 1.0 if block.lateral > 0 else -1.0
    low, rise = block.height, float(rng.uniform(0.55, 1.0)) * _RISE[block.kind] * block.depth
    eaves, ridge = block.lateral - 0.35 * out, block.lateral + 0.5 * out * block.depth
    color = look.color(rng, "roof")
    if look.weather == "snow":
        color = mixed(color, (238, 242, 248), 0.85)

    def fill(corners: list[tuple[float, float, float]], color: Color, shade: float) -> None:
        points = [(x + layout.bend_at(z), y, z) for x, y, z in corners]
        canvas.polygon(canvas.camera.project(np.array(points)), times(color, shade), surface)

    if block.near >= _NEAR_CLIP:
        shade = float(canvas.shade(np.array([0.0, 0.0, -1.0])))
        gable = [(eaves, low, near), (ridge, low + rise, near)]
        fill(
            [*gable, (block.lateral + out * block.depth, low, near)],
            look.color(rng, "facade"),
            shade,
        )
    normal = np.array([-out * rise, block.depth / 2, 0.0])
    shade = float(canvas.shade(normal / np.linalg.norm(normal)))
    under, top = low - 0.15, low + rise
    fill([(eaves, under, near), (eaves, under, far), (ridge, top, far), (ridge, top, near)],
         color, shade)  # fmt: skip
    if rng.random() < 0.6:  # a chimney
        z = near + float(rng.uniform(0.2, 0.8)) * (far - near)
        left, right = ridge - 0.4, ridge + 0.4
        box = [
            (left, top - 0.5, z),
            (left, top + 0.9, z),
            (right, top + 0.9, z),
            (right, top - 0.5, z),
        ]
        fill(box, color, 0.8 * shade)


def draw_barrier(
    canvas: Canvas, rng: np.random.Generator, layout: SceneLayout, barrier: Barrier
) -> None:
    """Draw a segment of wall, fence or hedge along the street."""
    near, far = max(barrier.near, _NEAR_CLIP), max(barrier.far, _NEAR_CLIP + 0.3)
    quad = _upright_quad(layout, (barrier.lateral, near), (barrier.lateral, far), 0, barrier.height)
    corners, height, width = _pixels(canvas, quad)
    if not _in_image(canvas, corners):
        return
    look = canvas.look
    # All segments of one barrier have the same variant, hence the same material and color.
    own = np.random.default_rng(barrier.variant)
    shade = _brightness(canvas, quad, (0.0, float(quad[0, 2])))
    size = (round(min(max(height, 6), 96)), round(min(max(width, 6), 160)))
    distance = 0.5 * (near + far)
    if barrier.kind == "fence":
        kinds: tuple[FenceKind, ...] = ("pickets", "bars", "mesh", "railing", "pickets")
        color = times(look.color(own, "fence"), shade)
        pattern = fence_pattern(kinds[barrier.variant % len(kinds)], color, 2, size)
        canvas.see_through(corners, pattern, canvas.add_surface(Surface(_FENCE, distance)))
    elif barrier.kind == "wall":
        color = times(look.color(own, "wall"), shade)
        made = ("concrete", "brick", "stone")[barrier.variant % 3]
        texture = masonry(rng, color, size, made, look.style.texture)  # type: ignore[arg-type]
        canvas.textured(corners, texture, canvas.add_surface(Surface(_WALL, distance, 0.5)))
    else:
        color = times(look.color(own, "leaves"), shade)
        if look.weather == "snow":
            color = mixed(color, (225, 230, 236), 0.4)
        texture = hedge_pattern(rng, color, size)
        canvas.textured(corners, texture, canvas.add_surface(Surface(_TREES, distance, 1.0)))


def draw_horizon(canvas: Canvas, rng: np.random.Generator, layout: SceneLayout) -> None:
    """Draw distant buildings, trees or hills at the horizon."""
    camera, look = canvas.camera, canvas.look
    columns = camera.columns
    if layout.horizon == "bare":
        return
    ground = _horizon_rows(canvas)
    if layout.horizon == "city":
        surface = canvas.add_surface(Surface(_BUILDING, 220.0, 0.5))
        position = -10.0
        while position < columns:
            width = float(rng.uniform(0.02, 0.07)) * columns
            height = camera.pixels_per_meter(200.0) * float(rng.gamma(3.0, 7.0) + 6)
            color = look.color(rng, "distant")
            base = float(np.interp(position, np.arange(columns), ground)) + 3
            top = base - height
            box = np.array([(position, base), (position, top), (position + width, top),
                            (position + width, base)])  # fmt: skip
            canvas.polygon(box, color, surface)
            position += width * float(rng.uniform(0.7, 1.2))
    if layout.horizon == "hills":
        color = mixed(look.color(rng, "leaves"), look.color(rng, "distant"), 0.65)
        surface = canvas.add_surface(Surface(_TREES, 400.0, 0.4))
        _ridge(canvas, rng, ground, 30.0, 0.5, color, surface)
    color = mixed(look.color(rng, "leaves"), look.color(rng, "distant"), 0.3)
    if look.weather == "snow":
        color = mixed(color, (220, 226, 234), 0.3)
    surface = canvas.add_surface(Surface(_TREES, 170.0, 1.0))
    height = 9.0 if layout.horizon == "trees" else 4.0
    _ridge(canvas, rng, ground, height, 3.0, color, surface)


def _ridge(
    canvas: Canvas, rng: np.random.Generator, ground: Floats, height: float, rough: float,
    color: Color, surface: int,
) -> None:  # fmt: skip
    """Draw a silhouette `height` meters high at a distance of 150 m, with waves and small bumps."""
    columns = canvas.camera.columns
    along = np.linspace(0, 1, columns // 3 + 2)
    waves = sum(np.sin(2 * np.pi * (f * along + rng.random())) / (f**0.6) for f in (1.3, 2.9, 7.1))
    bumps = rng.normal(0, 1, len(along))
    heights = height * (0.75 + 0.22 * waves) + 0.35 * rough * bumps
    unit = canvas.camera.pixels_per_meter(150.0)
    base = np.interp(along * (columns - 1), np.arange(columns), ground)
    top = base - np.maximum(heights, 0.5) * unit
    upper = np.stack([along * (columns + 2) - 1, top], axis=1)
    lower = np.array([(columns + 1.0, base[-1] + 4), (-1.0, base[0] + 4)])
    canvas.shape(np.concatenate([upper, lower]), color, surface)


def _horizon_rows(canvas: Canvas) -> Floats:
    """Row of the end of the ground, for every column."""
    camera = canvas.camera
    across = np.arange(camera.columns) - camera.center
    return np.asarray(
        camera.horizon + np.tan(camera.roll) * across + camera.focal * camera.eye / (1.3 * FAR)
    )


def _cell(pixels: float) -> int:
    """Size of a facade's cell in its texture, pixels: its projected size, 1 to 28."""
    return min(max(round(pixels), 1), 28)
