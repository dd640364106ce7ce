"""Mask2Former's masked-attention decoder (Cheng et al., section 3.2) and its class heads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clouds.modeling.backbone.base import pool_masks
from clouds.modeling.pixel_decoder.msdeformattn import sine_position_encoding
from clouds.modeling.text_classifier import TextEmbeddings

INITIAL_LOGIT_SCALE = 1 / 0.07
MAX_LOGIT_SCALE = 100
"""Of cosine similarities with text features, as in CLIP."""


@dataclass(frozen=True)
class MaskSource:
    """The factors of mask logits: a mask is the product of a query's embedding and the features.

    Attributes:
        embeddings: L tensors (N, Q, D), one per prediction.
        features: the mask features (N, D, H / 4, W / 4).
    """

    embeddings: list[Tensor]
    features: Tensor


@dataclass(frozen=True)
class Predictions:
    """Classes and masks of every query: of the initial queries and after each decoder layer.

    Attributes:
        class_logits: L tensors (N, Q, num_classes + 1), no_object last.
        mask_logits: L tensors (N, Q, H / 4, W / 4).
        source: the factors of the mask logits; None if they are not known.
    """

    class_logits: list[Tensor]
    mask_logits: list[Tensor]
    source: MaskSource | None = None

    @property
    def final(self) -> tuple[Tensor, Tensor]:
        """Class and mask logits after the last layer."""
        return self.class_logits[-1], self.mask_logits[-1]

    def matched_mask_logits(
        self, layers: Sequence[int], query_indices: Sequence[Tensor]
    ) -> list[Tensor]:
        """Mask logits of the matched queries, for the mask losses.

        They are computed again from `source`, so that the backward pass covers these queries only:
        the gradient of all `mask_logits`, nearly all of it zero, would cost ten times as much.

        Args:
            layers: indices of K of the L predictions.
            query_indices: per image (K, m), the queries of each of these predictions.

        Returns:
            per image (K, m, H / 4, W / 4)
        """
        if self.source is None:
            logits = torch.stack([self.mask_logits[i] for i in layers], dim=1)
            return [
                torch.stack([layer[index] for layer, index in zip(image, indices, strict=True)])
                for image, indices in zip(logits, query_indices, strict=True)
            ]
        embeddings = torch.stack([self.source.embeddings[i] for i in layers], dim=1)
        masks = []
        images = zip(embeddings, self.source.features, query_indices, strict=True)
        for image, features, indices in images:
            index = indices[..., None].expand(-1, -1, image.shape[-1])
            logits = image.gather(1, index).flatten(0, 1) @ features.flatten(1)
            masks.append(logits.view(*indices.shape, *features.shape[1:]))
        return masks


class MultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention`, batch first, with one boolean mask for all heads.

    torch's own copies the mask for every head and converts it to floats. With 100 queries on a map
    of stride 8 that copy is larger than all other tensors of the layer.
    """

    def __init__(self, d_model: int, num_heads: int, dropout: float) -> None:
        super().__init__(d_model, num_heads, dropout=dropout, batch_first=True)

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
    ) -> Tensor:
        """query (N, Q, C), key and value (N, K, C) -> (N, Q, C)

        Args:
            attn_mask: bool (N, Q, K), True where a query attends to a key; None: everywhere.
        """
        assert self.in_proj_weight is not None and self.in_proj_bias is not None
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, w, b).view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        mask = None if attn_mask is None else attn_mask[:, None]
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        projected: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return projected


