"""Colors of ADE20K's 150 classes, in which segmentation ControlNets of the hub take labels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from clouds.data.label_space import LabelSpace

Color = tuple[int, int, int]

ADE20K_COLORS: dict[str, Color] = {
    "wall": (120, 120, 120), "building": (180, 120, 120), "sky": (6, 230, 230),
    "tree": (4, 200, 3), "road": (140, 140, 140), "grass": (4, 250, 7),
    "sidewalk": (235, 255, 7), "person": (150, 5, 61), "earth": (120, 120, 70),
    "mountain": (143, 255, 140), "plant": (204, 255, 4), "car": (0, 102, 200),
    "water": (61, 230, 250), "fence": (255, 184, 6), "rock": (255, 41, 10),
    "railing": (255, 61, 6), "signboard": (255, 5, 153), "sand": (160, 150, 20),
    "path": (255, 31, 0), "house": (255, 9, 224), "field": (112, 9, 255),
    "stairs": (255, 224, 0), "river": (11, 200, 200), "bridge": (255, 82, 0),
    "hill": (255, 102, 0), "bench": (194, 255, 0), "bus": (255, 0, 245),
    "truck": (255, 0, 20), "tower": (255, 184, 184), "streetlight": (0, 71, 255),
    "booth": (255, 0, 204), "pole": (51, 0, 255), "land": (0, 194, 255), "van": (163, 255, 0),
    "boat": (173, 255, 0), "minibike": (163, 0, 255), "animal": (255, 0, 122),
    "bicycle": (255, 245, 0), "lake": (10, 190, 212), "traffic light": (41, 0, 255),
    "ashcan": (173, 0, 255), "flag": (92, 0, 255),
}  # fmt: skip
"""The classes that occur in streets, with the colors of the benchmark's color map (RGB)."""

_NEAREST: dict[str, str] = {
    "vegetation": "tree", "terrain": "grass", "rider": "person", "pedestrian": "person",
    "bicyclist": "person", "motorcyclist": "person", "other rider": "person",
    "traffic sign": "signboard", "traffic sign (front)": "signboard",
    "traffic sign (back)": "signboard", "sign": "signboard", "billboard": "signboard",
    "motorcycle": "minibike", "train": "bus", "on rails": "bus", "caravan": "van",
    "trailer": "truck", "other vehicle": "truck", "pavement": "sidewalk",
    "pedestrian area": "sidewalk", "curb": "sidewalk", "curb cut": "sidewalk",
    "parking": "road", "bike lane": "road", "service lane": "road", "crosswalk - plain": "road",
    "lane marking - crosswalk": "road", "lane marking - general": "road", "rail track": "road",
    "manhole": "road", "pothole": "road", "catch basin": "road", "guard rail": "railing",
    "barrier": "fence", "utility pole": "pole", "traffic sign frame": "pole",
    "street light": "streetlight", "ground animal": "animal", "bird": "animal",
    "trash can": "ashcan", "phone booth": "booth", "banner": "flag", "snow": "earth",
}  # fmt: skip
"""Class of a label space -> the nearest class of ADE20K; riders, signs and trains only roughly."""


def ade20k_colors(label_space: LabelSpace) -> tuple[npt.NDArray[np.uint8], tuple[str, ...]]:
    """Color of each train id in ADE20K's color map.

    A class has the color of the class of ADE20K of its name, of the nearest one, or of one of its
    words, in this order.

    Returns:
        (256, 3) uint8 RGB, and the names of the classes without a color, which are black like
        pixels that do not count.
    """
    table = np.zeros((256, 3), np.uint8)
    missing = []
    for i, (name, words) in enumerate(zip(label_space.names, label_space.synonyms, strict=True)):
        candidates = [name.lower(), _NEAREST.get(name.lower(), ""), *map(str.lower, words)]
        known = [word for word in candidates if word in ADE20K_COLORS]
        if known:
            table[i] = ADE20K_COLORS[known[0]]
        else:
            missing.append(name)
    return table, tuple(missing)
