"""Small backbones with adapters: real vision transformers and CLIP models, with random weights."""

from __future__ import annotations

import functools

import torch
from reference_adapters import adapter_config
from timm.models.vision_transformer import VisionTransformer
from tiny_model import tiny_config

from clouds.modeling.backbone.adapters import build_adapter
from clouds.modeling.backbone.clip import CLIP
from clouds.modeling.backbone.open_clip_models import create_clip
from clouds.modeling.backbone.vit import ViTBackbone

SMALL = {
    "none": {},
    "full": {"LAYER_DECAY": 0.5},
    "lora": {"RANK": 3, "ALPHA": 6.0},
    "rein": {"RANK": 4, "NUM_TOKENS": 12},
    "soma": {"RANK": 4, "ALPHA": 8.0, "FIRST_BLOCK": 2},
    "recycle": {"RANK": 5, "SUB_RANK": 2},
}
"""Options of the adapters for small networks."""

FROZEN = ("lora", "rein", "soma", "recycle")
LOW_RANK = ("lora", "soma", "recycle")


def small_config(name, **options):
    cfg = adapter_config(name, **{} if name == "none" else SMALL[name] | options)
    cfg.MODEL.MASK_FORMER.HIDDEN_DIM = 32
    return cfg


def small_vit(name="none", seed=0, transformer=None, **options):
    """4 blocks of width 48; its own weights do not depend on the adapter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if transformer is None:
            sizes = {"embed_dim": 48, "depth": 4, "num_heads": 3, "patch_size": 16, "img_size": 64}
            transformer = VisionTransformer(num_classes=0, init_values=0.5, reg_tokens=2, **sizes)
            for parameter in transformer.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.15)
        return ViTBackbone(
            transformer=transformer,
            pixel_mean=(0.0,) * 3,
            pixel_std=(1.0,) * 3,
            make_adapter=functools.partial(build_adapter, small_config(name, **options)),
        ).train()


def small_clip(name, model="clouds_tiny", seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        cfg = small_config(name, **options)
        make = functools.partial(build_adapter, cfg)
        clip_model = create_clip(model)
        for key, parameter in clip_model.named_parameters():
            if key.endswith("gamma"):  # of ConvNeXt's blocks, 1e-6 at first: they would do nothing
                parameter.data.fill_(0.5)
        return CLIP(clip_model=clip_model, model_name=model, make_adapter=make).train()


def images(n=2, height=64, width=96, seed=0):
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def move_adapter(backbone, seed=1):
    """Change all that trains, as a training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def vit_model_config(name="none", **settings):
    """The whole model on a ViT of timm with 6 blocks of width 64."""
    small = {f"MODEL__BACKBONE__ADAPTER__{name.upper()}__{k}": v for k, v in SMALL[name].items()}
    defaults = {
        "MODEL__BACKBONE__NAME": "ViT",
        "MODEL__BACKBONE__TIMM_NAME": "test_vit",
        "MODEL__BACKBONE__WEIGHTS": "",
        "MODEL__BACKBONE__IMG_SIZE": 64,
        "MODEL__BACKBONE__ADAPTER__NAME": name,
    }
    return tiny_config(**(defaults | small | settings))
