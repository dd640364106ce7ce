"""Captions of crops in varied wording: classes, their colors, sizes and positions, the scene."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from clouds.data.label_space import CITYSCAPES_19
from clouds.modeling.text_classifier import TEMPLATES
from street_models.scenes import Facts, UInt8Array

OBJECT_TEMPLATES = (*TEMPLATES, "{}", "a {}", "the {}", "a {} on the street", "a picture of a {}")
"""Of captions that name one class alone."""
MAX_PHRASES = 4
"""Maximum number of classes that a caption names."""
MIN_SHARE = 0.02
"""Share of a crop from which on a class is named."""

_CANONICAL = 0.5
"""Probability of the name of a class, instead of another word for it."""
_COLORED = frozenset(
    CITYSCAPES_19.names.index(name)
    for name in ("building", "wall", "fence", "sky", "person", "rider", "car", "truck", "bus",
                 "train", "motorcycle", "bicycle", "vegetation", "traffic sign")
)  # fmt: skip
_COUNTED = frozenset(
    CITYSCAPES_19.names.index(name)
    for name in ("person", "rider", "car", "truck", "bus", "motorcycle", "bicycle", "pole",
                 "traffic light", "traffic sign")
)  # fmt: skip
_NUMBERS = {2: "two", 3: "three", 4: "four"}
_COLUMNS = ("on the left", "in the middle", "on the right")
_ROWS = ("at the top", "", "at the bottom")
_WEATHER: Mapping[str, Sequence[str]] = {
    "clear": ("on a clear day", "in clear weather", "in sunshine"),
    "overcast": ("under an overcast sky", "on a cloudy day", "in gray weather"),
    "rain": ("in the rain", "on a rainy day", "in wet weather"),
    "fog": ("in fog", "on a foggy day", "in the mist"),
    "snow": ("in snowy weather", "on a snowy day", "in winter"),
}
_TIME: Mapping[str, Sequence[str]] = {
    "day": ("by day", "in daylight"),
    "dusk": ("at dusk", "in the evening", "at sunset"),
    "night": ("at night", "in the dark"),
}
_PLACE: Mapping[str, Sequence[str]] = {
    "downtown": ("downtown", "in the city center"),
    "street": ("in a city street", "in a narrow street"),
    "residential": ("in a residential area", "in the suburbs"),
    "avenue": ("on an avenue", "on a boulevard"),
    "highway": ("on a highway", "on a motorway"),
    "rural": ("in the countryside", "on a rural road"),
    "industrial": ("in an industrial area", "between warehouses"),
}
_HUES = ((0.04, "red"), (0.11, "orange"), (0.19, "yellow"), (0.45, "green"), (0.53, "cyan"),
         (0.72, "blue"), (0.80, "purple"), (0.95, "pink"), (1.01, "red"))  # fmt: skip
"""Upper limits of hues (turns) and their names."""


def object_caption(rng: np.random.Generator, class_id: int) -> str:
    """A caption that names one class by its name or by another of its words."""
    template = OBJECT_TEMPLATES[int(rng.integers(len(OBJECT_TEMPLATES)))]
    return template.format(_word(rng, class_id))


def crop_caption(
    rng: np.random.Generator, image: UInt8Array, label: UInt8Array, instances: UInt8Array,
    facts: Facts, whole: bool,
) -> str:  # fmt: skip
    """A caption of up to `MAX_PHRASES` classes in a crop, with positions, and of its scene.

    Args:
        image: (h, w, 3) uint8 RGB.
        label, instances: (h, w) uint8; train ids, and numbers of the objects (0 for stuff).
        whole: the crop shows most of the scene, so the caption says more of it.
    """
    shares = np.bincount(label.ravel(), minlength=256)[: CITYSCAPES_19.num_classes] / label.size
    visible = np.flatnonzero(shares >= MIN_SHARE)
    if len(visible) == 0:
        if not shares.any():
            return "a street" + _ending(rng, facts, whole)
        visible = np.array([shares.argmax()])
    count = min(len(visible), int(rng.integers(2, MAX_PHRASES + 1)))
    chosen = rng.permutation(visible)[:count]
    phrases = [_phrase(rng, image, label == c, instances, int(c), shares[c]) for c in chosen]
    text = phrases[0]
    if len(phrases) > 1:
        text = ", ".join(phrases[:-1]) + (" and " if rng.random() < 0.7 else ", ") + phrases[-1]
    opening = ("", "a photo of ", "There is ", "a picture with ", "a scene with ")
    return opening[int(rng.integers(len(opening)))] + text + _ending(rng, facts, whole)


def color_name(rgb: npt.NDArray[np.float64]) -> str:
    """The English name of a color (3,), RGB 0 to 255."""
    hue, light, saturation = colorsys.rgb_to_hls(*(float(v) / 255 for v in rgb))
    chroma = saturation * (1 - abs(2 * light - 1))
    if chroma < 0.12:
        return "black" if light < 0.25 else "white" if light > 0.75 else "gray"
    if light < 0.1:
        return "black"
    if hue < 0.14 and light < 0.4 and chroma < 0.5:
        return "brown"
    return next(name for limit, name in _HUES if hue < limit)


def _phrase(
    rng: np.random.Generator, image: UInt8Array, mask: npt.NDArray[np.bool_],
    instances: UInt8Array, class_id: int, share: float,
) -> str:  # fmt: skip
    """One class: number or article, size, color, word, position."""
    word = _word(rng, class_id)
    words = []
    if rng.random() < 0.25:
        words.append("large" if share > 0.3 else "medium" if share > 0.1 else "small")
    if class_id in _COLORED and rng.random() < 0.35:
        words.append(color_name(image[mask].mean(0)))
    plural = word.endswith("s") and not word.endswith(("ss", "bus", "grass"))
    number = len(np.unique(instances[mask]))
    if class_id in _COUNTED and number in _NUMBERS and plural:
        words.insert(0, _NUMBERS[number])
    elif not plural:
        words.insert(0, "the" if rng.random() < 0.15 else "a")
    words.append(word)
    if rng.random() < 0.7:
        words.append(_position(mask))
    return " ".join(w for w in words if w)


def _position(mask: npt.NDArray[np.bool_]) -> str:
    """Where the center of mass of a mask lies: row and column of a grid of three by three."""
    rows, columns = np.nonzero(mask)
    row = min(int(3 * (rows.mean() + 0.5) / mask.shape[0]), 2)
    column = min(int(3 * (columns.mean() + 0.5) / mask.shape[1]), 2)
    if row == 1:
        return _COLUMNS[column]
    if column == 1:
        return _ROWS[row]
    return f"{_ROWS[row]} {'left' if column == 0 else 'right'}"


def _ending(rng: np.random.Generator, facts: Facts, whole: bool) -> str:
    """Weather, time, place and viewpoint, each only now and then."""
    often = 2.0 if whole else 1.0
    parts = []
    for probability, table, value in (
        (0.25, _WEATHER, facts.weather), (0.2, _TIME, facts.time), (0.15, _PLACE, facts.place)
    ):  # fmt: skip
        if rng.random() < often * probability:
            choices = table[value]
            parts.append(choices[int(rng.integers(len(choices)))])
    if whole and rng.random() < 0.2:
        view = (
            "near the ground" if facts.eye < 1.2 else "high above" if facts.eye > 2.2 else "a car"
        )
        parts.append(f"seen from {view}")
    if whole and facts.autumn > 0.25 and rng.random() < 0.4:
        parts.append("in autumn")
    return "".join(f" {part}" for part in parts)


def _word(rng: np.random.Generator, class_id: int) -> str:
    """The name of a class, or another of the words that the label space has for it."""
    words = CITYSCAPES_19.synonyms[class_id]
    if rng.random() < _CANONICAL:
        return CITYSCAPES_19.names[class_id]
    return words[int(rng.integers(len(words)))]
