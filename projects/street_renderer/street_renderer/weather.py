"""Lighting and weather: grain, darkness, lamps, wet roads, fog, rain and snowflakes.

This pass uses the surface table and the distance of every pixel and does not change labels. Images
are color planes here, (3, rows, columns) float32.
"""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np

from street_renderer.camera import Floats
from street_renderer.canvas import Bytes, Canvas
from street_renderer.layout import CLASSES
from street_renderer.style import REFERENCE_ROWS, Look
from street_renderer.textures import noise_patch

_VISIBILITY = {"clear": 2500.0, "overcast": 1500.0, "rain": 380.0, "snow": 260.0, "fog": 48.0}
"""Distance in meters at which 63 % of the light is scattered."""
_DUSK = (0.62, 0.56, 0.58)
_NIGHT = (0.13, 0.14, 0.18)
"""Remaining light at dusk and at night, per color channel."""
_HEADLAMP = (1.0, 0.95, 0.84)
_MIRRORING = {"road": 0.36, "sidewalk": 0.18}
"""Share of reflected light on wet ground."""


def apply_light(canvas: Canvas, rng: np.random.Generator, ground: Floats) -> Floats:
    """Compute the light that reaches the camera.

    Args:
        ground: distance of the ground per pixel from `draw_ground`.

    Returns:
        Color planes (3, rows, columns) float32, mostly 0 to 255.
    """
    look = canvas.look
    numbers = np.ascontiguousarray(canvas.pixels[..., 3])
    grain = _grain(canvas, rng, numbers)
    planes = np.empty((3, *numbers.shape), np.float32)
    for channel, plane in enumerate(planes):
        np.multiply(canvas.pixels[..., channel], grain, out=plane)
    distance = _distances(canvas, numbers, ground)
    if look.time != "day":
        _darken(canvas, planes, numbers, distance)
    _add_glows(canvas, planes)
    if look.weather == "rain":
        _mirror_in_wet_ground(canvas, planes, numbers)
    _add_haze(look, rng, planes, distance)
    if look.weather == "rain":
        _add_rain(rng, planes)
    elif look.weather == "snow":
        _add_flakes(rng, planes)
    return planes


def _per_pixel(numbers: Bytes, values: Iterable[float]) -> Floats:
    """Look up one value per surface for all pixels: (rows, columns) float32."""
    table = np.zeros(256, np.float32)
    listed = list(values)
    table[: len(listed)] = listed
    return np.asarray(cv2.LUT(numbers, table))


def _grain(canvas: Canvas, rng: np.random.Generator, numbers: Bytes) -> Floats:
    """Brightness factors around 1: noise whose strength depends on the surface."""
    strength = 0.09 * canvas.look.style.texture
    amount = _per_pixel(numbers, (strength * (0.35 + s.grain) for s in canvas.surfaces))
    amount *= noise_patch(rng, "grain", *numbers.shape)
    amount += 1
    return amount


def _distances(canvas: Canvas, numbers: Bytes, ground: Floats) -> Floats:
    own = _per_pixel(numbers, (-1.0 if s.distance is None else s.distance for s in canvas.surfaces))
    return np.where(own < 0, ground, own)


def _darken(canvas: Canvas, planes: Floats, numbers: Bytes, distance: Floats) -> None:
    """Darken for dusk or night, except in the headlamps' beam and on glowing surfaces."""
    night = canvas.look.night
    glowing = _per_pixel(numbers, (float(s.glowing) for s in canvas.surfaces))
    beam = _headlamps(canvas, distance) if night else None
    for plane, tone, lamp in zip(planes, _NIGHT if night else _DUSK, _HEADLAMP, strict=True):
        gain = np.float32(tone) if beam is None else tone + lamp * beam
        plane *= gain + glowing * (1 - gain)


def _headlamps(canvas: Canvas, distance: Floats) -> Floats:
    """Light of the ego vehicle's headlamps (low beam) on every pixel, 0 to 1."""
    camera = canvas.camera
    across = (
        np.arange(camera.columns, dtype=np.float32) - np.float32(camera.center)
    ) / camera.focal
    beam = np.exp(-((across / 0.42) ** 2))[None, :]
    reach = np.exp(np.minimum(distance, 200.0) * np.float32(-1 / 17.0)) * (distance > 2.0)
    down = np.arange(camera.rows, dtype=np.float32)[:, None] - np.float32(camera.horizon)
    cut = 1 / (1 + np.exp(-(down / camera.rows + 0.03) * 60))
    return np.asarray(reach * (0.95 * beam * cut), np.float32)


