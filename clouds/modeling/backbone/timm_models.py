"""Models of timm by name, with pretrained weights: a timm tag, or a file."""

from __future__ import annotations

import difflib
import io
import logging
import shlex
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from clouds.downloads import one_warning
from clouds.messages import format_examples
from clouds.modeling.backbone.pretrained import pretrained_weights_are_skipped
from clouds.modeling.backbone.vit_resize import grid_of, resize_kernel, resize_positions
from clouds.weights_io import nonfinite_tensors, read_checkpoint

logger = logging.getLogger(__name__)

DEFAULT_TAG = "pretrained"
"""Value of MODEL.BACKBONE.WEIGHTS for the tag in MODEL.BACKBONE.TIMM_NAME, or timm's default."""

FAMILIES = ("vision_transformer", "eva", "vision_transformer_sam", "convnext")
"""Modules of timm whose models are backbones."""

EXAMPLES = (
    "vit_large_patch14_dinov2.lvd142m, vit_large_patch16_dinov3.lvd1689m, "
    "eva02_large_patch14_clip_336.merged2b, vit_large_patch14_clip_336.openai, "
    "vit_large_patch16_siglip_512.v2_webli, vit_pe_spatial_large_patch14_448.fb, "
    "samvit_large_patch16.sa1b, convnext_large.dinov3_lvd1689m"
)

UNUSED = ("norm.", "fc_norm.", "head.", "attn_pool.", "neck.")
"""Begin the names of tensors that no feature depends on: a file may lack or have them."""

FILE_NAMES = ("model.safetensors", "pytorch_model.bin")
"""Of weights in repositories of the Hugging Face hub."""


def full_name(name: str, weights: str) -> str:
    """Architecture and tag, as timm writes them: `vit_large_patch14_dinov2.lvd142m`.

    Args:
        name: MODEL.BACKBONE.TIMM_NAME, with or without a tag.
        weights: MODEL.BACKBONE.WEIGHTS; a tag replaces that of `name`.

    Raises:
        ValueError: timm does not know the architecture or the tag, or it is of no supported family.
    """
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=5)
        hint = f"Similar names are {', '.join(near)}." if near else f"Examples are {EXAMPLES}."
        raise ValueError(
            f"MODEL.BACKBONE.TIMM_NAME is {name!r}, which timm {timm.__version__} does not know. "
            + hint
        )
    if family_of(architecture) not in FAMILIES:
        raise ValueError(
            f"MODEL.BACKBONE.TIMM_NAME is {name!r}, which is no plain vision transformer and no "
            f"ConvNeXt. Examples are {EXAMPLES}."
        )
    known = [entry.partition(".")[2] for entry in timm.list_pretrained(f"{architecture}.*")]
    if weights not in ("", DEFAULT_TAG) and not Path(weights).is_file():
        tag = weights
    if not tag and weights == DEFAULT_TAG and known:
        tag = timm.models.get_pretrained_cfg(architecture).tag
    if tag and tag not in known:
        key = "WEIGHTS" if tag == weights else "TIMM_NAME"
        raise ValueError(
            f"MODEL.BACKBONE.{key} is {weights if tag == weights else name!r}: {tag!r} is neither "
            f"a file nor one of timm's weights for {architecture} "
            f"({', '.join(known) or 'it has none'}). '{DEFAULT_TAG}' takes timm's default, and an "
            "empty MODEL.BACKBONE.WEIGHTS random weights."
        )
    quick = architecture.replace("_clip_", "_clip_quickgelu_")
    if tag and quick != architecture and timm.list_pretrained(f"{quick}.{tag}"):
        logger.warning(
            "MODEL.BACKBONE.TIMM_NAME is %s, and its weights were trained with another activation "
            "function; %s.%s has it",
            *(name, quick, tag),
        )
    return f"{architecture}.{tag}" if tag else architecture


def family_of(name: str) -> str:
    """The module of timm that defines an architecture, such as `vision_transformer`."""
    import timm

    entry = timm.models.model_entrypoint(name.partition(".")[0])
    return str(entry.__module__.rpartition(".")[2])


def load_pretrained(model: nn.Module, name: str, weights: str, resize: str) -> None:
    """Load MODEL.BACKBONE.WEIGHTS into `model`, unless pretrained weights are skipped.

    Args:
        model: built by timm; on the CPU.
        name: its `full_name`.
        weights: a tag or 'pretrained', a file, or empty for random weights.
        resize: 'bicubic', without antialiasing, or 'timm': how a patch kernel and position
            embeddings of another size are resized.

    Raises:
        ValueError: the file does not hold weights of the model.
        FileNotFoundError: the weights can neither be found nor downloaded.
    """
    if pretrained_weights_are_skipped():
        return
    if not weights:
        logger.warning("%s starts from random weights (MODEL.BACKBONE.WEIGHTS is empty)", name)
        return
    path = Path(weights) if Path(weights).is_file() else _download(name)
    try:
        tensors = convert(read_checkpoint(path)["model"], model, resize)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{_no_weights_of(path, name)}: {error}") from error
    load_converted(model, tensors, _no_weights_of(path, name))


def convert(weights: Mapping[str, Tensor], model: nn.Module, resize: str) -> dict[str, Tensor]:
    """Weights under timm's names, with patch kernel and positions of the model's sizes.

    Args:
        weights: as published by the model's authors, by open_clip, or by timm.
        model: the model of timm that they are for.
        resize: see `load_pretrained`.
    """
    tensors = dict(weights)
    if resize == "bicubic":
        for key, tensor in weights.items():
            tensors[key] = _resized(key, tensor, model, weights)
    module = import_module(type(model).__module__)
    with redirect_stdout(io.StringIO()):  # some of timm's functions print
        converted: dict[str, Tensor] = module.checkpoint_filter_fn(tensors, model)
    return converted


