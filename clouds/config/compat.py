"""Keys that configs may set although they are not in the table.

These are keys of the published YAML files of CLOUDS, Mask2Former and FC-CLIP, and of earlier
versions of this project. Most published keys are in the table, with the same meaning. The others
are listed here, so that the files load unchanged. Names in neither table are errors.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from clouds.config.check import describe
from clouds.config.key import Key, sections
from clouds.config.values import Setting, coerce

logger = logging.getLogger(__name__)

RENAMED: dict[str, str] = {
    **{
        f"MODEL.FC_CLIP.{name}": f"MODEL.CLOUDS.{name}"
        for name in (
            "CLIP_MODEL_NAME",
            "CLIP_PRETRAINED_WEIGHTS",
            "GEOMETRIC_ENSEMBLE_ALPHA",
            "GEOMETRIC_ENSEMBLE_BETA",
            "ENSEMBLE_ON_VALID_MASK",
        )
    },
    "MODEL.CLOUDS.SAM.MOBILE": "MODEL.CLOUDS.SAM.MODEL",
    "MODEL.CLOUDS.SUPERPIXEL.RULER": "MODEL.CLOUDS.SUPERPIXEL.COMPACTNESS",
    "MODEL.CLOUDS.PSEUDO_LABEL.VOID_WEIGHT": "MODEL.CLOUDS.PSEUDO_LABEL.NO_OBJECT_WEIGHT",
    "TEST.PICTURES": "TEST.VISUALIZED_IMAGES",
}
"""Keys with another name in the table, and that name."""

TRANSLATED: dict[str, dict[Any, Any]] = {
    "MODEL.CLOUDS.SAM.MOBILE": {True: "mobile", False: "vit_h"},
}
"""Renamed keys with other values: each allowed value, and that of the key in the table."""

_SEMANTIC_ONLY = "CLOUDS does semantic segmentation only; leave it out"

FIXED: dict[str, tuple[Any, str]] = {
    "INPUT.FORMAT": ("RGB", "images are always read as RGB"),
    "INPUT.RESIZE.ENABLED": (
        True,
        "for images of their own size set INPUT.SCALE_RANGE '(1, 1)', INPUT.INITIAL_HEIGHT 0 and "
        "INPUT.INITIAL_WIDTH 0 instead",
    ),
    "INPUT.CROP.ENABLED": (True, "training always crops; set INPUT.CROP.SIZE instead"),
    "INPUT.SIZE_DIVISIBILITY": (-1, "crops have INPUT.CROP.SIZE and are not padded further"),
    "MODEL.SAVE_PSEUDO_LABELS": (False, "evaluation writes scores and images, no labels"),
    "MODEL.SEM_SEG_HEAD.NORM": ("GN", "the pixel decoder has group norms; leave it out"),
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": (4, "masks have stride 4; leave it out"),
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": (
        255,
        "unlabelled pixels have the label 255 in every dataset; leave it out",
    ),
    "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": (
        "MSDeformAttnPixelDecoder",
        "CLOUDS has this pixel decoder only; leave it out",
    ),
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_POINTS": (
        4,
        "deformable attention has 4 points per head and level; leave it out",
    ),
    "MODEL.MASK_FORMER.PRE_NORM": (False, "the mask decoder normalizes after each block"),
    "MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ": (
        False,
        "the mask decoder projects features if their number of channels differs from its own",
    ),
    "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": (
        "multi_scale_pixel_decoder",
        "the mask decoder reads all scales of the pixel decoder",
    ),
    "MODEL.MASK_FORMER.TEST.SEMANTIC_ON": (True, _SEMANTIC_ONLY),
    "MODEL.MASK_FORMER.TEST.INSTANCE_ON": (False, _SEMANTIC_ONLY),
    "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": (False, _SEMANTIC_ONLY),
    "MODEL.MASK_FORMER.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE": (
        False,
        "scores are resized instead of masks; leave it out",
    ),
    "DATALOADER.ASPECT_RATIO_GROUPING": (
        False,
        "batches are not grouped by aspect ratio; leave it out",
    ),
}
"""Keys of which one value is what the code does: that value, and what to do instead of another."""

_KEYS_BY_REASON: dict[str, str] = {
    "published training ignores them, scales by 0.5 to 2 and crops 768x768; use "
    "INPUT.SCALE_RANGE and INPUT.CROP.SIZE instead": (
        "INPUT.IMAGE_SIZE INPUT.MIN_SCALE INPUT.MAX_SCALE"
    ),
    "training has one mapper": "INPUT.DATASET_MAPPER_NAME",
    "published training does not repeat a crop": "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA",
    "published code never reads it": (
        "INPUT.RESIZE_HEIGHT INPUT.RESIZE_WIDTH INPUT.PL_THRESHOLD INPUT.RESIZE.SIZE_TRAIN "
        "MODEL.FLASH"
    ),
    "all of CLIP is frozen; MODEL.BACKBONE.FREEZE False trains it": "MODEL.BACKBONE.FREEZE_AT",
    "the backbone is CLIP, not Detectron2's ResNet": (
        "MODEL.RESNETS.DEPTH MODEL.RESNETS.OUT_FEATURES MODEL.RESNETS.RES5_MULTI_GRID "
        "MODEL.RESNETS.STEM_OUT_CHANNELS MODEL.RESNETS.STEM_TYPE MODEL.RESNETS.STRIDE_IN_1X1"
    ),
    "the backbone is CLIP, not Swin": (
        "MODEL.SWIN.PRETRAIN_IMG_SIZE MODEL.SWIN.PATCH_SIZE MODEL.SWIN.EMBED_DIM MODEL.SWIN.DEPTHS "
        "MODEL.SWIN.NUM_HEADS MODEL.SWIN.WINDOW_SIZE MODEL.SWIN.MLP_RATIO MODEL.SWIN.QKV_BIAS "
        "MODEL.SWIN.QK_SCALE MODEL.SWIN.DROP_RATE MODEL.SWIN.ATTN_DROP_RATE "
        "MODEL.SWIN.DROP_PATH_RATE MODEL.SWIN.APE MODEL.SWIN.PATCH_NORM MODEL.SWIN.OUT_FEATURES "
        "MODEL.SWIN.USE_CHECKPOINT"
    ),
    "the width is that of the CLIP model": "MODEL.CLOUDS.EMBED_DIM MODEL.FC_CLIP.EMBED_DIM",
    "the weights of losses are MODEL.MASK_FORMER.CLASS_WEIGHT, MASK_WEIGHT and DICE_WEIGHT": (
        "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT"
    ),
    "deformable attention has 4 points and MODEL.MASK_FORMER.NHEADS heads, as in published code": (
        "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS "
        "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS"
    ),
    "only decoders that CLOUDS does not have read it": "MODEL.MASK_FORMER.ENC_LAYERS",
    "they filter instance and panoptic output, which CLOUDS does not have": (
        "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD"
    ),
    "it filters by boxes, which label maps do not have": "DATALOADER.FILTER_EMPTY_ANNOTATIONS",
    "LOGGER wandb reads the project from WANDB_PROJECT, and the name is that of OUTPUT_DIR": (
        "WANDB.PROJECT WANDB.NAME"
    ),
    "there is a teacher if DATASETS.TRAIN names a generated dataset": (
        "MODEL.CLOUDS.SAM.MINIBATCH"
    ),
    "it controls images that published training writes; use TEST.VISUALIZED_IMAGES instead": (
        "MODEL.CLOUDS.OVERWRITING"
    ),
    "SAM's decoder processes up to 64 components at once": "MODEL.CLOUDS.SAM.COMPONENTS_AT_ONCE",
    "MODEL.CLOUDS.SAM.CACHE_DIR has no size limit; delete it to free the space": (
        "MODEL.CLOUDS.SAM.CACHE_GIB"
    ),
    "text features are computed at every start": "MODEL.CLOUDS.TEXT_CACHE_DIR",
}

NO_EFFECT: dict[str, str] = {
    name: reason for reason, names in _KEYS_BY_REASON.items() for name in names.split()
}
"""Keys of which every value is accepted and has no effect, and the reason."""

COMPAT_KEYS = RENAMED.keys() | FIXED.keys() | NO_EFFECT.keys()
"""All names above; none is in `clouds.config.KEYS`."""

COMPAT_SECTIONS = sections(COMPAT_KEYS)

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
        if setting.name in RENAMED and not _problems(setting):
            setting = _renamed(setting)
        last[setting.name] = setting
        if setting.name not in COMPAT_KEYS:
            ours.append(setting)
    messages = [line for setting in last.values() for line in _problems(setting)]
    _warn(name for name in last if name in NO_EFFECT)
    return ours, messages


def _renamed(setting: Setting) -> Setting:
    value, values = setting.value, TRANSLATED.get(setting.name)
    if values is not None:
        value = values[_coerced(setting, list(values))]
    return replace(setting, name=RENAMED[setting.name], value=value)


def _problems(setting: Setting) -> list[str]:
    """Messages about the value of a key outside of the table, or of another network's part."""
    name, allowed, hint = setting.name, list[Any](), ""
    if name in FIXED:
        allowed, hint = [FIXED[name][0]], FIXED[name][1]
    elif name in TRANSLATED:
        allowed, hint = list(TRANSLATED[name]), f"its name is now {RENAMED[name]}"
    if allowed and _coerced(setting, allowed) not in allowed:
        message = f"allowed is {' or '.join(map(repr, allowed))}; {hint}"
    elif part := OTHER_NETWORKS.get((name, str(setting.value))):
        message = _BASE_HINT.format(ours=part)
    else:
        return []
    return [describe(name, setting.value, message, {name: setting.origin})]


def _coerced(setting: Setting, allowed: Sequence[Any]) -> Any:
    """The value in the type of the allowed ones; None if it cannot be converted."""
    try:
        return coerce(Key(setting.name, allowed[0], ""), setting.value)
    except ValueError:
        return None


def _warn(names: Iterable[str]) -> None:
    """Log the keys without effect, with reasons."""
    reasons: dict[str, list[str]] = {}
    for name in names:
        reasons.setdefault(NO_EFFECT[name], []).append(name)
    if reasons:
        lines = ["These keys have no effect:"]
        lines += [f"  {', '.join(names)}: {why}" for why, names in reasons.items()]
        logger.warning("%s", "\n".join(lines))
