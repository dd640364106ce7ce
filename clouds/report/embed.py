"""Images inside of an HTML file, of bounded size."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

UInt8Array = npt.NDArray[np.uint8]

MAX_BYTES = 12 << 20
"""Size of all images of a report together, as text."""

MAX_WIDTH = 960
PANEL_WIDTH = 1500
"""Widths, pixels, to which wider images and panels are reduced."""

QUALITY = 80


@dataclass
class Embedder:
    """Encodes images as data URIs until they have `max_bytes` together.

    Attributes:
        max_bytes: limit.
        used: bytes of the URIs so far.
        left_out: images that would have exceeded the limit.
    """

    max_bytes: int = MAX_BYTES
    used: int = 0
    left_out: int = 0

    def photo(self, image: UInt8Array, max_width: int = MAX_WIDTH) -> str:
        """An image (H, W, 3) RGB as a URI, lossy; empty if the limit is reached."""
        return self._add(_reduced(Image.fromarray(image), max_width, Image.Resampling.LANCZOS))

    def colors(self, image: UInt8Array) -> str:
        """As `photo` of an image (H, W, 3) RGB of few colors, but lossless."""
        reduced = _reduced(Image.fromarray(image), MAX_WIDTH, Image.Resampling.NEAREST)
        return self._add(reduced, lossless=True)

    def _add(self, image: Image.Image, *, lossless: bool = False) -> str:
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=QUALITY, method=4, lossless=lossless)
        uri = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        if self.used + len(uri) > self.max_bytes:
            self.left_out += 1
            return ""
        self.used += len(uri)
        return uri


def _reduced(image: Image.Image, width: int, resampling: Image.Resampling) -> Image.Image:
    """The image, or if it is wider a copy of `width` pixels."""
    if image.width <= width:
        return image
    height = max(1, round(width * image.height / image.width))
    return image.resize((width, height), resampling)
