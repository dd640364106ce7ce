"""Whether a config can work: every value on its own, then those that must fit each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from clouds.config.defaults import KEYS
from clouds.config.values import coerce
from clouds.d2 import CfgNode
from clouds.data.label_space import CITYSCAPES_19
from clouds.device import resolve_device


class ConfigError(ValueError):
    """What is wrong with a config, everything at once, one line for each problem."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n  ".join([f"{count} in the configuration:", *problems]))


@dataclass(frozen=True)
class CrossCheck:
    """A condition on several keys.

    Attributes:
        keys: the keys it reads; a message about it begins with the first.
        check: takes their values in this order; returns None, or what the first must be.
    """

    keys: tuple[str, ...]
    check: Callable[..., str | None]


CROSS_CHECKS: list[CrossCheck] = []


def cross_check(*keys: str) -> Callable[[Callable[..., str | None]], Callable[..., str | None]]:
    """Add the decorated function to the checks, as `CrossCheck.check`."""

    def add(check: Callable[..., str | None]) -> Callable[..., str | None]:
        CROSS_CHECKS.append(CrossCheck(keys, check))
        return check

    return add


def problems(cfg: CfgNode, origins: Mapping[str, str] | None = None) -> list[str]:
    """Everything that is wrong with `cfg`, one line each; empty when nothing is.

    Args:
        cfg: has every key of the table; others that it may have are not looked at.
        origins: where the value of a key came from (a file and line), for the messages.
    """
    origins = origins or {}
    good: dict[str, Any] = {}
    found = []
    for key in KEYS:
        value = get(cfg, key.name)
        try:
            coerced = coerce(key, value)
        except ValueError as error:
            found.append(describe(key.name, value, str(error), origins))
            continue
        if key.rule.holds(coerced):
            good[key.name] = coerced
        else:
            found.append(describe(key.name, value, f"allowed is {key.rule.words}", origins))
    for cross in CROSS_CHECKS:
        # A value that is wrong by itself is reported once, not again by all that depends on it.
        if all(name in good for name in cross.keys):
            message = cross.check(*(good[name] for name in cross.keys))
            if message is not None:
                first = cross.keys[0]
                found.append(describe(first, good[first], message, origins))
    return found


def get(cfg: CfgNode, name: str) -> Any:
    """Value of the key with the dotted `name`."""
    node = cfg
    for part in name.split("."):
        node = node[part]
    return node


def describe(name: str, value: Any, message: str, origins: Mapping[str, str]) -> str:
    """One line on one problem."""
    origin = f" ({origins[name]})" if name in origins else ""
    return f"{name} = {value!r}{origin}: {message}"


@cross_check("MODEL.MASK_FORMER.HIDDEN_DIM", "MODEL.MASK_FORMER.NHEADS")
def decoder_heads_share_channels(channels: int, heads: int) -> str | None:
    """Each attention head gets as many channels as every other."""
    if channels % heads:
        return f"must be a multiple of MODEL.MASK_FORMER.NHEADS, {heads}"
    return None


@cross_check("MODEL.MASK_FORMER.HIDDEN_DIM")
def decoder_positions_fit(channels: int) -> str | None:
    """Sine positions: half the channels for each axis, in pairs of a sine and a cosine."""
    return "must be a multiple of 4, for sine and cosine of both axes" if channels % 4 else None


@cross_check("MODEL.SEM_SEG_HEAD.CONVS_DIM", "MODEL.MASK_FORMER.NHEADS")
def pixel_decoder_channels_fit(channels: int, heads: int) -> str | None:
    """Its norms have 32 groups, its attention as many heads as the mask decoder's."""
    if channels % 32:
        return "must be a multiple of 32, the groups of its norms"
    if channels % heads:
        return f"must be a multiple of MODEL.MASK_FORMER.NHEADS, {heads}"
    return None


PYRAMID = ("res2", "res3", "res4", "res5")
"""Features of the CLIP backbone at strides 4, 8, 16, 32."""


@cross_check("MODEL.SEM_SEG_HEAD.IN_FEATURES", "MODEL.BACKBONE.NAME")
def features_exist(features: list[str], backbone: str) -> str | None:
    """Another backbone may name its features as it likes."""
    if len(set(features)) < len(features):
        return "must not name a feature twice"
    if backbone == "CLIP" and not set(features) <= set(PYRAMID):
        return f"features of the CLIP backbone are {', '.join(PYRAMID)}"
    return None


