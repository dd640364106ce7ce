"""What the head predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskSource:
    """What masks are made of: a mask is the product of its query's embedding and the features.

    Attributes:
        embeddings: L tensors (N, Q, D).
        features: (N, D, H / 4, W / 4).
    """

    embeddings: list[Tensor]
    features: Tensor


@dataclass(frozen=True)
class Predictions:
    """Classes and masks of every query, after the raw queries and after each decoder layer.

    Attributes:
        class_logits: L tensors (N, Q, classes + 1), void last.
        mask_logits: L tensors (N, Q, H / 4, W / 4).
        source: of the masks; None where they have none.
    """

    class_logits: list[Tensor]
    mask_logits: list[Tensor]
    source: MaskSource | None = None

    @property
    def final(self) -> tuple[Tensor, Tensor]:
        """Class and mask logits of the last layer."""
        return self.class_logits[-1], self.mask_logits[-1]

    def chosen_masks(self, layers: Sequence[int], queries: Sequence[Tensor]) -> list[Tensor]:
        """Masks of a few queries, for losses.

        They are made again from their source, so that the way back leads through these few alone:
        the gradient of all `mask_logits`, nearly all of it zeros, would cost ten times as much.

        Args:
            layers: K of the L predictions.
            queries: per image (K, m), which queries of each of them.

        Returns:
            per image (K, m, H / 4, W / 4)
        """
        if self.source is None:
            logits = torch.stack([self.mask_logits[i] for i in layers], dim=1)
            return [
                torch.stack([layer[index] for layer, index in zip(image, chosen, strict=True)])
                for image, chosen in zip(logits, queries, strict=True)
            ]
        embeddings = torch.stack([self.source.embeddings[i] for i in layers], dim=1)
        masks = []
        for image, features, chosen in zip(
            embeddings.unbind(), self.source.features.unbind(), queries, strict=True
        ):
            index = chosen[..., None].expand(-1, -1, image.shape[-1])
            made = image.gather(1, index).flatten(0, 1) @ features.flatten(1)
            masks.append(made.view(*chosen.shape, *features.shape[1:]))
        return masks


def masks_of(embeddings: Tensor, features: Tensor) -> Tensor:
    """Embeddings (N, Q, D), features (N, D, h, w) -> mask logits (N, Q, h, w)."""
    return (embeddings @ features.flatten(2)).view(*embeddings.shape[:2], *features.shape[2:])
