"""Street furniture and plants: lamps, signs, traffic lights, bins, trees."""

from __future__ import annotations

from collections.abc import Sequence
from math import cos, pi, sin

import cv2
import numpy as np

from street_renderer.canvas import Bytes, Canvas, Color, Glow, Pixel
from street_renderer.meshes import Point
from street_renderer.textures import Species, plant_sprites

_LAMP_LIGHT: Color = (255, 214, 150)


def upright(canvas: Canvas, foot: Point, outline: Sequence[tuple[float, float]]) -> list[Pixel]:
    """Pixels of an outline in the plane through `foot` that faces the camera.

    Args:
        foot: a point on the ground in camera coordinates, meters.
        outline: (right, up) in meters from the foot.
    """
    camera = canvas.camera
    column, row = camera.project_point(foot)
    unit = camera.pixels_per_meter(foot[2])
    c, s = unit * cos(camera.roll), unit * sin(camera.roll)
    return [(column + c * x + s * y, row + s * x - c * y) for x, y in outline]


def draw_post(
    canvas: Canvas, foot: Point, height: float, width: float, color: Color, surface: int
) -> None:
    """Draw a vertical post, at least one pixel wide, lit from one side."""
    unit = canvas.camera.pixels_per_meter(foot[2])
    half = max(width, 1.1 / unit) / 2
    outline = [(-half, 0.0), (-half, height), (half, height), (half, 0.0)]
    canvas.polygon(upright(canvas, foot, outline), color, surface)
    if width * unit > 3:
        bright: Color = (
            min(color[0] * 1.3, 255),
            min(color[1] * 1.3, 255),
            min(color[2] * 1.3, 255),
        )
        outline = [(-half, 0.0), (-half, height), (-half * 0.2, height), (-half * 0.2, 0.0)]
        canvas.polygon(upright(canvas, foot, outline), bright, surface)


def draw_lamp(
    canvas: Canvas, foot: Point, variant: int, color: Color, surface: int, shining: int
) -> None:
    """Draw a street lamp, some with an arm over the road."""
    height = 5.0 + (variant % 5) * 0.8
    toward_road = -1.0 if foot[0] > 0 else 1.0
    unit = canvas.camera.pixels_per_meter(foot[2])
    draw_post(canvas, foot, height, 0.16, color, surface)
    if variant % 3 == 0:  # a lantern on top
        head = upright(canvas, foot, [(-0.2, height), (-0.3, height + 0.5), (0.3, height + 0.5),
                                      (0.2, height)])  # fmt: skip
        lamp = upright(canvas, foot, [(0.0, height + 0.25)])[0]
    else:
        reach = toward_road * (1.2 + 0.2 * (variant % 4))
        a, b = upright(canvas, foot, [(0.0, height), (reach, height + 0.35)])
        canvas.stroke(a, b, max(0.1 * unit, 1), color, surface)
        corners = [(-0.35, 0.28), (-0.3, 0.5), (0.4, 0.5), (0.35, 0.28)]
        head = upright(canvas, foot, [(reach + x, height + y) for x, y in corners])
        lamp = upright(canvas, foot, [(reach, height + 0.3)])[0]
    night = canvas.look.time != "day"
    tone: Color = (255, 226, 170) if night else (0.9 * color[0], 0.9 * color[1], 0.9 * color[2])
    canvas.polygon(head, tone, shining if night else surface)
    if night:
        strength = 0.75 if canvas.look.night else 0.3
        canvas.glows.append(Glow(lamp, (1.8 * unit, 1.8 * unit), _LAMP_LIGHT, strength))
        # Light on the ground, foreshortened by the camera height.
        wide = 5.0 * unit
        flat = wide * min(1.0, canvas.camera.eye / max(foot[2], 3.0)) * 1.6
        pool = upright(canvas, foot, [(toward_road * 1.5, 0.0)])[0]
        canvas.glows.append(Glow(pool, (wide, flat), _LAMP_LIGHT, 0.4 * strength))


