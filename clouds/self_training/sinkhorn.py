"""Class-balanced assignment of pixels to classes by Sinkhorn's algorithm (SENSE; SwAV).

Caron et al., Unsupervised Learning of Visual Features by Contrasting Cluster Assignments, NeurIPS
2020, section 3.1, describe the algorithm.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from clouds.self_training.refiners.base import PseudoLabel


@dataclass(frozen=True)
class BalancedAssignment:
    """Relabels the pixels of an image so that its classes have about equal shares.

    Each image is balanced alone, so that a label does not depend on the rest of the batch, and
    among the classes that are the best of at least one of its pixels: an even share for a class
    that is not in the image would be wrong.

    Attributes:
        rounds: of Sinkhorn's algorithm; SENSE: 3.
        temperature: divides the logits, which are logarithms of the scores; SENSE: 0.05.
    """

    rounds: int
    temperature: float

    def __call__(self, label: PseudoLabel, scores: Tensor) -> PseudoLabel:
        """The label with other classes, and their assigned probabilities as confidence.

        Args:
            label: the best classes of the scores.
            scores: the teacher's semantic map, float32 (C, H, W).
        """
        present = torch.bincount(label.classes.flatten(), minlength=1).nonzero()[:, 0]
        logits = scores[present].flatten(1).clamp(min=torch.finfo(scores.dtype).tiny).log()
        assigned = sinkhorn(logits / self.temperature, self.rounds)
        confidence, best = assigned.max(0)
        shape = label.classes.shape
        return PseudoLabel(
            present[best].to(torch.uint8).view(shape),
            confidence.float().view(shape),
            label.scores,
            label.query_confidence,
        )


def sinkhorn(logits: Tensor, rounds: int) -> Tensor:
    """Probabilities of the classes of each sample, with even shares of the classes.

    A round scales the classes to shares of 1 / C, then the samples to sums of 1. It computes with
    logarithms, since exp(logits) overflows at low temperatures.

    Args:
        logits: (C, N), divided by the temperature.
        rounds: at least 1. The more, the more even the shares.

    Returns:
        (C, N); the classes of a sample sum to 1.
    """
    by_sample = logits.new_zeros(logits.shape[1])
    by_class = logits.new_zeros(len(logits), 1)
    share = log(logits.shape[1] / len(logits))
    for _ in range(rounds):
        by_class = (share - (logits + by_sample).logsumexp(1))[:, None]
        by_sample = -(logits + by_class).logsumexp(0)
    return (logits + by_class + by_sample).exp()
