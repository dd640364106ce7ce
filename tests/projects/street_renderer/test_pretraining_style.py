"""Scenes for pre-training: away from the looks of the demo, and none of its images."""

from __future__ import annotations

import hashlib
import zlib

import numpy as np
import pytest
from street_renderer.dataset_writer import Recipe, render_sample
from street_renderer.domains import get_style
from street_renderer.palette import COMMON
from street_renderer.pretraining_style import (
    CONDITIONS,
    LEFT_OUT,
    draw_pretraining_style,
    pretraining_scene,
    seed_sequence,
)

SIZE = (64, 128)
DEMO = ("gta5", "cityscapes_val", "bdd_val", "mapillary_val")


@pytest.fixture(scope="module")
def styles():
    return [draw_pretraining_style(np.random.default_rng(seed)) for seed in range(40)]


def test_the_looks_of_the_demo_are_left_out():
    assert set(LEFT_OUT) == {"gta5", "cityscapes", "bdd100k", "mapillary_vistas"}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_no_color_is_one_of_the_palette(styles, name):
    look = get_style(name)
    for style in styles:
        for material, colors in style.palette.items():
            theirs = look.palette.get(material, COMMON[material])
            for r, g, b in colors:
                for x, y, z in theirs:
                    assert (r - x) ** 2 + (g - y) ** 2 + (b - z) ** 2 >= 36


@pytest.mark.parametrize("name", LEFT_OUT)
def test_texture_and_camera_are_others(styles, name):
    look = get_style(name)

    def in_ranges(lens, *names):
        inside = []
        for part in names:
            (value, same), (low, high) = getattr(lens, part), getattr(look.lens, part)
            assert value == same
            inside.append(low <= value <= high)
        return all(inside)

    for style in styles:
        assert abs(style.texture - look.texture) >= 0.03
        assert not in_ranges(style.lens, "eye", "horizon", "view")
        assert not in_ranges(style.lens, "saturation", "contrast", "noise")


def test_the_family_is_wide(styles):
    for name, low, high in (("eye", 1.2, 2.6), ("view", 55, 95), ("saturation", 0.7, 1.4)):
        values = [getattr(style.lens, name)[0] for style in styles]
        assert min(values) < low and max(values) > high
    assert min(s.texture for s in styles) < 0.4 and max(s.texture for s in styles) > 1.1


@pytest.mark.parametrize("name", LEFT_OUT)
def test_the_weather_is_another_mix(name):
    theirs = get_style(name).conditions
    pairs = set(CONDITIONS) | set(theirs)
    differences = [
        abs(
            CONDITIONS.get(pair, 0) / sum(CONDITIONS.values())
            - theirs.get(pair, 0) / sum(theirs.values())
        )
        for pair in pairs
    ]
    assert sum(differences) / 2 > 0.25  # total variation


def test_no_scene_has_the_random_numbers_of_an_image_of_the_demo():
    demo = {
        np.random.SeedSequence((seed, zlib.crc32(name.encode()), index)).generate_state(4).tobytes()
        for seed in range(3)
        for name in DEMO
        for index in range(500)
    }
    pretraining = {
        seed_sequence(seed, split, index).generate_state(4).tobytes()
        for seed in range(3)
        for split in ("train", "val")
        for index in range(500)
    }
    assert len(demo) == 3 * 4 * 500 and len(pretraining) == 3 * 2 * 500
    assert demo.isdisjoint(pretraining)


def test_the_seeds_have_a_namespace_of_their_own():
    mine = seed_sequence(0, "train", 5)
    without = np.random.SeedSequence(mine.entropy)
    assert len(mine.spawn_key) == 1 and without.spawn_key == ()
    assert mine.generate_state(4).tobytes() != without.generate_state(4).tobytes()


def test_no_image_is_one_of_the_demo():
    def digest(image):
        return hashlib.sha256(image.tobytes()).digest()

    demo = {
        digest(render_sample(Recipe.of(name, 0, SIZE), index).image)
        for name in DEMO
        for index in range(3)
    }
    mine = {
        digest(pretraining_scene(0, split, index, SIZE).rendered.image)
        for split in ("train", "val")
        for index in range(6)
    }
    assert len(demo) == 12 and len(mine) == 12
    assert demo.isdisjoint(mine)


def test_a_scene_is_a_function_of_its_arguments():
    first, again = (pretraining_scene(3, "train", 7, SIZE) for _ in range(2))
    assert np.array_equal(first.rendered.image, again.rendered.image)
    assert np.array_equal(first.rendered.label, again.rendered.label)
    assert (first.weather, first.time, first.place, first.eye) == (
        again.weather, again.time, again.place, again.eye,
    )  # fmt: skip


def test_nights_are_darker_than_days():
    scenes = [pretraining_scene(0, "val", index, SIZE) for index in range(24)]
    means = {
        time: np.mean([s.rendered.image.mean() for s in scenes if s.time == time])
        for time in ("day", "night")
    }
    assert means["night"] < 0.8 * means["day"]
