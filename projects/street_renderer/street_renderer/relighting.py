"""Scenes of rendered datasets in another look: the same layout and camera, other light and colors.

A rendered dataset records how it was rendered (`demo_data`), so the scene of a label is known.
"""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np

from clouds.data.datasets import DatasetSpec
from clouds.data.label_space import IGNORE
from clouds.generation.condition import Condition
from clouds.generation.generators.registry import GeneratedImage
from street_renderer.dataset_writer import Recipe, recorded_scene, sample_paths
from street_renderer.demo_data import RECORD, read_record
from street_renderer.generated_style import draw_photo_style
from street_renderer.prompt_reader import SceneDescription
from street_renderer.renderer import RENDERER_VERSION, render_layout
from street_renderer.style import Look, sample_look


class RecordedScenes:
    """The scenes of a rendered dataset.

    Args:
        dataset: in a folder that `clouds make-demo-data` has written.

    Raises:
        ValueError: it was not rendered, or by another version of the renderer.
    """

    def __init__(self, dataset: DatasetSpec) -> None:
        record = read_record(dataset.root).get(dataset.name)
        if record is None:
            raise ValueError(
                f"--condition is {dataset.name} in {dataset.root}, which is not in "
                f"{dataset.root / RECORD}: the renderer knows only the scenes that it has rendered "
                "(clouds make-demo-data). For other labels use --generator stable_diffusion with "
                "--controlnet."
            )
        if record.renderer != RENDERER_VERSION:
            raise ValueError(
                f"--condition is {dataset.name}, which was rendered by version {record.renderer} "
                f"of the renderer; this is version {RENDERER_VERSION}, whose scenes differ. Render "
                "the dataset again."
            )
        self._recipe = Recipe.of(dataset.name, record.seed, record.size, record.show_unlabelled)
        self._labelled = dataset.classes_present
        self._indices = {
            sample_paths(dataset.root.absolute(), dataset.name, index)[1]: index
            for index in range(record.count)
        }

    def render(self, condition: Condition, scene: SceneDescription, seed: int) -> GeneratedImage:
        """The scene of a label in the look that `scene` and `seed` describe, and its label.

        Classes that the dataset does not label are not labelled here either.
        """
        index = self._indices[condition.file.absolute()]
        layout, look, details = recorded_scene(self._recipe, index)
        rendered = render_layout(details, layout, another_look(look, scene, seed))
        table = np.full(256, IGNORE, np.uint8)
        table[list(self._labelled)] = self._labelled
        window = condition.window
        return GeneratedImage(
            window.apply(rendered.image, cv2.INTER_AREA),
            window.apply(cv2.LUT(rendered.label, table)),
        )


def another_look(look: Look, scene: SceneDescription, seed: int) -> Look:
    """A look from the styles of prompts, with the camera of `look`.

    What changes the shapes of things is kept: camera, hood and the share of palms.
    """
    rng = np.random.default_rng(seed)
    style = draw_photo_style(rng, scene.weather, scene.time)
    style = replace(style, palms=look.style.palms)
    size = look.camera.rows, look.camera.columns
    new = sample_look(rng, style, size)
    return replace(new, camera=look.camera, grade=replace(new.grade, hood=look.grade.hood))
