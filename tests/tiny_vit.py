"""Small vision transformers of timm, with random weights."""

from __future__ import annotations

import timm
import torch
from timm.models.vision_transformer_sam import VisionTransformerSAM

from clouds.modeling.backbone.vit import ViTBackbone

SMALL = {"embed_dim": 48, "depth": 4, "num_heads": 3, "patch_size": 16, "num_classes": 0}

ARCHITECTURES = {
    "dinov2": "vit_small_patch14_dinov2",
    "dinov2_reg4": "vit_small_patch14_reg4_dinov2",
    "dinov3": "vit_small_patch16_dinov3",
    "eva02": "eva02_small_patch14_224",
    "clip": "vit_base_patch16_clip_224",
    "siglip2": "vit_base_patch16_siglip_256",
    "pe": "vit_pe_spatial_small_patch16_512",
    "sam": None,
}
"""Families and a model of timm of each; that of SAM's encoder is built directly."""


def tiny_transformer(family="dinov2", img_size=64, seed=0, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family == "sam":
            options = {"use_rel_pos": True, "window_size": 2, "global_attn_indexes": (3,)}
            model = VisionTransformerSAM(img_size, neck_chans=32, **SMALL, **options, **changes)
        else:
            options = SMALL | {"img_size": img_size, "dynamic_img_size": True, "global_pool": ""}
            model = timm.create_model(ARCHITECTURES[family], **options | changes)
        for name, parameter in model.named_parameters():  # some start near 0: all shall matter
            if "gamma" in name or "token" in name or "pos" in name:
                torch.nn.init.normal_(parameter)
            elif parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def tiny_vit(family="dinov2", img_size=64, seed=0, changes=None, **options):
    transformer = tiny_transformer(family, img_size, seed, **(changes or {}))
    return ViTBackbone(
        transformer=transformer, pixel_mean=(0.0,) * 3, pixel_std=(1.0,) * 3, **options
    )


def images(n=2, height=64, width=96, seed=0):
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed))
