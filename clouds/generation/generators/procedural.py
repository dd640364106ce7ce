"""Pictures by the painter of `clouds.scenes`, which follows the words of the prompt.

It needs no weights and no GPU, and it knows the label of every pixel. Its labels are not for
training: they serve to measure how good pseudo-labels are. The pictures have a look of their own,
see `clouds.scenes.generated_style`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from clouds.data.label_space import CITYSCAPES_19
from clouds.generation.generators.registry import (
    GENERATOR_REGISTRY,
    LARGEST_SEED,
    Picture,
    Setting,
)
from clouds.generation.prompts import SceneWords, read_scene
from clouds.scenes import Contents, Style, paint
from clouds.scenes.demo_data import PAINTER
from clouds.scenes.generated_style import GENERATED_STYLE, draw_style
from clouds.scenes.painter import check_size
from clouds.scenes.style import Lens

TRIES = 5
"""Streets that are drawn up at most until one shows all that the prompt names."""
SEEN = 0.0008
"""Share of the picture's pixels from which on a class counts as shown."""
NOT_ASKED = ("road", "sky")
"""Classes that are in every picture."""

_DENSITY = {"quiet": 0.35, "busy": 1.7}
_LENSES: Mapping[str, Mapping[str, object]] = {
    "car": {"eye": (1.15, 1.5), "tilt": (-0.5, 0.5), "hood": 0.7},
    "sidewalk": {"eye": (1.45, 1.75), "aim": (0.28, 0.72), "hood": 0.0},
    "low": {"eye": (0.45, 0.8), "horizon": (0.46, 0.62), "hood": 0.0},
    "high": {"eye": (3.2, 5.5), "horizon": (0.22, 0.36), "hood": 0.0},
}


def procedural(*, height: int = 768, width: int = 768) -> Procedural:
    """Make the painter.

    Args:
        height, width: of a picture, pixels.

    Raises:
        ValueError: a size below 64 rows or columns.
    """
    check_size((height, width))
    return Procedural((height, width))


GENERATOR_REGISTRY.register(procedural)


class Procedural:
    """The painter as a generator; see `Generator`.

    Args:
        size: (rows, columns).
    """

    name = "procedural"
    model = ""
    labelled = True
    batch_size = 1

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.settings: Mapping[str, Setting] = {"painter": PAINTER, "style": GENERATED_STYLE}

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Picture]:
        """Paint one picture for each prompt; see `Generator.generate`."""
        assert len(prompts) == len(seeds)
        return [
            paint_prompt(text, seed, self.size) for text, seed in zip(prompts, seeds, strict=True)
        ]

    def remarks(self, prompts: Sequence[str]) -> list[str]:
        """Prompts in which no word is known."""
        return [
            f"no word of {text!r} is known to the painter: it paints any street"
            for text in dict.fromkeys(prompts)
            if read_scene(text) == SceneWords()
        ]


def paint_prompt(prompt: str, seed: int, size: tuple[int, int]) -> Picture:
    """Paint what a prompt says: a function of the arguments alone.

    Streets are drawn up until one shows all the classes that the prompt names; of several that
    fail to, the one that shows most of them is taken.

    Args:
        size: (rows, columns).
    """
    assert 0 <= seed <= LARGEST_SEED
    words = read_scene(prompt)
    palms = re.search(r"\bpalms?\b", prompt.lower()) is not None
    asked = [CITYSCAPES_19.names.index(name) for name in words.classes if name not in NOT_ASKED]
    best: tuple[int, Picture] | None = None
    for attempt in range(TRIES):
        rng = np.random.default_rng((seed, attempt))
        style = style_for(words, draw_style(rng, words.weather, words.time), palms=palms)
        picture = Picture(*paint(rng, style, contents_for(words), size))
        missing = len(asked) - _count_shown(picture, asked)
        if best is None or missing < best[0]:
            best = (missing, picture)
        if missing == 0:
            break
    assert best is not None
    return best[1]


def contents_for(words: SceneWords) -> Contents:
    """What the scene must hold and must not."""
    return Contents(
        place=words.place,
        wanted=tuple(sorted(words.classes - set(NOT_ASKED))),
        unwanted=tuple(sorted(words.unwanted - set(NOT_ASKED))),
        density=_DENSITY.get(words.bustle or "", 1.0),
    )


def style_for(words: SceneWords, style: Style, palms: bool = False) -> Style:
    """The style, with what the words say of season and viewpoint, and with palms or not."""
    if words.season is not None:
        style = replace(style, autumn=0.85 if words.season == "autumn" else 0.0)
    if palms:
        style = replace(style, palms=0.85)
    elif words.season == "winter" or words.weather == "snow":
        style = replace(style, palms=0.0)
    if words.viewpoint is not None:
        style = replace(style, lens=_lens_from(style.lens, words.viewpoint))
    return style


def _lens_from(lens: Lens, viewpoint: str) -> Lens:
    changes: dict[str, object] = dict(_LENSES[viewpoint])
    return replace(lens, **changes)  # type: ignore[arg-type]


def _count_shown(picture: Picture, classes: Sequence[int]) -> int:
    """How many of these classes are seen well."""
    assert picture.label is not None
    pixels: npt.NDArray[np.intp] = np.bincount(picture.label.ravel(), minlength=256)
    return int(sum(pixels[c] >= SEEN * picture.label.size for c in classes))
