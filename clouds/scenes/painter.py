"""Street scenes with an exact label for every pixel.

`paint` is the whole of it: what the scene holds is drawn from `Contents`, how it looks from a
`Style`, both with one random generator, so that a picture is a function of its seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi

import cv2
import numpy as np
import numpy.typing as npt

from clouds.data.label_space import IGNORE
from clouds.scenes.architect import sample_layout
from clouds.scenes.buildings import (
    SeenBlock,
    draw_barrier,
    draw_block,
    draw_horizon,
    visible_blocks,
)
from clouds.scenes.canvas import Bytes, Canvas, Color, Surface
from clouds.scenes.ground import draw_ground
from clouds.scenes.layout import Barrier, Contents, SceneLayout, Thing
from clouds.scenes.lens import expose
from clouds.scenes.objects import draw_thing
from clouds.scenes.sky import draw_sky
from clouds.scenes.style import Look, Style, sample_look
from clouds.scenes.weather import apply_light

SMALLEST = 64
"""Fewest rows and columns of a picture."""


@dataclass(frozen=True)
class Painting:
    """A painted scene.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        label: (H, W) uint8 train ids, 255 where nothing is labelled.
        instances: (H, W) uint16, number of the countable object, 0 elsewhere.
    """

    image: Bytes
    label: Bytes
    instances: npt.NDArray[np.uint16]


def paint(
    rng: np.random.Generator,
    style: Style,
    contents: Contents | None = None,
    size: tuple[int, int] = (256, 512),
) -> tuple[Bytes, Bytes]:
    """Paint a street scene.

    Args:
        rng: where all randomness comes from.
        style: how the scene looks.
        contents: what it must hold; whatever is usual by default.
        size: (rows, columns) of the picture.

    Returns:
        image (H, W, 3) uint8 RGB and label (H, W) uint8: train ids, 255 for unlabelled.

    Raises:
        ValueError: a size below 64 rows or columns.
    """
    painting = paint_scene(rng, style, contents, size)
    return painting.image, painting.label


def paint_scene(
    rng: np.random.Generator,
    style: Style,
    contents: Contents | None = None,
    size: tuple[int, int] = (256, 512),
) -> Painting:
    """`paint` with the instance map as well."""
    check_size(size)
    # Separate streams: one seed gives the same street in every style with equal habits.
    streams = [np.random.default_rng(seed) for seed in rng.integers(0, 1 << 63, 3)]
    layout = sample_layout(streams[0], contents, style.places, style.clutter)
    look = sample_look(streams[1], style, size)
    return render(streams[2], layout, look)


def check_size(size: tuple[int, int]) -> None:
    """Raise ValueError for a size (rows, columns) that is too small to show a street."""
    if min(size) < SMALLEST:
        raise ValueError(
            f"picture size is {size[0]}x{size[1]} (rows x columns); "
            f"both must be at least {SMALLEST}"
        )


def render(rng: np.random.Generator, layout: SceneLayout, look: Look) -> Painting:
    """Paint a given layout with a given look; `rng` chooses colors and small details."""
    # Each part has a stream of its own: what one draws more, no other part notices.
    streams = [np.random.default_rng(seed) for seed in rng.integers(0, 1 << 63, 6)]
    sky, horizon, floor, hood, light, lens = streams
    base = int(rng.integers(0, 1 << 63))
    canvas = Canvas(look)
    draw_sky(canvas, sky)
    draw_horizon(canvas, horizon, layout)
    ground = draw_ground(canvas, floor, layout)
    for number, item in _back_to_front(layout, visible_blocks(canvas, layout)):
        own = np.random.default_rng((base, number))
        if isinstance(item, SeenBlock):
            draw_block(canvas, own, layout, item)
        elif isinstance(item, Barrier):
            draw_barrier(canvas, own, layout, item)
        else:
            draw_thing(canvas, own, layout, item)
    if look.grade.hood:
        _draw_hood(canvas, hood)
    image = expose(lens, apply_light(canvas, light, ground), look.grade)
    numbers = np.ascontiguousarray(canvas.pixels[..., 3])
    labels, instances = np.full(256, IGNORE, np.uint8), np.zeros(256, np.uint16)
    for number, surface in enumerate(canvas.surfaces):
        labels[number], instances[number] = surface.label, surface.instance
    return Painting(image, cv2.LUT(numbers, labels), cv2.LUT(numbers, instances))


_Item = SeenBlock | Barrier | Thing
_HALF_LENGTHS = {"bus": 4.5, "truck": 3.0, "tram": 5.0, "railcar": 5.0}
"""Long vehicles are sorted by their near end, these metres before their middle."""


def _back_to_front(layout: SceneLayout, blocks: list[SeenBlock]) -> list[tuple[int, _Item]]:
    """Items in drawing order, each with a number of its own.

    First what stands beyond the barriers, then the barriers, then the street; each from far to
    near. A ray from the street meets the smaller lateral position first, so what stands beyond a
    barrier never hides it, and a barrier never hides what stands on the street.
    """

    def key(entry: tuple[int, _Item]) -> tuple[int, float]:
        item = entry[1]
        if isinstance(item, SeenBlock):
            return (0, -item.block.far)
        if isinstance(item, Barrier):
            return (1, -item.far)
        near_end = _HALF_LENGTHS.get(item.kind, 0.0) * abs(cos(item.heading))
        return (0 if item.behind else 2, near_end - item.distance)

    items: list[tuple[int, _Item]] = [(3 * block.number, block) for block in blocks]
    items += [(3 * n + 1, barrier) for n, barrier in enumerate(layout.barriers)]
    items += [(3 * n + 2, thing) for n, thing in enumerate(layout.things)]
    return sorted(items, key=key)


def _draw_hood(canvas: Canvas, rng: np.random.Generator) -> None:
    """The own car's bonnet at the lower edge: a rounded shape that no class labels."""
    camera = canvas.camera
    tall = float(rng.uniform(0.05, 0.11)) * camera.rows
    middle = camera.columns * float(rng.uniform(0.46, 0.54))
    wide = camera.columns * float(rng.uniform(0.55, 0.8))
    angles = np.linspace(0, pi, 25)
    rim = np.stack(
        [middle + wide * np.cos(angles), camera.rows + 1 - tall * np.sin(angles) ** 0.6], axis=1
    )
    below = [(middle - wide, camera.rows + 9.0), (middle + wide, camera.rows + 9.0)]
    outline = np.concatenate([rim, below])
    red, green, blue = canvas.look.color(rng, "car")
    dark: Color = (0.35 * red, 0.35 * green, 0.35 * blue)
    surface = canvas.add_surface(Surface(IGNORE, 2.0))
    canvas.shape(outline, dark, surface)
    shine: Color = (0.55 * red, 0.55 * green, 0.55 * blue)
    canvas.shape(outline + np.array((0.0, 0.35 * tall)), shine, surface)
