"""What a query's class is read from: three ways, under the published names.

MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME chooses among them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from clouds.modeling.backbones.clip import pool_masks
from clouds.modeling.mask_decoder.attention import MLP
from clouds.modeling.mask_decoder.decoder import MaskedTransformerDecoder
from clouds.modeling.text.classifier import TextRows


class OriginalMultiScaleMaskedTransformerDecoder(MaskedTransformerDecoder):
    """A linear classifier on the query, as in Mask2Former: the published CLOUDS recipe."""

    needs_text = False

    def __init__(self, *, channels: int, classes: int, embed_dim: int, **rest: Any) -> None:
        super().__init__(channels=channels, **rest)
        self.class_embed = nn.Linear(channels, classes + 1)

    def classify(
        self, query: Tensor, mask_logits: Tensor, mask_features: Tensor, text: TextRows | None
    ) -> Tensor:
        logits: Tensor = self.class_embed(query)
        return logits


class BisMultiScaleMaskedTransformerDecoder(OriginalMultiScaleMaskedTransformerDecoder):
    """A linear classifier on the sum of the query and of what its mask covers."""

    def __init__(self, *, channels: int, mask_dim: int, **rest: Any) -> None:
        super().__init__(channels=channels, mask_dim=mask_dim, **rest)
        self._mask_pooling_proj = _pooling_projection(mask_dim, channels)

    def classify(
        self, query: Tensor, mask_logits: Tensor, mask_features: Tensor, text: TextRows | None
    ) -> Tensor:
        pooled = pool_masks(mask_features, mask_logits.detach() > 0)
        logits: Tensor = self.class_embed(self._mask_pooling_proj(pooled) + query)
        return logits


class MultiScaleMaskedTransformerDecoder(MaskedTransformerDecoder):
    """Similarity of query and mask with the text features of the class names, as in FC-CLIP."""

    needs_text = True

    def __init__(
        self, *, channels: int, mask_dim: int, classes: int, embed_dim: int, **rest: Any
    ) -> None:
        super().__init__(channels=channels, mask_dim=mask_dim, **rest)
        self._mask_pooling_proj = _pooling_projection(mask_dim, channels)
        self.class_embed = MLP(channels, channels, embed_dim, 3)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def classify(
        self, query: Tensor, mask_logits: Tensor, mask_features: Tensor, text: TextRows | None
    ) -> Tensor:
        assert text is not None, "the model gives the text classifier to a decoder that needs it"
        pooled = pool_masks(mask_features, mask_logits.detach() > 0)
        embedding = self.class_embed(self._mask_pooling_proj(pooled) + query)
        return text.logits(embedding, self.logit_scale.exp().clamp(max=100))


def _pooling_projection(mask_dim: int, channels: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(mask_dim), nn.Linear(mask_dim, channels))


ClassHead = OriginalMultiScaleMaskedTransformerDecoder | MultiScaleMaskedTransformerDecoder

CLASS_HEADS: dict[str, type[ClassHead]] = {
    "OriginalMultiScaleMaskedTransformerDecoder": OriginalMultiScaleMaskedTransformerDecoder,
    "MultiScaleMaskedTransformerDecoder": MultiScaleMaskedTransformerDecoder,
    "BisMultiScaleMaskedTransformerDecoder": BisMultiScaleMaskedTransformerDecoder,
    "linear": OriginalMultiScaleMaskedTransformerDecoder,
    "text": MultiScaleMaskedTransformerDecoder,
    "pooled": BisMultiScaleMaskedTransformerDecoder,
}
