"""A labelled record -> a training sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from clouds.data.mappers.pair import read_pair, to_tensor
from clouds.data.sample import Record, SourceSample
from clouds.data.transforms import GeometryRange, JitterRange

if TYPE_CHECKING:
    from clouds.d2 import CfgNode


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
