"""Where the trained weights are: beside the package in a checkout, within it where it was built."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_BUILT = _PACKAGE / "weights"
FOLDER = _BUILT if _BUILT.is_dir() else _PACKAGE.parent / "weights"
STREET_CLIP = FOLDER / "street_clip.safetensors"
STREET_SAM = FOLDER / "street_sam.safetensors"
