"""A generated record -> a training sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from clouds.data.mappers.pair import to_tensor
from clouds.data.reading import read_image
from clouds.data.sample import GeneratedSample, Record
from clouds.data.transforms import JitterRange

if TYPE_CHECKING:
    from clouds.d2 import CfgNode

_PAINT_AGAIN = (
    "Delete it and run tools/generate_images.py again with the same options: it paints what is "
    "missing."
)


@dataclass(frozen=True)
class GeneratedMapper:
    """Reads an image as it was painted, flips half of them, jitters the student's view.

    Neither resized nor cropped. A label, where the folder has one to measure by, is never read.

    Attributes:
        flip: exchange left and right in half of the cases.
        jitter: how the colors of the student's view are distorted; None: not at all.
    """

    flip: bool
    jitter: JitterRange | None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> GeneratedMapper:
        """As INPUT says."""
        return cls(cfg.INPUT.FLIP, JitterRange() if cfg.INPUT.COLOR_AUG_SSD else None)

    def __call__(self, record: Record, seed: int) -> GeneratedSample:
        """The sample of one visit; the same record and seed give the same sample.

        Args:
            record: a generated image.
            seed: this visit's own, in [0, 2**63).

        Raises:
            FileNotFoundError: the image is gone.
            ValueError: it is broken, or of another size than its manifest says.
        """
        clean = read_painted(record)
        height, width = clean.shape[:2]
        rng = np.random.default_rng(seed)
        # drawn before the jitter, so that a seed has the same clean view with and without it
        flipped = self.flip and bool(rng.integers(2))
        if flipped:
            clean = np.ascontiguousarray(clean[:, ::-1])
        clean_image = to_tensor(clean)
        image = clean_image
        if self.jitter is not None:
            image = to_tensor(self.jitter.draw(rng).apply(clean))
        return {
            "image": image,
            "clean_image": clean_image,
            "flipped": flipped,
            "height": height,
            "width": width,
            "file_name": str(record.image),
            "domain": record.domain,
            "dataset": record.dataset,
            "seed": seed,
        }


def read_painted(record: Record) -> npt.NDArray[np.uint8]:
    """A generated image, (H, W, 3) RGB.

    Raises:
        FileNotFoundError: it is gone.
        ValueError: it is broken, or of another size than its manifest says.
    """
    try:
        image = read_image(record.image)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{record.image}: this image of {record.dataset} is gone since training began. "
            "Run tools/generate_images.py again with the same options, then go on with --resume."
        ) from error
    except ValueError as error:
        raise ValueError(f"{error} This is a generated image. {_PAINT_AGAIN}") from error
    height, width = image.shape[:2]
    painted_height, painted_width = record.painted_size or (height, width)
    if (height, width) != (painted_height, painted_width):
        raise ValueError(
            f"{record.image}: the image is {width}x{height} pixels, but the manifest of "
            f"{record.dataset} says {painted_width}x{painted_height}. {_PAINT_AGAIN}"
        )
    return image
