"""Fixtures of tests of reading."""

from __future__ import annotations

import pytest

from clouds.data import reading


@pytest.fixture(params=["fast", "without kornia_rs"])
def decoder(request, monkeypatch):
    """Every test runs with the fast decoder of PNG files and without it."""
    if request.param != "fast":
        monkeypatch.setattr(reading, "decode_image_png_u8", None)
    elif reading.decode_image_png_u8 is None:
        pytest.skip("kornia_rs is not installed")
    return request.param
