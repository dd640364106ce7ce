"""Majority vote in superpixels: labels follow the image's edges, without a network."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clouds.d2 import CfgNode
from clouds.data.label_space import IGNORE
from clouds.self_training.refiners.base import REFINER_REGISTRY, PseudoLabel, RefinedLabel, Refiner

SLIC_ITERATIONS = 5
"""Each takes as long as the one before, and moves fewer pixels."""


class SuperpixelRefiner:
    """Gives each superpixel (SLIC, Achanta et al., 2012) the class of most of its pixels.

    Args:
        size: side of a superpixel, pixels, on average.
        compactness: weight of distance against color, as in scikit-image; with larger values
            superpixels are closer to squares.
    """

    needs_scores = False

    def __init__(self, size: int, compactness: float) -> None:
        self.size = size
        self.compactness = compactness

    def refine(
        self, images: Sequence[Tensor], labels: Sequence[PseudoLabel], seeds: Sequence[int]
    ) -> list[RefinedLabel]:
        """See `Refiner`. A superpixel without a class of the teacher gets none."""
        return [self._refine(i, label) for i, label in zip(images, labels, strict=True)]

    def _refine(self, image: Tensor, label: PseudoLabel) -> RefinedLabel:
        pixels = image.permute(1, 2, 0).cpu().numpy()
        segments = superpixels(pixels, self.size, self.compactness)
        classes, agreement = majority_vote(segments, label.classes.cpu().numpy())
        device = label.classes.device
        voted = PseudoLabel(torch.from_numpy(classes).to(device), label.confidence)
        refined = RefinedLabel.from_teacher(voted)
        return RefinedLabel(refined.labels, refined.masks, torch.from_numpy(agreement).to(device))


def superpixels(
    image: npt.NDArray[np.uint8], size: int, compactness: float
) -> npt.NDArray[np.intp]:
    """Superpixels by SLIC of an image, uint8 (H, W, 3) RGB; see `SuperpixelRefiner`.

    Returns:
        (H, W), numbers from 0, some of which may be missing. Superpixels need not be connected:
        a vote does not need it, and merging stray pixels into a neighbor would lose edges.

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
    # SLIC rescales its input to [0, 1], so compactness is rescaled with it.
    value_range = float(np.ptp(lab)) or 1.0
    segments: npt.NDArray[np.intp] = slic(
        lab,
        n_segments=max(1, round(height * width / size**2)),
        compactness=compactness / value_range,
        max_num_iter=SLIC_ITERATIONS,
        enforce_connectivity=False,
        convert2lab=False,  # OpenCV is several times faster
        start_label=0,
    )
    return segments


def majority_vote(
    segments: npt.NDArray[np.intp], classes: npt.NDArray[np.uint8], ignore: int = IGNORE
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """The most frequent class of each segment, and its share.

    Args:
        segments: (H, W), numbers from 0.
        classes: uint8 (H, W).
        ignore: value that is no class; such pixels do not vote.

    Returns:
        classes: uint8 (H, W), the smallest of equally frequent ones; `ignore` without any vote.
        agreement: float32 (H, W) in [0, 1], the share of the segment's pixels with that class.
    """
    num_segments = int(segments.max()) + 1
    num_values = int(classes.max()) + 1
    pairs = segments.ravel() * num_values + classes.ravel()
    votes = np.bincount(pairs, minlength=num_segments * num_values)
    votes = votes.reshape(num_segments, num_values)
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
