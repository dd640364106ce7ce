"""The keys of the table that are about noise in pseudo-labels; all of them are off by default."""

from __future__ import annotations

from clouds.config.key import Key, above, at_least, one_of, within

NOISE_KEYS: tuple[Key, ...] = (
    Key(
        "DATASETS.RARE_CLASS_SAMPLING.ENABLED",
        False,
        "Draw images of labelled datasets by their classes, rare ones more often (DAFormer).",
    ),
    Key(
        "DATASETS.RARE_CLASS_SAMPLING.TEMPERATURE",
        0.01,
        "Class c is drawn with the probability softmax((1 - f) / T), f its share of the pixels; a "
        "higher T evens the probabilities.",
        above(0),
    ),
    Key(
        "DATASETS.RARE_CLASS_SAMPLING.MIN_PIXELS",
        3000,
        "Pixels of the drawn class that an image has at least, in its label file.",
        at_least(1),
    ),
    Key(
        "DATASETS.RARE_CLASS_SAMPLING.MIN_CROP_RATIO",
        0.5,
        "The crop is drawn up to 10 times, until it has this share of "
        "DATASETS.RARE_CLASS_SAMPLING.MIN_PIXELS.",
        within(0, 1),
    ),
    Key(
        "INPUT.CLASS_MIXING",
        False,
        "Paste half of the classes of a labelled image onto each generated image, and onto its "
        "pseudo-label (DACS).",
    ),
    Key(
        "MODEL.CLOUDS.EMA_WARM_START",
        False,
        "Limit the momentum of the teacher's t-th update to 1 - 1 / (t + 1); with "
        "MODEL.CLOUDS.ITERATION_UPDATE 1 as in DAFormer.",
    ),
    Key(
        "MODEL.CLOUDS.TEACHER_FLIP",
        False,
        "Average the teacher's scores over a generated image and its mirror image (SENSE).",
    ),
    Key(
        "MODEL.CLOUDS.MASKED_CONSISTENCY.RATIO",
        0.0,
        "Share of the blocks of a generated image that the student does not see (MIC: 0.7).",
        within(0, 1),
    ),
    Key(
        "MODEL.CLOUDS.MASKED_CONSISTENCY.BLOCK_SIZE",
        64,
        "Side of these blocks, pixels.",
        at_least(1),
    ),
    Key(
        "MODEL.CLOUDS.PSEUDO_LABEL.ASSIGNMENT",
        "argmax",
        "Class of a generated image's pixel: the best score ('argmax'), or 'sinkhorn', where the "
        "classes of an image get even shares (SENSE, with "
        "MODEL.CLOUDS.PSEUDO_LABEL.MIN_CONFIDENCE 0.95).",
        one_of("argmax", "sinkhorn"),
    ),
    Key("MODEL.CLOUDS.PSEUDO_LABEL.SINKHORN.ROUNDS", 3, "Rounds of 'sinkhorn'.", at_least(1)),
    Key(
        "MODEL.CLOUDS.PSEUDO_LABEL.SINKHORN.TEMPERATURE",
        0.05,
        "Divides the logarithms of the scores in 'sinkhorn'.",
        above(0),
    ),
    Key(
        "MODEL.CLOUDS.PSEUDO_LABEL.MIN_IMAGE_CONFIDENCE",
        0.0,
        "Ignore a generated image where the mean over the teacher's queries of the largest class "
        "probability is lower (SENSE: 0.95); 0: none.",
        within(0, 1),
    ),
    Key(
        "MODEL.CLOUDS.PSEUDO_LABEL.QUALITY_THRESHOLD",
        0.0,
        "Multiply the losses of a generated image by its share of pixels whose confidence is at "
        "least this (DACS, MIC: 0.968); 0: do not.",
        within(0, 1),
    ),
    Key(
        "MODEL.CLOUDS.PSEUDO_LABEL.DICE_WEIGHT",
        1.0,
        "Factor of the dice losses of generated images (SENSE: 0).",
        at_least(0),
    ),
    Key(
        "MODEL.CLOUDS.PSEUDO_LABEL.MAX_CLASS_LOSS",
        0.0,
        "Ignore pixels of generated images whose loss is above this multiple of their class's mean "
        "loss on labelled images (FreeMask: 1.25); 0: none.",
        at_least(0),
    ),
    Key(
        "MODEL.CLOUDS.PSEUDO_LABEL.BOUNDARY_WEIGHT",
        0.0,
        "Additional weight, at most, of uncertain pixels at boundaries of pseudo-labels "
        "(FLEX-Seg: 3).",
        at_least(0),
    ),
    Key(
        "MODEL.CLOUDS.PSEUDO_LABEL.BOUNDARY_WIDTH",
        3,
        "Distance to a boundary up to which they count, pixels.",
        at_least(1),
    ),
)
