"""The table of configuration keys: default, meaning, unit and allowed values of each.

A key is declared here or in a table that is included here, and nowhere else; `clouds list-config`
prints all.
"""

from __future__ import annotations

from clouds.config.defaults_model import MODEL_KEYS
from clouds.config.defaults_noise import NOISE_KEYS
from clouds.config.defaults_solver import SOLVER_KEYS
from clouds.config.key import (
    Key,
    above,
    all_positive,
    at_least,
    not_empty,
    one_of,
    positive_pair,
    sizes,
    some_of,
    some_positive,
    within,
)
from clouds.data.input_sizes import PUBLISHED

KEYS: tuple[Key, ...] = (
    Key("VERSION", 2, "Config version of Detectron2; it does not change.", one_of(2)),
    Key("SEED", 0, "Seed of initial weights, sampling and augmentation.", within(0, 2**63 - 1)),
    Key(
        "OUTPUT_DIR",
        "./output",
        "Folder for checkpoints, metrics, images and the log.",
        not_empty,
        is_path=True,
    ),
    Key(
        "LOGGER",
        ("tensorboard",),
        "What shows the numbers of metrics.json, besides: 'tensorboard', 'csv' (metrics.csv and "
        "evaluations.csv), 'wandb' (Weights & Biases; its variables WANDB_PROJECT, WANDB_MODE …).",
        some_of("tensorboard", "csv", "wandb"),
        element="tensorboard",
    ),
    Key("LOG_PERIOD", 20, "Iterations between console lines and metric records.", at_least(1)),
    Key(
        "CUDNN_BENCHMARK",
        False,
        "Let cuDNN choose its algorithms by timing them; faster, but not reproducible.",
    ),
    Key(
        "DIST_TIMEOUT",
        3600,
        "Seconds that several processes wait for each other; more than the slowest evaluation.",
        at_least(1),
    ),
    *MODEL_KEYS,
    *NOISE_KEYS,
    # ------------------------------------------------------------------- data
    Key("DATASETS.TRAIN", ("gta5",), "Names of the training datasets."),
    Key(
        "DATASETS.TEST",
        ("mapillary_val", "bdd_val", "cityscapes_val"),
        "Names of the datasets to evaluate on, each separately.",
    ),
    Key(
        "DATASETS.DESCRIPTIONS",
        (),
        "YAML files that describe datasets of one's own (docs/own_data.md), relative to the "
        "working directory; a checkpoint's config has their text.",
        element="",
    ),
    Key(
        "DATASETS.LABEL_SPACE",
        "",
        "The classes to train on: cityscapes_19, camvid_11, mapillary_65 or the name of a "
        "description; other datasets are mapped to it by name. Empty: the classes of the labelled "
        "datasets in DATASETS.TRAIN, which must be the same.",
    ),
    Key(
        "DATASETS.CLASS_MAP",
        (),
        "Classes that become one of another name in the training label space, per dataset, such as "
        "'camvid11_*: tree=vegetation, pavement=sidewalk'; nothing after '=': its pixels do not "
        "count.",
        element="",
    ),
    Key(
        "DATASETS.SOURCE_VAL_FRACTION",
        0.0,
        "Share of the images of each labelled training dataset, at equal distances, that training "
        "leaves out; they are scored at each evaluation, and model_best.pth has the best weights.",
        within(0, 0.5),
    ),
    Key(
        "DATASETS.SOURCE_FACTOR",
        1.0,
        "Average number of samples of a source image per epoch.",
        above(0),
    ),
    Key(
        "DATASETS.TARGET_FACTOR",
        1.0,
        "Average number of samples of a generated image per epoch (published name).",
        above(0),
    ),
    Key(
        "DATASETS.FACTORS",
        (),
        "Average number of samples of an image per epoch, one number per dataset of "
        "DATASETS.TRAIN; empty: DATASETS.SOURCE_FACTOR and DATASETS.TARGET_FACTOR.",
        all_positive,
        element=1.0,
    ),
    Key(
        "INPUT.INITIAL_HEIGHT",
        0,
        "Height to which a source image is resized before random scaling, pixels; 0: its own.",
        at_least(0),
    ),
    Key(
        "INPUT.INITIAL_WIDTH",
        0,
        "Width to which a source image is resized before random scaling, pixels; 0: its own.",
        at_least(0),
    ),
    Key(
        "INPUT.INITIAL_SIZES",
        (),
        "The same for each dataset of DATASETS.TRAIN, a pair of height and width per dataset, "
        "(0, 0) for generated images; empty: INPUT.INITIAL_HEIGHT and INPUT.INITIAL_WIDTH.",
        sizes,
        element=(1052, 1914),
    ),
    Key(
        "INPUT.SCALE_RANGE",
        (0.5, 2.0),
        "Minimum and maximum of the random scale factor of source images.",
        positive_pair,
    ),
    Key(
        "INPUT.SHORT_SIDES",
        (),
        "Short sides, pixels, of which one is drawn for each source image, which is resized to it "
        "without antialiasing as in mmsegmentation; empty: INPUT.INITIAL_HEIGHT, INITIAL_WIDTH or "
        "INITIAL_SIZES, and INPUT.SCALE_RANGE.",
        all_positive,
        element=512,
    ),
    Key(
        "INPUT.LONG_SIDE_MAX",
        0,
        "Limit of the long side with INPUT.SHORT_SIDES, pixels; 0: none.",
        at_least(0),
    ),
    Key("INPUT.CROP.SIZE", (768, 768), "Training crop, height and width, pixels.", positive_pair),
    Key(
        "INPUT.CROP.POSITION",
        "uniform",
        "'uniform', or 'diagonal': one random number for both axes, as in the published code "
        "(Detectron2's FixedSizeCrop).",
        one_of("uniform", "diagonal"),
    ),
    Key(
        "INPUT.CROP.CAT_MAX_RATIO",
        1.0,
        "Another crop is drawn, up to 10 times, while one class has this share of its labelled "
        "pixels or more; 1: never.",
        within(0.01, 1),
    ),
    Key(
        "INPUT.CROP.PADDING",
        "black",
        "Where an image is smaller than INPUT.CROP.SIZE: 'black' before flip and color "
        "augmentation (published), or 'mean': 0 after normalization, at the bottom and on the "
        "right, as in mmsegmentation. No mask has these pixels.",
        one_of("black", "mean"),
    ),
    Key("INPUT.FLIP", True, "Flip training images horizontally with probability 0.5."),
    Key("INPUT.COLOR_AUG_SSD", True, "Jitter brightness, contrast, saturation and hue (SSD)."),
    Key(
        "INPUT.PHOTOMETRIC_DISTORTION",
        False,
        "The same with the ranges and the rounding of mmsegmentation's PhotoMetricDistortion, in "
        "place of INPUT.COLOR_AUG_SSD.",
    ),
    Key(
        "INPUT.COLOR_AUG_ON_DEVICE",
        False,
        "Apply INPUT.COLOR_AUG_SSD on the model's device, with the same random numbers, in place "
        "of the loader processes.",
    ),
    Key(
        "DATALOADER.SAMPLER_TRAIN",
        "WeightedTrainingSampler",
        "'WeightedTrainingSampler' applies DATASETS.FACTORS or DATASETS.SOURCE_FACTOR and "
        "DATASETS.TARGET_FACTOR, 'TrainingSampler' does not.",
        one_of("WeightedTrainingSampler", "TrainingSampler"),
    ),
    Key(
        "DATALOADER.NUM_WORKERS",
        4,
        "Loader processes per GPU; 0: load in the main process.",
        at_least(0),
    ),
    Key(
        "DATALOADER.TIMEOUT",
        600,
        "Seconds to wait for the next batch of a loader process; 0: without limit.",
        at_least(0),
    ),
    Key(
        "DATALOADER.FAULTY",
        "stop",
        "A training file that cannot be read ends training ('stop'), or is reported and replaced "
        "by another of its dataset, chosen by the sample's seed ('skip').",
        one_of("stop", "skip"),
    ),
    Key(
        "DATALOADER.MAX_FAULTY",
        10,
        "Number of different files that DATALOADER.FAULTY 'skip' allows over all processes.",
        at_least(0),
    ),
    *SOLVER_KEYS,
    # ------------------------------------------------------------- evaluation
    Key("TEST.EVAL_PERIOD", 4000, "Iterations between evaluations; 0: only the last.", at_least(0)),
    Key(
        "TEST.PROTOCOL",
        "native",
        "'native': whole image, short side TEST.SHORT_SIDE, prediction resized to the original "
        "label; 'clouds': the same input, BDD, Mapillary and ACDC labels resized with the image; "
        "'slide': overlapping windows, their scores averaged (TEST.SLIDE); or windows and input "
        "sizes of a paper's code: 'rein512', 'rein1024', 'soma512', 'soma1024', 'tqdm', 'vltseg'.",
        one_of("native", "clouds", "slide", *PUBLISHED),
    ),
    Key(
        "TEST.INPUT_SIZES",
        (),
        "Long and short side, pixels, into which the images of a dataset are fitted, in place of "
        "the protocol's, such as 'bdd_*: 1280x720'.",
        element="",
    ),
    Key(
        "TEST.AUG.ENABLED",
        False,
        "Test-time augmentation: scores of scaled and flipped inputs are averaged.",
    ),
    Key(
        "TEST.AUG.SCALES",
        (1.0,),
        "Scales of the input with TEST.AUG.ENABLED.",
        some_positive,
    ),
    Key("TEST.AUG.FLIP", True, "With TEST.AUG.ENABLED also flip each input horizontally."),
    Key("TEST.SHORT_SIDE", 1024, "Short side of the input, pixels; 0: its own.", at_least(0)),
    Key(
        "TEST.LONG_SIDE_MAX",
        8192,
        "Limit of the long side, pixels, where an image is resized to a short side (0: none); a "
        "longer image gets this long side and keeps its ratio. At a short side of 1024 an image "
        "of 2:1 has 2048, one of 4:1 4096; only images longer than 8:1 are limited.",
        at_least(0),
    ),
    Key(
        "TEST.SLIDE.SHORT_SIDE",
        0,
        "Short side of the image that is divided into windows, pixels; 0: its own (as in Rein's "
        "results with windows of 1024; those with windows of 512 use 512).",
        at_least(0),
    ),
    Key("TEST.SLIDE.CROP_SIZE", 1024, "Side of the sliding window, pixels.", at_least(32)),
    Key(
        "TEST.SLIDE.STRIDE",
        2 / 3,
        "Step of the sliding window as a fraction of its side.",
        within(0.1, 1),
    ),
    Key(
        "TEST.MASKS_AT_ONCE",
        10,
        "Bound on memory for masks and scores at inference, in masks of the image's size.",
        at_least(1),
    ),
    Key(
        "TEST.GENERATED_IMAGES",
        50,
        "Labelled generated images on which teacher, refined label and student are scored at each "
        "evaluation in joint training; 0: none.",
        at_least(0),
    ),
    Key(
        "TEST.METRICS",
        (),
        "Scores beyond mIoU and accuracy: 'confidence': calibration error of the confidence (ECE), "
        "and AUROC, FPR95 and AUPR of telling correct from wrong pixels by it; 'boundary': IoU of "
        "the boundaries of classes.",
        some_of("confidence", "boundary"),
        element="confidence",
    ),
    Key(
        "TEST.ANOMALY_SETS",
        (),
        "Folders, relative to that of the datasets, with images and masks of objects of unknown "
        "classes in the layout of SegmentMeIfYouCan (images/, labels_masks/): AUPR, FPR95 and "
        "AUROC of finding their pixels by low confidence.",
        element="road_anomaly21",
    ),
    Key("TEST.VISUALIZED_IMAGES", 4, "Images per dataset drawn at each evaluation.", at_least(0)),
)
