"""Majority vote in superpixels: labels follow the image's edges, without any weights."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt
import torch

from clouds.d2 import CfgNode
from clouds.self_training.refiners.base import (
    NO_CLASS,
    REFINER_REGISTRY,
    PseudoLabel,
    RefinedLabel,
    Refiner,
    as_it_is,
)

ITERATIONS = 5
"""Rounds of SLIC: each takes as long as the one before, and moves fewer pixels."""


class SuperpixelRefiner:
    """Gives each superpixel (SLIC, Achanta et al., 2012) the class most of its pixels have.

    Args:
        size: side of a superpixel, pixels, on average.
        ruler: weight of distance against color, as scikit-image's `compactness`; the larger, the
            squarer are the superpixels.
    """

    def __init__(self, size: int, ruler: float) -> None:
        self.size = size
        self.ruler = ruler

    def refine(
        self,
        images: Sequence[torch.Tensor],
        labels: Sequence[PseudoLabel],
        seeds: Sequence[int],
    ) -> list[RefinedLabel]:
        """See `Refiner`. A superpixel where the teacher names no class gets none."""
        return [self._refine(i, label) for i, label in zip(images, labels, strict=True)]

    def _refine(self, image: torch.Tensor, label: PseudoLabel) -> RefinedLabel:
        segments = superpixels(image.permute(1, 2, 0).cpu().numpy(), self.size, self.ruler)
        classes, agreement = majority(segments, label.classes.cpu().numpy())
        device = label.classes.device
        voted = PseudoLabel(torch.from_numpy(classes).to(device), label.confidence)
        split = as_it_is(voted)
        return RefinedLabel(split.labels, split.masks, torch.from_numpy(agreement).to(device))


def superpixels(image: npt.NDArray[np.uint8], size: int, ruler: float) -> npt.NDArray[np.intp]:
    """SLIC's superpixels.

    Args:
        image: uint8 (H, W, 3) RGB.
        size: side of a superpixel, pixels, on average.
        ruler: scikit-image's `compactness`.

    Returns:
        (H, W), numbers from 0, of which some may be missing. A superpixel may have stray pixels:
        a vote needs no connected ones, and joining strays to a neighbour would lose edges.

    Raises:
        ImportError: scikit-image is not installed.
    """
    try:
        from skimage.segmentation import slic
    except ImportError as error:
        raise ImportError(
            "MODEL.CLOUDS.REFINER superpixel needs scikit-image: pip install scikit-image"
        ) from error
    height, width = image.shape[:2]
    lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    # SLIC stretches what it gets to [0, 1]: `compactness` shrinks with it.
    stretch = float(np.ptp(lab)) or 1.0
    segments: npt.NDArray[np.intp] = slic(
        lab,
        n_segments=max(1, round(height * width / size**2)),
        compactness=ruler / stretch,
        max_num_iter=ITERATIONS,
        enforce_connectivity=False,
        convert2lab=False,  # OpenCV is several times faster
        start_label=0,
    )
    return segments


def majority(
    segments: npt.NDArray[np.intp], classes: npt.NDArray[np.uint8], ignore: int = NO_CLASS
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """The commonest class of each segment, and how common it is there.

    Args:
        segments: (H, W), numbers from 0.
        classes: uint8 (H, W).
        ignore: the value that is no class and has no vote.

    Returns:
        classes: uint8 (H, W), the smallest of equally common ones; `ignore` where nobody votes.
        agreement: float32 (H, W) in [0, 1], the share of the segment's pixels of that class.
    """
    count = int(segments.max()) + 1
    kinds = int(classes.max()) + 1
    pairs = segments.ravel() * kinds + classes.ravel()
    votes = np.bincount(pairs, minlength=count * kinds).reshape(count, kinds)
    areas = votes.sum(1)
    votes[:, ignore:] = 0
    most = votes.max(1)
    winners = np.where(most > 0, votes.argmax(1), ignore).astype(np.uint8)
    shares = (most / np.maximum(areas, 1)).astype(np.float32)
    return winners[segments], shares[segments]


def superpixel(cfg: CfgNode, device: torch.device) -> Refiner:
    """MODEL.CLOUDS.REFINER superpixel."""
    node = cfg.MODEL.CLOUDS.SUPERPIXEL
    return SuperpixelRefiner(node.SIZE, node.COMPACTNESS)


REFINER_REGISTRY.register(superpixel)