def draw_traffic_light(
    canvas: Canvas, foot: Point, variant: int, color: Color, surfaces: tuple[int, int, int],
    arm: float = 0.0,
) -> None:  # fmt: skip
    """Draw a traffic light on a post and, with an arm, one or two more above the road.

    Args:
        surfaces: numbers of the post, the housing and the lit lamp.
        arm: length of the arm towards the road, meters; 0 for none.
    """
    pole, housing, shining = surfaces
    height = 5.6 if arm else 3.1
    draw_post(canvas, foot, height, 0.15, color, pole)
    lit = variant % 3
    _signal(canvas, (foot[0], foot[1] + 2.2, foot[2] - 0.1), lit, housing, shining)
    if arm:
        reach = -arm if foot[0] > 0 else arm
        unit = canvas.camera.pixels_per_meter(foot[2])
        a, b = upright(canvas, foot, [(0.0, height - 0.1), (reach, height)])
        canvas.stroke(a, b, max(0.12 * unit, 1), color, pole)
        for share in (0.95, 0.5) if arm > 4 else (0.95,):
            spot = (foot[0] + share * reach, foot[1] + height - 0.9, foot[2] - 0.1)
            _signal(canvas, spot, lit, housing, shining)


def _signal(canvas: Canvas, low: Point, lit: int, housing: int, shining: int) -> None:
    """Draw a housing with red, amber and green lamps; `lit` is the index of the lit one."""
    x0, x1, tall = -0.2, 0.2, 1.05
    frame = [(x0, 0.0), (x0, tall), (x1, tall), (x1, 0.0)]
    canvas.polygon(upright(canvas, low, frame), (30, 32, 30), housing)
    unit = canvas.camera.pixels_per_meter(low[2])
    tones: tuple[Color, ...] = ((255, 52, 40), (255, 190, 40), (60, 255, 140))
    for number, tone in enumerate(tones):
        center = upright(canvas, low, [(0.0, tall * (5 - 2 * number) / 6)])[0]
        on = number == lit
        dim: Color = (tone[0] * 0.22, tone[1] * 0.22, tone[2] * 0.22)
        canvas.disc(center, 0.13 * unit, tone if on else dim, shining if on else housing)
        if on and canvas.look.time != "day":
            canvas.glows.append(Glow(center, (0.9 * unit, 0.9 * unit), tone, 0.6))


def draw_sign(
    canvas: Canvas, foot: Point, variant: int, colors: tuple[Color, Color], pole: int, face: int
) -> None:
    """Draw a traffic sign on a post: round, triangular, octagonal, square or a direction board.

    Args:
        colors: of the post and of the sign.
    """
    post, paint = colors
    kind = (0, 1, 2, 3, 4, 0, 1, 3, 4, 5)[variant % 10]
    white: Color = (238, 238, 234)
    red: Color = (196, 32, 36)
    height = 2.3 + 0.2 * (variant % 4)
    draw_post(canvas, foot, height + 0.5, 0.09, post, pole)
    center = (foot[0], foot[1] + height + 0.1, foot[2] - 0.05)

    def ring(size: float, corners: int, start: float) -> list[tuple[float, float]]:
        angles = start + np.linspace(0, 2 * pi, corners, endpoint=False)
        return [(size * cos(a), size * sin(a)) for a in angles]

    def fill(outline: list[tuple[float, float]], color: Color) -> None:
        canvas.polygon(upright(canvas, center, outline), color, face)

    if kind == 0:  # prohibition or speed limit
        fill(ring(0.42, 16, 0), red)
        fill(ring(0.30, 16, 0), white)
        fill([(-0.14, -0.12), (-0.14, 0.12), (0.14, 0.12), (0.14, -0.12)], (40, 40, 44))
    elif kind == 1:  # warning
        fill(ring(0.52, 3, pi / 2), red)
        fill(ring(0.32, 3, pi / 2), white)
    elif kind == 2:  # stop
        fill(ring(0.46, 8, pi / 8), red)
        fill([(-0.28, -0.08), (-0.28, 0.08), (0.28, 0.08), (0.28, -0.08)], white)
    elif kind == 3:  # blue round with an arrow
        fill(ring(0.42, 16, 0), (28, 78, 168))
        fill([(-0.05, -0.26), (-0.05, 0.2), (0.05, 0.2), (0.05, -0.26)], white)
        fill([(-0.16, 0.1), (0.0, 0.3), (0.16, 0.1)], white)
    elif kind == 4:  # square: parking, pedestrians
        fill(ring(0.56, 4, pi / 4), (28, 78, 168))
        fill([(-0.14, -0.26), (-0.14, 0.26), (0.14, 0.26), (0.14, -0.26)], white)
    else:  # direction board
        wide = 0.9 + 0.25 * (variant % 4)
        fill([(-wide, -0.1), (-wide, 0.85), (wide, 0.85), (wide, -0.1)], white)
        rim = 0.05
        fill([(rim - wide, rim - 0.1), (rim - wide, 0.85 - rim), (wide - rim, 0.85 - rim),
              (wide - rim, rim - 0.1)], paint)  # fmt: skip
        for y in (0.1, 0.45):
            fill([(-0.7 * wide, y), (-0.7 * wide, y + 0.16), (0.55 * wide, y + 0.16),
                  (0.55 * wide, y)], white)  # fmt: skip


