"""The appearance of scenes: palette, weather, time of day, camera, clutter.

A `Style` describes a domain by ranges and weights, from which one `Look` is drawn per image;
`street_renderer.domains` has the styles of the demo data. Colors are RGB, 0 to 255.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np

from street_renderer.camera import Camera
from street_renderer.palette import COMMON, RGB

Range = tuple[float, float]
Weather = Literal["clear", "overcast", "rain", "fog", "snow"]
Time = Literal["day", "dusk", "night"]
Place = Literal["downtown", "street", "residential", "avenue", "highway", "rural", "industrial"]
WEATHERS: tuple[str, ...] = get_args(Weather)
TIMES: tuple[str, ...] = get_args(Time)
PLACES: tuple[Place, ...] = get_args(Place)

REFERENCE_ROWS = 256
"""Sizes in pixels refer to an image with this many rows."""


@dataclass(frozen=True)
class Lens:
    """Ranges of the camera parameters and of the camera effects.

    Attributes:
        eye: height above the ground, meters.
        horizon: row of the horizon, share of the image height from the top.
        view: horizontal field of view, degrees.
        aim: column of the road's vanishing point, share of the image width.
        tilt: roll around the viewing axis, degrees.
        blur: standard deviation of the lens blur, pixels at 256 rows; it grows with the size to
            the power of 0.7.
        noise: standard deviation of the sensor noise, gray levels.
        vignette: relative loss of light in the corners.
        saturation, contrast, exposure, gamma: 1 leaves the colors as they are.
        cast: maximum deviation of the random gain of a color channel from 1.
        tint: constant gain of the red, green and blue channels.
        softness: quality of JPEG compression; 100 means none.
        hood: probability that the hood of the ego vehicle is visible (label 255).
    """

    eye: Range = (1.2, 1.5)
    horizon: Range = (0.40, 0.48)
    view: Range = (60.0, 75.0)
    aim: Range = (0.44, 0.56)
    tilt: Range = (-0.5, 0.5)
    blur: Range = (0.40, 0.45)
    noise: Range = (0.0, 0.5)
    vignette: Range = (0.0, 0.02)
    saturation: Range = (1.0, 1.0)
    contrast: Range = (1.0, 1.0)
    exposure: Range = (1.0, 1.0)
    gamma: Range = (1.0, 1.0)
    cast: float = 0.0
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    softness: Range = (100.0, 100.0)
    hood: float = 0.0


@dataclass(frozen=True)
class Style:
    """One domain: distribution of the contents and appearance of its images.

    Attributes:
        name: for messages and the contact sheet.
        palette: colors by material; other materials have the colors of the default palette.
        conditions: weights of pairs (weather, time of day).
        places: weights of the types of place.
        clutter: factor of the number of objects, 1 is average.
        texture: strength of surface texture, 0 for flat colors, 1 for realistic.
        spread: standard deviation of a material's color around the palette's, gray levels.
        sunlight: contrast between lit and shaded faces and strength of shadows, 0 to 1.
        autumn: share of trees with autumn leaves.
        palms: share of trees that are palms.
        lens: the camera.
    """

    name: str
    palette: Mapping[str, tuple[RGB, ...]] = field(default_factory=dict)
    conditions: Mapping[tuple[Weather, Time], float] = field(
        default_factory=lambda: {("clear", "day"): 1.0}
    )
    places: Mapping[Place, float] = field(default_factory=lambda: dict.fromkeys(PLACES, 1.0))
    clutter: float = 1.0
    texture: float = 0.6
    spread: float = 8.0
    sunlight: float = 0.6
    autumn: float = 0.05
    palms: float = 0.0
    lens: Lens = field(default_factory=Lens)

    def under(self, weather: Weather | None = None, time: Time | None = None) -> Style:
        """The same style with fixed weather, time of day or both.

        Raises:
            ValueError: a name that is not one of `WEATHERS` or `TIMES`.
        """
        if weather is not None and weather not in WEATHERS:
            raise ValueError(f"unknown weather {weather!r}; known: {', '.join(WEATHERS)}")
        if time is not None and time not in TIMES:
            raise ValueError(f"unknown time of day {time!r}; known: {', '.join(TIMES)}")
        fixed: dict[tuple[Weather, Time], float] = {}
        for (old_weather, old_time), weight in self.conditions.items():
            key = (weather or old_weather, time or old_time)
            fixed[key] = fixed.get(key, 0.0) + weight
        return replace(self, conditions=fixed)


@dataclass(frozen=True)
class Grade:
    """The camera effects of one image; see `Lens`."""

    blur: float
    noise: float
    vignette: float
    saturation: float
    contrast: float
    exposure: float
    gamma: float
    gains: tuple[float, float, float]
    quality: int
    hood: bool


@dataclass(frozen=True)
class Look:
    """The appearance of one image, drawn from a `Style`.

    Attributes:
        sun: unit vector towards the sun in camera coordinates (right, up, forward).
        direct: strength of direct sunlight, 0 to 1.
    """

    style: Style
    weather: Weather
    time: Time
    camera: Camera
    grade: Grade
    sun: tuple[float, float, float]
    direct: float

    def colors(self, material: str) -> tuple[RGB, ...]:
        """All colors of a material in the style."""
        return self.style.palette.get(material, COMMON[material])

    def color(self, rng: np.random.Generator, material: str) -> tuple[float, float, float]:
        """Draw a color of a material with the style's spread, 0 to 255."""
        choices = self.colors(material)
        base = choices[int(rng.random() * len(choices))]
        common, *single = (self.style.spread * rng.standard_normal(4)).tolist()
        red, green, blue = (
            min(max(value + common + 0.3 * own, 0.0), 255.0)
            for value, own in zip(base, single, strict=True)
        )
        return red, green, blue

    @property
    def night(self) -> bool:
        """Whether lamps are on and the sky is dark."""
        return self.time == "night"