def _add_glows(canvas: Canvas, planes: Floats) -> None:
    """Add the light around lamps."""
    _, rows, columns = planes.shape
    for glow in canvas.glows:
        x, y = glow.center
        wide, high = (min(max(radius, 2.0), 0.4 * rows) for radius in glow.radius)
        x0, x1 = max(0, int(x - wide)), min(columns, int(x + wide) + 2)
        y0, y1 = max(0, int(y - high)), min(rows, int(y + high) + 2)
        if x0 >= x1 or y0 >= y1:
            continue
        across = ((np.arange(x0, x1, dtype=np.float32) - np.float32(x)) / np.float32(wide)) ** 2
        down = ((np.arange(y0, y1, dtype=np.float32) - np.float32(y)) / np.float32(high)) ** 2
        fall = np.maximum(1 - np.sqrt(across[None, :] + down[:, None]), 0) ** 2
        fall *= np.float32(glow.strength)
        for plane, value in zip(planes, glow.color, strict=True):
            plane[y0:y1, x0:x1] += value * fall


def _mirror_in_wet_ground(canvas: Canvas, planes: Floats, numbers: Bytes) -> None:
    """Add vertically blurred reflections on wet ground."""
    rows = planes.shape[1]
    horizon = round(min(max(canvas.camera.horizon, 1), rows - 2))
    source = np.maximum(2 * horizon - np.arange(horizon, rows) - 1, 0)
    smear = (3, max(3, (rows - horizon) // 6 * 2 + 1))
    share = _per_pixel(
        numbers[horizon:],
        (
            _MIRRORING.get(CLASSES[s.label], 0.0) if s.distance is None and s.label < 19 else 0.0
            for s in canvas.surfaces
        ),
    )
    for plane in planes:
        mirrored = cv2.blur(plane[source], smear)
        plane[horizon:] += share * (mirrored - plane[horizon:])


def _add_haze(look: Look, rng: np.random.Generator, planes: Floats, distance: Floats) -> None:
    visibility = _VISIBILITY[look.weather] * float(rng.uniform(0.65, 1.5))
    color = (206, 210, 214) if look.weather != "clear" else (186, 204, 224)
    dim = {"day": 1.0, "dusk": 0.55, "night": 0.10}[look.time]
    share = 1 - np.exp(np.minimum(distance, 4000.0) * np.float32(-1 / visibility))
    if look.weather == "clear":
        share *= np.float32(0.6)
    elif look.weather != "fog":  # keep the color of the sky
        share[distance > 600] *= np.float32(0.4)
    for plane, value in zip(planes, color, strict=True):
        plane += share * (dim * value - plane)


def _add_rain(rng: np.random.Generator, planes: Floats) -> None:
    """Add faint streaks, and drops on the windshield that blur the image."""
    _, rows, columns = planes.shape
    scale = rows / REFERENCE_ROWS
    layer = np.zeros((rows, columns), np.float32)
    slant = float(rng.uniform(-0.3, 0.3))
    starts = rng.uniform(0, (columns, rows), (90, 2)).tolist()
    for (x, y), length, light in zip(
        starts, rng.uniform(5, 16, 90).tolist(), rng.uniform(8, 26, 90).tolist(), strict=True
    ):
        end = (round(x + slant * length * scale), round(y + length * scale))
        cv2.line(layer, (round(x), round(y)), end, light, 1, cv2.LINE_AA)
    planes += layer
    drops = np.zeros((rows, columns), np.uint8)
    for _ in range(int(rng.integers(0, 14))):
        center = (int(rng.integers(columns)), int(rng.integers(rows)))
        cv2.circle(drops, center, max(1, round(rng.uniform(2, 6) * scale)), 255, -1)
    size = 2 * round(5 * scale) + 1
    for plane in planes:
        cv2.copyTo(cv2.blur(plane, (size, size)) * np.float32(1.04), drops, plane)


def _add_flakes(rng: np.random.Generator, planes: Floats) -> None:
    """Add snowflakes: many small faint ones, a few large ones near the lens."""
    _, rows, columns = planes.shape
    scale = rows / REFERENCE_ROWS
    layer = np.zeros((rows, columns), np.float32)
    count = int(rng.integers(60, 260))
    radii = np.clip(rng.exponential(0.7, count) * scale, 0, 4 * scale).tolist()
    spots = rng.uniform(0, (columns, rows), (count, 2)).tolist()
    for (x, y), radius, light in zip(
        spots, radii, rng.uniform(0.35, 0.8, count).tolist(), strict=True
    ):
        cv2.circle(layer, (round(x), round(y)), round(radius), light, -1)
    layer = cv2.GaussianBlur(layer, (3, 3), 0.7)
    for plane, white in zip(planes, (238, 240, 244), strict=True):
        plane += layer * (white - plane)