def _resized(key: str, tensor: Tensor, model: Any, weights: Mapping[str, Tensor]) -> Tensor:
    """The tensor `key` of a file; patch kernels and tables of positions resized to the model's."""
    last = key.rpartition("visual.")[2]
    if last.endswith("patch_embed.proj.weight") or last == "conv1.weight":
        return resize_kernel(tensor, model.patch_embed.patch_size[0])
    prefix = key.removesuffix("positional_embedding")
    is_table = key.endswith("pos_embed") or (prefix != key and f"{prefix}conv1.weight" in weights)
    if not is_table or model.pos_embed is None or tensor.dim() == 4:
        return tensor  # SAM's table, of four dimensions, is resized to each image alone
    if tensor.shape[-2] == model.pos_embed.shape[-2]:
        return tensor
    table = tensor if tensor.dim() == 3 else tensor[None]
    side = grid_of(table)[1]
    resized = resize_positions(table, (side, side), model.patch_embed.grid_size)
    return resized if tensor.dim() == 3 else resized[0]


def load_converted(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    what: str,
    unused: tuple[str, ...] = UNUSED,
) -> None:
    """Load tensors under the model's names; those that no feature depends on may be missing.

    Args:
        model: built by timm.
        tensors: see `convert`.
        what: begins error messages.
        unused: begin the names of tensors that may be missing, or have other shapes.

    Raises:
        ValueError: others are missing, have other shapes or values that are not finite; the message
            begins with `what`.
    """
    state = model.state_dict()
    needed = [key for key in state if not key.startswith(unused)]
    missing = [key for key in needed if key not in tensors]
    shapes = {
        key: (tuple(tensors[key].shape), tuple(state[key].shape)) for key in state.keys() & tensors
    }
    others = [f"{key} {a} instead of {b}" for key, (a, b) in sorted(shapes.items()) if a != b]
    others = [text for text in others if not text.startswith(unused)]
    if missing or others:
        problems = [
            f"{len(missing)} of {len(needed)} tensors are missing ({format_examples(missing)})"
        ]
        problems += [f"{len(others)} have other shapes ({format_examples(others)})"]
        found = [text for text, names in zip(problems, (missing, others), strict=True) if names]
        raise ValueError(
            f"{what}: {'; '.join(found)}. Name a file of this model and size, or the model of the "
            "file in MODEL.BACKBONE.TIMM_NAME."
        )
    kept = {key: tensors[key] for key, (a, b) in shapes.items() if a == b}
    if broken := nonfinite_tensors(kept):
        raise ValueError(f"{what}: not finite: {format_examples(broken)}. Download it again.")
    model.load_state_dict(kept, strict=False)
    dropped = sorted(tensors.keys() - state.keys() - {"mask_token"})
    dropped = [key for key in dropped if not key.startswith(unused)]
    if dropped:
        logger.info(
            "%d tensors of the file are not used: %s", len(dropped), format_examples(dropped)
        )


def _no_weights_of(path: Path, name: str) -> str:
    return f"the file '{path}' (MODEL.BACKBONE.WEIGHTS) does not hold weights of {name}"


def _download(name: str) -> Path:
    """The file of timm's weights, from the cache of the Hugging Face hub or downloaded."""
    import timm
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    config = timm.models.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        raise ValueError(
            f"timm has no weights of {name} on the Hugging Face hub. Set MODEL.BACKBONE.WEIGHTS to "
            "a file, or empty for random weights."
        )
    files = [config.hf_hub_filename] if config.hf_hub_filename else list(FILE_NAMES)
    try:
        with one_warning() as attempts:
            for file in files[:-1]:
                try:
                    return Path(hf_hub_download(config.hf_hub_id, file))
                except LocalEntryNotFoundError:
                    raise
                except EntryNotFoundError:
                    continue  # the repository has the other file
            return Path(hf_hub_download(config.hf_hub_id, files[-1]))
    except (OSError, RuntimeError, ValueError) as error:
        code = f"import timm; timm.create_model('{name}', pretrained=True)"
        reason = attempts.failure or f"{type(error).__name__}: {str(error)[:200]}"
        raise FileNotFoundError(
            f"The weights of {name} are not on this machine and could not be downloaded "
            f"({reason}). On a machine with internet run `python -c {shlex.quote(code)}` and copy "
            "its cache (~/.cache/huggingface), or set MODEL.BACKBONE.WEIGHTS to a weights file, or "
            "MODEL.WEIGHTS to a checkpoint, which brings them. Gated weights, such as DINOv3's, "
            f"need an account that has accepted their licence: "
            f"https://huggingface.co/{config.hf_hub_id}"
        ) from error


def pixel_statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, RGB, 0-255, of the images that a model was trained on.

    Raises:
        ValueError: timm does not tell them.
    """
    import timm

    config = timm.models.get_pretrained_cfg(name)
    if config is None:
        raise ValueError(
            f"timm does not tell mean and standard deviation of images for {name}; "
            "set MODEL.PIXEL_MEAN and MODEL.PIXEL_STD."
        )
    return tuple(255 * v for v in config.mean), tuple(255 * v for v in config.std)
