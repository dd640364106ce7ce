"""From a dataset record to a sample: what training and evaluation get of one image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from clouds.data.augmentation import GeometryRange, JitterRange
from clouds.data.datasets import get_dataset
from clouds.data.reading import read_image
from clouds.data.structures import EvalSample, GeneratedSample, Record, SourceSample

if TYPE_CHECKING:
    from clouds.d2 import CfgNode


UInt8Array = npt.NDArray[np.uint8]


def read_pair(record: Record) -> tuple[UInt8Array, UInt8Array | None]:
    """A record's image (H, W, 3) RGB and its label (H, W) as train ids, None if it has none.

    Raises:
        FileNotFoundError: a file is gone.
        ValueError: a file is broken, or the label is not as large as the image.
    """
    image = read_image(record.image)
    if record.label is None:
        return image, None
    label = get_dataset(record.dataset).read_label(record)
    if label.shape != image.shape[:2]:
        raise ValueError(
            f"{record.label}: the label is {label.shape[1]}x{label.shape[0]} pixels, but its "
            f"image {record.image} is {image.shape[1]}x{image.shape[0]}. One of them is not the "
            "dataset's own; `python tools/check_datasets.py --full` lists every such pair."
        )
    return image, label


def to_tensor(pixels: UInt8Array) -> torch.Tensor:
    """(H, W, 3) -> (3, H, W); (H, W) as it is. uint8, memory in order."""
    if pixels.ndim == 3:
        pixels = pixels.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(pixels))


@dataclass(frozen=True)
class SourceMapper:
    """Reads image and label, then resizes, crops, jitters and flips them at random.

    Attributes:
        geometry: how images are resized, cropped and flipped.
        jitter: how their colors are distorted; None: not at all.
    """

    geometry: GeometryRange
    jitter: JitterRange | None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> SourceMapper:
        """As INPUT says."""
        keys = cfg.INPUT
        geometry = GeometryRange(
            working=(keys.INITIAL_HEIGHT, keys.INITIAL_WIDTH),
            scale=tuple(keys.SCALE_RANGE),
            crop=tuple(keys.CROP.SIZE),
            position=keys.CROP.POSITION,
            flip=keys.FLIP,
        )
        return cls(geometry, JitterRange() if keys.COLOR_AUG_SSD else None)

    def __call__(self, record: Record, seed: int) -> SourceSample:
        """The sample of one visit; the same record and seed give the same sample.

        Args:
            record: an image with its label.
            seed: this visit's own, in [0, 2**63).

        Raises:
            FileNotFoundError: a file is gone.
            ValueError: a file is broken, the label missing or of another size than the image.
        """
        image, label = read_pair(record)
        if label is None:
            raise ValueError(f"{record.image} has no label, so it cannot be a source of training")
        height, width = label.shape
        rng = np.random.default_rng(seed)
        geometry = self.geometry.draw((height, width), rng)
        view = geometry.apply_image(image)
        if self.jitter is not None:
            view = self.jitter.draw(rng).apply(view)
        return {
            "image": to_tensor(view),
            "sem_seg": to_tensor(geometry.apply_label(label)),
            "height": height,
            "width": width,
            "file_name": str(record.image),
            "domain": record.domain,
            "dataset": record.dataset,
            "seed": seed,
        }


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


Prepare = Callable[[UInt8Array, "UInt8Array | None", str], "tuple[UInt8Array, UInt8Array | None]"]
"""What an evaluation protocol does to a picture: (image (H, W, 3) RGB, label (H, W) train ids or
None, name of the dataset) -> (image that the model gets, label that is scored)."""


@dataclass(frozen=True)
class EvaluationMapper:
    """Reads image and label, and lets the protocol prepare them.

    Attributes:
        prepare: the protocol's.
    """

    prepare: Prepare

    def __call__(self, record: Record) -> EvalSample:
        """The sample of one record; raises as `read_pair`."""
        image, label = read_pair(record)
        fed, scored = self.prepare(image, label, record.dataset)
        height, width = image.shape[:2] if scored is None else scored.shape
        sample: EvalSample = {
            "image": to_tensor(fed),
            "height": height,
            "width": width,
            "file_name": str(record.image),
            "domain": record.domain,
            "dataset": record.dataset,
        }
        if scored is not None:
            sample["label"] = to_tensor(scored)
        return sample
