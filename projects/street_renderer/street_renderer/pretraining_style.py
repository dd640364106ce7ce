"""Scenes for pre-training: one random style per image, from a wide family that leaves looks out.

The demo trains on `gta5` and evaluates on `cityscapes`, `bdd100k` and `mapillary_vistas`
(`LEFT_OUT`). Models that are pre-trained on these scenes have seen none of the four looks:

palette     every color is at least `COLOR_DISTANCE` from the colors that the look has for the
            same material
texture     its strength is at least `TEXTURE_DISTANCE` from that of the look
camera      height, horizon and field of view are not all three within the ranges of the look, and
            neither are saturation, contrast and noise
weather     the weights of the conditions (`CONDITIONS`) are those of none of the looks

The random spread of colors within an image, shapes of objects and layouts of streets are shared
with all domains. Random numbers come from a namespace of seeds of its own, so no scene is one of
`dataset_writer` or `generator`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

from street_renderer.domains import get_style
from street_renderer.generated_style import LENSES, draw_colors, draw_style
from street_renderer.layout import Contents
from street_renderer.palette import COMMON, RGB
from street_renderer.renderer import RenderedScene, render_layout, sample_scene
from street_renderer.style import Lens, Place, Range, Style, Time, Weather

PRETRAINING_STYLE = 1
"""Incremented whenever these scenes change."""
LEFT_OUT = ("gta5", "cityscapes", "bdd100k", "mapillary_vistas")
"""Names of the styles that are left out."""
COLOR_DISTANCE = 6.0
"""Minimum distance of two colors of a material, Euclidean in RGB, gray levels."""
TEXTURE_DISTANCE = 0.03
CAMERA_RANGES: Mapping[str, Range] = {
    "eye": (0.9, 3.0), "horizon": (0.28, 0.64), "view": (42, 108),
    "saturation": (0.5, 1.6), "contrast": (0.75, 1.35), "noise": (0.0, 6.0),
}  # fmt: skip
GEOMETRY = ("eye", "horizon", "view")
RESPONSE = ("saturation", "contrast", "noise")
"""Camera parameters of `Lens` that are compared with the looks, in two groups."""
CONDITIONS: Mapping[tuple[Weather, Time], float] = {
    ("clear", "day"): 3, ("overcast", "day"): 2, ("rain", "day"): 1.5, ("fog", "day"): 1.5,
    ("snow", "day"): 1.5, ("clear", "dusk"): 1, ("overcast", "dusk"): 0.7, ("rain", "dusk"): 0.5,
    ("snow", "dusk"): 0.3, ("fog", "dusk"): 0.3, ("clear", "night"): 0.9,
    ("overcast", "night"): 0.4, ("rain", "night"): 0.4, ("snow", "night"): 0.2,
    ("fog", "night"): 0.2,
}  # fmt: skip
"""Weights of the conditions."""

_T = TypeVar("_T")
Split = Literal["train", "val"]
_SPLITS: Mapping[Split, int] = {"train": 0, "val": 1}
_NAMESPACE = zlib.crc32(b"street_renderer.pretraining")
_STRENGTH = 1.25
"""Colors differ by this factor more from the common palette than those of `generated_style`."""
_MAX_DRAWS = 10_000
_REQUESTED = (
    "wall", "fence", "traffic light", "traffic sign", "terrain", "person", "rider", "truck", "bus",
    "train", "motorcycle", "bicycle",
)  # fmt: skip
"""Classes that are rare in scenes without request."""


@dataclass(frozen=True)
class PretrainingScene:
    """A rendered scene and what captions may say of it.

    Attributes:
        eye: height of the camera above the ground, meters.
        autumn: share of trees with autumn leaves.
    """

    rendered: RenderedScene
    weather: Weather
    time: Time
    place: Place
    eye: float
    autumn: float


def pretraining_scene(
    seed: int, split: Split, index: int, size: tuple[int, int]
) -> PretrainingScene:
    """Render scene `index` of a split, a function of the arguments alone.

    Args:
        seed: of the whole set, 0 or more.
        size: (height, width), pixels.
    """
    rng = np.random.default_rng(seed_sequence(seed, split, index))
    style = draw_pretraining_style(rng)
    wanted = rng.choice(_REQUESTED, int(rng.integers(0, 5)), replace=False).tolist()
    contents = Contents(wanted=tuple(sorted(wanted)), density=float(rng.uniform(0.5, 1.6)))
    layout, look, details = sample_scene(rng, style, contents, size)
    return PretrainingScene(
        rendered=render_layout(details, layout, look),
        weather=look.weather,
        time=look.time,
        place=layout.place,
        eye=look.camera.eye,
        autumn=style.autumn,
    )


def seed_sequence(seed: int, split: Split, index: int) -> np.random.SeedSequence:
    """Seeds of one scene.

    The `spawn_key` makes the namespace: NumPy fills its entropy to four words before that of the
    key, so it has at least five words, and sequences without a key, as of other images, have fewer
    or other ones.
    """
    return np.random.SeedSequence((seed, _SPLITS[split], index), spawn_key=(_NAMESPACE,))


def draw_pretraining_style(rng: np.random.Generator) -> Style:
    """Draw a style for one image, away from the looks in `LEFT_OUT`."""
    pairs = list(CONDITIONS)
    weights = np.array([CONDITIONS[pair] for pair in pairs])
    weather, time = pairs[int(rng.choice(len(pairs), p=weights / weights.sum()))]
    looks = [get_style(name) for name in LEFT_OUT]
    return replace(
        draw_style(rng, weather, time),
        name="pretraining",
        palette={name: _draw_colors(rng, name, looks) for name in COMMON},
        clutter=float(rng.uniform(0.6, 1.8)),
        texture=_draw_until(
            lambda: float(rng.uniform(0.2, 1.3)),
            lambda value: all(abs(value - s.texture) >= TEXTURE_DISTANCE for s in looks),
        ),
        spread=float(rng.uniform(3, 22)),
        sunlight=float(rng.uniform(0.3, 0.95)),
        lens=_draw_lens(rng, time, looks),
    )


def is_close(color: RGB, others: Sequence[RGB]) -> bool:
    """Whether a color is within `COLOR_DISTANCE` of one of the others."""
    gaps = np.linalg.norm(np.subtract(others, color, dtype=np.float64), axis=-1)
    return bool((gaps < COLOR_DISTANCE).any())


def within(lens: Lens, style: Style, names: Sequence[str]) -> bool:
    """Whether parameters, each a single value in `lens`, are all within the style's ranges."""
    return all(
        getattr(style.lens, name)[0] <= getattr(lens, name)[0] <= getattr(style.lens, name)[1]
        for name in names
    )


def _draw_colors(
    rng: np.random.Generator, material: str, looks: Sequence[Style]
) -> tuple[RGB, ...]:
    others = [color for s in looks for color in s.palette.get(material, COMMON[material])]

    def draw_one(number: int) -> RGB:
        return _draw_until(
            lambda: draw_colors(rng, material, _STRENGTH)[number],
            lambda color: not is_close(color, others),
        )

    return tuple(draw_one(number) for number in range(len(COMMON[material])))


def _draw_lens(rng: np.random.Generator, time: Time, looks: Sequence[Style]) -> Lens:
    def draw() -> Lens:
        values = {name: float(rng.uniform(*span)) for name, span in CAMERA_RANGES.items()}
        points: dict[str, Range] = {name: (value, value) for name, value in values.items()}
        return replace(LENSES[time], **points)  # type: ignore[arg-type]

    return _draw_until(
        draw,
        lambda lens: not any(within(lens, s, part) for s in looks for part in (GEOMETRY, RESPONSE)),
    )


def _draw_until(draw: Callable[[], _T], accepted: Callable[[_T], bool]) -> _T:
    for _ in range(_MAX_DRAWS):
        value = draw()
        if accepted(value):
            return value
    raise AssertionError("the ranges leave nothing but the looks that are left out")
