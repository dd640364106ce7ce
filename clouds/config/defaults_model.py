"""The keys of the table under MODEL: network, losses, inference and self-training."""

from __future__ import annotations

from clouds.config.defaults_adapter import ADAPTER_KEYS
from clouds.config.defaults_regions import REGION_KEYS
from clouds.config.key import (
    Key,
    Rule,
    above,
    at_least,
    blocks,
    no_or_three_numbers,
    no_or_three_positive,
    not_empty,
    one_of,
    within,
)

WEIGHTS_KEYS = {
    "MODEL.BACKBONE.WEIGHTS": ("ViT",),
    "MODEL.CLOUDS.CLIP_PRETRAINED_WEIGHTS": ("CLIP", "CLIPViT"),
}
"""Keys that name a backbone's own weights, and those backbones."""

SAM_NAMES = ("vit_b", "vit_l", "vit_h", "mobile", "street", "tiny")
sam_model = Rule(
    f"one of {', '.join(map(repr, SAM_NAMES))}, an id on the Hugging Face hub such as "
    "facebook/sam2.1-hiera-tiny, or a folder (with a slash, such as ./folder)",
    lambda value: value in SAM_NAMES or "/" in value,
)

MODEL_KEYS: tuple[Key, ...] = (
    Key(
        "MODEL.DEVICE",
        "auto",
        "'auto' (CUDA if available, else the CPU), 'cpu', 'cuda' or 'cuda:N'.",
    ),
    Key("MODEL.META_ARCHITECTURE", "CLOUDS", "Registered name of the whole model.", not_empty),
    Key("MODEL.WEIGHTS", "", "Checkpoint to start from; empty: none.", is_path=True),
    Key(
        "MODEL.WEIGHTS_PARTIAL",
        False,
        "Accept a checkpoint with missing weights or other shapes; what did not match is logged "
        "either way.",
    ),
    Key(
        "MODEL.COMPILE",
        "none",
        "Parts that torch.compile compiles at their first use: 'backbone', 'head' (student's and "
        "teacher's), 'all' or 'none'. Needs a C++ compiler, on CUDA Triton; each new image size "
        "takes about a minute. Results differ by rounding.",
        one_of("none", "backbone", "head", "all"),
    ),
    Key(
        "MODEL.PIXEL_MEAN",
        [],
        "Subtracted from the image, RGB, 0-255; empty: the mean of the images that the backbone "
        "was trained on.",
        no_or_three_numbers,
        element=123.675,
    ),
    Key(
        "MODEL.PIXEL_STD",
        [],
        "Divides the image after the mean is subtracted, RGB, 0-255; empty: the backbone's own.",
        no_or_three_positive,
        element=58.395,
    ),
    Key(
        "MODEL.BACKBONE.NAME",
        "CLIP",
        "Registered name of the backbone: 'CLIP' (ConvNeXt or ResNet of open_clip), 'ViT' (models "
        "of timm), 'CLIPViT' (vision transformers of open_clip, with their text encoder).",
        not_empty,
    ),
    Key(
        "MODEL.BACKBONE.FREEZE",
        True,
        "Do not train the backbone's own weights; an adapter (MODEL.BACKBONE.ADAPTER) trains.",
    ),
    *ADAPTER_KEYS,
    Key(
        "MODEL.BACKBONE.TIMM_NAME",
        "vit_large_patch14_dinov2.lvd142m",
        "Model of the backbone ViT: timm's name, with or without the tag of its weights.",
        not_empty,
    ),
    Key(
        "MODEL.BACKBONE.WEIGHTS",
        "pretrained",
        "Weights of the backbone ViT: 'pretrained' (the tag in MODEL.BACKBONE.TIMM_NAME, or timm's "
        "default), another tag of timm, or a file; empty: random weights.",
        is_path=True,
    ),
    Key(
        "MODEL.BACKBONE.PATCH_SIZE",
        16,
        "Patch size of a vision transformer, pixels; the kernel of its weights is resized to it.",
        one_of(8, 16),
    ),
    Key(
        "MODEL.BACKBONE.IMG_SIZE",
        512,
        "Side of the square image that the stored position embeddings of a vision transformer are "
        "for, pixels; those of its weights are resized to it. SAM's encoder keeps its own.",
        at_least(32),
    ),
    Key(
        "MODEL.BACKBONE.RESIZE",
        "bicubic",
        "How patch kernel and positions in weights are resized: 'bicubic' without antialiasing, as "
        "in the code of Rein, SoMA and others; 'timm': pseudo-inverse, and with antialiasing.",
        one_of("bicubic", "timm"),
    ),
    Key(
        "MODEL.BACKBONE.POSITIONS",
        "bicubic",
        "How stored positions are resized to an image of another size: 'bicubic' or 'bilinear' "
        "without antialiasing, 'timm' (bicubic with it), or 'dinov2' (bicubic with the offset 0.1 "
        "of DINOv2's and Rein's code).",
        one_of("bicubic", "bilinear", "timm", "dinov2"),
    ),
    Key(
        "MODEL.BACKBONE.PYRAMID",
        "plain",
        "Feature pyramid of a vision transformer: 'plain' (bilinear, nothing learned), 'learned' "
        "(transposed convolutions, as in tqdm and VLTSeg) or 'neck' (a convolution before and "
        "after bilinear resizing, as in Rein's CLIP baseline).",
        one_of("plain", "learned", "neck"),
    ),
    Key(
        "MODEL.BACKBONE.OUT_BLOCKS",
        (),
        "Blocks of a vision transformer, counted from 0, whose results become res2 to res5; empty: "
        "7, 11, 15, 23 of 24 blocks, or a quarter apart.",
        blocks,
    ),
    Key(
        "MODEL.BACKBONE.DROP_PATH",
        0.0,
        "Largest rate of stochastic depth in the backbone ViT; none while it is frozen.",
        within(0, 0.9),
    ),
    Key(
        "MODEL.BACKBONE.ACTIVATION_CHECKPOINTING",
        False,
        "Compute the blocks of a vision transformer again in the backward pass instead of keeping "
        "their activations: less memory, more time, the same gradients.",
    ),
    Key("MODEL.SEM_SEG_HEAD.NAME", "CLOUDSHead", "Registered name of the head.", not_empty),
    Key(
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
        0,
        "Classes without the no-object class; 0: as many as the label space of DATASETS.TRAIN "
        "has, which then is the value of the loaded config.",
        within(0, 255),
    ),
    Key(
        "MODEL.SEM_SEG_HEAD.IN_FEATURES",
        ["res2", "res3", "res4", "res5"],
        "Backbone features that the pixel decoder reads, fine to coarse.",
        not_empty,
    ),
    Key(
        "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES",
        ["res3", "res4", "res5"],
        "Those of MODEL.SEM_SEG_HEAD.IN_FEATURES that the deformable-attention encoder reads.",
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
        "Hidden channels of the feed-forward network of the deformable-attention encoder.",
        at_least(1),
    ),
    Key(
        "MODEL.SEM_SEG_HEAD.DEFORMABLE_ATTENTION",
        "auto",
        "Implementation of deformable attention: 'torch', 'triton' (needs CUDA), or 'auto' (Triton "
        "on CUDA if it works). They differ by rounding; Triton's gradients differ by rounding from "
        "run to run.",
        one_of("auto", "torch", "triton"),
    ),
    Key(
        "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME",
        "OriginalMultiScaleMaskedTransformerDecoder",
        "Class head: Original… is a linear classifier on the query (published CLOUDS), "
        "MultiScaleMaskedTransformerDecoder compares mask-pooled queries with CLIP's text features "
        "(FC-CLIP), Bis… is a linear classifier on mask-pooled queries. "
        "'linear', 'text' and 'pooled' are short names of these.",
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
        "Compute losses on the predictions of every decoder layer, not only of the last.",
    ),
    Key(
        "MODEL.MASK_FORMER.NO_OBJECT_WEIGHT",
        0.1,
        "Weight of the no-object class in the class loss.",
        above(0),
    ),
    Key(
        "MODEL.MASK_FORMER.UNLABELED_CLASSES",
        "ignore",
        "Classes that a dataset of DATASETS.TRAIN does not label and another one does: 'ignore' "
        "trains unmatched queries as no object only for the share of their mask on labeled pixels "
        "of its images; 'absent' as everywhere (published).",
        one_of("ignore", "absent"),
    ),
    Key("MODEL.MASK_FORMER.CLASS_WEIGHT", 2.0, "Weight of the class loss.", at_least(0)),
    Key("MODEL.MASK_FORMER.MASK_WEIGHT", 5.0, "Weight of the mask's BCE loss.", at_least(0)),
    Key("MODEL.MASK_FORMER.DICE_WEIGHT", 5.0, "Weight of the mask's dice loss.", at_least(0)),
    Key(
        "MODEL.MASK_FORMER.CLASS_NORMALIZER",
        "batch",
        "The class loss is a weighted mean over the whole 'batch' (the same loss on any number of "
        "GPUs), or over the images of each 'rank' (published).",
        one_of("batch", "rank"),
    ),
    Key("MODEL.MASK_FORMER.HIDDEN_DIM", 256, "Channels of the mask decoder.", at_least(1)),
    Key("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 100, "Object queries.", at_least(1)),
    Key("MODEL.MASK_FORMER.NHEADS", 8, "Heads of every attention layer.", at_least(1)),
    Key("MODEL.MASK_FORMER.DROPOUT", 0.0, "Dropout in both transformers.", within(0, 1)),
    Key(
        "MODEL.MASK_FORMER.DIM_FEEDFORWARD",
        2048,
        "Hidden channels of the mask decoder's feed-forward network.",
        at_least(1),
    ),
    Key(
        "MODEL.MASK_FORMER.DEC_LAYERS",
        10,
        "Predictions of the mask decoder: one from the initial queries and one per layer, so it "
        "has one layer fewer.",
        at_least(2),
    ),
    Key(
        "MODEL.MASK_FORMER.TRAIN_NUM_POINTS",
        12544,
        "Points per mask at which matching costs and mask losses are computed.",
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
        "Fraction of the mask loss's points that are the most uncertain candidates.",
        within(0, 1),
    ),
    Key(
        "MODEL.MASK_FORMER.SIZE_DIVISIBILITY",
        32,
        "Height and width of images are padded to a multiple of this number, pixels.",
        at_least(32),
    ),
    Key(
        "MODEL.CLOUDS.CLIP_MODEL_NAME",
        "convnext_large_d_320",
        "Name of the CLIP model in open_clip: ConvNeXt or ResNet (backbone CLIP), vision "
        "transformer (backbone CLIPViT).",
        not_empty,
    ),
    Key(
        "MODEL.CLOUDS.CLIP_PRETRAINED_WEIGHTS",
        "laion2b_s29b_b131k_ft_soup",
        "Tag of open_clip, file, or name of packaged weights (street_clip); empty: random weights.",
        is_path=True,
    ),
    Key(
        "MODEL.CLOUDS.GEOMETRIC_ENSEMBLE",
        False,
        "Combine class probabilities with CLIP's zero-shot ones at inference (geometric mean).",
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
        "Momentum of the EMA teacher: the factor of its old weights in an update.",
        within(0, 1),
    ),
    Key("MODEL.CLOUDS.ITERATION_UPDATE", 100, "Iterations between teacher updates.", at_least(1)),
    Key(
        "MODEL.CLOUDS.GEOMETRIC_ENSEMBLE_EMA",
        False,
        "Combine the teacher's class probabilities with CLIP's zero-shot ones (geometric mean).",
    ),
    Key(
        "MODEL.CLOUDS.GENERATED_LABELS",
        "teacher",
        "Labels of generated images in training: the 'teacher', refined (published); 'given', "
        "those that the images were generated for, without a teacher; or 'filtered', these with "
        "the filters of MODEL.CLOUDS.PSEUDO_LABEL by the teacher's scores, without refiner.",
        one_of("teacher", "given", "filtered"),
    ),
    Key(
        "MODEL.CLOUDS.REFINER",
        "sam",
        "Refiner of the teacher's labels: 'sam' (points per component), 'sam_text' (names of "
        "classes, SAM 3), 'regions' (majority in SAM's automatic masks), 'superpixel' (majority "
        "vote, no weights), 'none', or a registered name.",
        not_empty,
    ),
    Key("MODEL.CLOUDS.SAM.ENABLED", True, "False with MODEL.CLOUDS.REFINER 'sam': no refiner."),
    Key(
        "MODEL.CLOUDS.SAM.MODEL",
        "vit_h",
        "SAM's image encoder; 'mobile' needs the package mobile_sam, 'street' is Street-SAM, for "
        "rendered streets, 'tiny' is for tests. Or a SAM of transformers (docs/refiners.md): an id "
        "on the Hugging Face hub, such as facebook/sam2.1-hiera-tiny, or a folder.",
        sam_model,
    ),
    Key(
        "MODEL.CLOUDS.SAM.WEIGHTS",
        "weights/sam_vit_h_4b8939.pth",
        "File with SAM's weights, or the name of weights that an installed package offers "
        "(street_sam); empty: random weights. Models of transformers bring their own.",
        is_path=True,
    ),
    Key(
        "MODEL.CLOUDS.SAM.SIZE_THRESHOLD",
        5000,
        "Connected components with at most this many pixels are not refined.",
        at_least(0),
    ),
    Key("MODEL.CLOUDS.SAM.EROSION", False, "Erode components before points are sampled."),
    Key("MODEL.CLOUDS.SAM.EROSION_SIZE", 3, "Side of the erosion kernel, pixels.", at_least(1)),
    Key("MODEL.CLOUDS.SAM.NUM_POINTS", 5, "Point prompts per component.", at_least(1)),
    Key(
        "MODEL.CLOUDS.SAM.SELECTION_MODE",
        "random",
        "Positions of SAM's point prompts: 'random' in the component, at its 'center', or random "
        "in the 'largest_component' of the eroded component.",
        one_of("random", "center", "largest_component"),
    ),
    Key(
        "MODEL.CLOUDS.SAM.RM_INTERSECTION",
        True,
        "Remove pixels that several masks cover from all of them.",
    ),
    Key(
        "MODEL.CLOUDS.SAM.OVERLAP",
        "classes",
        "Pixels that MODEL.CLOUDS.SAM.RM_INTERSECTION removes: covered by masks of different "
        "'classes', or by any two masks ('published', where a class without a pixel left stays as "
        "an empty target).",
        one_of("classes", "published"),
    ),
    Key(
        "MODEL.CLOUDS.SAM.REFINEMENT",
        False,
        "Run SAM's decoder a second time, on the points and the best mask's logits.",
    ),
    Key(
        "MODEL.CLOUDS.SAM.CACHE_DIR",
        "",
        "Folder that caches SAM's image embeddings of unaugmented views in half precision, 2 MB "
        "each, of other models up to 11 MB; runs may share it, entries of each SOLVER.AMP "
        "precision are separate. Empty: no cache.",
        is_path=True,
    ),
    Key(
        "MODEL.CLOUDS.SAM.TEXT_SCORE_THRESHOLD",
        0.3,
        "Refiner 'sam_text': instances of SAM 3 with a lower score are left out.",
        within(0, 1),
    ),
    *REGION_KEYS,
    Key("MODEL.CLOUDS.SUPERPIXEL.SIZE", 16, "Side of a superpixel, pixels.", at_least(2)),
    Key(
        "MODEL.CLOUDS.SUPERPIXEL.COMPACTNESS",
        10.0,
        "Compactness of superpixels; larger values give squarer ones.",
        above(0),
    ),
    Key(
        "MODEL.CLOUDS.UNCOVERED",
        "negative",
        "Pixels of a generated image that no refined mask covers: 'negative' for every mask "
        "(published), 'ignore' in all losses, or the label of the 'teacher'.",
        one_of("negative", "ignore", "teacher"),
    ),
    Key(
        "MODEL.CLOUDS.PSEUDO_LABEL.MIN_CONFIDENCE",
        0.0,
        "Ignore pixels where the teacher's confidence is lower; 0: ignore none.",
        within(0, 1),
    ),
    Key(
        "MODEL.CLOUDS.PSEUDO_LABEL.MIN_AGREEMENT",
        0.0,
        "Ignore pixels of refined segments whose agreement with the teacher is lower; 0: none.",
        within(0, 1),
    ),
    Key(
        "MODEL.CLOUDS.PSEUDO_LABEL.WEIGHT",
        "none",
        "Weight of a pseudo-label's pixels in the losses: the teacher's 'confidence', the "
        "'agreement' of teacher and refined segment, 'both' (their product), or 'none'.",
        one_of("none", "confidence", "agreement", "both"),
    ),
    Key(
        "MODEL.CLOUDS.PSEUDO_LABEL.NO_OBJECT_WEIGHT",
        1.0,
        "Weight of a generated image's unmatched queries in the class loss, relative to "
        "MODEL.MASK_FORMER.NO_OBJECT_WEIGHT: 1 trains classes that are missing from its "
        "pseudo-label as absent (published), 0 does not.",
        within(0, 1),
    ),
)
