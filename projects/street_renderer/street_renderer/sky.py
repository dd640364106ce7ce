"""The sky: gradient, clouds, glow of the sun, stars."""

from __future__ import annotations

import cv2
import numpy as np

from street_renderer.camera import Floats
from street_renderer.canvas import Canvas, Surface
from street_renderer.layout import CLASSES
from street_renderer.style import Look
from street_renderer.textures import noise_patch

_DISTANCE = 900.0
"""Distance of the sky for the haze, meters."""


def draw_sky(canvas: Canvas, rng: np.random.Generator) -> None:
    """Fill the canvas with sky; everything else is drawn over it."""
    camera, look = canvas.camera, canvas.look
    surface = canvas.add_surface(Surface(CLASSES.index("sky"), _DISTANCE, glowing=True))
    # With a tilted horizon the sky extends below the first row with ground.
    tilt = abs(np.tan(camera.roll)) * camera.columns
    rows = int(np.clip(camera.first_ground_row() + tilt + 2, 2, camera.rows))
    zenith, horizon, cloud = _colors(look, rng)
    height = np.linspace(0, 1, rows, dtype=np.float32)[:, None] ** np.float32(1.4)
    cover = _cloud_cover(rng, look, rows, camera.columns)
    planes = np.empty((3, rows, camera.columns), np.float32)
    for plane, top, low, white in zip(planes, zenith, horizon, cloud, strict=True):
        np.multiply(cover, white - (top + height * (low - top)), out=plane)
        plane += top + height * (low - top)
    if look.weather == "clear" and look.time != "night" and rng.random() < 0.4:
        _add_sun(rng, planes, (255, 190, 120) if look.time == "dusk" else (255, 250, 230))
    if look.night and look.weather == "clear":
        row, column = rng.integers(0, (rows, camera.columns), (40, 2)).T
        planes[:, row, column] += rng.uniform(10, 60, 40).astype(np.float32)
    drawn = np.clip(planes, 0, 255).astype(np.uint8)
    canvas.pixels[:rows] = cv2.merge([*drawn, np.full(drawn.shape[1:], surface, np.uint8)])
    canvas.pixels[rows:] = (*np.clip(horizon, 0, 255), surface)


def _colors(look: Look, rng: np.random.Generator) -> tuple[Floats, Floats, Floats]:
    """Zenith, horizon and cloud color, (3,) float32 each."""
    names = ("zenith", "horizon", "cloud")
    zenith, horizon, cloud = (np.array(look.color(rng, n), np.float32) for n in names)
    gray = rng.uniform(0.78, 1.0)
    bright = rng.random() < 0.6
    if look.weather != "clear":
        cover_strength = {"overcast": 0.85, "rain": 0.95, "fog": 1.0, "snow": 0.95}[look.weather]
        tone = {"overcast": (206, 210, 214), "rain": (164, 170, 176), "fog": (206, 208, 210),
                "snow": (208, 212, 218)}[look.weather]  # fmt: skip
        flat = np.array(tone, np.float32) * np.float32(gray)
        zenith = zenith + np.float32(cover_strength) * (flat * np.float32(0.94) - zenith)
        horizon = horizon + np.float32(cover_strength) * (flat * np.float32(1.04) - horizon)
        cloud = flat * np.float32(1.1 if bright else 0.82)
    if look.time == "dusk":
        warm = np.array((246, 168, 96), np.float32) * np.float32(0.85 + 0.2 * gray)
        share = np.float32(0.75 if look.weather == "clear" else 0.35)
        horizon = horizon + share * (warm - horizon)
        zenith = zenith * np.array((0.55, 0.52, 0.66), np.float32)
        cloud = cloud * np.array((0.86, 0.66, 0.62), np.float32)
    if look.night:
        glow = np.array(((8, 10, 20), (34, 31, 34), (26, 24, 28)), np.float32)
        zenith, horizon, cloud = (
            np.float32(0.03) * day + night
            for day, night in zip((zenith, horizon, cloud), glow, strict=True)
        )
    return zenith, horizon, cloud


def _cloud_cover(rng: np.random.Generator, look: Look, rows: int, columns: int) -> Floats:
    """Cloud cover of every pixel, 0 to 1, (rows, columns) float32."""
    shape = (columns, rows)
    large = np.ascontiguousarray(noise_patch(rng, "clouds", 96, int(rng.integers(90, 200))))
    small = np.ascontiguousarray(noise_patch(rng, "patches", 128, 256))
    noise = cv2.resize(large, shape, interpolation=cv2.INTER_LINEAR)
    noise += np.float32(0.22) * cv2.resize(small, shape, interpolation=cv2.INTER_LINEAR)
    if look.weather == "clear":
        cover = (noise - np.float32(rng.uniform(0.1, 1.6))) * np.float32(1.5)
        return np.asarray(np.clip(cover, 0, 0.92))
    share = np.float32(0.25 if look.weather == "fog" else 0.75)
    return np.asarray(np.clip(np.float32(0.45) + np.float32(0.3) * noise, 0, 1) * share)


def _add_sun(rng: np.random.Generator, planes: Floats, color: tuple[int, int, int]) -> None:
    _, rows, columns = planes.shape
    x, y = rng.uniform(0, columns), rng.uniform(0.1, 0.9) * rows
    scale = np.float32(12 / (0.25 * columns) ** 2)
    across = (np.arange(columns, dtype=np.float32) - np.float32(x)) ** 2 * scale
    down = (np.arange(rows, dtype=np.float32) - np.float32(y)) ** 2 * scale
    glow = np.float32(0.9) / (1 + across[None, :] + down[:, None])
    for plane, value in zip(planes, color, strict=True):
        plane += glow * (value - plane)
