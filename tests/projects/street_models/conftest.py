"""Few small scenes, rendered once."""

from __future__ import annotations

import pytest
from street_models.scenes import Scenes, SceneSet, render_scenes


@pytest.fixture(scope="session")
def scene_folder(tmp_path_factory):
    """A folder with `train`, 24 scenes, and `val`, 4, of 80 x 160 pixels."""
    folder = tmp_path_factory.mktemp("scenes")
    render_scenes(folder / "train", SceneSet(0, "train", 24, 80, 160))
    render_scenes(folder / "val", SceneSet(0, "val", 4, 80, 160))
    return folder


@pytest.fixture(scope="session")
def scenes(scene_folder):
    return Scenes(scene_folder / "train")
