"""Folders of rendered scenes: interrupted and continued, checked against what is requested."""

from __future__ import annotations

import numpy as np
import pytest
from street_models import scenes as module
from street_models.scenes import Scenes, SceneSet, render_scenes
from street_renderer.pretraining_style import pretraining_scene

SET = SceneSet(seed=0, split="val", count=5, height=64, width=96)


class PowerCutError(Exception):
    pass


def interrupted(monkeypatch, after):
    rendered = []

    def render(*args):
        if len(rendered) == after:
            raise PowerCutError
        rendered.append(args)
        return pretraining_scene(*args)

    monkeypatch.setattr(module, "pretraining_scene", render)
    return rendered


def test_scenes_are_those_of_the_renderer(tmp_path):
    render_scenes(tmp_path, SET)
    scenes = Scenes(tmp_path)
    assert len(scenes) == 5
    scene = pretraining_scene(0, "val", 3, (64, 96))
    assert np.array_equal(scenes.images[3], scene.rendered.image)
    assert np.array_equal(scenes.labels[3], scene.rendered.label)
    assert np.array_equal(scenes.instances[3], scene.rendered.instances)
    assert (scenes.facts[3].weather, scenes.facts[3].place) == (scene.weather, scene.place)


def test_an_interrupted_run_is_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SAVE_EVERY", 2)
    with monkeypatch.context() as patch:
        interrupted(patch, after=3)
        with pytest.raises(PowerCutError):
            render_scenes(tmp_path / "cut", SET)
        with pytest.raises(FileNotFoundError, match=r"2 of 5 scenes.*interrupted.*again"):
            Scenes(tmp_path / "cut")
    with monkeypatch.context() as patch:
        rendered = interrupted(patch, after=99)
        render_scenes(tmp_path / "cut", SET)
        assert [args[2] for args in rendered] == [2, 3, 4]
    render_scenes(tmp_path / "whole", SET)
    cut, whole = Scenes(tmp_path / "cut"), Scenes(tmp_path / "whole")
    assert np.array_equal(cut.images, whole.images) and cut.facts == whole.facts


def test_other_scenes_are_refused(tmp_path):
    render_scenes(tmp_path, SET)
    with pytest.raises(ValueError, match=r"other scenes .*seed=0.*requested .*seed=1"):
        render_scenes(tmp_path, SceneSet(1, "val", 5, 64, 96))


def test_a_folder_without_scenes(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no rendered scenes"):
        Scenes(tmp_path)
