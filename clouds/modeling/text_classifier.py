"""A classifier from class names, through the backbone's text encoder (paper section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from clouds.device import full_precision
from clouds.modeling.backbone.base import TextEmbedder

TEMPLATES: tuple[str, ...] = (
    "a photo of a {}.",
    "This is a photo of a {}",
    "There is a {} in the scene",
    "There is the {} in the scene",
    "a photo of a {} in the scene",
    "a photo of a small {}.",
    "a photo of a medium {}.",
    "a photo of a large {}.",
    "This is a photo of a small {}.",
    "This is a photo of a medium {}.",
    "This is a photo of a large {}.",
    "There is a small {} in the scene.",
    "There is a medium {} in the scene.",
    "There is a large {} in the scene.",
)
"""Prompt templates for class names (those of ViLD, as in FC-CLIP and CLOUDS)."""


@dataclass(frozen=True)
class TextEmbeddings:
    """Rows that embeddings are compared with: synonyms of class 0 first, no-object last.

    Attributes:
        rows: (S + 1, D), of unit length.
        counts: number of synonyms of each class; they sum to S.
    """

    rows: Tensor
    counts: tuple[int, ...]

    def logits(self, embeddings: Tensor, scale: Tensor) -> Tensor:
        """Cosine similarities of embeddings (N, Q, D) with every class, times `scale`, shape ().

        Returns:
            (N, Q, num_classes + 1): per class the maximum over its synonyms, no-object last.
        """
        # The scale is up to 100, and half precision would round the cosines to half a percent.
        with full_precision(embeddings.device):
            similarity = scale * F.normalize(embeddings.float(), dim=-1) @ self.rows.T
        per_class = torch.split(similarity, [*self.counts, 1], dim=-1)
        return torch.stack([columns.amax(-1) for columns in per_class], dim=-1)


class TextClassifier:
    """Text embeddings of class names, computed at the first use and kept.

    Call `reset` when the weights of the text encoder have changed.

    Args:
        synonyms: per class, its names.
    """

    def __init__(self, synonyms: Sequence[Sequence[str]]) -> None:
        self.synonyms = tuple(tuple(names) for names in synonyms)
        self._rows: Tensor | None = None

    def reset(self) -> None:
        """Forget the embeddings, so that the next use computes them again."""
        self._rows = None

    @torch.no_grad()
    def synonym_embeddings(self, encoder: TextEmbedder) -> Tensor:
        """(S, D): one row of unit length per synonym, on the encoder's device.

        The embeddings of a synonym in all templates are normalized, averaged and normalized again.

        Raises:
            ValueError: the classes have no names.
        """
        if not self.synonyms:
            raise ValueError(
                "the text classifier has no names of classes: DATASETS.TRAIN names a dataset "
                "whose label space is not known. Use a class head without text encoder, "
                "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME linear or pooled."
            )
        device = encoder.logit_scale.device
        if self._rows is None or self._rows.device != device:
            prompts = encoder.encode_text(prompts_for(self.synonyms))
            rows = F.normalize(prompts, dim=-1)
            rows = rows.view(-1, len(TEMPLATES), rows.shape[-1]).mean(1)
            self._rows = F.normalize(rows, dim=-1)
        return self._rows

    def embeddings(self, encoder: TextEmbedder, no_object: Tensor) -> TextEmbeddings:
        """The rows of all synonyms and, normalized, the no-object embedding (1, D)."""
        rows = torch.cat((self.synonym_embeddings(encoder), F.normalize(no_object, dim=-1)))
        return TextEmbeddings(rows, tuple(len(names) for names in self.synonyms))


def prompts_for(synonyms: Sequence[Sequence[str]]) -> list[str]:
    """Every synonym in every template, ordered by class, synonym, template."""
    return [t.format(name) for names in synonyms for name in names for t in TEMPLATES]
