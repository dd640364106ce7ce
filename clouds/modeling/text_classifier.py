"""A classifier made of words: one row per synonym of each class (paper section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from clouds.modeling.backbone.clip import CLIP
from clouds.modeling.backbone.open_clip_models import get_tokenizer

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


PROMPTS_AT_ONCE = 128  # bounds the text encoder's memory; the result does not depend on it


@dataclass(frozen=True)
class TextRows:
    """Text features to compare with, the synonyms of class 0 first, void last.

    Attributes:
        rows: (S + 1, D), of unit length.
        counts: synonyms of each class; they sum to S.
    """

    rows: Tensor
    counts: tuple[int, ...]

    def logits(self, embeddings: Tensor, scale: Tensor) -> Tensor:
        """Similarity of embeddings with every class.

        Args:
            embeddings: (N, Q, D), of any length.
            scale: factor on the cosine similarity, shape ().

        Returns:
            (N, Q, C + 1): per class the maximum over its synonyms, void last.
        """
        # The scale is up to 100, and half precision would round the cosines to half a percent.
        with torch.autocast(embeddings.device.type, enabled=False):
            similarity = scale * F.normalize(embeddings.float(), dim=-1) @ self.rows.T
        per_class = torch.split(similarity, [*self.counts, 1], dim=-1)
        return torch.stack([columns.amax(-1) for columns in per_class], dim=-1)


class TextClassifier:
    """The text features of class names, computed when first asked for.

    `reset` when the backbone's weights have changed.

    Args:
        synonyms: per class, its words.
    """

    def __init__(self, synonyms: Sequence[Sequence[str]]) -> None:
        self.synonyms = tuple(tuple(names) for names in synonyms)
        self._features: Tensor | None = None

    def reset(self) -> None:
        """Forget the features."""
        self._features = None

    @torch.no_grad()
    def features(self, backbone: CLIP) -> Tensor:
        """(S, D): one unit-length row per synonym, on the backbone's device."""
        device = backbone.logit_scale.device
        if self._features is None or self._features.device != device:
            if not self.synonyms:
                raise ValueError(
                    "the text classifier has no words for the classes: DATASETS.TRAIN names a "
                    "dataset whose classes are not known. Use a class head that needs no text, "
                    "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME linear or pooled."
                )
            tokens = get_tokenizer(backbone.model_name)(prompts_for(self.synonyms))
            self._features = self._compute(backbone, tokens)
        return self._features

    def _compute(self, backbone: CLIP, tokens: Tensor) -> Tensor:
        device = backbone.logit_scale.device
        chunks = torch.split(tokens.to(device), PROMPTS_AT_ONCE)
        with torch.autocast(device.type, enabled=False):  # once for all: in full precision
            rows = torch.cat([backbone.encode_text(chunk) for chunk in chunks])
        rows = F.normalize(rows.float(), dim=-1)
        rows = rows.view(-1, len(TEMPLATES), rows.shape[-1]).mean(1)
        return F.normalize(rows, dim=-1)

    def rows(self, backbone: CLIP, void: Tensor) -> TextRows:
        """The features with the void embedding (1, D), which is normalized here, appended."""
        rows = torch.cat((self.features(backbone), F.normalize(void, dim=-1)))
        return TextRows(rows, tuple(len(names) for names in self.synonyms))


def prompts_for(synonyms: Sequence[Sequence[str]]) -> list[str]:
    """Every synonym in every template: class by class, synonym by synonym."""
    return [t.format(name) for names in synonyms for name in names for t in TEMPLATES]