def draw_gantry(
    canvas: Canvas, left: Point, right: Point, colors: tuple[Color, Color], pole: int, face: int
) -> None:
    """Draw large direction boards on a beam across the whole road."""
    post, paint = colors
    unit = canvas.camera.pixels_per_meter(left[2])
    for foot in (left, right):
        draw_post(canvas, foot, 6.6, 0.3, post, pole)
    a = upright(canvas, left, [(0.0, 6.4)])[0]
    b = upright(canvas, right, [(0.0, 6.4)])[0]
    canvas.stroke(a, b, max(0.25 * unit, 1), post, pole)
    span = right[0] - left[0]
    for share in (0.3, 0.7):
        spot = (left[0] + share * span, left[1] + 5.4, left[2] - 0.1)
        half = min(0.16 * span, 2.8)
        board = [(-half, 0.0), (-half, 2.2), (half, 2.2), (half, 0.0)]
        canvas.polygon(upright(canvas, spot, board), (236, 238, 236), face)
        inner = [(0.08 - half, 0.08), (0.08 - half, 2.12), (half - 0.08, 2.12), (half - 0.08, 0.08)]
        canvas.polygon(upright(canvas, spot, inner), paint, face)
        for y in (0.5, 1.2):
            text = [
                (-0.7 * half, y),
                (-0.7 * half, y + 0.35),
                (0.5 * half, y + 0.35),
                (0.5 * half, y),
            ]
            canvas.polygon(upright(canvas, spot, text), (236, 238, 236), face)


def draw_box(
    canvas: Canvas, foot: Point, size: tuple[float, float], color: Color, surface: int
) -> None:
    """Draw a bin or a cabinet of (width, height) meters: front and lid."""
    wide, tall = size[0] / 2, size[1]
    canvas.polygon(
        upright(canvas, foot, [(-wide, 0.0), (-wide, tall), (wide, tall), (wide, 0.0)]),
        color, surface,
    )  # fmt: skip
    lid = [(-wide - 0.04, tall), (-wide - 0.04, tall + 0.1), (wide + 0.04, tall + 0.1),
           (wide + 0.04, tall)]  # fmt: skip
    dark: Color = (0.6 * color[0], 0.6 * color[1], 0.6 * color[2])
    canvas.polygon(upright(canvas, foot, lid), dark, surface)


