"""Conditions on the keys of the model."""

from __future__ import annotations

from clouds.config.cross_checks import cross_check
from clouds.config.defaults_model import WEIGHTS_KEYS


@cross_check("MODEL.MASK_FORMER.HIDDEN_DIM", "MODEL.MASK_FORMER.NHEADS")
def decoder_channels_are_divisible(channels: int, num_heads: int) -> str | None:
    """Attention heads have equal numbers of channels."""
    if channels % num_heads:
        return f"must be a multiple of MODEL.MASK_FORMER.NHEADS, {num_heads}"
    return None


@cross_check("MODEL.MASK_FORMER.HIDDEN_DIM")
def position_channels_are_divisible(channels: int) -> str | None:
    """Sine position encoding: half the channels per axis, in pairs of sine and cosine."""
    return "must be a multiple of 4, for sine and cosine of both axes" if channels % 4 else None


@cross_check("MODEL.SEM_SEG_HEAD.CONVS_DIM", "MODEL.MASK_FORMER.NHEADS")
def pixel_decoder_channels_are_divisible(channels: int, num_heads: int) -> str | None:
    """The pixel decoder has group norms of 32 groups and NHEADS attention heads."""
    if channels % 32:
        return "must be a multiple of 32, the groups of its group norms"
    if channels % num_heads:
        return f"must be a multiple of MODEL.MASK_FORMER.NHEADS, {num_heads}"
    return None


PYRAMID = ("res2", "res3", "res4", "res5")
"""Features of our backbones, at strides 4, 8, 16, 32."""

BACKBONES = ("CLIP", "CLIPViT", "ViT")
"""Names of backbones with these features; others may have other ones."""


@cross_check("MODEL.SEM_SEG_HEAD.IN_FEATURES", "MODEL.BACKBONE.NAME")
def features_exist(features: list[str], backbone: str) -> str | None:
    """Names are checked for our backbones; others may have other features."""
    if len(set(features)) < len(features):
        return "must not name a feature twice"
    if backbone in BACKBONES and not set(features) <= set(PYRAMID):
        return f"features of the backbone {backbone} are {', '.join(PYRAMID)}"
    return None


@cross_check(
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES",
    "MODEL.SEM_SEG_HEAD.IN_FEATURES",
    "MODEL.BACKBONE.NAME",
)
def deformable_features_are_inputs(
    deformable: list[str], features: list[str], backbone: str
) -> str | None:
    """The encoder reads the coarsest features; the FPN adds all finer ones in order."""
    if len(set(deformable)) < len(deformable):
        return "must not name a feature twice"
    if not set(deformable) <= set(features):
        return f"must be among MODEL.SEM_SEG_HEAD.IN_FEATURES, {features}"
    if backbone not in BACKBONES or not set(features) <= set(PYRAMID):
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
def size_divisibility_is_a_multiple_of_the_stride(divisibility: int) -> str | None:
    """The padded image has an integer number of positions at stride 32."""
    return "must be a multiple of 32, the stride of res5" if divisibility % 32 else None


@cross_check("MODEL.BACKBONE.IMG_SIZE", "MODEL.BACKBONE.PATCH_SIZE")
def image_has_whole_patches(img_size: int, patch_size: int) -> str | None:
    """Positions are those of a grid of patches."""
    if img_size % patch_size:
        return f"must be a multiple of MODEL.BACKBONE.PATCH_SIZE, {patch_size}"
    return None


@cross_check("MODEL.BACKBONE.PYRAMID", "MODEL.BACKBONE.PATCH_SIZE")
def learned_pyramid_has_patches_of_16(pyramid: str, patch_size: int) -> str | None:
    """Its transposed convolutions have fixed factors."""
    if pyramid == "learned" and patch_size != 16:
        return f"needs MODEL.BACKBONE.PATCH_SIZE 16, which is {patch_size}; or use 'plain'"
    return None


FROZEN_ADAPTERS = ("lora", "rein", "soma", "recycle")


