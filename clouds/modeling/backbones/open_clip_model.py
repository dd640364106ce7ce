"""CLIP models from open_clip: the published ones, and small ones for the demo and the tests."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)

OWN_CONFIGS = Path(__file__).parent / "open_clip_configs"


@cache
def _register_own_configs() -> None:
    import open_clip

    open_clip.add_model_config(OWN_CONFIGS)


def create_clip(name: str, pretrained: str = "") -> nn.Module:
    """Build a CLIP model with open_clip.

    Args:
        name: open_clip's model name, such as `convnext_large_d_320` or `RN50`.
        pretrained: open_clip's tag of its weights, a weights file, or empty for random weights.

    Raises:
        ValueError: the name or the tag is unknown.
        FileNotFoundError: the weights can neither be found nor downloaded.
    """
    import open_clip

    _register_own_configs()
    known = open_clip.list_models()
    if name not in known:
        raise ValueError(
            f"MODEL.CLOUDS.CLIP_MODEL_NAME is {name!r}, which open_clip {open_clip.__version__} "
            f"does not know. ConvNeXt and ResNet models it knows: "
            + ", ".join(m for m in known if "convnext" in m or m.startswith("RN"))
        )
    if not pretrained:
        logger.warning(
            "CLIP %s starts from random weights (CLIP_PRETRAINED_WEIGHTS is empty)", name
        )
        return _create(open_clip, name, None)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in tags and not Path(pretrained).is_file():
        raise ValueError(
            f"MODEL.CLOUDS.CLIP_PRETRAINED_WEIGHTS is {pretrained!r}: neither a file nor one of "
            f"open_clip's weights for {name} ({', '.join(tags) or 'it has none'}). "
            "Leave it empty for random weights."
        )
    try:
        return _create(open_clip, name, pretrained)
    except (OSError, RuntimeError) as error:
        if Path(pretrained).is_file():
            raise ValueError(f"{pretrained} does not hold weights of {name}: {error}") from error
        raise FileNotFoundError(
            f"The weights {pretrained!r} of CLIP {name} are not on this machine and could not be "
            f"downloaded ({type(error).__name__}: {error}). On a machine with internet run "
            f"`python -c \"import open_clip; open_clip.create_model('{name}', '{pretrained}')\"` "
            "and copy its cache (~/.cache/huggingface, ~/.cache/clip), or set "
            "MODEL.CLOUDS.CLIP_PRETRAINED_WEIGHTS to a weights file, or to '' when MODEL.WEIGHTS "
            "brings them."
        ) from error


def _create(open_clip: Any, name: str, pretrained: str | None) -> nn.Module:
    model: nn.Module = open_clip.create_model(name, pretrained=pretrained, precision="fp32")
    return model


def get_tokenizer(name: str) -> Any:
    """The tokenizer of `name`: list of strings -> int64 (N, context length)."""
    import open_clip

    _register_own_configs()
    return open_clip.get_tokenizer(name)
