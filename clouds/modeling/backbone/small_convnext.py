"""A small ConvNeXt for CLIP models that train on CPU cores."""

from __future__ import annotations

from typing import Any

NAME = "clouds_convnext_small"
"""Its name for timm, in the model configs of open_clip."""
LAYER_SCALE = 0.3
"""Initial layer scale. timm's 1e-6 is for networks many times as deep and schedules as long."""


def clouds_convnext_small(pretrained: bool = False, **options: Any) -> Any:
    """Build timm's ConvNeXt with widths of 32 to 256 and 6 blocks, of 1.0 million parameters.

    Args:
        pretrained: must be False; there are no weights of the encoder alone.
        **options: of timm's `ConvNeXt`.

    Raises:
        ValueError: `pretrained` is True.
    """
    import timm

    if pretrained:
        raise ValueError(
            f"{NAME} has no pretrained weights of its own; set pretrained=False. Those of a whole "
            "CLIP are loaded by MODEL.CLOUDS.CLIP_PRETRAINED_WEIGHTS."
        )
    # timm's registry passes these of the model's name; `convnext_tiny` below has its own
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        options.pop(name, None)
    # another size of the same class, under whose name timm has the settings that are not sizes
    return timm.create_model(
        "convnext_tiny",
        dims=(32, 64, 128, 256),
        depths=(1, 1, 3, 1),
        ls_init_value=LAYER_SCALE,
        **options,
    )


def register() -> None:
    """Add it to the models of timm."""
    from timm.models import register_model

    register_model(clouds_convnext_small)