# ---------------------------------------------------------------------- plants
def draw_plant(
    canvas: Canvas, foot: Point, species: Species, variant: int, size: tuple[float, float],
    leaves: Color, bark: Color, surface: int, snow: float = 0.0,
) -> None:  # fmt: skip
    """Draw a tree or a bush.

    Args:
        size: width of the crown and height of the whole plant in meters.
        leaves, bark: colors before shading.
        snow: snow cover of the top of the crown, 0 to 1.
    """
    sprites = plant_sprites(species)
    sprite = sprites[variant % len(sprites)]
    width, height = size
    unit = canvas.camera.pixels_per_meter(foot[2])
    whole = species in ("palm", "bare", "bush")
    crown_low = 0.0 if whole else height * (0.12 if species == "conifer" else 0.30)
    if not whole:
        draw_post(canvas, foot, crown_low + 0.25 * height, 0.035 * height + 0.08, bark, surface)
    pixels = (max(2, round(width * unit)), max(2, round((height - crown_low) * unit)))
    left_top = upright(canvas, foot, [(-width / 2, height)])[0]
    crop = _visible(left_top, pixels, canvas)
    if crop is None:
        return
    light = _resized(sprite.light, pixels, crop, variant)
    mask = _resized(sprite.mask, pixels, crop, variant)
    mask = np.where(mask > 110, np.uint8(255), np.uint8(0))
    colors = _leaf_colors(canvas, leaves, bark)[light]
    if snow > 0:
        whiten = snow * np.clip((light.astype(np.float32) - 95) / 90, 0, 1)[..., None]
        colors = (colors + whiten * (np.array((232, 236, 242), np.float32) - colors)).astype(
            np.uint8
        )
    corner = (round(left_top[0]) + crop[0], round(left_top[1]) + crop[1])
    canvas.stamp(corner, colors, mask, surface)


def _visible(
    left_top: Pixel, pixels: tuple[int, int], canvas: Canvas
) -> tuple[int, int, int, int] | None:
    """The part of a sprite inside the image: left, top, right, bottom in the sprite's pixels."""
    left, top = round(left_top[0]), round(left_top[1])
    x0, y0 = max(0, -left), max(0, -top)
    x1 = min(pixels[0], canvas.camera.columns - left)
    y1 = min(pixels[1], canvas.camera.rows - top)
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def _resized(
    sprite: Bytes, pixels: tuple[int, int], crop: tuple[int, int, int, int], variant: int
) -> Bytes:
    """A resized part of a sprite; some variants are mirrored."""
    if variant // 8 % 2:
        sprite = sprite[:, ::-1]
    x0, y0, x1, y1 = crop
    shrink_x, shrink_y = sprite.shape[1] / pixels[0], sprite.shape[0] / pixels[1]
    if max(shrink_x, shrink_y) > 2:  # minification: area average, then crop
        small = cv2.resize(np.ascontiguousarray(sprite), pixels, interpolation=cv2.INTER_AREA)
        return np.asarray(small[y0:y1, x0:x1], dtype=np.uint8)
    # Only the crop is computed: a near crown may be many times larger than the image.
    matrix = np.array([[shrink_x, 0, (x0 + 0.5) * shrink_x - 0.5],
                       [0, shrink_y, (y0 + 0.5) * shrink_y - 0.5]])  # fmt: skip
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    warped: Bytes = cv2.warpAffine(
        np.ascontiguousarray(sprite), matrix, (x1 - x0, y1 - y0), flags=flags,
        borderMode=cv2.BORDER_REPLICATE,
    )  # fmt: skip
    return warped


def _leaf_colors(canvas: Canvas, leaves: Color, bark: Color) -> Bytes:
    """Table (256, 3) from the light value of a sprite to colors: bark, shaded and sunlit leaves."""
    direct = canvas.look.direct
    level = np.linspace(0, 1, 256, dtype=np.float32)[:, None]
    base = np.asarray(leaves, np.float32)
    contrast = 0.9 + 0.5 * direct
    table = base * (1 + contrast * (level - 0.5))
    # Sunlit leaves are more yellow, shaded ones more blue.
    table += (level - 0.5) * np.array((26, 16, -14), np.float32) * (0.4 + direct)
    table[:36] = np.asarray(bark, np.float32)
    return np.clip(table, 0, 255).astype(np.uint8)
