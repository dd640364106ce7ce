"""The backbone `ViT`: models of timm from a config."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from clouds.d2 import BACKBONE_REGISTRY, Backbone, CfgNode, ShapeSpec
from clouds.modeling.backbone.adapters import build_adapter
from clouds.modeling.backbone.convnext import ConvNeXtBackbone
from clouds.modeling.backbone.timm_models import (
    family_of,
    full_name,
    load_pretrained,
    pixel_statistics,
)
from clouds.modeling.backbone.vit import ViTBackbone


@BACKBONE_REGISTRY.register()  # type: ignore[untyped-decorator]
def ViT(cfg: CfgNode, input_shape: ShapeSpec | None = None) -> Backbone:  # noqa: N802
    """The model MODEL.BACKBONE.TIMM_NAME of timm with the features `res2` to `res5`.

    A vision transformer gets a pyramid, a ConvNeXt has its own stages.

    Raises:
        ValueError: timm does not know the name, or it is of no supported family; the weights are
            not those of the model.
        FileNotFoundError: the weights can neither be found nor downloaded.
    """
    import timm

    options = cfg.MODEL.BACKBONE
    name = full_name(options.TIMM_NAME, options.WEIGHTS)
    mean, std = pixel_statistics(name)
    settings: dict[str, Any] = {"pixel_mean": mean, "pixel_std": std, "frozen": options.FREEZE}
    settings["make_adapter"] = functools.partial(build_adapter, cfg)
    if family_of(name) == "convnext":
        if options.ACTIVATION_CHECKPOINTING:
            raise ValueError(
                f"MODEL.BACKBONE.ACTIVATION_CHECKPOINTING needs a vision transformer, and "
                f"MODEL.BACKBONE.TIMM_NAME is {options.TIMM_NAME!r}. Set it to False."
            )
        model = timm.create_model(name, num_classes=0, drop_path_rate=options.DROP_PATH)
        load_pretrained(model, name, options.WEIGHTS, options.RESIZE)
        return ConvNeXtBackbone(convnext=model, **settings)
    transformer = create_transformer(cfg, name, num_classes=0, global_pool="")
    load_pretrained(transformer, name, options.WEIGHTS, options.RESIZE)
    return ViTBackbone(transformer=transformer, **settings, **vit_options(cfg))


def create_transformer(cfg: CfgNode, name: str, **head: Any) -> nn.Module:
    """A vision transformer of timm with random weights, for MODEL.BACKBONE.IMG_SIZE.

    Args:
        cfg: the config.
        name: timm's name.
        head: timm's arguments of what follows the blocks.
    """
    import timm

    options = cfg.MODEL.BACKBONE
    settings: dict[str, Any] = {
        "patch_size": options.PATCH_SIZE,
        "drop_path_rate": options.DROP_PATH,
    }
    if family_of(name) == "vision_transformer_sam":
        # its relative positions are of its own size, and are resized to each image
        settings["num_classes"] = 0
    else:  # rotary positions of any image, not of one size
        settings |= {"img_size": options.IMG_SIZE, "dynamic_img_size": True, **head}
    model: nn.Module = timm.create_model(name, **settings)
    return model


def vit_options(cfg: CfgNode) -> dict[str, Any]:
    """Arguments of `ViTBackbone` that say how the features are made."""
    options = cfg.MODEL.BACKBONE
    return {
        "out_blocks": options.OUT_BLOCKS,
        "pyramid": options.PYRAMID,
        "positions": options.POSITIONS,
        "activation_checkpointing": options.ACTIVATION_CHECKPOINTING,
    }
