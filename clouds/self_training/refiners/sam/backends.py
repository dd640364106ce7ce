"""What MODEL.CLOUDS.SAM.MODEL names: image encoder, behind the cache, and mask decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from clouds.d2 import CfgNode
from clouds.files import expand_user
from clouds.self_training.refiners.sam.embedding_cache import (
    CachedEmbedder,
    EmbeddingCache,
    Shape,
    fingerprint,
    module_fingerprint,
)
from clouds.self_training.refiners.sam.model import build_sam
from clouds.self_training.refiners.sam.predictor import (
    Embed,
    ImageEmbedder,
    PointPredictor,
    PredictMasks,
)
from clouds.self_training.refiners.sam.pretrained import (
    POINT_FAMILIES,
    Pretrained,
    is_pretrained,
    load_pretrained,
)
from clouds.self_training.refiners.sam.prompt_decoder import (
    BestMaskPredictor,
    PromptDecoder,
    SegmentAnythingDecoder,
)
from clouds.self_training.refiners.sam.transformers_points import (
    TransformersDecoder,
    TransformersEmbedder,
)

CONVOLUTIONS_AT_ONCE_CPU = 8
"""Prompts of a decoder without a transformer that are decoded together on a CPU: twice as fast as
one by one for Street-SAM."""


@dataclass(frozen=True)
class PointSam:
    """A SAM that takes points.

    Attributes:
        embed: images to embeddings; a `CachedEmbedder` with MODEL.CLOUDS.SAM.CACHE_DIR.
        predict_masks: the best mask of each set of points.
        decoder: all masks for points and boxes.
    """

    embed: Embed
    predict_masks: PredictMasks
    decoder: PromptDecoder


def build_point_sam(cfg: CfgNode, device: torch.device) -> PointSam:
    """The SAM that MODEL.CLOUDS.SAM names; raises as `build_sam` and `load_pretrained`."""
    node = cfg.MODEL.CLOUDS.SAM
    if is_pretrained(node.MODEL):
        model = load_pretrained(node.MODEL, POINT_FAMILIES, device)
        decoder = TransformersDecoder(model)
        embedder = TransformersEmbedder(model)
        shape = (1, 1, embedder.num_values)
        embed = with_cache(cfg, embedder, model, model.network.vision_encoder, shape)
        return PointSam(embed, BestMaskPredictor(decoder, node.REFINEMENT), decoder)
    sam = build_sam(cfg, device)
    embed = cached_embedder(cfg, sam) if node.CACHE_DIR else ImageEmbedder(sam)
    if hasattr(sam.mask_decoder, "transformer"):  # what the faster predictor is made for
        predict = PointPredictor(sam, second_pass=node.REFINEMENT)
        return PointSam(embed, predict, SegmentAnythingDecoder(sam))
    prompted = SegmentAnythingDecoder(sam, CONVOLUTIONS_AT_ONCE_CPU)
    return PointSam(embed, BestMaskPredictor(prompted, node.REFINEMENT), prompted)


def cached_embedder(cfg: CfgNode, sam: Any) -> CachedEmbedder:
    """segment_anything's image encoder behind the cache in MODEL.CLOUDS.SAM.CACHE_DIR.

    The encoder stays in main memory until an image is not in the cache.

    Raises:
        OSError: the folder cannot be made.
    """
    node = cfg.MODEL.CLOUDS.SAM
    shape = sam.prompt_encoder.embed_dim, *sam.prompt_encoder.image_embedding_size
    cache = EmbeddingCache(expand_user(node.CACHE_DIR), shape)
    sam.image_encoder.cpu()
    encoder = fingerprint(sam, node.MODEL)
    return CachedEmbedder(ImageEmbedder(sam), cache, encoder, sam.device)


def with_cache(
    cfg: CfgNode, embed: Embed, model: Pretrained, encoder: torch.nn.Module, shape: Shape
) -> Embed:
    """`embed` behind the cache in MODEL.CLOUDS.SAM.CACHE_DIR, or as it is without one.

    Args:
        encoder: what `embed` runs; it stays in main memory until an image is not in the cache.
        shape: of the embeddings.

    Raises:
        OSError: the folder cannot be made.
    """
    folder = cfg.MODEL.CLOUDS.SAM.CACHE_DIR
    if not folder:
        return embed
    cache = EmbeddingCache(expand_user(folder), shape)
    device = model.network.device
    key = module_fingerprint((model.family.class_name, model.frame), model.network)
    encoder.cpu()
    return CachedEmbedder(embed, cache, key, device)