class SelfAttentionLayer(nn.Module):
    """Self-attention among the queries, followed by sum and LayerNorm."""

    def __init__(self, d_model: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(d_model, num_heads, dropout)
        self.norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        _init_xavier(self)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """x, position (N, Q, C) -> (N, Q, C)"""
        query = x + position
        out: Tensor = self.norm(x + self.dropout(self.self_attn(query, query, x)))
        return out


class CrossAttentionLayer(nn.Module):
    """Attention of the queries to a feature map, followed by sum and LayerNorm."""

    def __init__(self, d_model: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.multihead_attn = MultiheadAttention(d_model, num_heads, dropout)
        self.norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        _init_xavier(self)

    def forward(
        self, x: Tensor, position: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor
    ) -> Tensor:
        """x, position (N, Q, C); key, value (N, K, C); attn_mask bool (N, Q, K) -> (N, Q, C)"""
        attended = self.multihead_attn(x + position, key, value, attn_mask)
        out: Tensor = self.norm(x + self.dropout(attended))
        return out


class FFNLayer(nn.Module):
    """A feed-forward network on each query, followed by sum and LayerNorm."""

    def __init__(self, d_model: int, dim_feedforward: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        _init_xavier(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, Q, C) -> (N, Q, C)"""
        hidden = self.dropout(F.relu(self.linear1(x), inplace=True))
        out: Tensor = self.norm(x + self.dropout(self.linear2(hidden)))
        return out


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int) -> None:
        super().__init__()
        dims = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(dims))

    def forward(self, x: Tensor) -> Tensor:
        *inner, last = self.layers
        for layer in inner:
            x = F.relu(layer(x), inplace=True)
        out: Tensor = last(x)
        return out


class MaskedTransformerDecoder(nn.Module):
    """Queries that attend, layer after layer, to the inside of the masks predicted so far.

    Subclasses implement `classify`.

    Args:
        in_channels, hidden_dim, mask_dim: channels of multi-scale features, decoder, mask features.
        num_queries: object queries that are learned here; 0: `forward` is given queries, whose
            features are a linear function of them (as in Rein).
        num_levels: number of feature maps; layer i attends to map i modulo `num_levels`.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        hidden_dim: int,
        mask_dim: int,
        num_queries: int,
        num_layers: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        num_levels: int,
    ) -> None:
        super().__init__()
        self.hidden_dim, self.num_queries = hidden_dim, num_queries
        self.num_predictions = num_layers + 1
        self.transformer_self_attention_layers = nn.ModuleList(
            SelfAttentionLayer(hidden_dim, num_heads, dropout) for _ in range(num_layers)
        )
        self.transformer_cross_attention_layers = nn.ModuleList(
            CrossAttentionLayer(hidden_dim, num_heads, dropout) for _ in range(num_layers)
        )
        self.transformer_ffn_layers = nn.ModuleList(
            FFNLayer(hidden_dim, dim_feedforward, dropout) for _ in range(num_layers)
        )
        self.decoder_norm = nn.LayerNorm(hidden_dim)
        if num_queries > 0:
            self.query_feat = nn.Embedding(num_queries, hidden_dim)
            self.query_embed = nn.Embedding(num_queries, hidden_dim)
        else:
            self.query_to_feat = nn.Linear(hidden_dim, hidden_dim)
        self.level_embed = nn.Embedding(num_levels, hidden_dim)
        self.input_proj = nn.ModuleList(
            nn.Identity() if in_channels == hidden_dim else nn.Conv2d(in_channels, hidden_dim, 1)
            for _ in range(num_levels)
        )
        self.mask_embed = MLP(hidden_dim, hidden_dim, mask_dim, 3)

    def classify(
        self, query: Tensor, mask_logits: Tensor, mask_features: Tensor, text: TextEmbeddings | None
    ) -> Tensor:
        """
        Args:
            query: normalized queries (N, Q, C).
            mask_logits: the masks of these queries (N, Q, h, w).
            mask_features: (N, mask_dim, h, w).
            text: the text classifier; None where the subclass does not need it.

        Returns:
            class logits (N, Q, num_classes + 1), no_object last.
        """
        raise NotImplementedError

    def forward(
        self,
        maps: Sequence[Tensor],
        mask_features: Tensor,
        text: TextEmbeddings | None = None,
        final_only: bool = False,
        queries: Tensor | None = None,
    ) -> Predictions:
        """
        Args:
            maps: multi-scale features (N, in_channels, h_l, w_l), coarse to fine.
            mask_features: (N, mask_dim, H / 4, W / 4).
            text: the text classifier, for a subclass that needs it.
            final_only: return the last prediction only, where no loss needs the others.
            queries: object queries (Q, C) where none are learned here.
        """
        n = mask_features.shape[0]
        memory = self._memory(maps)
        resized_features = [_resize_like(mask_features, m) for m in maps]
        position, x = (q.expand(n, -1, -1) for q in self._initial_queries(queries))
        normalized = [self.decoder_norm(x)]
        embeddings = [self.mask_embed(normalized[-1])]
        layers = zip(
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
            strict=True,
        )
        for i, (cross_attention, self_attention, ffn) in enumerate(layers):
            level = i % len(maps)
            # Equal to resizing the mask logits: resizing and the product are linear and commute.
            mask_logits = predict_masks(embeddings[-1].detach(), resized_features[level])
            x = cross_attention(x, position, *memory[level], attention_mask(mask_logits))
            x = ffn(self_attention(x, position))
            normalized.append(self.decoder_norm(x))
            embeddings.append(self.mask_embed(normalized[-1]))
        if final_only:
            normalized, embeddings = normalized[-1:], embeddings[-1:]
        return self._predictions(normalized, MaskSource(embeddings, mask_features), text)

    def _initial_queries(self, queries: Tensor | None) -> tuple[Tensor, Tensor]:
        """Positions and features of the object queries, (Q, C) each."""
        if queries is None:
            return self.query_embed.weight, self.query_feat.weight
        return queries, self.query_to_feat(queries)

    def _memory(self, maps: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Keys (position encoding added) and values of every level, each (N, h * w, C)."""
        memory = []
        for m, project, embed in zip(maps, self.input_proj, self.level_embed.weight, strict=True):
            value = project(m).flatten(2).transpose(1, 2) + embed
            h, w = m.shape[-2:]
            position = sine_position_encoding(h, w, self.hidden_dim, m.device).flatten(1).T
            memory.append((value + position, value))
        return memory

    def _predictions(
        self, queries: list[Tensor], source: MaskSource, text: TextEmbeddings | None
    ) -> Predictions:
        """Predictions of the normalized queries of several layers, computed together."""
        mask_logits = predict_masks(torch.cat(source.embeddings, dim=1), source.features)
        all_queries = torch.cat(queries, dim=1)
        class_logits = self.classify(all_queries, mask_logits, source.features, text)
        num_queries = queries[0].shape[1]
        return Predictions(
            list(torch.split(class_logits, num_queries, dim=1)),
            list(torch.split(mask_logits, num_queries, dim=1)),
            source,
        )


def predict_masks(embeddings: Tensor, features: Tensor) -> Tensor:
    """Embeddings (N, Q, D), mask features (N, D, h, w) -> mask logits (N, Q, h, w)."""
    return (embeddings @ features.flatten(2)).view(*embeddings.shape[:2], *features.shape[2:])


@torch.no_grad()
def attention_mask(mask_logits: Tensor) -> Tensor:
    """Where each query attends: inside of its mask, or everywhere if that is empty.

    Mask logits at the size of the attended map (N, Q, h, w) -> bool (N, Q, h * w).
    """
    inside = mask_logits.flatten(2) >= 0
    return inside | ~inside.any(-1, keepdim=True)


@torch.no_grad()
def _resize_like(features: Tensor, reference: Tensor) -> Tensor:
    return F.interpolate(features, reference.shape[-2:], mode="bilinear", align_corners=False)


def _init_xavier(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


class OriginalMultiScaleMaskedTransformerDecoder(MaskedTransformerDecoder):
    """Mask2Former's linear classifier on the query: the published CLOUDS recipe."""

    needs_text = False

    def __init__(self, *, hidden_dim: int, num_classes: int, embed_dim: int, **rest: Any) -> None:
        super().__init__(hidden_dim=hidden_dim, **rest)
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)

    def classify(
        self, query: Tensor, mask_logits: Tensor, mask_features: Tensor, text: TextEmbeddings | None
    ) -> Tensor:
        logits: Tensor = self.class_embed(query)
        return logits


class BisMultiScaleMaskedTransformerDecoder(OriginalMultiScaleMaskedTransformerDecoder):
    """A linear classifier on the sum of the query and the pooled mask features of its mask."""

    def __init__(self, *, hidden_dim: int, mask_dim: int, **rest: Any) -> None:
        super().__init__(hidden_dim=hidden_dim, mask_dim=mask_dim, **rest)
        self._mask_pooling_proj = _pooling_projection(mask_dim, hidden_dim)

    def classify(
        self, query: Tensor, mask_logits: Tensor, mask_features: Tensor, text: TextEmbeddings | None
    ) -> Tensor:
        pooled = pool_masks(mask_features, mask_logits.detach() > 0)
        logits: Tensor = self.class_embed(self._mask_pooling_proj(pooled) + query)
        return logits


class MultiScaleMaskedTransformerDecoder(MaskedTransformerDecoder):
    """Cosine similarity of query plus pooled mask features with text features, as in FC-CLIP."""

    needs_text = True

    def __init__(
        self, *, hidden_dim: int, mask_dim: int, num_classes: int, embed_dim: int, **rest: Any
    ) -> None:
        super().__init__(hidden_dim=hidden_dim, mask_dim=mask_dim, **rest)
        self._mask_pooling_proj = _pooling_projection(mask_dim, hidden_dim)
        self.class_embed = MLP(hidden_dim, hidden_dim, embed_dim, 3)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(INITIAL_LOGIT_SCALE)))

    def classify(
        self, query: Tensor, mask_logits: Tensor, mask_features: Tensor, text: TextEmbeddings | None
    ) -> Tensor:
        assert text is not None, "this class head needs the text classifier"
        pooled = pool_masks(mask_features, mask_logits.detach() > 0)
        embedding = self.class_embed(self._mask_pooling_proj(pooled) + query)
        return text.logits(embedding, self.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE))


def _pooling_projection(mask_dim: int, hidden_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(mask_dim), nn.Linear(mask_dim, hidden_dim))


ClassHead = OriginalMultiScaleMaskedTransformerDecoder | MultiScaleMaskedTransformerDecoder

CLASS_HEADS: dict[str, type[ClassHead]] = {
    "OriginalMultiScaleMaskedTransformerDecoder": OriginalMultiScaleMaskedTransformerDecoder,
    "MultiScaleMaskedTransformerDecoder": MultiScaleMaskedTransformerDecoder,
    "BisMultiScaleMaskedTransformerDecoder": BisMultiScaleMaskedTransformerDecoder,
    "linear": OriginalMultiScaleMaskedTransformerDecoder,
    "text": MultiScaleMaskedTransformerDecoder,
    "pooled": BisMultiScaleMaskedTransformerDecoder,
}
