"""Keys that configs may set although they are not in the table.

These are keys of the published YAML files of CLOUDS, Mask2Former and FC-CLIP, and of earlier
versions of this project. Most published keys are in the table, with the same meaning. The others
are listed here, so that the files load unchanged: keys with another name, keys of which one value
is what the code does, and keys without effect. Names in neither table are errors.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from clouds.config.check import describe
from clouds.config.key import Key
from clouds.config.values import Setting, coerce

logger = logging.getLogger(__name__)


class KeyStatus(Enum):
    """How a key outside of the table is treated."""

    RENAMED = "it has another name in the table"
    FIXED = "some values are what the code does; others are errors"
    NO_EFFECT = "every value is accepted and has no effect"


@dataclass(frozen=True)
class CompatKey:
    """A key outside of the table that configs may set.

    Attributes:
        name: its dotted name.
        status: how it is treated.
        note: RENAMED: the name in the table. FIXED: what to do instead of setting another value.
            NO_EFFECT: why.
        allowed: accepted values; empty: all.
        translated: RENAMED: the value under the new name for each of `allowed`; empty: the same.
    """

    name: str
    status: KeyStatus
    note: str = ""
    allowed: tuple[Any, ...] = ()
    translated: tuple[Any, ...] = ()


def _many(section: str, names: str, status: KeyStatus, note: str = "") -> Iterable[CompatKey]:
    """Keys of one section with the same status and note."""
    return (CompatKey(f"{section}.{name}", status, note) for name in names.split())


def _fixed(name: str, value: Any, note: str) -> CompatKey:
    """A key of which one value is what the code does."""
    return CompatKey(name, KeyStatus.FIXED, note, (value,))


_NO_RESNET = "the backbone is CLIP, not Detectron2's ResNet"
_NO_SWIN = "the backbone is CLIP, not Swin"
_OWN_SCALING = (
    "published training ignores them, scales by 0.5 to 2 and crops 768x768; use "
    "INPUT.SCALE_RANGE and INPUT.CROP.SIZE instead"
)
_NEVER_READ = "published code never reads it"
_SEMANTIC = "they filter instance and panoptic output, which CLOUDS does not have"
_WEIGHTS_AND_BIASES = "metrics go to metrics.json and TensorBoard, not to Weights & Biases"
_OTHER_DECODERS = "only decoders that CLOUDS does not have read it"
_SEMANTIC_ONLY = "CLOUDS does semantic segmentation only; leave it out"

_KEYS: tuple[CompatKey, ...] = (
    # FC-CLIP, which CLOUDS started from
    *(
        CompatKey(f"MODEL.FC_CLIP.{name}", KeyStatus.RENAMED, f"MODEL.CLOUDS.{name}")
        for name in (
            "CLIP_MODEL_NAME",
            "CLIP_PRETRAINED_WEIGHTS",
            "GEOMETRIC_ENSEMBLE_ALPHA",
            "GEOMETRIC_ENSEMBLE_BETA",
            "ENSEMBLE_ON_VALID_MASK",
        )
    ),
    # input
    _fixed("INPUT.FORMAT", "RGB", "images are always read as RGB"),
    _fixed(
        "INPUT.RESIZE.ENABLED",
        True,
        "for images of their own size set INPUT.SCALE_RANGE '(1, 1)', INPUT.INITIAL_HEIGHT 0 and "
        "INPUT.INITIAL_WIDTH 0 instead",
    ),
    _fixed("INPUT.CROP.ENABLED", True, "training always crops; set INPUT.CROP.SIZE instead"),
    _fixed("INPUT.SIZE_DIVISIBILITY", -1, "crops have INPUT.CROP.SIZE and are not padded further"),
    *_many("INPUT", "IMAGE_SIZE MIN_SCALE MAX_SCALE", KeyStatus.NO_EFFECT, _OWN_SCALING),
    CompatKey(
        "INPUT.DATASET_MAPPER_NAME",
        KeyStatus.NO_EFFECT,
        "training has one mapper",
    ),
    CompatKey(
        "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA",
        KeyStatus.NO_EFFECT,
        "published training does not repeat a crop",
    ),
    *_many("INPUT", "RESIZE_HEIGHT RESIZE_WIDTH PL_THRESHOLD", KeyStatus.NO_EFFECT, _NEVER_READ),
    CompatKey("INPUT.RESIZE.SIZE_TRAIN", KeyStatus.NO_EFFECT, _NEVER_READ),
    # backbone and head
    CompatKey("MODEL.FLASH", KeyStatus.NO_EFFECT, _NEVER_READ),
    _fixed("MODEL.SAVE_PSEUDO_LABELS", False, "evaluation writes scores and images, no labels"),
    CompatKey(
        "MODEL.BACKBONE.FREEZE_AT",
        KeyStatus.NO_EFFECT,
        "all of CLIP is frozen; MODEL.BACKBONE.FREEZE False trains it",
    ),
    *_many(
        "MODEL.RESNETS",
        "DEPTH OUT_FEATURES RES5_MULTI_GRID STEM_OUT_CHANNELS STEM_TYPE STRIDE_IN_1X1",
        KeyStatus.NO_EFFECT,
        _NO_RESNET,
    ),
    *_many(
        "MODEL.SWIN",
        "PRETRAIN_IMG_SIZE PATCH_SIZE EMBED_DIM DEPTHS NUM_HEADS WINDOW_SIZE MLP_RATIO QKV_BIAS "
        "QK_SCALE DROP_RATE ATTN_DROP_RATE DROP_PATH_RATE APE PATCH_NORM OUT_FEATURES "
        "USE_CHECKPOINT",
        KeyStatus.NO_EFFECT,
        _NO_SWIN,
    ),
    *(
        CompatKey(name, KeyStatus.NO_EFFECT, "the width is that of the CLIP model")
        for name in ("MODEL.CLOUDS.EMBED_DIM", "MODEL.FC_CLIP.EMBED_DIM")
    ),
    CompatKey(
        "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT",
        KeyStatus.NO_EFFECT,
        "the weights of losses are MODEL.MASK_FORMER.CLASS_WEIGHT, MASK_WEIGHT and DICE_WEIGHT",
    ),
    _fixed("MODEL.SEM_SEG_HEAD.NORM", "GN", "the pixel decoder has group norms; leave it out"),
    _fixed("MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 4, "masks have stride 4; leave it out"),
    *_many(
        "MODEL.SEM_SEG_HEAD",
        "DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS",
        KeyStatus.NO_EFFECT,
        "deformable attention has 4 points and MODEL.MASK_FORMER.NHEADS heads, as in published "
        "code",
    ),
    CompatKey("MODEL.MASK_FORMER.ENC_LAYERS", KeyStatus.NO_EFFECT, _OTHER_DECODERS),
    _fixed("MODEL.MASK_FORMER.PRE_NORM", False, "the mask decoder normalizes after each block"),
    _fixed(
        "MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ",
        False,
        "the mask decoder projects features if their number of channels differs from its own",
    ),
    _fixed(
        "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE",
        "multi_scale_pixel_decoder",
        "the mask decoder reads all scales of the pixel decoder",
    ),
    _fixed("MODEL.MASK_FORMER.TEST.SEMANTIC_ON", True, _SEMANTIC_ONLY),
    _fixed("MODEL.MASK_FORMER.TEST.INSTANCE_ON", False, _SEMANTIC_ONLY),
    _fixed("MODEL.MASK_FORMER.TEST.PANOPTIC_ON", False, _SEMANTIC_ONLY),
    _fixed(
        "MODEL.MASK_FORMER.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE",
        False,
        "scores are resized instead of masks; leave it out",
    ),
    *_many(
        "MODEL.MASK_FORMER.TEST",
        "OBJECT_MASK_THRESHOLD OVERLAP_THRESHOLD",
        KeyStatus.NO_EFFECT,
        _SEMANTIC,
    ),
    # loader and logging
    _fixed(
        "DATALOADER.ASPECT_RATIO_GROUPING",
        False,
        "batches are not grouped by aspect ratio; leave it out",
    ),
    CompatKey(
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS",
        KeyStatus.NO_EFFECT,
        "it filters by boxes, which label maps do not have",
    ),
    *_many("WANDB", "PROJECT NAME", KeyStatus.NO_EFFECT, _WEIGHTS_AND_BIASES),
    # joint training
    CompatKey(
        "MODEL.CLOUDS.SAM.MOBILE",
        KeyStatus.RENAMED,
        "MODEL.CLOUDS.SAM.MODEL",
        allowed=(True, False),
        translated=("mobile", "vit_h"),
    ),
    CompatKey(
        "MODEL.CLOUDS.SAM.MINIBATCH",
        KeyStatus.NO_EFFECT,
        "there is a teacher if DATASETS.TRAIN names a generated dataset",
    ),
    CompatKey(
        "MODEL.CLOUDS.OVERWRITING",
        KeyStatus.NO_EFFECT,
        "it controls images that published training writes; use TEST.PICTURES instead",
    ),
    # earlier versions of this project
    CompatKey(
        "MODEL.CLOUDS.SUPERPIXEL.RULER", KeyStatus.RENAMED, "MODEL.CLOUDS.SUPERPIXEL.COMPACTNESS"
    ),
    CompatKey(
        "MODEL.CLOUDS.PSEUDO_LABEL.VOID_WEIGHT",
        KeyStatus.RENAMED,
        "MODEL.CLOUDS.PSEUDO_LABEL.NO_OBJECT_WEIGHT",
    ),
    _fixed(
        "MODEL.SEM_SEG_HEAD.IGNORE_VALUE",
        255,
        "unlabelled pixels have the label 255 in every dataset; leave it out",
    ),
    _fixed(
        "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME",
        "MSDeformAttnPixelDecoder",
        "CLOUDS has this pixel decoder only; leave it out",
    ),
    _fixed(
        "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_POINTS",
        4,
        "deformable attention has 4 points per head and level; leave it out",
    ),
    CompatKey(
        "MODEL.CLOUDS.SAM.COMPONENTS_AT_ONCE",
        KeyStatus.NO_EFFECT,
        "SAM's decoder processes up to 64 components at once",
    ),
    CompatKey(
        "MODEL.CLOUDS.SAM.CACHE_GIB",
        KeyStatus.NO_EFFECT,
        "MODEL.CLOUDS.SAM.CACHE_DIR has no size limit; delete it to free the space",
    ),
    CompatKey(
        "MODEL.CLOUDS.TEXT_CACHE_DIR",
        KeyStatus.NO_EFFECT,
        "text features are computed at every start",
    ),
)

COMPAT_KEYS: dict[str, CompatKey] = {key.name: key for key in _KEYS}
"""By name; no name is in `clouds.config.KEYS`."""

COMPAT_SECTIONS = {
    ".".join(parts[:n])
    for parts in (name.split(".") for name in COMPAT_KEYS)
    for n in range(1, len(parts))
}

_BASE_HINT = (
    "CLOUDS does not have that network; the published files of CLOUDS are based on "
    "segmentation/clouds_config.yaml: name that as _BASE_, or set {ours!r}"
)

OTHER_NETWORKS: dict[tuple[str, str], str] = {
    ("MODEL.META_ARCHITECTURE", "MaskFormer"): "CLOUDS",
    ("MODEL.META_ARCHITECTURE", "FCCLIP"): "CLOUDS",
    ("MODEL.BACKBONE.NAME", "build_resnet_backbone"): "CLIP",
    ("MODEL.BACKBONE.NAME", "D2SwinTransformer"): "CLIP",
    ("MODEL.SEM_SEG_HEAD.NAME", "MaskFormerHead"): "CLOUDSHead",
    ("MODEL.SEM_SEG_HEAD.NAME", "FCCLIPHead"): "CLOUDSHead",
}
"""Published values of keys of the table that name parts CLOUDS does not have, and its own part."""


def translate(settings: Sequence[Setting]) -> tuple[list[Setting], list[str]]:
    """Replace settings of keys outside of the table, and log one warning for those without effect.

    Args:
        settings: in the order in which they are applied.

    Returns:
        The settings of other keys, and messages about invalid values, one line each. A value that
        a later setting replaces is not checked: published files set parts of other networks in
        their bases and replace them later.
    """
    ours: list[Setting] = []
    last: dict[str, Setting] = {}
    for setting in settings:
        key = COMPAT_KEYS.get(setting.name)
        if key is not None and key.status is KeyStatus.RENAMED and not _problems(setting):
            setting = _renamed(key, setting)
        last[setting.name] = setting
        if setting.name not in COMPAT_KEYS:
            ours.append(setting)
    messages = [line for setting in last.values() for line in _problems(setting)]
    _warn([setting for setting in last.values() if setting.name in COMPAT_KEYS])
    return ours, messages


def _renamed(key: CompatKey, setting: Setting) -> Setting:
    if not key.translated:
        return replace(setting, name=key.note)
    value = dict(zip(key.allowed, key.translated, strict=True))[_value(key, setting)]
    return replace(setting, name=key.note, value=value)


def _problems(setting: Setting) -> list[str]:
    """Messages about the value of a key outside of the table, or of another network's part."""
    origins = {setting.name: setting.origin}
    key = COMPAT_KEYS.get(setting.name)
    if key is None:
        part = OTHER_NETWORKS.get((setting.name, str(setting.value)))
        message = "" if part is None else _BASE_HINT.format(ours=part)
    elif key.allowed and _value(key, setting) not in key.allowed:
        hint = f"its name is now {key.note}" if key.status is KeyStatus.RENAMED else key.note
        message = f"allowed is {' or '.join(map(repr, key.allowed))}; {hint}"
    else:
        message = ""
    return [describe(setting.name, setting.value, message, origins)] if message else []


def _value(key: CompatKey, setting: Setting) -> Any:
    """The value in the type of the allowed ones; None if it cannot be converted."""
    if not key.allowed:
        return None
    try:
        return coerce(Key(key.name, key.allowed[0], ""), setting.value)
    except ValueError:
        return None


def _warn(settings: Sequence[Setting]) -> None:
    """Log the keys without effect, with reasons."""
    reasons: dict[str, list[str]] = {}
    for setting in settings:
        key = COMPAT_KEYS[setting.name]
        if key.status is KeyStatus.NO_EFFECT:
            reasons.setdefault(key.note, []).append(key.name)
    if reasons:
        lines = ["These keys have no effect:"]
        lines += [f"  {', '.join(names)}: {why}" for why, names in reasons.items()]
        logger.warning("%s", "\n".join(lines))
