"""Every configuration key: its default, what it means, in what unit, and what it may be.

The table below is the only place where a key is declared. `get_cfg` turns it into a config,
`clouds.config.check` validates values with it, and `tools/list_config.py` prints it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from clouds.d2 import CfgNode


@dataclass(frozen=True)
class Rule:
    """What values are allowed.

    Attributes:
        words: the same as `holds`, in words, after "allowed is"; empty: whatever the type allows.
        holds: whether a value of the right type is allowed.
    """

    words: str
    holds: Callable[[Any], bool]


def one_of(*allowed: object) -> Rule:
    """One of these."""
    return Rule(f"one of {', '.join(map(repr, allowed))}", lambda value: value in allowed)


def at_least(low: float) -> Rule:
    """A number not below `low`."""
    return Rule(f"at least {low}", lambda value: value >= low)


def above(low: float) -> Rule:
    """A number greater than `low`."""
    return Rule(f"greater than {low}", lambda value: value > low)


def within(low: float, high: float) -> Rule:
    """A number from `low` to `high`, both included."""
    return Rule(f"between {low} and {high}", lambda value: low <= value <= high)


three_numbers = Rule("three numbers, red green blue", lambda value: len(value) == 3)
three_positive = Rule(
    "three numbers greater than 0, red green blue",
    lambda value: len(value) == 3 and all(v > 0 for v in value),
)
positive_pair = Rule(
    "two numbers greater than 0", lambda value: len(value) == 2 and all(v > 0 for v in value)
)
not_empty = Rule("not empty", lambda value: len(value) > 0)
anything = Rule("", lambda value: True)


@dataclass(frozen=True)
class Key:
    """One configuration key.

    Attributes:
        name: the dotted name, as in a YAML file or on the command line.
        default: its value when nothing sets it; its type is the type that a value must have.
        doc: meaning, unit and source.
        rule: what values are allowed.
    """

    name: str
    default: Any
    doc: str
    rule: Rule = anything


KEYS: tuple[Key, ...] = (
    Key("VERSION", 2, "Detectron2's config version; it does not change.", one_of(2)),
    Key("SEED", 0, "Seed of initial weights, sampling and augmentation.", at_least(0)),
    Key("OUTPUT_DIR", "./output", "Folder for checkpoints, metrics, pictures and the log."),
    Key("LOG_PERIOD", 20, "Iterations between console lines and metric records.", at_least(1)),
    Key("CUDNN_BENCHMARK", False, "Let cuDNN time its algorithms; faster, not repeatable."),
    # ------------------------------------------------------------------ model
    Key(
        "MODEL.DEVICE",
        "auto",
        "'auto' (CUDA when there is one, else the CPU), 'cpu', 'cuda' or 'cuda:N'.",
    ),
    Key("MODEL.META_ARCHITECTURE", "CLOUDS", "Registered name of the whole model.", not_empty),
    Key("MODEL.WEIGHTS", "", "Checkpoint to start from; empty: none."),
    Key(
        "MODEL.WEIGHTS_PARTIAL",
        False,
        "Accept a checkpoint that lacks some of the model's weights or has other shapes; "
        "what did not match is listed either way.",
    ),
    Key(
        "MODEL.COMPILE",
        "none",
        "Which parts torch.compile makes kernels for, when they are first used: 'backbone', 'head' "
        "(that of the teacher too), 'all' or 'none'. Needs a C++ compiler, on CUDA Triton; every "
        "new size of image costs a minute. Results differ by rounding.",
        one_of("none", "backbone", "head", "all"),
    ),
    Key(
        "MODEL.PIXEL_MEAN",
        [122.7709383, 116.7460125, 104.09373615],
        "Subtracted from the image, RGB, on the 0-255 scale (CLIP's own).",
        three_numbers,
    ),
    Key(
        "MODEL.PIXEL_STD",
        [68.5005327, 66.6321579, 70.32316305],
        "Divides the image after the mean is taken, RGB, on the 0-255 scale (CLIP's own).",
        three_positive,
    ),
    Key("MODEL.BACKBONE.NAME", "CLIP", "Registered name of the backbone.", not_empty),
    Key("MODEL.BACKBONE.FREEZE", True, "Keep the backbone as it is; False trains it too."),
    Key("MODEL.SEM_SEG_HEAD.NAME", "CLOUDSHead", "Registered name of the head.", not_empty),
    Key("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 19, "Classes, the void class not counted.", at_least(1)),
    Key("MODEL.SEM_SEG_HEAD.IGNORE_VALUE", 255, "Label of pixels that do not count.", at_least(0)),
    Key(
        "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME",
        "MSDeformAttnPixelDecoder",
        "Pixel decoder.",
        one_of("MSDeformAttnPixelDecoder"),
    ),
    Key(
        "MODEL.SEM_SEG_HEAD.IN_FEATURES",
        ["res2", "res3", "res4", "res5"],
        "Backbone features the pixel decoder reads, fine to coarse.",
        not_empty,
    ),
    Key(
        "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES",
        ["res3", "res4", "res5"],
        "Those of them that go through deformable attention.",
        not_empty,
    ),
    Key("MODEL.SEM_SEG_HEAD.CONVS_DIM", 256, "Channels of the pixel decoder.", at_least(32)),
    Key("MODEL.SEM_SEG_HEAD.MASK_DIM", 256, "Channels of the mask features.", at_least(1)),
    Key(
        "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS",
        6,
        "Layers of the deformable-attention encoder.",
        at_least(1),
    ),
    Key(
        "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_DIM_FEEDFORWARD",
        1024,
        "Hidden channels of that encoder's feed-forward network.",
        at_least(1),
    ),
    Key(
        "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_POINTS",
        4,
        "Sampling points of a query per head and level.",
        at_least(1),
    ),
    Key(
        "MODEL.SEM_SEG_HEAD.DEFORMABLE_ATTENTION",
        "auto",
        "How deformable attention is computed: 'torch', 'triton' (needs CUDA), or 'auto' (Triton "
        "on CUDA where it works). They differ by rounding; Triton's gradients vary by it from run "
        "to run.",
        one_of("auto", "torch", "triton"),
    ),
    Key(
        "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME",
        "OriginalMultiScaleMaskedTransformerDecoder",
        "Selects the class head: Original… is a linear classifier on the query (published CLOUDS), "
        "MultiScaleMaskedTransformerDecoder compares mask-pooled queries with CLIP's text features "
        "(FC-CLIP), Bis… is a linear classifier on mask-pooled queries. "
        "'linear', 'text' and 'pooled' are short for them.",
        one_of(
            "OriginalMultiScaleMaskedTransformerDecoder",
            "MultiScaleMaskedTransformerDecoder",
            "BisMultiScaleMaskedTransformerDecoder",
            "linear",
            "text",
            "pooled",
        ),
    ),
    Key(
        "MODEL.MASK_FORMER.DEEP_SUPERVISION",
        True,
        "Losses on the predictions of every decoder layer, not of the last alone.",
    ),
    Key("MODEL.MASK_FORMER.NO_OBJECT_WEIGHT", 0.1, "Weight of void in the class loss.", above(0)),
    Key("MODEL.MASK_FORMER.CLASS_WEIGHT", 2.0, "Weight of the class loss.", at_least(0)),
    Key("MODEL.MASK_FORMER.MASK_WEIGHT", 5.0, "Weight of the mask's BCE loss.", at_least(0)),
    Key("MODEL.MASK_FORMER.DICE_WEIGHT", 5.0, "Weight of the mask's dice loss.", at_least(0)),
    Key(
        "MODEL.MASK_FORMER.CLASS_NORMALIZER",
        "batch",
        "What the class loss is a weighted mean over: the whole 'batch' (the same loss on any "
        "number of GPUs), or each 'rank' on its own (published).",
        one_of("batch", "rank"),
    ),
    Key("MODEL.MASK_FORMER.HIDDEN_DIM", 256, "Channels of the mask decoder.", at_least(1)),
    Key("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 100, "Queries.", at_least(1)),
    Key("MODEL.MASK_FORMER.NHEADS", 8, "Heads of every attention.", at_least(1)),
    Key("MODEL.MASK_FORMER.DROPOUT", 0.0, "Dropout in both transformers.", within(0, 1)),
    Key("MODEL.MASK_FORMER.DIM_FEEDFORWARD", 2048, "Hidden channels of its FFN.", at_least(1)),
    Key(
        "MODEL.MASK_FORMER.DEC_LAYERS",
        10,
        "Predictions of the mask decoder: one on the raw queries, one after each layer, so its "
        "layers are one fewer.",
        at_least(2),
    ),
    Key(
        "MODEL.MASK_FORMER.TRAIN_NUM_POINTS",
        12544,
        "Points of a mask at which matching costs and mask losses are taken.",
        at_least(1),
    ),
    Key(
        "MODEL.MASK_FORMER.OVERSAMPLE_RATIO",
        3.0,
        "Candidate points per point of the mask loss.",
        at_least(1),
    ),
    Key(
        "MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO",
        0.75,
        "Share of the mask loss's points taken where the mask is least certain.",
        within(0, 1),
    ),
    Key(
        "MODEL.MASK_FORMER.SIZE_DIVISIBILITY",
        32,
        "Images are padded to a multiple of it, in pixels.",
        at_least(32),
    ),
    Key(
        "MODEL.CLOUDS.CLIP_MODEL_NAME",
        "convnext_large_d_320",
        "open_clip's name of the CLIP model, ConvNeXt or ResNet.",
        not_empty,
    ),
    Key(
        "MODEL.CLOUDS.CLIP_PRETRAINED_WEIGHTS",
        "laion2b_s29b_b131k_ft_soup",
        "open_clip's tag of its weights, or a file; empty: random weights.",
    ),
    Key(
        "MODEL.CLOUDS.GEOMETRIC_ENSEMBLE",
        False,
        "Average class probabilities with CLIP's zero-shot ones when segmenting.",
    ),
    Key(
        "MODEL.CLOUDS.GEOMETRIC_ENSEMBLE_ALPHA",
        0.4,
        "Exponent of CLIP's probability for classes seen in training.",
        within(0, 1),
    ),
    Key(
        "MODEL.CLOUDS.GEOMETRIC_ENSEMBLE_BETA",
        0.8,
        "Exponent of CLIP's probability for classes not seen in training.",
        within(0, 1),
    ),
    Key(
        "MODEL.CLOUDS.ENSEMBLE_ON_VALID_MASK",
        False,
        "Ensemble only queries whose mask has a pixel at CLIP's stride; others keep their own "
        "probabilities.",
    ),
    # ---------------------------------------------------------- self-training
    Key(
        "MODEL.CLOUDS.SAM.ALPHA_EMA",
        0.999,
        "Momentum of the teacher: the share of its weights that stays at an update.",
        within(0, 1),
    ),
    Key(
        "MODEL.CLOUDS.ITERATION_UPDATE",
        100,
        "Iterations between updates of the teacher.",
        at_least(1),
    ),
    Key(
        "MODEL.CLOUDS.GEOMETRIC_ENSEMBLE_EMA",
        False,
        "Average the teacher's class probabilities with CLIP's zero-shot ones.",
    ),
    Key(
        "MODEL.CLOUDS.REFINER",
        "sam",
        "What improves the teacher's labels: 'sam', 'superpixel' (majority vote, no weights), "
        "'none', or a registered name.",
        not_empty,
    ),
    Key(
        "MODEL.CLOUDS.SAM.ENABLED",
        True,
        "False leaves the teacher's label as it is where REFINER is 'sam'.",
    ),
    Key(
        "MODEL.CLOUDS.SAM.MODEL",
        "vit_h",
        "SAM's image encoder; 'mobile' needs the package mobile_sam, 'tiny' is one for tests.",
        one_of("vit_b", "vit_l", "vit_h", "mobile", "tiny"),
    ),
    Key(
        "MODEL.CLOUDS.SAM.WEIGHTS",
        "weights/sam_vit_h_4b8939.pth",
        "File with SAM's weights; empty: random ones.",
    ),
    Key(
        "MODEL.CLOUDS.SAM.SIZE_THRESHOLD",
        5000,
        "Connected components of at most so many pixels get no mask.",
        at_least(0),
    ),
    Key("MODEL.CLOUDS.SAM.EROSION", False, "Erode components before points are chosen."),
    Key("MODEL.CLOUDS.SAM.EROSION_SIZE", 3, "Side of the eroding square, pixels.", at_least(1)),
    Key("MODEL.CLOUDS.SAM.NUM_POINTS", 5, "Points per component.", at_least(1)),
    Key(
        "MODEL.CLOUDS.SAM.SELECTION_MODE",
        "random",
        "Where they lie: 'random' in the component, at its 'center', or random in its "
        "'largest_component' once it is eroded.",
        one_of("random", "center", "largest_component"),
    ),
    Key("MODEL.CLOUDS.SAM.RM_INTERSECTION", True, "Drop pixels that several masks cover."),
    Key(
        "MODEL.CLOUDS.SAM.OVERLAP",
        "classes",
        "Which pixels those are: covered by masks of different 'classes', or by any two masks "
        "('published', where a class that loses all its pixels also stays as an empty target).",
        one_of("classes", "published"),
    ),
    Key(
        "MODEL.CLOUDS.SAM.REFINEMENT",
        False,
        "Run SAM's decoder again on the points and the best mask's logits.",
    ),
    Key(
        "MODEL.CLOUDS.SAM.COMPONENTS_AT_ONCE",
        64,
        "Components that SAM's decoder takes at a time, which bounds memory; a CPU takes one.",
        at_least(1),
    ),
    Key(
        "MODEL.CLOUDS.SAM.CACHE_DIR",
        "",
        "Folder where SAM's image embeddings of clean views are kept in half precision, 2 MB each, "
        "so that its encoder sees each view once; runs may share it, those with another SOLVER.AMP "
        "have entries of their own; empty: each visit computes.",
    ),
    Key(
        "MODEL.CLOUDS.SAM.CACHE_GIB",
        64.0,
        "Bound on that folder, GiB: entries that no run uses any more make room; 0: no bound.",
        at_least(0),
    ),
    Key("MODEL.CLOUDS.SUPERPIXEL.SIZE", 16, "Side of a superpixel, pixels.", at_least(2)),
    Key(
        "MODEL.CLOUDS.SUPERPIXEL.RULER",
        10.0,
        "Smoothness of superpixels; larger ones are squarer.",
        above(0),
    ),
    Key(
        "MODEL.CLOUDS.UNCOVERED",
        "negative",
        "Pixels of a generated image that no refined mask covers: 'negative' for every mask "
        "(published), 'ignore' in all losses, or the 'teacher' has the say.",
        one_of("negative", "ignore", "teacher"),
    ),
    Key(
        "MODEL.CLOUDS.PSEUDO_LABEL.MIN_CONFIDENCE",
        0.0,
        "Pixels where the teacher is less confident do not count; 0: all do.",
        within(0, 1),
    ),
    Key(
        "MODEL.CLOUDS.PSEUDO_LABEL.MIN_AGREEMENT",
        0.0,
        "Pixels of refined segments that agree less with the teacher do not count; 0: all do.",
        within(0, 1),
    ),
    Key(
        "MODEL.CLOUDS.PSEUDO_LABEL.WEIGHT",
        "none",
        "Weigh the losses of a pseudo-label's pixels by the teacher's 'confidence', by 'agreement' "
        "between teacher and refined segment, by 'both' (their product), or not.",
        one_of("none", "confidence", "agreement", "both"),
    ),
    Key(
        "MODEL.CLOUDS.PSEUDO_LABEL.VOID_WEIGHT",
        1.0,
        "Weight of a generated image's unmatched queries in the class loss, relative to "
        "NO_OBJECT_WEIGHT: 1 teaches that classes which its pseudo-label lacks are absent "
        "(published), 0 leaves that open.",
        within(0, 1),
    ),
    # ------------------------------------------------------------------- data
    Key("DATASETS.TRAIN", ("gta5",), "Names of the training datasets."),
    Key(
        "DATASETS.TEST",
        ("mapillary_val", "bdd_val", "cityscapes_val"),
        "Names of the datasets that are evaluated, each on its own.",
    ),
    Key(
        "DATASETS.SOURCE_FACTOR",
        1.0,
        "How often a source image comes up in an epoch, on average.",
        above(0),
    ),
    Key(
        "DATASETS.TARGET_FACTOR",
        1.0,
        "How often a generated image does. The published name calls generated images target.",
        above(0),
    ),
    Key(
        "INPUT.INITIAL_HEIGHT",
        0,
        "Height of a source image, pixels, before random scaling; 0: as it is.",
        at_least(0),
    ),
    Key("INPUT.INITIAL_WIDTH", 0, "Width, likewise.", at_least(0)),
    Key(
        "INPUT.SCALE_RANGE",
        (0.5, 2.0),
        "Random scaling of source images relative to that size, from, to.",
        positive_pair,
    ),
    Key("INPUT.CROP.SIZE", (768, 768), "Training crop, height, width, pixels.", positive_pair),
    Key(
        "INPUT.CROP.POSITION",
        "uniform",
        "'uniform', or 'diagonal': one draw for both axes, as the published code (Detectron2's "
        "FixedSizeCrop) does.",
        one_of("uniform", "diagonal"),
    ),
    Key("INPUT.FLIP", True, "Flip half of the training images left to right."),
    Key("INPUT.COLOR_AUG_SSD", True, "Jitter brightness, contrast, saturation and hue (SSD)."),
    Key(
        "DATALOADER.SAMPLER_TRAIN",
        "WeightedTrainingSampler",
        "'WeightedTrainingSampler' heeds DATASETS.SOURCE_FACTOR and TARGET_FACTOR, "
        "'TrainingSampler' does not.",
        one_of("WeightedTrainingSampler", "TrainingSampler"),
    ),
    Key("DATALOADER.NUM_WORKERS", 4, "Loader processes per GPU; 0: in the main one.", at_least(0)),
    # ----------------------------------------------------------------- solver
    Key("SOLVER.OPTIMIZER", "ADAMW", "Optimizer.", one_of("ADAMW", "SGD")),
    Key("SOLVER.IMS_PER_BATCH", 8, "Images of a step over all GPUs.", at_least(1)),
    Key("SOLVER.MAX_ITER", 40000, "Training iterations.", at_least(0)),
    Key("SOLVER.BASE_LR", 1e-5, "Learning rate of the head.", above(0)),
    Key("SOLVER.MOMENTUM", 0.9, "Momentum of SGD.", within(0, 1)),
    Key(
        "SOLVER.BACKBONE_MULTIPLIER",
        0.1,
        "The backbone's learning rate relative to the head's, when it trains.",
        at_least(0),
    ),
    Key("SOLVER.WEIGHT_DECAY", 0.05, "Weight decay.", at_least(0)),
    Key("SOLVER.WEIGHT_DECAY_NORM", 0.0, "Weight decay of norm layers.", at_least(0)),
    Key("SOLVER.WEIGHT_DECAY_EMBED", 0.0, "Weight decay of embeddings.", at_least(0)),
    Key(
        "SOLVER.LR_SCHEDULER_NAME",
        "WarmupMultiStepLR",
        "WarmupMultiStepLR (constant with no STEPS before MAX_ITER), WarmupPolyLR, WarmupCosineLR.",
        one_of("WarmupMultiStepLR", "WarmupPolyLR", "WarmupCosineLR"),
    ),
    Key("SOLVER.STEPS", (), "Iterations at which WarmupMultiStepLR multiplies by GAMMA."),
    Key("SOLVER.GAMMA", 0.1, "That factor.", above(0)),
    Key("SOLVER.POLY_LR_POWER", 0.9, "Exponent of WarmupPolyLR.", above(0)),
    Key(
        "SOLVER.POLY_LR_CONSTANT_ENDING",
        0.0,
        "WarmupPolyLR stays at this share of the learning rate once it has come down to it.",
        within(0, 1),
    ),
    Key("SOLVER.WARMUP_ITERS", 10, "Iterations of learning-rate warm-up.", at_least(0)),
    Key("SOLVER.WARMUP_FACTOR", 1.0, "Learning rate at its start, relative.", within(0, 1)),
    Key("SOLVER.WARMUP_METHOD", "linear", "Its shape.", one_of("linear", "constant")),
    Key("SOLVER.CLIP_GRADIENTS.ENABLED", True, "Clip gradients."),
    Key(
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE",
        "full_model",
        "'full_model': the norm over all parameters; 'norm', 'value': each parameter on its own.",
        one_of("full_model", "norm", "value"),
    ),
    Key("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.01, "The bound.", above(0)),
    Key("SOLVER.CLIP_GRADIENTS.NORM_TYPE", 2.0, "Exponent of the norm.", above(0)),
    Key("SOLVER.AMP.ENABLED", False, "Train and evaluate under autocast."),
    Key(
        "SOLVER.AMP.DTYPE",
        "bf16",
        "Its type; fp16 scales the loss and needs a GPU.",
        one_of("bf16", "fp16"),
    ),
    Key("SOLVER.CHECKPOINT_PERIOD", 5000, "Iterations between checkpoints.", at_least(1)),
    Key(
        "SOLVER.CHECKPOINTS_KEPT",
        3,
        "Newest periodic checkpoints that stay on disk, the final one not counted; 0: all.",
        at_least(0),
    ),
    # ------------------------------------------------------------- evaluation
    Key("TEST.EVAL_PERIOD", 4000, "Iterations between evaluations; 0: at the end.", at_least(0)),
    Key(
        "TEST.PROTOCOL",
        "native",
        "'native': whole image, short side SHORT_SIDE, prediction resized to the untouched label; "
        "'clouds': the same input, BDD, Mapillary and ACDC labels resized with the image; "
        "'slide': overlapping windows, their scores averaged (TEST.SLIDE).",
        one_of("native", "clouds", "slide"),
    ),
    Key("TEST.SHORT_SIDE", 1024, "Short side of the input, pixels; 0: as it is.", at_least(0)),
    Key(
        "TEST.SLIDE.SHORT_SIDE",
        0,
        "Short side of the image that windows slide over, pixels; 0: as it is (as Rein's results "
        "with windows of 1024; those with windows of 512 take 512).",
        at_least(0),
    ),
    Key("TEST.SLIDE.CROP_SIZE", 1024, "Side of the sliding window, pixels.", at_least(32)),
    Key("TEST.SLIDE.STRIDE", 2 / 3, "Step of the window, as a share of it.", within(0.1, 1)),
    Key(
        "TEST.MASKS_AT_ONCE",
        10,
        "Memory for masks and scores while an image is segmented, counted in masks of its size.",
        at_least(1),
    ),
    Key(
        "TEST.GENERATED_IMAGES",
        50,
        "Labelled generated images on which teacher, refined label and student are scored at each "
        "evaluation in joint training; 0: none.",
        at_least(0),
    ),
    Key("TEST.PICTURES", 4, "Pictures per dataset drawn at each evaluation.", at_least(0)),
)


def add_clouds_config(cfg: CfgNode) -> None:
    """Set every key of the table on `cfg`, in place, as Detectron2 projects do.

    Keys that `cfg` already has (a config of Detectron2's own `get_cfg`) get our default, save
    MODEL.DEVICE, where Detectron2 does not know 'auto'; its other keys stay.
    """
    for key in KEYS:
        node = cfg
        *parents, leaf = key.name.split(".")
        for name in parents:
            if name not in node:
                node[name] = CfgNode()
            node = node[name]
        if key.name != "MODEL.DEVICE" or leaf not in node:
            node[leaf] = key.default


def get_cfg() -> CfgNode:
    """A config of the defaults of every key in the table."""
    cfg = CfgNode()
    add_clouds_config(cfg)
    return cfg
