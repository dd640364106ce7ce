"""Regions of a pseudo-label that are probably wrong: a Gaussian mixture of their losses.

The losses of right and of wrong labels are two groups, which a mixture of two Gaussians separates
(Arazo et al., 2019; DivideMix, Li et al., 2020; of regions: SeCo, Zhao et al., 2023).
"""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clouds.messages import install_extra

MIN_REGIONS = 8
"""With fewer regions there is no mixture."""
MIN_SPREAD = 1e-3
"""Losses that differ by less, in nats, are one group."""
SMALLEST = 1e-6
"""Probabilities are at least this, which bounds the loss."""

Floats = npt.NDArray[np.float64]


def region_losses(scores: Tensor, regions: Tensor, num_regions: int) -> Tensor:
    """Mean cross-entropy of each class in each region.

    Args:
        scores: float32 (C, H, W), the teacher's semantic map. Probabilities are its shares in the
            sum over classes, or the scores themselves where that sum is below 1.
        regions: int64 (H, W), 0..num_regions-1; -1 where there is none.

    Returns:
        float32 (num_regions, C): mean of -log p over the region's pixels; 0 for one without any.
    """
    probabilities = scores / scores.sum(0).clamp(min=1)
    return region_means(-probabilities.clamp(min=SMALLEST).log(), regions, num_regions)


def region_means(values: Tensor, regions: Tensor, num_regions: int) -> Tensor:
    """Mean over the pixels of each region, float32 (num_regions, C); 0 for one without any.

    Args:
        values: float32 (C, H, W).
        regions: see `region_losses`.
    """
    inside = regions >= 0
    own = values[:, inside].T
    sums = own.new_zeros(num_regions, len(values)).index_add_(0, regions[inside], own)
    areas = torch.bincount(regions[inside], minlength=num_regions)
    return sums / areas.clamp(min=1)[:, None]


def noise_probabilities(losses: Floats) -> Floats:
    """Probability of each region of being in the group of larger losses.

    Losses are scaled to [0, 1]; settings of the mixture are those of DivideMix.

    Args:
        losses: (R,), of the regions of one image for their classes.

    Returns:
        (R,); 0 for all if there are fewer than MIN_REGIONS, if they differ by less than
        MIN_SPREAD, or if one Gaussian explains the losses
        better than two, by the Bayesian information criterion.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture
    except ImportError as error:
        raise ImportError(
            f"MODEL.CLOUDS.REGIONS.FILTER needs scikit-learn: {install_extra('sam')}"
        ) from error
    if len(losses) < MIN_REGIONS or (span := np.ptp(losses)) < MIN_SPREAD:
        return np.zeros(len(losses))
    values = ((losses - losses.min()) / span)[:, None]
    one, two = (
        GaussianMixture(n, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=0) for n in (1, 2)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # ten steps are meant to be few
        one.fit(values)
        two.fit(values)
    if one.bic(values) <= two.bic(values):
        return np.zeros(len(losses))
    posterior: Floats = two.predict_proba(values)[:, two.means_[:, 0].argmax()]
    return posterior
