"""CLIP models from open_clip: the published ones, and small ones for the demo and the tests."""

from __future__ import annotations

import difflib
import logging
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clouds import plugins
from clouds.downloads import one_warning
from clouds.messages import format_examples
from clouds.modeling.backbone import small_convnext
from clouds.modeling.backbone.pretrained import pretrained_weights_are_skipped
from clouds.modeling.backbone.torchscript import is_torchscript, read_torchscript
from clouds.weights_io import nonfinite_tensors, read_checkpoint
from clouds.weights_record import GROUP, find_weights

logger = logging.getLogger(__name__)

OWN_CONFIGS = Path(__file__).parent / "open_clip_configs"
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids")
"""Ends of names of tensors that weights files have besides weights; the model makes its own."""
PIXEL_MEAN = (122.7709383, 116.7460125, 104.09373615)
PIXEL_STD = (68.5005327, 66.6321579, 70.32316305)
"""Of the images that OpenAI's CLIP was trained on, RGB, 0-255; those of most others as well."""

REASON_LENGTH = 300  # characters of another library's error: it may list every tensor


@cache
def _register_own_configs() -> None:
    import open_clip

    small_convnext.register()
    open_clip.add_model_config(OWN_CONFIGS)


def create_clip(name: str, pretrained: str = "") -> nn.Module:
    """Build a CLIP model with open_clip.

    Args:
        name: open_clip's model name, such as `convnext_large_d_320` or `RN50`.
        pretrained: open_clip's tag of its weights, a weights file, a name of weights that an
            installed package offers (`clouds.weights_record`), or empty for random weights.

    Within `skip_pretrained_weights`, `pretrained` only determines the activation function.

    Raises:
        ValueError: the name or the tag is unknown, or the file does not hold weights of the model
            or those that its record says.
        FileNotFoundError: the weights can neither be found nor downloaded.
    """
    import open_clip

    _register_own_configs()
    known = open_clip.list_models()
    if name not in known:
        raise ValueError(
            f"MODEL.CLOUDS.CLIP_MODEL_NAME is {name!r}, which open_clip {open_clip.__version__} "
            f"does not know. Similar names are "
            + ", ".join(difflib.get_close_matches(name, known, n=5, cutoff=0.4))
            + ". ConvNeXt and ResNet models it knows: "
            + ", ".join(m for m in known if "convnext" in m or m.startswith("RN"))
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained_weights_are_skipped():
        with _quiet():  # open_clip warns of random weights, by way of the root logger
            return _create(open_clip, name, [pretrained] if pretrained in tags else tags)
    if not pretrained:
        logger.warning(
            "CLIP %s starts from random weights (CLIP_PRETRAINED_WEIGHTS is empty)", name
        )
        with _quiet():  # open_clip says the same, by way of the root logger
            return _create(open_clip, name, tags)
    if pretrained in tags:
        return _from_tag(open_clip, name, pretrained)
    if file := find_weights(pretrained):
        return _from_file(open_clip, name, str(file), tags)
    offered = ", ".join(plugins.names(GROUP)) or "none is installed"
    raise ValueError(
        f"MODEL.CLOUDS.CLIP_PRETRAINED_WEIGHTS is {pretrained!r}: neither a file, nor one of "
        f"open_clip's weights for {name} ({', '.join(tags) or 'it has none'}), nor weights of an "
        f"installed package ({offered}). Leave it empty for random weights."
    )


def _from_tag(open_clip: Any, name: str, tag: str) -> nn.Module:
    try:
        with one_warning() as attempts:
            path = open_clip.download_pretrained(open_clip.get_pretrained_cfg(name, tag))
    except (OSError, RuntimeError) as error:
        code = "import open_clip as c; c.download_pretrained(c.get_pretrained_cfg"
        code += f'("{name}", "{tag}"))'
        raise FileNotFoundError(
            f"The weights {tag!r} of CLIP {name} are not on this machine and could not be "
            f"downloaded ({attempts.failure or _reason(error)}). On a machine with internet run "
            f"`python -c {shlex.quote(code)}` and copy its cache (~/.cache/huggingface, "
            "~/.cache/clip), or set MODEL.CLOUDS.CLIP_PRETRAINED_WEIGHTS to a weights file, or "
            "MODEL.WEIGHTS to a checkpoint, which brings them."
        ) from error
    return _from_file(open_clip, name, str(path), [tag])


def _from_file(open_clip: Any, name: str, path: str, tags: Sequence[str]) -> nn.Module:
    """A model with the weights of a file.

    open_clip itself does not read the file, because after some errors it reads it again in a way
    that runs code in it.
    """
    weights = read_clip_weights(path, name)
    with _quiet():  # open_clip warns of random weights
        model = _create(open_clip, name, tags)
    try:
        scale = weights["logit_scale"]  # (1,) in some files
        shape = model.get_parameter("logit_scale").shape
        weights = {**weights, "logit_scale": scale.reshape(shape)}
        if hasattr(model, "text"):  # names of the text encoder with the prefix `text.`
            weights = open_clip.model.convert_to_custom_text_state_dict(weights)
        model.load_state_dict(weights)
    except (RuntimeError, KeyError) as error:
        raise _not_clip(name, path, _reason(error)) from error
    return model


def read_clip_weights(path: str, name: str) -> dict[str, Tensor]:
    """Weights of CLIP from a file, on the CPU; no code that it may contain runs.

    Args:
        path: a `.safetensors` file, a file of `torch.save` (see `read_checkpoint`), or a
            TorchScript archive as OpenAI published them.
        name: open_clip's name of the model, for messages.

    Raises:
        ValueError: it is damaged, holds something else or values that are not finite.
    """
    try:
        if is_torchscript(Path(path)):
            weights = read_torchscript(Path(path))
        else:
            weights = read_checkpoint(path)["model"]
    except (OSError, ValueError) as error:
        raise _not_clip(name, path, _reason(error)) from error
    weights = {n: value for n, value in weights.items() if not n.endswith(NO_WEIGHTS)}
    if broken := nonfinite_tensors(weights):
        raise _not_clip(name, path, f"not finite: {format_examples(broken)}")
    return weights


def _not_clip(name: str, path: str, reason: str) -> ValueError:
    return ValueError(
        f"The file {path!r} (MODEL.CLOUDS.CLIP_PRETRAINED_WEIGHTS) does not hold weights of CLIP "
        f"{name} ({reason}). Allowed are state dicts of torch.save, .safetensors, and OpenAI's "
        "TorchScript files; download it again, or name another."
    )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {textwrap.shorten(str(error), REASON_LENGTH)}"


def _create(open_clip: Any, name: str, tags: Sequence[str]) -> nn.Module:
    """Build the model, random, with the activation that its weights `tags` were trained with.

    open_clip only warns when weights want QuickGELU and the model's own config does not have it, as
    with all weights of `RN50` and `RN101`; their text features would be wrong.
    """
    configs = [open_clip.get_pretrained_cfg(name, tag) for tag in tags]
    model: nn.Module = open_clip.create_model(
        name,
        pretrained=None,
        precision="fp32",
        device=torch.get_default_device(),
        force_quick_gelu=bool(configs) and all(c.get("quick_gelu", False) for c in configs),
    )
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep warnings of the root logger back."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def pixel_statistics(name: str, tag: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, RGB, 0-255, of the images of a model's weights.

    Args:
        name: open_clip's name of the model.
        tag: of its weights; for others those of its first weights.
    """
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    if not tags:
        return PIXEL_MEAN, PIXEL_STD
    config = open_clip.get_pretrained_cfg(name, tag if tag in tags else tags[0])
    mean, std = config.get("mean"), config.get("std")
    return (
        tuple(255 * v for v in mean) if mean else PIXEL_MEAN,
        tuple(255 * v for v in std) if std else PIXEL_STD,
    )


def get_tokenizer(name: str) -> Any:
    """The tokenizer of `name`: list of strings -> int64 (N, context length)."""
    import open_clip

    _register_own_configs()
    return open_clip.get_tokenizer(name)
