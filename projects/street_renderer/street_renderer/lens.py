"""Camera effects: blur, color response, vignette, noise, JPEG compression."""

from __future__ import annotations

import cv2
import numpy as np

from street_renderer.camera import Floats
from street_renderer.canvas import Bytes
from street_renderer.style import Grade
from street_renderer.textures import noise_patch

_LUMA = np.array([0.299, 0.587, 0.114])


def expose(rng: np.random.Generator, planes: Floats, grade: Grade) -> Bytes:
    """Apply the camera effects, which `Lens` describes.

    Args:
        planes: (3, rows, columns) float32, RGB light; modified in place.

    Returns:
        (rows, columns, 3) uint8 RGB.
    """
    _, rows, columns = planes.shape
    if grade.vignette > 0:
        planes *= _vignette(rows, columns, grade.vignette)
    matrix = grade.saturation * np.eye(3) + (1 - grade.saturation) * _LUMA[None, :]
    matrix = np.diag(grade.gains) @ matrix * grade.exposure
    image = cv2.transform(cv2.merge(list(planes)), matrix)
    if grade.blur >= 0.3:
        size = 2 * max(1, round(2 * grade.blur)) + 1
        image = cv2.GaussianBlur(image, (size, size), grade.blur)
    if grade.noise > 0:
        image += _sensor_noise(rng, rows, columns, grade.noise)
    np.clip(image, 0, 255, out=image)
    developed = cv2.LUT(image.astype(np.uint8), _response(grade))
    if grade.quality < 100:
        developed = _compressed(developed, grade.quality)
    return np.asarray(developed, np.uint8)


def _vignette(rows: int, columns: int, loss: float) -> Floats:
    down = np.linspace(-1, 1, rows, dtype=np.float32) ** 2
    across = np.linspace(-1, 1, columns, dtype=np.float32) ** 2
    reach = np.float32(0.5) * (down[:, None] + across[None, :])
    return np.asarray(1 - np.float32(loss) * reach * reach)


def _sensor_noise(rng: np.random.Generator, rows: int, columns: int, sigma: float) -> Floats:
    """Luminance noise with a little color in it, (rows, columns, 3) float32."""
    gray = np.float32(0.85 * sigma) * noise_patch(rng, "fine", rows, columns)
    color = np.float32(0.4 * sigma)
    channels = [gray + color * noise_patch(rng, "fine", rows, columns) for _ in range(3)]
    return np.asarray(cv2.merge(channels))


def _response(grade: Grade) -> Bytes:
    """Contrast around the middle and gamma as a table (256,) uint8."""
    level = np.arange(256) / 255
    level = np.clip(0.5 + (level - 0.5) * grade.contrast, 0, 1) ** grade.gamma
    return np.rint(255 * level).astype(np.uint8)


def _compressed(image: Bytes, quality: int) -> Bytes:
    """One JPEG round trip."""
    success, encoded = cv2.imencode(
        ".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality]
    )
    assert success, "OpenCV cannot encode JPEG"
    decoded = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    return np.asarray(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB), np.uint8)
