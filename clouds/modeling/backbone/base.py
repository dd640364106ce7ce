"""What a backbone may offer beyond Detectron2's `Backbone`.

A backbone is Detectron2's: images (N, 3, H, W) to a dict of named feature maps, `output_shape()`
and `size_divisibility`. Further abilities are optional: `PixelStatistics`, the normalization of its
images; `TextEncoder`, which the text class head and the geometric ensemble need; `HasBlocks`, parts
to shard; and parameter groups for the optimizer (`clouds.engine.optimizer`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clouds.d2 import CfgNode

logger = logging.getLogger(__name__)

TOLERANCE = 0.1
"""Difference of pixel statistics, on the 0-255 scale, that is rounding."""


@runtime_checkable
class PixelStatistics(Protocol):
    """Ability of a backbone that tells how its images are normalized, RGB, 0-255."""

    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]


class TextEmbedder(Protocol):
    """A text encoder whose space images and texts share, as CLIP's."""

    @property
    def embed_dim(self) -> int:
        """Dimension D of the shared space."""
        ...

    @property
    def logit_scale(self) -> Tensor:
        """Factor on cosine similarities of image and text embeddings, shape ()."""
        ...

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Text embeddings (T, D), not normalized, on the encoder's device."""
        ...


@runtime_checkable
class TextEncoder(TextEmbedder, Protocol):
    """Ability of a backbone with a text encoder."""

    def embed_masks(
        self, features: Mapping[str, Tensor], mask_logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Image embeddings of the regions of masks.

        Args:
            features: the backbone's output, name -> (N, C, H / stride, W / stride).
            mask_logits: (N, Q, h, w); a pixel is in a mask where its logit is > 0.

        Returns:
            Embeddings (N, Q, D), not normalized, and bool (N, Q): whether a mask has a pixel at the
            stride of the features that are pooled.
        """
        ...


@runtime_checkable
class HasBlocks(Protocol):
    """Ability of a network whose weights can be sharded block by block (SOLVER.PARALLEL fsdp)."""

    def blocks(self) -> Sequence[Sequence[nn.Module]]:
        """Groups of layers in the order in which they are computed.

        All layers of a group are called as modules, and nothing else reads their parameters.
        """
        ...


def binary_masks_at(features: Tensor, mask_logits: Tensor) -> Tensor:
    """Where mask logits (N, Q, h, w), resized bilinearly to features (N, C, H, W), are > 0."""
    size = features.shape[-2:]
    return F.interpolate(mask_logits, size=size, mode="bilinear", align_corners=False) > 0


def pool_masks(features: Tensor, masks: Tensor) -> Tensor:
    """Mean feature in each mask: (N, C, H, W), bool (N, Q, H, W) -> (N, Q, C).

    A mask without a pixel gives zeros.
    """
    weight = masks.to(features.dtype)
    weight = weight / (weight.sum((-1, -2), keepdim=True) + 1e-8)
    return torch.einsum("nchw,nqhw->nqc", features, weight)


def pixel_statistics(cfg: CfgNode, backbone: object) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of images: those of the config, or if empty the backbone's own.

    Values of the config that are not those of the backbone are told in a warning.

    Raises:
        ValueError: the config has none, and the backbone does not tell its own.
    """
    mean, std = tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD)
    name = cfg.MODEL.BACKBONE.NAME
    if isinstance(backbone, PixelStatistics):
        for key, value, own in (
            ("PIXEL_MEAN", mean, backbone.pixel_mean),
            ("PIXEL_STD", std, backbone.pixel_std),
        ):
            if value and max(abs(a - b) for a, b in zip(value, own, strict=True)) > TOLERANCE:
                logger.warning(
                    "MODEL.%s is %s, and the backbone %s was trained with %s; leave the key empty "
                    "to use that",
                    *(key, value, name, tuple(round(v, 3) for v in own)),
                )
        return mean or backbone.pixel_mean, std or backbone.pixel_std
    if not mean or not std:
        raise ValueError(
            f"MODEL.PIXEL_MEAN or MODEL.PIXEL_STD is empty, and the backbone {name} does not tell "
            "its own (attributes pixel_mean and pixel_std). Set both."
        )
    return mean, std
