"""Mask2Former's masked-attention decoder (Cheng et al., section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clouds.modeling.mask_decoder.attention import (
    MLP,
    CrossAttentionLayer,
    FFNLayer,
    SelfAttentionLayer,
    may_attend,
)
from clouds.modeling.mask_decoder.predictions import MaskSource, Predictions, masks_of
from clouds.modeling.position_encoding import sine_position_encoding
from clouds.modeling.text.classifier import TextRows


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
