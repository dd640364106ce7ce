"""SAMs of transformers, loaded from a folder or from the Hugging Face hub, frozen."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import errors

from clouds.downloads import one_warning
from clouds.files import expand_user
from clouds.messages import format_examples, install_extra
from clouds.self_training.refiners.sam.frame import Color, Frame
from clouds.weights_io import nonfinite_tensors

logger = logging.getLogger(__name__)

KEY = "MODEL.CLOUDS.SAM.MODEL"
IMAGENET = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
HALF = (127.5, 127.5, 127.5), (127.5, 127.5, 127.5)


@dataclass(frozen=True)
class Family:
    """Models of one architecture.

    Attributes:
        class_name: name in transformers.
        keep_aspect, colors: of its `Frame`; `colors` are mean and std.
        example: a model of it on the hub.
    """

    class_name: str
    keep_aspect: bool
    colors: tuple[Color, Color]
    example: str


_SAM2 = Family("Sam2Model", False, IMAGENET, "facebook/sam2.1-hiera-tiny")
_EDGETAM = Family("EdgeTamModel", False, IMAGENET, "yonigozlan/EdgeTAM-hf")
_TRACKER = Family("Sam3TrackerModel", False, HALF, "facebook/sam3")
_SAM3 = Family("Sam3Model", False, HALF, "facebook/sam3")

POINT_FAMILIES: Mapping[str, Family] = {
    "sam": Family("SamModel", True, IMAGENET, "facebook/sam-vit-base"),
    "sam_hq": Family("SamHQModel", True, IMAGENET, "syscv-community/sam-hq-vit-base"),
    "sam2": _SAM2,
    "sam2_video": _SAM2,
    "edgetam": _EDGETAM,
    "edgetam_video": _EDGETAM,
    "sam3_tracker": _TRACKER,
    "sam3_tracker_video": _TRACKER,
    "sam3_video": _TRACKER,
}
"""Models that take points, by `model_type` of their config; files of the video models hold them."""

TEXT_FAMILIES: Mapping[str, Family] = {"sam3": _SAM3, "sam3_video": _SAM3}
"""Models that take the name of a class."""


@dataclass(frozen=True)
class Pretrained:
    """A model of transformers.

    Attributes:
        network: in evaluation mode, float32, without gradients.
        family: see there.
        frame: of its input.
    """

    network: Any
    family: Family
    frame: Frame


def load_pretrained(
    model: str, families: Mapping[str, Family], device: torch.device | str
) -> Pretrained:
    """A SAM of one of the families, on the device.

    Args:
        model: MODEL.CLOUDS.SAM.MODEL: a folder, or an id on the hub, downloaded if it is not in
            the local cache.

    Raises:
        ImportError: transformers is not installed, or too old for the family.
        FileNotFoundError: no such folder or id, no access to it, no connection, or no weights.
        ValueError: it is no SAM of these families, or its weights are not complete or not finite.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{KEY} {model} needs transformers: {install_extra('sam')}") from error
    source = _source(model)
    with _explained(model):
        kind = transformers.AutoConfig.from_pretrained(source).model_type
    family = _family(model, kind, families)
    network_class = getattr(transformers, family.class_name, None)
    if network_class is None:
        raise ImportError(
            f"{KEY} {model}: transformers {transformers.__version__} has no {family.class_name}; "
            "install a newer one: pip install -U transformers"
        )
    with _explained(model):
        network, report = network_class.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True
        )
    if report["missing_keys"]:
        missing = format_examples(sorted(report["missing_keys"]))
        raise ValueError(f"{KEY}: {model} lacks weights of {family.class_name}: {missing}")
    broken = nonfinite_tensors(network.state_dict())
    if broken:
        raise ValueError(
            f"{KEY}: {model} has weights that are not finite: {format_examples(broken)}"
        )
    frame = Frame(_input_side(network.config), family.keep_aspect, *family.colors)
    logger.info("%s: %s of %s", model, family.class_name, kind)
    return Pretrained(network.requires_grad_(False).eval().to(device), family, frame)


def load_tokenizer(model: str) -> Any:
    """The tokenizer that comes with a model; raises as `load_pretrained`."""
    import transformers

    with _explained(model):
        return transformers.AutoTokenizer.from_pretrained(_source(model))


def _source(model: str) -> str:
    """The folder, with the home directory in place of `~`, or the id."""
    path = expand_user(model)
    looks_local = path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1
    if looks_local and not path.is_dir():
        raise FileNotFoundError(f"{KEY}: there is no folder {model}")
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{KEY}: the folder {model} has no config.json, so it is no model of transformers. "
            "Files of segment-anything are named by MODEL.CLOUDS.SAM.WEIGHTS, with "
            f"{KEY} vit_b, vit_l or vit_h."
        )
    return str(path) if path.is_dir() else model


def _family(model: str, kind: str, families: Mapping[str, Family]) -> Family:
    if kind in families:
        return families[kind]
    advice = {"sam3": " It needs MODEL.CLOUDS.REFINER sam_text."} if "sam" in families else {}
    if kind in POINT_FAMILIES:
        advice = {kind: " It takes points: MODEL.CLOUDS.REFINER sam."}
    examples = ", ".join(dict.fromkeys(family.example for family in families.values()))
    raise ValueError(
        f"{KEY}: {model} is a model of type {kind}, which this refiner cannot use."
        f"{advice.get(kind, '')} Allowed are models of types {', '.join(families)}, such as "
        f"{examples}."
    )


def _input_side(config: Any) -> int:
    """Height and width of the input, pixels."""
    # Files of SAM 3 for video hold two models.
    for part in ("tracker_config", "detector_config"):
        config = getattr(config, part, None) or config
    prompts = getattr(config, "prompt_encoder_config", None)
    size = (config.vision_config if prompts is None else prompts).image_size
    return int(size if isinstance(size, int) else size[0])


@contextmanager
def _explained(model: str) -> Iterator[None]:
    """Replace errors about a model that is not available by advice in one line."""
    try:
        with one_warning() as attempts:
            yield
    except OSError as error:
        raise FileNotFoundError(f"{KEY}: {_advice(model, error, attempts.failure)}") from error
    except ValueError as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{KEY}: {model} is no model that can be loaded: {first}") from error


def _advice(model: str, error: OSError, failure: str) -> str:
    """Why a model is not available, and what to do."""
    if expand_user(model).is_dir():
        first = str(error).strip().splitlines()[0]
        return f"the folder {model} is not complete ({first}). Download or save it again."
    causes = _causes(error)
    if any(isinstance(each, errors.GatedRepoError) for each in causes):
        return (
            f"{model} is gated: accept its terms on https://huggingface.co/{model}, then log in "
            "with `hf auth login` or set HF_TOKEN."
        )
    if any(isinstance(each, errors.RepositoryNotFoundError) for each in causes):
        return (
            f"there is no folder {model}, and no model {model} on the Hugging Face hub. Check the "
            "name; a private one needs `hf auth login`."
        )
    reason = failure or "the hub cannot be reached, or HF_HUB_OFFLINE is set"
    return (
        f"{model} is not in the local cache, and {reason}. On a machine with a connection run "
        f"`hf download {model} --local-dir FOLDER`, copy FOLDER, and set {KEY} FOLDER."
    )


def _causes(error: BaseException) -> list[BaseException]:
    """The error and the errors that it came from."""
    found: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in found:
        found.append(each)
        each = each.__cause__ or each.__context__
    return found


def is_pretrained(model: str) -> bool:
    """Whether a value of MODEL.CLOUDS.SAM.MODEL is a folder or an id, not a built-in name."""
    return "/" in model
