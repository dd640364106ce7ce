"""The renderer as an image generator of `clouds.generation`, named `procedural`.

It renders what the prompt describes, without weights or a GPU, and writes exact labels, on which
pseudo-labels are evaluated. For labels of rendered datasets it renders their scenes in another look
(`relighting`). `generated_style` describes the appearance of the images. The library finds this
generator by its entry point (pyproject.toml).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from clouds.data.label_space import CITYSCAPES_19
from clouds.generation.condition import Condition, LabelConditions
from clouds.generation.generators.registry import (
    MAX_SEED,
    GeneratedImage,
    SettingValue,
)
from street_renderer import Contents, Style, render
from street_renderer.generated_style import GENERATED_STYLE, draw_photo_style
from street_renderer.prompt_reader import SceneDescription, parse_scene
from street_renderer.relighting import RecordedScenes
from street_renderer.renderer import RENDERER_VERSION, check_size
from street_renderer.style import Lens

MAX_ATTEMPTS = 5
"""Number of scenes that are rendered at most until one shows all classes of the prompt."""
MIN_VISIBLE = 0.0008
"""Share of the pixels from which a class counts as visible."""
ALWAYS_VISIBLE = ("road", "sky")
"""Classes that are in every image."""

_DENSITY = {"quiet": 0.35, "busy": 1.7}
_LENSES: Mapping[str, Mapping[str, object]] = {
    "car": {"eye": (1.15, 1.5), "tilt": (-0.5, 0.5), "hood": 0.7},
    "sidewalk": {"eye": (1.45, 1.75), "aim": (0.28, 0.72), "hood": 0.0},
    "low": {"eye": (0.45, 0.8), "horizon": (0.46, 0.62), "hood": 0.0},
    "high": {"eye": (3.2, 5.5), "horizon": (0.22, 0.36), "hood": 0.0},
}


def procedural(*, height: int = 768, width: int = 768) -> Procedural:
    """Build the generator.

    Args:
        height, width: of an image, pixels.

    Raises:
        ValueError: a height or width below 64 pixels.
    """
    check_size((height, width))
    return Procedural((height, width))


class Procedural:
    """The renderer as a `Generator`.

    Args:
        size: (height, width), pixels.
    """

    name = "procedural"
    model = ""
    has_labels = True
    batch_size = 1

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        # The key "painter" is kept: folders are resumed only if their recorded settings are equal.
        self.settings: Mapping[str, SettingValue] = {
            "painter": RENDERER_VERSION,
            "style": GENERATED_STYLE,
        }
        self._scenes: RecordedScenes | None = None

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[GeneratedImage]:
        """Render one image per prompt; see `Generator.generate`."""
        assert len(prompts) == len(seeds)
        return [
            render_prompt(text, seed, self.size) for text, seed in zip(prompts, seeds, strict=True)
        ]

    def check_conditions(self, conditions: LabelConditions) -> None:
        """Raise ValueError if the labels are not those of a rendered dataset."""
        self._scenes = RecordedScenes(conditions.dataset)

    def generate_for_labels(
        self, prompts: Sequence[str], seeds: Sequence[int], conditions: Sequence[Condition]
    ) -> list[GeneratedImage]:
        """Render the scene of each label in another look, after `check_conditions`.

        Weather and time are those of the prompt; the labels are those of the new images.
        """
        assert self._scenes is not None
        return [
            self._scenes.render(condition, parse_scene(prompt), seed)
            for prompt, seed, condition in zip(prompts, seeds, conditions, strict=True)
        ]

    def prompt_warnings(self, prompts: Sequence[str]) -> list[str]:
        """Warnings for prompts without a known word."""
        return [
            f"no word of {text!r} is in the lexicon of the renderer: the scene is random"
            for text in dict.fromkeys(prompts)
            if parse_scene(text) == SceneDescription()
        ]


def render_prompt(prompt: str, seed: int, size: tuple[int, int]) -> GeneratedImage:
    """Render a prompt; the image is a function of the arguments alone.

    Up to `MAX_ATTEMPTS` scenes are rendered until one shows all classes that the prompt names;
    otherwise the first one that shows the most of them is returned.

    Args:
        size: (height, width), pixels.
    """
    assert 0 <= seed <= MAX_SEED
    scene = parse_scene(prompt)
    palms = re.search(r"\bpalms?\b", prompt.lower()) is not None
    requested = [
        CITYSCAPES_19.names.index(name) for name in scene.classes if name not in ALWAYS_VISIBLE
    ]
    best: tuple[int, GeneratedImage] | None = None
    for attempt in range(MAX_ATTEMPTS):
        rng = np.random.default_rng((seed, attempt))
        style = style_for(scene, draw_photo_style(rng, scene.weather, scene.time), palms=palms)
        image = GeneratedImage(*render(rng, style, contents_for(scene), size))
        missing = len(requested) - _count_visible(image, requested)
        if best is None or missing < best[0]:
            best = (missing, image)
        if missing == 0:
            break
    assert best is not None
    return best[1]


def contents_for(scene: SceneDescription) -> Contents:
    """The requested and excluded contents of the scene."""
    return Contents(
        place=scene.place,
        wanted=tuple(sorted(scene.classes - set(ALWAYS_VISIBLE))),
        unwanted=tuple(sorted(scene.unwanted - set(ALWAYS_VISIBLE))),
        density=_DENSITY.get(scene.bustle or "", 1.0),
    )


def style_for(scene: SceneDescription, style: Style, palms: bool = False) -> Style:
    """The style with the season and viewpoint of the prompt, and with palms if requested."""
    if scene.season is not None:
        style = replace(style, autumn=0.85 if scene.season == "autumn" else 0.0)
    if palms:
        style = replace(style, palms=0.85)
    elif scene.season == "winter" or scene.weather == "snow":
        style = replace(style, palms=0.0)
    if scene.viewpoint is not None:
        style = replace(style, lens=_lens_from(style.lens, scene.viewpoint))
    return style


def _lens_from(lens: Lens, viewpoint: str) -> Lens:
    changes: dict[str, object] = dict(_LENSES[viewpoint])
    return replace(lens, **changes)  # type: ignore[arg-type]


def _count_visible(image: GeneratedImage, classes: Sequence[int]) -> int:
    """Number of these classes that cover at least `MIN_VISIBLE` of the image."""
    assert image.label is not None
    pixels: npt.NDArray[np.intp] = np.bincount(image.label.ravel(), minlength=256)
    return int(sum(pixels[c] >= MIN_VISIBLE * image.label.size for c in classes))
