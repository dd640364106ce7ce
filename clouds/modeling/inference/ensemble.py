"""The geometric ensemble of the head's classes with CLIP's own (FC-CLIP, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clouds.d2 import CfgNode
from clouds.data.datasets import get_dataset
from clouds.data.sample import Domain


@dataclass(frozen=True)
class EnsembleOptions:
    """What `geometric_ensemble` needs beside logits.

    Attributes:
        seen: per class, whether it occurs in a training dataset.
        alpha, beta: exponents of CLIP's probability for seen and for other classes.
        valid_masks_only: leave queries alone whose mask has no pixel.
    """

    seen: tuple[bool, ...]
    alpha: float
    beta: float
    valid_masks_only: bool = False

    @classmethod
    def from_config(cls, cfg: CfgNode) -> EnsembleOptions:
        """Exponents as configured; seen are the classes of the labelled training datasets."""
        options = cfg.MODEL.CLOUDS
        datasets = [get_dataset(name) for name in cfg.DATASETS.TRAIN]
        labelled = [dataset for dataset in datasets if dataset.domain is not Domain.GENERATED]
        present = {c for dataset in labelled for c in dataset.classes_present}
        seen = tuple(c in present for c in range(cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES))
        return cls(
            seen,
            options.GEOMETRIC_ENSEMBLE_ALPHA,
            options.GEOMETRIC_ENSEMBLE_BETA,
            options.ENSEMBLE_ON_VALID_MASK,
        )


def geometric_ensemble(
    in_vocabulary: Tensor,
    out_of_vocabulary: Tensor,
    seen: Tensor,
    alpha: float,
    beta: float,
    ensembled: Tensor | None = None,
) -> Tensor:
    """Combine what was learned with what CLIP knows, per query and class.

    Args:
        in_vocabulary: the head's class logits (N, Q, C + 1), void last.
        out_of_vocabulary: CLIP's zero-shot logits (N, Q, C + 1), void last.
        seen: bool (C,), the classes that occur in training.
        alpha: exponent of CLIP's probability for seen classes; the head's has 1 - alpha.
        beta: the same for the others.
        ensembled: bool (N, Q), queries to combine; the others keep the head's probabilities, void
            and all. None: every query.

    Returns:
        (N, Q, C + 1) probabilities; void keeps the head's.
    """
    void = in_vocabulary.softmax(-1)[..., -1:]
    exponent = torch.where(seen, alpha, beta)
    if ensembled is not None:
        exponent = exponent * ensembled[..., None]
    # Sums of log-probabilities stay finite where products of probabilities underflow.
    combined = (1 - exponent) * in_vocabulary[..., :-1].log_softmax(-1)
    combined = combined + exponent * out_of_vocabulary[..., :-1].log_softmax(-1)
    return torch.cat((combined.softmax(-1) * (1 - void), void), dim=-1)
