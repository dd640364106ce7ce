"""What backbones with CLIP's text encoder share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clouds.modeling.backbone.open_clip_models import get_tokenizer

TEXTS_AT_ONCE = 128
"""Bounds the memory of the text encoder; the result does not depend on it."""


class CLIPText:
    """The text half of `TextEncoder`, from open_clip's model.

    Attributes:
        clip_model: open_clip's model.
        model_name: its name, which determines the tokenizer.
    """

    clip_model: Any
    model_name: str

    @property
    def embed_dim(self) -> int:
        """Width of the space that images and texts share."""
        encoder = getattr(self.clip_model, "text", self.clip_model)
        return int(encoder.text_projection.shape[1])

    @property
    def logit_scale(self) -> Tensor:
        """CLIP's own factor on cosine similarities, at most 100, shape ()."""
        scale: Tensor = self.clip_model.logit_scale.exp().clamp(max=100)
        return scale

    def text_blocks(self) -> list[list[nn.Module]]:
        """The blocks of the text encoder, as `HasBlocks` has them; empty if they are not known."""
        encoder = getattr(self.clip_model, "text", self.clip_model)
        transformer = getattr(encoder, "transformer", None)
        return [[block] for block in getattr(transformer, "resblocks", ())]

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Text embeddings (T, embed_dim), not normalized, in float32 also under autocast."""
        device = self.logit_scale.device
        tokens = get_tokenizer(self.model_name)(list(texts)).to(device)
        with torch.autocast(device.type, enabled=False):
            chunks = [self.clip_model.encode_text(c) for c in torch.split(tokens, TEXTS_AT_ONCE)]
        return torch.cat(chunks).float()