@cross_check("MODEL.BACKBONE.ADAPTER.NAME", "MODEL.BACKBONE.FREEZE")
def adapter_has_a_frozen_backbone(adapter: str, freeze: bool) -> str | None:
    """Adapters of our own train instead of the backbone's weights."""
    if adapter in FROZEN_ADAPTERS and not freeze:
        return (
            "adapts a frozen backbone, and MODEL.BACKBONE.FREEZE is False; set it to True, or use "
            "the adapter 'full' or 'none'"
        )
    return None


@cross_check(
    "MODEL.BACKBONE.ADAPTER.REIN.NUM_TOKENS",
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES",
    "MODEL.BACKBONE.ADAPTER.NAME",
    "MODEL.BACKBONE.ADAPTER.REIN.LINK_QUERIES",
)
def tokens_are_queries(tokens: int, queries: int, adapter: str, link: bool) -> str | None:
    """Each of Rein's tokens is an object query."""
    if adapter == "rein" and link and tokens != queries:
        return f"must be MODEL.MASK_FORMER.NUM_OBJECT_QUERIES, {queries}, whose place they take"
    return None


@cross_check(
    "SOLVER.CHECKPOINT_ADAPTERS_ONLY",
    "MODEL.BACKBONE.ADAPTER.NAME",
    "MODEL.BACKBONE.FREEZE",
    "MODEL.BACKBONE.NAME",
    *WEIGHTS_KEYS,
)
def left_out_weights_can_be_loaded(
    adapters_only: bool, adapter: str, freeze: bool, backbone: str, *weights: str
) -> str | None:
    """A backbone that a checkpoint leaves out is frozen, and has weights to load it over."""
    if not adapters_only:
        return None
    if adapter == "full" or not freeze:
        return "leaves the frozen backbone out, and this one trains; set it to False"
    for (key, backbones), value in zip(WEIGHTS_KEYS.items(), weights, strict=True):
        if backbone in backbones and not value:
            return f"leaves the backbone's own weights out, and {key} names none; name them there"
    return None


@cross_check("MODEL.BACKBONE.ACTIVATION_CHECKPOINTING", "MODEL.BACKBONE.NAME")
def blocks_can_be_computed_again(enabled: bool, backbone: str) -> str | None:
    """Vision transformers run their blocks one by one; our other backbones do not."""
    if enabled and backbone == "CLIP":
        return "needs a vision transformer, MODEL.BACKBONE.NAME ViT or CLIPViT"
    return None


@cross_check("SOLVER.PARALLEL", "MODEL.COMPILE")
def sharded_model_is_not_compiled(parallel: str, compiled: str) -> str | None:
    """Compiled graphs of sharded weights are not tested."""
    if parallel == "fsdp" and compiled != "none":
        return f"does not work with MODEL.COMPILE {compiled!r}; set that to 'none', or use 'ddp'"
    return None


FITTED_ADAPTERS = ("soma", "recycle")
"""Adapters that start from decompositions of the backbone's own weights."""


@cross_check("SOLVER.PARALLEL", "MODEL.WEIGHTS_PARTIAL", "MODEL.BACKBONE.ADAPTER.NAME")
def adapter_starts_from_whole_weights(parallel: str, partial: bool, adapter: str) -> str | None:
    """Weights of the backbone that MODEL.WEIGHTS brings are loaded when the model is sharded."""
    if parallel == "fsdp" and partial and adapter in FITTED_ADAPTERS:
        return (
            f"cannot start the adapter {adapter} from weights of MODEL.WEIGHTS_PARTIAL; set that "
            "to False and name the backbone's weights by its own key, or use 'ddp'"
        )
    return None


@cross_check("MODEL.CLOUDS.GENERATED_LABELS", "MODEL.CLOUDS.PSEUDO_LABEL.MAX_CLASS_LOSS")
def given_labels_have_a_filter(labels: str, max_class_loss: float) -> str | None:
    """Without it, 'filtered' labels would be the given ones."""
    if labels == "filtered" and max_class_loss == 0:
        return (
            "is filtered, which needs MODEL.CLOUDS.PSEUDO_LABEL.MAX_CLASS_LOSS above 0 (FreeMask: "
            "1.25); 'given' does not filter"
        )
    return None
