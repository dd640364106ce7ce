"""The style of images rendered from prompts: one random style per image.

A domain of `street_renderer.domains` has one palette and one camera. `draw_style` draws the palette
around the common one, and camera, clutter, texture and light from wide ranges. `draw_photo_style`,
the style of prompts' images, narrows them to what photographs have in common, as those that a
diffusion model was trained on: colors near the common palette, a camera at the height of eyes,
some noise and compression, and at night a long exposure. These images are nearer to photographs
than the source is, as a diffusion model's are nearer to them than a game is.

No range was fitted to the source or to an evaluated domain, and none is taken from their styles:
the ranges are centered on neutral values, that is the common palette and a camera that leaves
colors as they are. But they overlap with all domains, which also share the same models of
buildings and cars: these images transfer to the rendered domains more easily than images of Stable
Diffusion to real ones.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from street_renderer.palette import COMMON, RGB
from street_renderer.style import Lens, Style, Time, Weather

GENERATED_STYLE = 2
"""Incremented whenever these styles change, so that old and new images are not mixed."""

LENS = Lens(
    eye=(1.1, 2.3),
    horizon=(0.34, 0.56),
    view=(45, 95),
    aim=(0.34, 0.66),
    tilt=(-2.0, 2.0),
    blur=(0.40, 0.90),
    noise=(0.0, 3.5),
    vignette=(0.0, 0.30),
    saturation=(0.70, 1.35),
    contrast=(0.85, 1.25),
    exposure=(0.85, 1.20),
    gamma=(0.80, 1.20),
    cast=0.06,
    softness=(70, 100),
    hood=0.1,
)

LENSES: Mapping[Time, Lens] = {
    "day": LENS,
    "dusk": replace(LENS, exposure=(1.1, 1.6), gamma=(0.75, 1.0)),
    "night": replace(LENS, exposure=(1.2, 2.0), gamma=(0.75, 1.05), noise=(0.0, 5.0)),
}
"""Lens by time of day; photographs at night have longer exposures than a moving camera allows."""

PHOTO_LENS = Lens(
    eye=(1.1, 1.9),
    horizon=(0.38, 0.54),
    view=(48, 84),
    aim=(0.40, 0.60),
    tilt=(-1.0, 1.0),
    blur=(0.40, 0.70),
    noise=(0.5, 2.5),
    vignette=(0.0, 0.20),
    saturation=(0.80, 1.20),
    contrast=(0.90, 1.10),
    exposure=(0.92, 1.08),
    gamma=(0.90, 1.10),
    cast=0.04,
    softness=(75, 100),
    hood=0.1,
)

PHOTO_LENSES: Mapping[Time, Lens] = {
    "day": PHOTO_LENS,
    "dusk": replace(PHOTO_LENS, exposure=(1.3, 1.7), gamma=(0.75, 0.95)),
    "night": replace(PHOTO_LENS, exposure=(1.6, 2.4), gamma=(0.70, 0.95)),
}
PHOTO_STRENGTH = 0.6
"""Factor of the largest shifts of colors."""

CONDITIONS: Mapping[tuple[Weather, Time], float] = {
    ("clear", "day"): 6, ("overcast", "day"): 3, ("rain", "day"): 1, ("fog", "day"): 0.8,
    ("snow", "day"): 0.8, ("clear", "dusk"): 0.6, ("overcast", "dusk"): 0.2, ("rain", "dusk"): 0.1,
    ("snow", "dusk"): 0.05, ("fog", "dusk"): 0.05, ("clear", "night"): 0.4,
    ("overcast", "night"): 0.1, ("rain", "night"): 0.15, ("snow", "night"): 0.05,
    ("fog", "night"): 0.05,
}  # fmt: skip
"""Weights of the conditions that a prompt leaves open; mostly daylight."""

_LARGEST_SHIFTS: Mapping[str, tuple[float, float, float]] = {
    "zenith": (0.05, 0.6, 0.20), "horizon": (0.06, 0.6, 0.12), "cloud": (0.05, 0.5, 0.08),
    "asphalt": (0.50, 0.6, 0.30), "marking": (0.03, 0.5, 0.12), "center": (0.03, 0.5, 0.12),
    "sidewalk": (0.06, 0.8, 0.25), "curb": (0.05, 0.8, 0.20), "terrain": (0.06, 0.5, 0.25),
    "soil": (0.03, 0.5, 0.30), "leaves": (0.06, 0.5, 0.30), "autumn": (0.05, 0.4, 0.20),
    "trunk": (0.03, 0.6, 0.30), "facade": (0.10, 0.7, 0.25), "roof": (0.08, 0.7, 0.30),
    "glass": (0.08, 0.6, 0.35), "wall": (0.05, 0.6, 0.25), "fence": (0.10, 0.8, 0.35),
    "pole": (0.20, 1.0, 0.35), "skin": (0.01, 0.2, 0.10), "hair": (0.02, 0.4, 0.30),
    "sign": (0.02, 0.2, 0.12), "distant": (0.05, 0.6, 0.15),
}  # fmt: skip
"""Material -> maximum change of hue (turns), saturation and lightness (relative)."""
_ANY_HUE = (0.5, 0.4, 0.25)
"""The same for materials of any color: vehicles, clothes, shops."""


def draw_style(
    rng: np.random.Generator, weather: Weather | None = None, time: Time | None = None
) -> Style:
    """Draw a style for one image.

    Args:
        weather, time: fixed values; None: drawn from `CONDITIONS`.
    """
    pairs = [p for p in CONDITIONS if weather in (None, p[0]) and time in (None, p[1])]
    weights = np.array([CONDITIONS[pair] for pair in pairs])
    condition = pairs[int(rng.choice(len(pairs), p=weights / weights.sum()))]
    autumn = float(rng.uniform(0.3, 0.9)) if rng.random() < 0.15 else float(rng.uniform(0, 0.1))
    return Style(
        name="generated",
        palette={name: draw_colors(rng, name) for name in COMMON},
        conditions={condition: 1.0},
        clutter=float(rng.uniform(0.6, 1.5)),
        texture=float(rng.uniform(0.45, 1.1)),
        spread=float(rng.uniform(5, 20)),
        sunlight=float(rng.uniform(0.4, 0.85)),
        autumn=autumn,
        palms=float(rng.uniform(0.3, 0.9)) if rng.random() < 0.1 else 0.0,
        lens=LENSES[condition[1]],
    )


def draw_photo_style(
    rng: np.random.Generator, weather: Weather | None = None, time: Time | None = None
) -> Style:
    """Draw a style for one image as photographs have it; see `draw_style`."""
    style = draw_style(rng, weather, time)
    ((_, drawn_time),) = style.conditions
    return replace(
        style,
        palette={name: draw_colors(rng, name, PHOTO_STRENGTH) for name in COMMON},
        clutter=float(rng.uniform(0.8, 1.4)),
        texture=float(rng.uniform(0.5, 1.0)),
        spread=float(rng.uniform(6, 16)),
        lens=PHOTO_LENSES[drawn_time],
    )


def draw_colors(rng: np.random.Generator, material: str, strength: float = 1.0) -> tuple[RGB, ...]:
    """The material's common colors with a shared random shift and one per color.

    Args:
        strength: factor of the largest shifts.
    """
    shared = 0.7 if material in _LARGEST_SHIFTS else 0.0
    largest = strength * np.array(_LARGEST_SHIFTS.get(material, _ANY_HUE))
    common_shift = shared * rng.uniform(-1, 1, 3)
    return tuple(
        _shifted(color, largest * (common_shift + (1 - shared) * rng.uniform(-1, 1, 3)))
        for color in COMMON[material]
    )


def _shifted(color: RGB, shift: npt.NDArray[np.float64]) -> RGB:
    """A color with its hue (turns), saturation and lightness (shares) changed."""
    hue, light, saturation = colorsys.rgb_to_hls(*(value / 255 for value in color))
    turned, richer, lighter = (float(value) for value in shift)
    saturation = min(max(saturation * (1 + richer), 0.0), 1.0)
    light = min(max(light * (1 + lighter), 0.02), 0.98)
    red, green, blue = colorsys.hls_to_rgb((hue + turned) % 1, light, saturation)
    return round(255 * red), round(255 * green), round(255 * blue)
