"""Scenes of rendered datasets in another look, for their labels."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from street_renderer.dataset_writer import Recipe, recorded_scene, render_sample
from street_renderer.dataset_writer import run as render
from street_renderer.demo_data import prepare
from street_renderer.generator import procedural
from street_renderer.prompt_reader import parse_scene
from street_renderer.relighting import another_look
from street_renderer.renderer import render_layout

from clouds.cli import generate
from clouds.data.datasets import forget_listings, get_dataset
from clouds.generation.condition import LabelConditions, Window

SIZE = (96, 192)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Six rendered images of gta5 and four of synthia, which lacks classes."""
    folder = tmp_path_factory.mktemp("rendered")
    list(render(prepare(folder, {"gta5": 6, "synthia": 4}, seed=3, size=SIZE), workers=1))
    forget_listings()
    return folder


def generated(root, name, count, prompt="a street at night in the rain", size=SIZE):
    generator = procedural(height=size[0], width=size[1])
    conditions = LabelConditions(get_dataset(name, root), size)
    generator.check_conditions(conditions)
    used = [conditions[number] for number in range(count)]
    return used, generator.generate_for_labels([prompt] * count, list(range(count)), used)


def test_a_recorded_scene_is_that_of_the_dataset():
    recipe = Recipe.of("gta5", 3, SIZE)
    layout, look, details = recorded_scene(recipe, 2)
    again = render_layout(details, layout, look)
    assert np.array_equal(again.image, render_sample(recipe, 2).image)


@pytest.mark.parametrize("name", ["gta5", "synthia"])
def test_things_stay_where_they_are_in_another_light(root, name):
    conditions, images = generated(root, name, 4)
    by_day = generated(root, name, 4, "a street by day in clear weather")[1]
    for condition, image, day in zip(conditions, images, by_day, strict=True):
        assert (image.label == condition.label).mean() > 0.95
        assert not image.approximate  # it is the label of the new image
        assert image.image.mean() < 0.8 * day.image.mean()
        assert set(np.unique(image.label)) <= {*get_dataset(name, root).classes_present, 255}


def test_image_and_label_are_the_window_of_the_scene(root):
    generator = procedural(height=SIZE[0], width=SIZE[1])
    conditions = LabelConditions(get_dataset("gta5", root), SIZE)
    generator.check_conditions(conditions)
    whole = conditions[0]
    part = replace(whole, window=Window(10, 20, 48, 64, (48, 64)))
    half = replace(whole, window=Window(0, 0, *SIZE, (48, 96)))
    images = generator.generate_for_labels(["a street"] * 3, [7] * 3, [whole, part, half])
    assert np.array_equal(images[1].image, images[0].image[10:58, 20:84])
    assert np.array_equal(images[1].label, images[0].label[10:58, 20:84])
    assert np.array_equal(images[2].label, images[0].label[::2, ::2])
    means = images[0].image.reshape(48, 2, 96, 2, 3).mean((1, 3))
    assert np.abs(images[2].image - means).max() <= 0.5


def test_the_dataset_root_may_be_relative(root, monkeypatch):
    absolute = generated(root, "gta5", 1)[1][0]
    monkeypatch.chdir(root.parent)
    relative = generated(Path(root.name), "gta5", 1)[1][0]
    assert np.array_equal(relative.image, absolute.image)


def test_a_look_is_a_function_of_the_seed():
    look = recorded_scene(Recipe.of("gta5", 3, SIZE), 0)[1]
    scene = parse_scene("a street in fog")
    first, again, other = (another_look(look, scene, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert first.camera == look.camera and first.weather == "fog"
    assert first.style.palette != look.style.palette


def test_other_labels_are_refused(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    forget_listings()
    for kind in ("images", "labels"):
        (tmp_path / "gta5").mkdir(exist_ok=True)
        (tmp_path / "gta5" / kind).symlink_to(root / "gta5" / kind)
    command = ["--output", str(tmp_path / "x"), "--generator", "procedural", "--condition", "gta5"]
    with pytest.raises(SystemExit):
        generate.main(command)
    assert "knows only the scenes that it has rendered" in capsys.readouterr().err
    record = json.loads((root / "demo_data.json").read_text())
    record["gta5"]["painter"] = 0
    (tmp_path / "demo_data.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit):
        generate.main(command)
    assert "rendered by version 0 of the renderer; this is version 1" in capsys.readouterr().err
