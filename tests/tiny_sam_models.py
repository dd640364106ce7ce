"""Tiny random SAMs of transformers, each family, saved to a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from sam_models import save_letter_tokenizer

POINT_MODELS = ("sam", "sam_hq", "sam2", "edgetam", "sam3_tracker")
SIDE = {"sam3_tracker": 126, "sam3": 126}  # of the others 128
WORDS = ("road", "sidewalk", "building", "wall", "fence", "car")

DECODER = {
    "hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32,
}  # fmt: skip
PROMPTS = {"hidden_size": 32, "image_size": 128, "patch_size": 16, "mask_input_channels": 16}
LEVELS = {
    "backbone_channel_list": [64, 32, 16, 8],
    "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    "fpn_hidden_size": 32,
}
VIT = {
    "hidden_size": 32, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 128, "patch_size": 16, "window_size": 4, "global_attn_indexes": (1,),
    "num_pos_feats": 16, "initializer_range": 0.02,
}  # fmt: skip
HIERA = {
    "model_type": "sam2_hiera_det_model", "hidden_size": 8, "num_attention_heads": 1,
    "image_size": [128, 128], "blocks_per_stage": [1, 1, 2, 1],
    "embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1, 1, 2, 2],
    "window_size_per_stage": [4, 4, 4, 4], "global_attention_blocks": [3],
}  # fmt: skip
REPVIT = {
    "model_type": "timm_wrapper", "architecture": "repvit_m1", "num_classes": 2,
    "model_args": {
        "in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3],
        "embed_dim": (8, 16, 32, 64), "depth": (1, 1, 1, 1),
    },
}  # fmt: skip
VIT3 = {
    "backbone_config": {
        "model_type": "sam3_vit_model", "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 126, "patch_size": 14,
        "window_size": 3, "global_attn_indexes": [1], "pretrain_image_size": 42,
    },
    "fpn_hidden_size": 32,
    "backbone_feature_sizes": [[36, 36], [18, 18], [9, 9]],
}  # fmt: skip
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}


def classes_and_settings(family):
    t = pytest.importorskip("transformers")
    if family in ("sam", "sam_hq"):
        name = "Sam" if family == "sam" else "SamHQ"
        decoder = DECODER if family == "sam" else DECODER | {"vit_dim": 32}
        parts = {"vision_config": VIT, "prompt_encoder_config": PROMPTS}
        parts["mask_decoder_config"] = decoder
        return getattr(t, f"{name}Config"), getattr(t, f"{name}Model"), parts
    common = {"prompt_encoder_config": PROMPTS, "mask_decoder_config": DECODER}
    if family == "sam2":
        return (
            t.Sam2Config,
            t.Sam2Model,
            common | {"vision_config": LEVELS | {"backbone_config": HIERA}},
        )
    if family == "edgetam":
        return (
            t.EdgeTamConfig,
            t.EdgeTamModel,
            common | {"vision_config": LEVELS | {"backbone_config": REPVIT}},
        )
    if family == "sam3_tracker":
        prompts = PROMPTS | {"image_size": 126, "patch_size": 14}
        return (
            t.Sam3TrackerConfig,
            t.Sam3TrackerModel,
            common
            | {
                "vision_config": {"model_type": "sam3_vision_model"} | VIT3,
                "prompt_encoder_config": prompts,
            },
        )
    text = {
        "model_type": "clip_text_model", "vocab_size": 600, "hidden_size": 32,
        "intermediate_size": 64, "projection_dim": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 32, "bos_token_id": 0,
        "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    return (
        t.Sam3Config,
        t.Sam3Model,
        {
            "vision_config": VIT3,
            "text_config": text,
            "geometry_encoder_config": SMALL | {"num_layers": 1},
            "detr_encoder_config": SMALL | {"num_layers": 1},
            "detr_decoder_config": SMALL | {"num_layers": 2, "num_queries": 10},
            "mask_decoder_config": {"hidden_size": 32, "num_attention_heads": 4},
        },
    )


def build(family, seed=0):
    """The network in evaluation mode, its weights spread: masks are neither empty nor all."""
    config, model, settings = classes_and_settings(family)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = model(config(**settings)).eval()
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return network.requires_grad_(False)


def save(family, folder, seed=0):
    """Save to `folder`, which is returned as text; SAM 3 with a tokenizer that knows WORDS."""
    build(family, seed).save_pretrained(folder)
    if family == "sam3":
        save_letter_tokenizer(folder)
    return str(folder)