@cross_check(
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES",
    "MODEL.SEM_SEG_HEAD.IN_FEATURES",
    "MODEL.BACKBONE.NAME",
)
def deformable_features_are_read(
    deformable: list[str], features: list[str], backbone: str
) -> str | None:
    """The pyramid is built downwards from the finest feature that went through attention."""
    if len(set(deformable)) < len(deformable):
        return "must not name a feature twice"
    if not set(deformable) <= set(features):
        return f"must be among MODEL.SEM_SEG_HEAD.IN_FEATURES, {features}"
    if backbone != "CLIP" or not set(features) <= set(PYRAMID):
        return None
    finer = PYRAMID[: min(PYRAMID.index(name) for name in deformable)]
    others = set(features) - set(deformable)
    if others != set(finer):
        return (
            "the other names in MODEL.SEM_SEG_HEAD.IN_FEATURES must be all the finer features, "
            f"here {list(finer)}; they are {sorted(others)}"
        )
    return None


@cross_check("MODEL.MASK_FORMER.SIZE_DIVISIBILITY")
def padding_fits_the_coarsest_feature(divisibility: int) -> str | None:
    """Features at stride 32 must cover the padded image exactly."""
    return "must be a multiple of 32, the stride of res5" if divisibility % 32 else None


TEXT_HEADS = ("text", "MultiScaleMaskedTransformerDecoder")


@cross_check(
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
    "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME",
    "MODEL.CLOUDS.GEOMETRIC_ENSEMBLE",
)
def classes_are_those_of_the_labels(classes: int, head: str, ensemble: bool) -> str | None:
    """Labels become train ids of the one label space when they are read; texts name its classes."""
    known = len(CITYSCAPES_19.names)
    if classes < known:
        return f"must be at least {known}, the classes that labels are read as"
    if classes > known and (head in TEXT_HEADS or ensemble):
        return f"must be {known}, the classes that the text classifier has words for"
    return None


@cross_check("MODEL.SEM_SEG_HEAD.IGNORE_VALUE", "MODEL.SEM_SEG_HEAD.NUM_CLASSES")
def ignored_is_no_class(ignore: int, classes: int) -> str | None:
    """Labels are uint8."""
    if classes <= ignore <= 255:
        return None
    return f"must be at least MODEL.SEM_SEG_HEAD.NUM_CLASSES, {classes}, and at most 255"


@cross_check("INPUT.INITIAL_HEIGHT", "INPUT.INITIAL_WIDTH")
def working_size_is_whole(height: int, width: int) -> str | None:
    """Height alone or width alone says nothing."""
    if (height > 0) == (width > 0):
        return None
    return f"INPUT.INITIAL_WIDTH is {width}; both must be 0, or both above 0"


@cross_check("INPUT.SCALE_RANGE")
def scale_range_is_ordered(scales: tuple[float, float]) -> str | None:
    """From small to large."""
    return None if scales[0] <= scales[1] else "the first number must not exceed the second"


@cross_check("SOLVER.STEPS")
def steps_increase(steps: tuple[int, ...]) -> str | None:
    """Steps beyond the last iteration are allowed, and never reached."""
    if all(a < b for a, b in zip((0, *steps), steps, strict=False)):
        return None
    return "must be iterations above 0 in increasing order"


@cross_check("MODEL.DEVICE")
def device_exists(device: str) -> str | None:
    """On this machine."""
    try:
        resolve_device(device)
    except ValueError as error:
        return str(error)
    return None


@cross_check("SOLVER.AMP.DTYPE", "SOLVER.AMP.ENABLED", "MODEL.DEVICE")
def half_precision_has_a_gpu(dtype: str, enabled: bool, device: str) -> str | None:
    """The loss scaling that fp16 needs works on CUDA alone."""
    if dtype != "fp16" or not enabled or device_exists(device) is not None:
        return None
    resolved = resolve_device(device)
    if resolved.type == "cuda":
        return None
    return f"needs CUDA, and MODEL.DEVICE {device!r} is {resolved} here; use 'bf16'"
