"""Common corruptions of images (Hendrycks and Dietterich, 2019), by the package imagecorruptions.

Images are corrupted when they are read for an evaluation, with random numbers that depend on the
name of the file alone, so that every run and every process sees the same pixels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from clouds.messages import install_extra

COMMON = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur",
    "zoom_blur", "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate",
    "jpeg_compression",
)  # fmt: skip
"""The corruptions that benchmarks take the mean over."""

EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""Further corruptions, meant for the choice of hyperparameters."""

CORRUPTIONS = COMMON + EXTRA
SEVERITIES = (1, 2, 3, 4, 5)
MIN_SIDE = 32
"""Shortest side of an image that the package corrupts, pixels."""

PACKAGE = "imagecorruptions-imaug"
INSTALL = f"{install_extra('corruptions')} && pip install --no-deps {PACKAGE}"
"""Without dependencies, because opencv-python would replace files of opencv-python-headless."""

_SEEDED = ("glass_blur", "impulse_noise")
"""Corruptions that draw from a generator of their own; the others draw from numpy's global one."""

UInt8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Corruption:
    """A corruption, of one image if it has its seed.

    Attributes:
        name: one of CORRUPTIONS.
        severity: one of SEVERITIES.
        seed: of all random numbers, in [0, 2**32).

    Raises:
        ValueError: another name or severity.
    """

    name: str
    severity: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in CORRUPTIONS or self.severity not in SEVERITIES:
            raise ValueError(
                f"no corruption {self.name!r} of severity {self.severity!r}; corruptions are "
                f"{', '.join(CORRUPTIONS)}, severities {SEVERITIES[0]} to {SEVERITIES[-1]}"
            )

    def of_file(self, file: str) -> Corruption:
        """The same with the seed of a file.

        Args:
            file: path relative to the folder of the images, with '/', so that the seed does not
                depend on where the dataset is.
        """
        digest = hashlib.sha256(file.encode("utf-8", "surrogateescape")).digest()
        return replace(self, seed=int.from_bytes(digest[:4], "little"))

    def __call__(self, image: UInt8Array) -> UInt8Array:
        """The corrupted image.

        Args:
            image: (H, W, 3) RGB; it is not changed.

        Returns:
            (H, W, 3) RGB. The state of numpy's global generator is as before.

        Raises:
            ImportError: the package is missing or cannot be imported.
            ValueError: a side is shorter than MIN_SIDE.
        """
        height, width = image.shape[:2]
        if min(height, width) < MIN_SIDE:
            raise ValueError(
                f"the image has {width}x{height} pixels, but {self.name} needs at least "
                f"{MIN_SIDE}x{MIN_SIDE}"
            )
        own: dict[str, int] = {"seed": self.seed} if self.name in _SEEDED else {}
        corrupt = import_package().corrupt
        state = np.random.get_state()
        np.random.seed(self.seed)
        try:
            corrupted = corrupt(image, severity=self.severity, corruption_name=self.name, **own)
        finally:
            np.random.set_state(state)
        return np.asarray(corrupted, np.uint8)


def import_package() -> Any:
    """The module imagecorruptions.

    Raises:
        ImportError: it is not installed or cannot be imported; the message says what to install.
    """
    try:
        import imagecorruptions
    except ImportError as error:
        raise ImportError(
            f"corrupted images need the package {PACKAGE}: install it by `{INSTALL}`. Importing it "
            f"failed: {error}"
        ) from error
    return imagecorruptions
