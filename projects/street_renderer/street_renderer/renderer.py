"""Renders street scenes with an exact label for every pixel.

`render` draws a random layout that fulfills a `Contents` and a random appearance of a `Style`, with
one random generator, so an image is a function of its seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi

import cv2
import numpy as np
import numpy.typing as npt

from clouds.data.label_space import IGNORE
from street_renderer.buildings import (
    VisibleBlock,
    draw_barrier,
    draw_block,
    draw_horizon,
    visible_blocks,
)
from street_renderer.canvas import Bytes, Canvas, Color, Surface
from street_renderer.ground import draw_ground
from street_renderer.layout import Barrier, Contents, SceneLayout, Thing
from street_renderer.layout_sampler import sample_layout
from street_renderer.lens import expose
from street_renderer.objects import draw_thing
from street_renderer.sky import draw_sky
from street_renderer.style import Look, Style, sample_look
from street_renderer.weather import apply_light

RENDERER_VERSION = 1
"""Incremented whenever the images change, so that old and new images are not mixed."""
MIN_SIZE = 64
"""Minimum height and width of an image, pixels."""


@dataclass(frozen=True)
class RenderedScene:
    """A rendered scene.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        label: (H, W) uint8 train ids, 255 for unlabeled.
        instances: (H, W) uint16, number of the object (thing), 0 for stuff.
    """

    image: Bytes
    label: Bytes
    instances: npt.NDArray[np.uint16]


def render(
    rng: np.random.Generator,
    style: Style,
    contents: Contents | None = None,
    size: tuple[int, int] = (256, 512),
) -> tuple[Bytes, Bytes]:
    """Render a random street scene.

    Args:
        rng: source of all randomness.
        style: appearance of the scene.
        contents: requested and excluded contents; none by default.
        size: (height, width) of the image, pixels.

    Returns:
        Image (H, W, 3) uint8 RGB and label (H, W) uint8: train ids, 255 for unlabeled.

    Raises:
        ValueError: a height or width below 64 pixels.
    """
    scene = render_scene(rng, style, contents, size)
    return scene.image, scene.label


def render_scene(
    rng: np.random.Generator,
    style: Style,
    contents: Contents | None = None,
    size: tuple[int, int] = (256, 512),
) -> RenderedScene:
    """`render` with the instance map."""
    layout, look, details = sample_scene(rng, style, contents, size)
    return render_layout(details, layout, look)


def sample_scene(
    rng: np.random.Generator,
    style: Style,
    contents: Contents | None = None,
    size: tuple[int, int] = (256, 512),
) -> tuple[SceneLayout, Look, np.random.Generator]:
    """What `render_scene` renders: layout, look, and the generator of colors and details."""
    check_size(size)
    # Separate streams: the layout does not depend on the appearance of the style.
    streams = [np.random.default_rng(seed) for seed in rng.integers(0, 1 << 63, 3)]
    layout = sample_layout(streams[0], contents, style.places, style.clutter)
    return layout, sample_look(streams[1], style, size), streams[2]


def check_size(size: tuple[int, int]) -> None:
    """Raise ValueError for a (height, width) below `MIN_SIZE`."""
    if min(size) < MIN_SIZE:
        raise ValueError(
            f"image size is {size[0]}x{size[1]} (rows x columns); both must be at least {MIN_SIZE}"
        )


def render_layout(rng: np.random.Generator, layout: SceneLayout, look: Look) -> RenderedScene:
    """Render a given layout with a given look; `rng` draws colors and small details."""
    # One stream per part: a change in one part does not affect the others.
    streams = [np.random.default_rng(seed) for seed in rng.integers(0, 1 << 63, 6)]
    sky, horizon, floor, hood, light, lens = streams
    base = int(rng.integers(0, 1 << 63))
    canvas = Canvas(look)
    draw_sky(canvas, sky)
    draw_horizon(canvas, horizon, layout)
    ground = draw_ground(canvas, floor, layout)
    for number, item in _back_to_front(layout, visible_blocks(canvas, layout)):
        own = np.random.default_rng((base, number))
        if isinstance(item, VisibleBlock):
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
    return RenderedScene(image, cv2.LUT(numbers, labels), cv2.LUT(numbers, instances))


_Item = VisibleBlock | Barrier | Thing
_HALF_LENGTHS = {"bus": 4.5, "truck": 3.0, "tram": 5.0, "railcar": 5.0}
"""Half lengths of long vehicles, meters: they are sorted by their near end."""


def _back_to_front(layout: SceneLayout, blocks: list[VisibleBlock]) -> list[tuple[int, _Item]]:
    """Items in drawing order, each with a unique number.

    First the items behind the barriers, then the barriers, then the street, each from far to near:
    a ray from the camera meets the smaller lateral position first, so items behind a barrier never
    occlude it, and a barrier never occludes items on the street.
    """

    def key(entry: tuple[int, _Item]) -> tuple[int, float]:
        item = entry[1]
        if isinstance(item, VisibleBlock):
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
    """Draw the hood of the ego vehicle at the lower edge, unlabeled."""
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
