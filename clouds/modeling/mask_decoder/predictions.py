"""What the head predicts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Predictions:
    """Classes and masks of every query, after the raw queries and after each decoder layer.

    Attributes:
        class_logits: L tensors (N, Q, classes + 1), void last.
        mask_logits: L tensors (N, Q, H / 4, W / 4).
    """

    class_logits: list[Tensor]
    mask_logits: list[Tensor]

    @property
    def final(self) -> tuple[Tensor, Tensor]:
        """Class and mask logits of the last layer."""
        return self.class_logits[-1], self.mask_logits[-1]
