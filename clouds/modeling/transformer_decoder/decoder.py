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
from clouds.modeling.text_classifier import TextRows


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


class MultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention`, batch first, with one mask for all heads.

    torch's own wants the mask copied for every head and as floats: with 100 queries on a stride-8
    map that copy is larger than everything else in the layer.
    """

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__(channels, heads, dropout=dropout, batch_first=True)

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            query: (N, Q, C)
            key, value: (N, K, C)
            allowed: bool (N, Q, K), True where a query may look; None: everywhere.

        Returns:
            (N, Q, C)
        """
        assert self.in_proj_weight is not None and self.in_proj_bias is not None
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, w, b).view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if allowed is None else allowed[:, None],
            dropout_p=self.dropout if self.training else 0.0,
        )
        projected: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return projected


class SelfAttentionLayer(nn.Module):
    """Queries look at one another."""

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(channels, heads, dropout)
        self.norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)
        _init_xavier(self)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """x, position (N, Q, C) -> (N, Q, C)"""
        place = x + position
        out: Tensor = self.norm(x + self.dropout(self.self_attn(place, place, x)))
        return out


class CrossAttentionLayer(nn.Module):
    """Queries look at a feature map."""

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.multihead_attn = MultiheadAttention(channels, heads, dropout)
        self.norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)
        _init_xavier(self)

    def forward(
        self, x: Tensor, position: Tensor, key: Tensor, value: Tensor, allowed: Tensor
    ) -> Tensor:
        """x, position (N, Q, C); key, value (N, K, C); allowed bool (N, Q, K) -> (N, Q, C)"""
        attended = self.multihead_attn(x + position, key, value, allowed)
        out: Tensor = self.norm(x + self.dropout(attended))
        return out


class FFNLayer(nn.Module):
    """Each query is worked on by itself."""

    def __init__(self, channels: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(channels, hidden)
        self.linear2 = nn.Linear(hidden, channels)
        self.norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)
        _init_xavier(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, Q, C) -> (N, Q, C)"""
        hidden = self.dropout(F.relu(self.linear1(x), inplace=True))
        out: Tensor = self.norm(x + self.dropout(self.linear2(hidden)))
        return out


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, channels: int, hidden: int, out: int, layers: int) -> None:
        super().__init__()
        widths = [channels, *[hidden] * (layers - 1), out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        *inner, last = self.layers
        for layer in inner:
            x = F.relu(layer(x), inplace=True)
        out: Tensor = last(x)
        return out


def _init_xavier(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


@torch.no_grad()
def may_attend(mask_logits: Tensor) -> Tensor:
    """Where each query may look next: inside the mask it predicts now.

    A query whose mask is empty may look everywhere.

    Args:
        mask_logits: at the size of the map to be attended (N, Q, h, w).

    Returns:
        bool (N, Q, h * w)
    """
    inside = mask_logits.flatten(2) >= 0
    return inside | ~inside.any(-1, keepdim=True)


class MaskedTransformerDecoder(nn.Module):
    """Queries that look, layer by layer, inside the masks they have predicted so far.

    What a query's class is read from is left to the subclasses in `class_heads.py`.

    Args:
        in_channels: width of the multi-scale features.
        channels: width of the decoder.
        mask_dim: channels of the mask features.
        queries, layers, heads, hidden, dropout: of the transformer.
        levels: number of feature maps, visited in turn.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        channels: int,
        mask_dim: int,
        queries: int,
        layers: int,
        heads: int,
        hidden: int,
        dropout: float,
        levels: int,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.transformer_self_attention_layers = nn.ModuleList(
            SelfAttentionLayer(channels, heads, dropout) for _ in range(layers)
        )
        self.transformer_cross_attention_layers = nn.ModuleList(
            CrossAttentionLayer(channels, heads, dropout) for _ in range(layers)
        )
        self.transformer_ffn_layers = nn.ModuleList(
            FFNLayer(channels, hidden, dropout) for _ in range(layers)
        )
        self.decoder_norm = nn.LayerNorm(channels)
        self.query_feat = nn.Embedding(queries, channels)
        self.query_embed = nn.Embedding(queries, channels)
        self.level_embed = nn.Embedding(levels, channels)
        self.input_proj = nn.ModuleList(
            nn.Identity() if in_channels == channels else nn.Conv2d(in_channels, channels, 1)
            for _ in range(levels)
        )
        self.mask_embed = MLP(channels, channels, mask_dim, 3)

    def classify(
        self, query: Tensor, mask_logits: Tensor, mask_features: Tensor, text: TextRows | None
    ) -> Tensor:
        """
        Args:
            query: normalized queries (N, Q, C).
            mask_logits: the masks of these queries (N, Q, h, w).
            mask_features: (N, mask_dim, h, w).
            text: the text classifier; None where the subclass does not need it.

        Returns:
            class logits (N, Q, classes + 1), void last.
        """
        raise NotImplementedError

    def forward(
        self,
        maps: Sequence[Tensor],
        mask_features: Tensor,
        text: TextRows | None = None,
        final_only: bool = False,
    ) -> Predictions:
        """
        Args:
            maps: multi-scale features (N, in_channels, h_l, w_l), coarse to fine.
            mask_features: (N, mask_dim, H / 4, W / 4).
            text: the text classifier, for a subclass that needs it.
            final_only: give the last prediction alone, where there are no losses on the others.
        """
        n = mask_features.shape[0]
        memory = self._memory(maps)
        coarse = [_resized(mask_features, m) for m in maps]
        position = self.query_embed.weight.expand(n, -1, -1)
        x = self.query_feat.weight.expand(n, -1, -1)
        queries = [self.decoder_norm(x)]
        embeddings = [self.mask_embed(queries[-1])]
        layers = zip(
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
            strict=True,
        )
        for i, (cross_attention, self_attention, ffn) in enumerate(layers):
            level = i % len(maps)
            # As the masks resized: resizing and the product are linear, their order is free.
            allowed = may_attend(masks_of(embeddings[-1].detach(), coarse[level]))
            x = cross_attention(x, position, *memory[level], allowed)
            x = ffn(self_attention(x, position))
            queries.append(self.decoder_norm(x))
            embeddings.append(self.mask_embed(queries[-1]))
        if final_only:
            queries, embeddings = queries[-1:], embeddings[-1:]
        return self._predictions(queries, MaskSource(embeddings, mask_features), text)

    def _memory(self, maps: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Keys (position added) and values of every level, each (N, h * w, C)."""
        memory = []
        for m, project, embed in zip(maps, self.input_proj, self.level_embed.weight, strict=True):
            value = project(m).flatten(2).transpose(1, 2) + embed
            h, w = m.shape[-2:]
            position = sine_position_encoding(h, w, self.channels, m.device).flatten(1).T
            memory.append((value + position, value))
        return memory

    def _predictions(
        self, queries: list[Tensor], source: MaskSource, text: TextRows | None
    ) -> Predictions:
        """Of normalized queries after several layers, all at once."""
        mask_logits = masks_of(torch.cat(source.embeddings, dim=1), source.features)
        together = torch.cat(queries, dim=1)
        class_logits = self.classify(together, mask_logits, source.features, text)
        count = queries[0].shape[1]
        return Predictions(
            list(torch.split(class_logits, count, dim=1)),
            list(torch.split(mask_logits, count, dim=1)),
            source,
        )


@torch.no_grad()
def _resized(features: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(features, like.shape[-2:], mode="bilinear", align_corners=False)


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
