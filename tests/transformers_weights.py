"""Our weights under the names of transformers' Mask2Former.

transformers has an independent implementation of the same network. With the same weights its pixel
decoder and mask decoder must give the same outputs as ours.
"""

from __future__ import annotations

import re

import pytest
import torch

PIXEL_DECODER = (
    (r"^input_proj\.", "input_projections."),
    (r"^transformer\.", ""),
    (r"\.norm1\.", ".self_attn_layer_norm."),
    (r"\.norm2\.", ".final_layer_norm."),
    (r"\.linear(\d)\.", r".fc\1."),
    (r"^(adapter|layer)_(\d)\.norm\.", r"\1_\2.1."),
    (r"^(adapter|layer)_(\d)\.(weight|bias)$", r"\1_\2.0.\3"),
    (r"^mask_features\.", "mask_projection."),
)

LAYER = r"decoder.layers.\1."
SELF, CROSS, FFN = (
    rf"^transformer_{kind}_layers\.(\d+)\." for kind in ("self_attention", "cross_attention", "ffn")
)
MASK_DECODER = (
    (r"^query_feat\.", "queries_features."),
    (r"^query_embed\.", "queries_embedder."),
    (r"^input_proj\.", "input_projections."),
    (r"^decoder_norm\.", "decoder.layernorm."),
    (r"^mask_embed\.layers\.(\d)\.", r"decoder.mask_predictor.mask_embedder.\1.0."),
    (SELF + r"norm\.", LAYER + "self_attn_layer_norm."),
    (SELF, LAYER),
    (CROSS + r"norm\.", LAYER + "cross_attn_layer_norm."),
    (CROSS + r"multihead_attn\.", LAYER + "cross_attn."),
    (FFN + r"norm\.", LAYER + "final_layer_norm."),
    (FFN + r"linear(\d)\.", LAYER + r"fc\2."),
)


def mask2former():
    """transformers' module; without it the test that calls this is skipped."""
    return pytest.importorskip("transformers.models.mask2former.modeling_mask2former")


def mask2former_config(**settings):
    mask2former()
    from transformers import Mask2FormerConfig

    return Mask2FormerConfig(**settings)


def renamed(name, rules):
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def pixel_decoder_weights(ours):
    """State dict of our pixel decoder -> of `Mask2FormerPixelDecoder`."""
    return {renamed(name, PIXEL_DECODER): value for name, value in ours.items()}


def mask_decoder_weights(ours):
    """State dict of our mask decoder -> of `Mask2FormerTransformerModule`, without the class head.

    Its self-attention has separate projections of query, key and value; ours are stacked.
    """
    theirs = {}
    for name, value in ours.items():
        if name.startswith("class_embed."):
            continue
        name = renamed(name, MASK_DECODER)
        if ".self_attn.in_proj_" in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                theirs[name.replace("in_proj_", f"{letter}_proj.")] = part
        else:
            theirs[name] = value
    return theirs


def randomize(module, seed=0):
    """Random values for all parameters: none is 0 or 1 as initial weights often are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "sampling_offsets.bias" in name:
                parameter.copy_(2 * noise)
            elif parameter.dim() > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
    return module