def sample_look(rng: np.random.Generator, style: Style, size: tuple[int, int]) -> Look:
    """Draw the appearance of one image of `size` (height, width) from a style."""
    pairs = list(style.conditions)
    weights = np.array([style.conditions[pair] for pair in pairs], dtype=np.float64)
    weather, time = pairs[int(rng.choice(len(pairs), p=weights / weights.sum()))]
    lens = style.lens
    direct = style.sunlight if weather == "clear" else 0.12 * style.sunlight
    if time != "day":
        direct *= 0.35 if time == "dusk" else 0.0
    return Look(
        style=style,
        weather=weather,
        time=time,
        camera=_sample_camera(rng, lens, size),
        grade=_sample_grade(rng, lens, size[0] / REFERENCE_ROWS),
        sun=_sample_sun(rng, low=time == "dusk"),
        direct=float(direct),
    )


def _sample_camera(rng: np.random.Generator, lens: Lens, size: tuple[int, int]) -> Camera:
    rows, columns = size
    half_view = np.radians(rng.uniform(*lens.view)) / 2
    # The field of view refers to this width, so narrower images have a smaller one.
    reference_width = max(columns, 1.6 * rows)
    return Camera(
        rows=rows,
        columns=columns,
        focal=float(reference_width / 2 / np.tan(half_view)),
        eye=float(rng.uniform(*lens.eye)),
        horizon=float(rng.uniform(*lens.horizon) * rows),
        center=float(rng.uniform(*lens.aim) * columns),
        roll=float(np.radians(rng.uniform(*lens.tilt))),
    )


def _sample_grade(rng: np.random.Generator, lens: Lens, scale: float) -> Grade:
    gains = np.asarray(lens.tint) * (1 + rng.uniform(-lens.cast, lens.cast, 3))
    return Grade(
        blur=float(rng.uniform(*lens.blur) * scale**0.7),
        noise=float(rng.uniform(*lens.noise)),
        vignette=float(rng.uniform(*lens.vignette)),
        saturation=float(rng.uniform(*lens.saturation)),
        contrast=float(rng.uniform(*lens.contrast)),
        exposure=float(rng.uniform(*lens.exposure)),
        gamma=float(rng.uniform(*lens.gamma)),
        gains=(float(gains[0]), float(gains[1]), float(gains[2])),
        quality=round(float(rng.uniform(*lens.softness))),
        hood=bool(rng.random() < lens.hood),
    )


def _sample_sun(rng: np.random.Generator, low: bool) -> tuple[float, float, float]:
    height = np.radians(rng.uniform(6, 16) if low else rng.uniform(30, 60))
    around = rng.uniform(0, 2 * np.pi)
    flat = np.cos(height)
    return (float(flat * np.sin(around)), float(np.sin(height)), float(flat * np.cos(around)))
