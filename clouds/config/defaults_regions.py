"""The keys of regions and their classes, MODEL.CLOUDS.REGIONS and MODEL.CLOUDS.CROP_CLASSES."""

from __future__ import annotations

from clouds.config.key import Key, at_least, one_of, within

REGION_KEYS: tuple[Key, ...] = (
    Key(
        "MODEL.CLOUDS.REGIONS.THINGS",
        (
            *("pole", "traffic light", "traffic sign", "person", "rider", "car", "truck", "bus"),
            *("train", "motorcycle", "bicycle"),
        ),
        "Refiner 'regions': classes whose components prompt SAM one by one; the others are stuff.",
    ),
    Key(
        "MODEL.CLOUDS.REGIONS.POINTS_PER_SIDE",
        32,
        "Automatic masks: points of the grid per row and per column.",
        at_least(1),
    ),
    Key(
        "MODEL.CLOUDS.REGIONS.PRED_IOU_THRESH",
        0.88,
        "Automatic masks: smallest IoU that SAM predicts for a mask.",
    ),
    Key(
        "MODEL.CLOUDS.REGIONS.STABILITY_SCORE_THRESH",
        0.95,
        "Automatic masks: smallest IoU of the masks at two thresholds.",
        within(0, 1),
    ),
    Key(
        "MODEL.CLOUDS.REGIONS.BOX_NMS_THRESH",
        0.7,
        "Automatic masks: largest IoU of the boxes of two masks.",
        within(0, 1),
    ),
    Key(
        "MODEL.CLOUDS.REGIONS.MIN_SHARE",
        0.2,
        "Stuff: share of an automatic mask's pixels that its class must exceed.",
        within(0, 1),
    ),
    Key(
        "MODEL.CLOUDS.REGIONS.MIN_AREA",
        10,
        "Things: components with fewer pixels are left out.",
        at_least(1),
    ),
    Key(
        "MODEL.CLOUDS.REGIONS.BOX_GROWTH",
        1.25,
        "Things: growth of the box on each side, in units of its area / perimeter.",
        at_least(0),
    ),
    Key("MODEL.CLOUDS.REGIONS.NUM_POINTS", 2, "Things: purest points per component.", at_least(1)),
    Key(
        "MODEL.CLOUDS.REGIONS.FILTER",
        "drop",
        "Regions whose loss a Gaussian mixture calls noisy: 'drop', 'relabel' or 'none'.",
        one_of("none", "drop", "relabel"),
    ),
    Key(
        "MODEL.CLOUDS.REGIONS.NOISE_THRESHOLD",
        0.5,
        "Probability above which a region is noisy.",
        within(0, 1),
    ),
    Key(
        "MODEL.CLOUDS.CROP_CLASSES.WEIGHT",
        0.0,
        "Classes of the regions of a refined label, connected components, are chosen by the "
        "teacher and by CLIP: weight of the log-probability of CLIP's zero-shot class for a crop "
        "around the region, beside the teacher's with weight 1; 0: as refined (published).",
        at_least(0),
    ),
    Key(
        "MODEL.CLOUDS.CROP_CLASSES.MIN_AREA",
        60,
        "Regions with fewer pixels keep their class.",
        at_least(1),
    ),
)
