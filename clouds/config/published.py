"""Key names of published YAML files: of CLOUDS itself, of Mask2Former and of FC-CLIP.

Most published keys are keys here too, with the same meaning; `clouds.config.defaults` has them.
The table below holds the others, so that a published file loads as it is: a key that has another
name here, a key of which one value is what the code here does, and a key that changes nothing.
Names that stand in neither table are errors.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from clouds.config.check import describe
from clouds.config.defaults import Key
from clouds.config.setting import Setting
from clouds.config.values import coerce

logger = logging.getLogger(__name__)


class Fate(Enum):
    """What becomes of a published key."""

    RENAMED = "it has another name"
    KEPT = "some of its values are what the code here does; others are errors"
    NO_EFFECT = "it changes nothing"


@dataclass(frozen=True)
class PublishedKey:
    """A key that published files set and that is none of ours.

    Attributes:
        name: its dotted name there.
        fate: what becomes of it here.
        note: RENAMED: the name here. KEPT: what to do about other values. NO_EFFECT: why.
        allowed: values that are accepted; empty: all.
        here: RENAMED: what each allowed value is under the name here; empty: the same.
    """

    name: str
    fate: Fate
    note: str = ""
    allowed: tuple[Any, ...] = ()
    here: tuple[Any, ...] = ()


def _many(section: str, names: str, fate: Fate, note: str = "") -> Iterable[PublishedKey]:
    """Keys of one section that share fate and note."""
    return (PublishedKey(f"{section}.{name}", fate, note) for name in names.split())


def _kept(name: str, value: Any, note: str) -> PublishedKey:
    """A key of which one value describes what the code here does."""
    return PublishedKey(name, Fate.KEPT, note, (value,))


_NO_RESNET = "the backbone is CLIP, not Detectron2's ResNet"
_NO_SWIN = "the backbone is CLIP, not Swin"
_OWN_SCALING = (
    "published training scales by 0.5 to 2 and crops 768x768 whatever they say; here "
    "INPUT.SCALE_RANGE and INPUT.CROP.SIZE set that"
)
_NEVER_READ = "published code never reads it"
_SEMANTIC = "they filter instance and panoptic output, and there is none"
_WEIGHTS_AND_BIASES = "metrics go to metrics.json and TensorBoard, not to Weights & Biases"
_OTHER_DECODERS = "decoders that are not here read it"
_SEMANTIC_ONLY = "CLOUDS does semantic segmentation alone; leave it out"

_TABLE: tuple[PublishedKey, ...] = (
    # FC-CLIP, which CLOUDS started from
    *(
        PublishedKey(f"MODEL.FC_CLIP.{name}", Fate.RENAMED, f"MODEL.CLOUDS.{name}")
        for name in (
            "CLIP_MODEL_NAME",
            "CLIP_PRETRAINED_WEIGHTS",
            "GEOMETRIC_ENSEMBLE_ALPHA",
            "GEOMETRIC_ENSEMBLE_BETA",
            "ENSEMBLE_ON_VALID_MASK",
        )
    ),
    PublishedKey(
        "MODEL.CLOUDS.TEXT_CACHE_DIR",
        Fate.NO_EFFECT,
        "text features are computed once a run and are not kept on disk",
    ),
    # input
    _kept("INPUT.FORMAT", "RGB", "images are read as RGB, always"),
    _kept(
        "INPUT.RESIZE.ENABLED",
        True,
        "for images of their own size set INPUT.SCALE_RANGE '(1, 1)', INPUT.INITIAL_HEIGHT 0 and "
        "INPUT.INITIAL_WIDTH 0 instead",
    ),
    _kept("INPUT.CROP.ENABLED", True, "training always crops; set INPUT.CROP.SIZE instead"),
    _kept(
        "INPUT.SIZE_DIVISIBILITY", -1, "crops have INPUT.CROP.SIZE; nothing more is padded to them"
    ),
    *_many("INPUT", "IMAGE_SIZE MIN_SCALE MAX_SCALE", Fate.NO_EFFECT, _OWN_SCALING),
    PublishedKey(
        "INPUT.DATASET_MAPPER_NAME",
        Fate.NO_EFFECT,
        "published training has one mapper, and so here",
    ),
    PublishedKey(
        "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA",
        Fate.NO_EFFECT,
        "published training takes each crop at its first try",
    ),
    *_many("INPUT", "RESIZE_HEIGHT RESIZE_WIDTH PL_THRESHOLD", Fate.NO_EFFECT, _NEVER_READ),
    PublishedKey("INPUT.RESIZE.SIZE_TRAIN", Fate.NO_EFFECT, _NEVER_READ),
    # backbone and head
    PublishedKey("MODEL.FLASH", Fate.NO_EFFECT, _NEVER_READ),
    _kept("MODEL.SAVE_PSEUDO_LABELS", False, "evaluation writes scores and pictures, no labels"),
    PublishedKey(
        "MODEL.BACKBONE.FREEZE_AT",
        Fate.NO_EFFECT,
        "CLIP is frozen whole; MODEL.BACKBONE.FREEZE False trains it",
    ),
    *_many(
        "MODEL.RESNETS",
        "DEPTH OUT_FEATURES RES5_MULTI_GRID STEM_OUT_CHANNELS STEM_TYPE STRIDE_IN_1X1",
        Fate.NO_EFFECT,
        _NO_RESNET,
    ),
    *_many(
        "MODEL.SWIN",
        "PRETRAIN_IMG_SIZE PATCH_SIZE EMBED_DIM DEPTHS NUM_HEADS WINDOW_SIZE MLP_RATIO QKV_BIAS "
        "QK_SCALE DROP_RATE ATTN_DROP_RATE DROP_PATH_RATE APE PATCH_NORM OUT_FEATURES "
        "USE_CHECKPOINT",
        Fate.NO_EFFECT,
        _NO_SWIN,
    ),
    *(
        PublishedKey(name, Fate.NO_EFFECT, "the width is read from the CLIP model itself")
        for name in ("MODEL.CLOUDS.EMBED_DIM", "MODEL.FC_CLIP.EMBED_DIM")
    ),
    PublishedKey(
        "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT",
        Fate.NO_EFFECT,
        "losses are weighed by MODEL.MASK_FORMER's CLASS_, MASK_ and DICE_WEIGHT",
    ),
    _kept("MODEL.SEM_SEG_HEAD.NORM", "GN", "the pixel decoder has group norms; leave it out"),
    _kept("MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 4, "masks have stride 4; leave it out"),
    *_many(
        "MODEL.SEM_SEG_HEAD",
        "DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS",
        Fate.NO_EFFECT,
        "published code has 4 points and MODEL.MASK_FORMER.NHEADS heads whatever they say; here "
        "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_POINTS sets the points",
    ),
    PublishedKey("MODEL.MASK_FORMER.ENC_LAYERS", Fate.NO_EFFECT, _OTHER_DECODERS),
    _kept("MODEL.MASK_FORMER.PRE_NORM", False, "the mask decoder norms after each block"),
    _kept(
        "MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ",
        False,
        "the mask decoder projects features where their channels differ from its own",
    ),
    _kept(
        "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE",
        "multi_scale_pixel_decoder",
        "the mask decoder reads all scales of the pixel decoder",
    ),
    _kept("MODEL.MASK_FORMER.TEST.SEMANTIC_ON", True, _SEMANTIC_ONLY),
    _kept("MODEL.MASK_FORMER.TEST.INSTANCE_ON", False, _SEMANTIC_ONLY),
    _kept("MODEL.MASK_FORMER.TEST.PANOPTIC_ON", False, _SEMANTIC_ONLY),
    _kept(
        "MODEL.MASK_FORMER.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE",
        False,
        "scores are resized, not masks; leave it out",
    ),
    *_many(
        "MODEL.MASK_FORMER.TEST",
        "OBJECT_MASK_THRESHOLD OVERLAP_THRESHOLD",
        Fate.NO_EFFECT,
        _SEMANTIC,
    ),
    # loader and logging
    _kept("DATALOADER.ASPECT_RATIO_GROUPING", False, "batches mix all images; leave it out"),
    PublishedKey(
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS",
        Fate.NO_EFFECT,
        "it is about boxes, and label maps have none",
    ),
    *_many("WANDB", "PROJECT NAME", Fate.NO_EFFECT, _WEIGHTS_AND_BIASES),
    # joint training
    PublishedKey(
        "MODEL.CLOUDS.SAM.MOBILE",
        Fate.RENAMED,
        "MODEL.CLOUDS.SAM.MODEL",
        allowed=(True, False),
        here=("mobile", "vit_h"),
    ),
    PublishedKey(
        "MODEL.CLOUDS.SAM.MINIBATCH",
        Fate.NO_EFFECT,
        "there is a teacher wherever DATASETS.TRAIN names a generated dataset",
    ),
    PublishedKey(
        "MODEL.CLOUDS.OVERWRITING",
        Fate.NO_EFFECT,
        "it is about pictures that published training writes, and here TEST.PICTURES sets those",
    ),
)

PUBLISHED: dict[str, PublishedKey] = {key.name: key for key in _TABLE}
"""By name; no name is one of `clouds.config.KEYS`."""

PUBLISHED_SECTIONS = {
    ".".join(parts[:n])
    for parts in (name.split(".") for name in PUBLISHED)
    for n in range(1, len(parts))
}

_BASE_HINT = (
    "that is a network which CLOUDS does not have: the published files build theirs over "
    "segmentation/clouds_config.yaml; name that as _BASE_, or write {ours!r}"
)

OTHER_NETWORKS: dict[tuple[str, str], str] = {
    ("MODEL.META_ARCHITECTURE", "MaskFormer"): "CLOUDS",
    ("MODEL.META_ARCHITECTURE", "FCCLIP"): "CLOUDS",
    ("MODEL.BACKBONE.NAME", "build_resnet_backbone"): "CLIP",
    ("MODEL.BACKBONE.NAME", "D2SwinTransformer"): "CLIP",
    ("MODEL.SEM_SEG_HEAD.NAME", "MaskFormerHead"): "CLOUDSHead",
    ("MODEL.SEM_SEG_HEAD.NAME", "FCCLIPHead"): "CLOUDSHead",
}
"""Published values of our keys that name parts we do not have, and the part that we have."""


def translate(settings: Sequence[Setting]) -> tuple[list[Setting], list[str]]:
    """Turn published keys into ours, and warn, once, about those that change nothing.

    Args:
        settings: in the order in which they are written, a later one over an earlier one.

    Returns:
        The settings without published names, and what is wrong, one line each. A value that a
        later setting replaces is not looked at: published files set parts of other networks in
        their bases and replace them further up.
    """
    ours: list[Setting] = []
    last: dict[str, Setting] = {}
    for setting in settings:
        key = PUBLISHED.get(setting.name)
        if key is not None and key.fate is Fate.RENAMED and not _problems(setting):
            value = dict(zip(key.allowed, key.here, strict=True)).get(_value(key, setting))
            setting = replace(setting, name=key.note, value=value if key.here else setting.value)
        last[setting.name] = setting
        if setting.name not in PUBLISHED:
            ours.append(setting)
    found = [line for setting in last.values() for line in _problems(setting)]
    _warn([setting for setting in last.values() if setting.name in PUBLISHED])
    return ours, found


def _problems(setting: Setting) -> list[str]:
    """What is wrong with the value of a published key, or with a published value of ours."""
    origins = {setting.name: setting.origin}
    key = PUBLISHED.get(setting.name)
    if key is None:
        part = OTHER_NETWORKS.get((setting.name, str(setting.value)))
        message = "" if part is None else _BASE_HINT.format(ours=part)
    elif key.allowed and _value(key, setting) not in key.allowed:
        hint = f"its name here is {key.note}" if key.fate is Fate.RENAMED else key.note
        message = f"allowed is {' or '.join(map(repr, key.allowed))}; {hint}"
    else:
        message = ""
    return [describe(setting.name, setting.value, message, origins)] if message else []


def _value(key: PublishedKey, setting: Setting) -> Any:
    """The value in the type of the allowed ones, or None if it cannot be had."""
    if not key.allowed:
        return None
    try:
        return coerce(Key(key.name, key.allowed[0], ""), setting.value)
    except ValueError:
        return None


def _warn(settings: Sequence[Setting]) -> None:
    """Say which published keys change nothing."""
    reasons: dict[str, list[str]] = {}
    for setting in settings:
        key = PUBLISHED[setting.name]
        if key.fate is Fate.NO_EFFECT:
            reasons.setdefault(key.note, []).append(key.name)
    if reasons:
        lines = ["These keys of published files change nothing:"]
        lines += [f"  {', '.join(names)}: {why}" for why, names in reasons.items()]
        logger.warning("%s", "\n".join(lines))
