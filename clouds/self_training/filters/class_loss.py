"""FreeMask's filter: pixels whose loss is far above that of their class on labelled images.

Yang et al., FreeMask: Synthetic Images with Dense Annotations Make Stronger Segmentation Models,
NeurIPS 2023, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clouds import comm
from clouds.data.structures import Targets, class_map
from clouds.self_training.refiners.base import PseudoLabel

MOMENTUM = 0.99
"""Factor of the sums of earlier iterations at each iteration."""


def pixel_losses(scores: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy of each pixel's class, float32 (H, W); 0 where there is no class.

    Args:
        scores: semantic map, (C, H, W). A class's probability is its share in the sum of the
            scores, or the score itself where that sum is below 1, as in `label_from_scores`.
        classes: (H, W), train ids; ids from C on are no class.
    """
    is_class = classes < len(scores)
    index = classes.long().masked_fill(~is_class, 0)[None]
    score = scores.gather(0, index)[0]
    smallest = torch.finfo(score.dtype).eps
    losses = -(score / scores.sum(0).clamp(min=1)).clamp(min=smallest).log()
    return losses.float().masked_fill(~is_class, 0.0)


class ClassLosses:
    """Mean losses of the classes on labelled training images, averaged over recent iterations.

    `observe` only collects. The statistics change in `commit`, once an iteration is complete, so
    that they are those of the last completed iteration when a checkpoint is saved. They are sums
    over the images of all processes.

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int) -> None:
        self._totals = torch.zeros(2, num_classes, dtype=torch.float64)  # of losses, of pixels
        self._observed: Tensor | None = None

    @property
    def means(self) -> Tensor:
        """float64 (C,) on the host; infinite for a class that has not been seen."""
        losses, pixels = self._totals
        return torch.where(pixels > 0, losses / pixels.clamp(min=1e-12), torch.inf)

    @torch.no_grad()
    def observe(self, scores: Tensor, label: Tensor) -> None:
        """Add the prediction for one labelled image.

        Args:
            scores: semantic map, (C, H, W).
            label: (H, W), train ids, 255 where a pixel does not count.
        """
        num_classes, label = len(scores), label.to(scores.device)
        losses, classes = pixel_losses(scores, label).double(), label.long().clamp(max=num_classes)
        sums = losses.new_zeros(2, num_classes + 1)
        sums[0].index_add_(0, classes.flatten(), losses.flatten())
        sums[1] = torch.bincount(classes.flatten(), minlength=num_classes + 1)
        observed = sums[:, :num_classes]
        self._observed = observed if self._observed is None else self._observed + observed

    def commit(self, device: torch.device) -> None:
        """Take what was observed in this iteration into the means; every process must call it."""
        observed, self._observed = self._observed, None
        if observed is None:
            observed = self._totals.new_zeros(self._totals.shape)
        total = comm.mean_over_ranks(observed.to(device)).cpu()  # a factor cancels out in the means
        self._totals = MOMENTUM * self._totals + (1 - MOMENTUM) * total

    def discard(self) -> None:
        """Forget what was observed since the last `commit`."""
        self._observed = None

    def state_dict(self) -> dict[str, Any]:
        return {"totals": self._totals}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: it is of another number of classes.
        """
        if state["totals"].shape != self._totals.shape:
            raise ValueError(
                f"mean losses of {state['totals'].shape[-1]} classes are saved, but there are "
                f"{self._totals.shape[-1]}"
            )
        self._totals = state["totals"].double().cpu().clone()


@dataclass(frozen=True)
class ClassLossFilter:
    """Ignores pixels whose loss is above `tolerance` times the mean loss of their class.

    A class that no labelled image has had so far keeps all its pixels. Pixels without a class keep
    their weights.

    Attributes:
        class_losses: on labelled images.
        tolerance: FreeMask: 1.25.
    """

    class_losses: ClassLosses
    tolerance: float
    needs_scores = True

    def __call__(self, label: PseudoLabel, targets: Targets) -> Targets:
        assert label.scores is not None
        classes = class_map(targets.labels, targets.masks)
        noisy = self.is_noisy(label.scores, classes)
        return replace(targets, weights=targets.pixel_weights.masked_fill(noisy, 0.0))

    def is_noisy(self, scores: Tensor, classes: Tensor) -> Tensor:
        """bool (H, W), the pixels to ignore; scores (C, H, W), classes (H, W) train ids."""
        limits = (self.tolerance * self.class_losses.means).to(scores.device, torch.float32)
        limits = torch.cat([limits, limits.new_tensor([torch.inf])])
        limit = limits[classes.long().clamp(max=len(scores))]
        return pixel_losses(scores, classes) > limit
