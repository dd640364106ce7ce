"""The generator `procedural`: images follow the words of the prompt and have exact labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from street_renderer import STYLES
from street_renderer.generated_style import draw_photo_style, draw_style
from street_renderer.generator import render_prompt
from street_renderer.palette import COMMON

from clouds.data.label_space import CITYSCAPES_19
from clouds.generation.generators import build_generator

SIZE = (96, 192)
PROMPTS = ["a tram at night in the rain", "a bus, a wall", "cars in the snow", "a quiet farm road"]


def share(label: np.ndarray, name: str) -> float:
    return float((label == CITYSCAPES_19.names.index(name)).mean())


def generated(prompt: str, seeds: range, size=SIZE):
    return [render_prompt(prompt, seed, size) for seed in seeds]


def test_image_is_a_function_of_prompt_and_seed():
    generator = build_generator("procedural", {"height": 64, "width": 96})
    together = generator.generate(PROMPTS, [5, 6, 7, 8])
    for prompt, seed, image in zip(PROMPTS, [5, 6, 7, 8], together, strict=True):
        alone = generator.generate([prompt], [seed])[0]
        assert np.array_equal(alone.image, image.image)
        assert np.array_equal(alone.label, image.label)
        assert image.image.shape == (64, 96, 3) and image.image.dtype == np.uint8
        assert image.label.shape == (64, 96) and image.label.dtype == np.uint8
        assert set(np.unique(image.label)) <= {*range(19), 255}
    assert not np.array_equal(generator.generate(PROMPTS[:1], [9])[0].image, together[0].image)


@pytest.mark.parametrize(
    ("prompt", "names"),
    [
        ("a tram at night in the rain", ("train",)),
        ("two cyclists and a motorbike beside a brick wall", ("bicycle", "motorcycle", "wall")),
        ("a bus waits at the traffic lights of a busy crossing", ("bus", "traffic light")),
        ("a lorry on a motorway under a road sign", ("truck", "traffic sign")),
        ("pedestrians on the sidewalk, a wooden fence, trees", ("person", "fence", "vegetation")),
    ],
)
def test_classes_of_the_prompt_are_visible(prompt, names):
    labels = [image.label for image in generated(prompt, range(10))]
    for name in names:
        seen = [share(label, name) > 0.0005 for label in labels]
        assert sum(seen) >= 9, (name, seen)


def test_excluded_classes_are_never_visible():
    for image in generated("a downtown street without cars or trees, no people", range(8)):
        for name in ("car", "vegetation", "person"):
            assert share(image.label, name) == 0


def test_weather_time_and_bustle_of_the_prompt_are_rendered():
    def sky_light(prompt):
        sky = CITYSCAPES_19.names.index("sky")
        return np.mean([p.image[p.label == sky].mean() for p in generated(prompt, range(6))])

    day, night = (sky_light(f"a residential street on a clear {t}") for t in ("day", "night"))
    assert night < 0.65 * day
    # snow covers the ground; fog reduces the contrast
    road = CITYSCAPES_19.names.index("road")

    def road_light(prompt):
        return np.mean([p.image[p.label == road].mean() for p in generated(prompt, range(6))])

    assert road_light("snow on a road at noon") > 1.15 * road_light("a road at noon, sunny")

    far = [CITYSCAPES_19.names.index(name) for name in ("building", "vegetation", "sky")]

    def contrast(prompt):
        images = generated(prompt, range(6))
        return np.mean([p.image[np.isin(p.label, far)].std() for p in images])

    assert contrast("an avenue in thick fog at noon") < 0.75 * contrast("a sunny avenue at noon")

    def moving(prompt):
        return np.mean(
            [np.isin(p.label, range(11, 19)).mean() for p in generated(prompt, range(16))]
        )

    assert moving("a busy avenue") > 1.3 * moving("a quiet avenue")


def test_viewpoint_of_the_prompt_is_rendered():
    def sky(prompt):
        return np.mean([share(p.label, "sky") for p in generated(prompt, range(8))])

    assert sky("a motorway, view from a footbridge") < sky("a motorway, low angle")


def test_every_image_has_its_own_style_and_none_is_an_evaluated_domain():
    styles = [draw_photo_style(np.random.default_rng(seed)) for seed in range(20)]
    asphalts = {style.palette["asphalt"] for style in styles}
    assert len(asphalts) == 20
    domains = [replace(style, name="") for style in STYLES.values()]
    assert not any(replace(style, name="") in domains for style in styles)
    # Facades vary more between images than between domains.
    means = [np.mean(style.palette["facade"], axis=0) for style in styles]
    of_domains = [np.mean(style.palette["facade"], axis=0) for style in STYLES.values()
                  if "facade" in style.palette]  # fmt: skip
    assert np.std(means, axis=0).mean() > np.std(of_domains, axis=0).mean()


def test_style_has_the_requested_weather_and_time():
    rng = np.random.default_rng(0)
    for draw in (draw_style, draw_photo_style):
        assert list(draw(rng, "fog", "night").conditions) == [("fog", "night")]
        drawn = {next(iter(draw(rng, time="dusk").conditions)) for _ in range(60)}
        assert {time for _, time in drawn} == {"dusk"} and len(drawn) > 1


def test_images_of_prompts_are_nearer_to_neutral_colors_than_wide_styles():
    """Twenty palettes of each: mean distance of a color from the common one."""

    def distance(draw):
        palettes = [draw(np.random.default_rng(seed)).palette for seed in range(20)]
        gaps = [
            np.linalg.norm(np.subtract(palette[name], COMMON[name], dtype=float), axis=-1).mean()
            for palette in palettes
            for name in COMMON
        ]
        return np.mean(gaps)

    assert 0.4 < distance(draw_photo_style) / distance(draw_style) < 0.8


def test_prompts_without_a_known_word_give_a_warning():
    generator = build_generator("procedural", {"height": 64, "width": 64})
    warnings = generator.prompt_warnings(["a bus", "quelque chose", "quelque chose"])
    assert len(warnings) == 1 and "quelque chose" in warnings[0]


def test_a_too_small_size_is_an_error():
    with pytest.raises(ValueError, match="at least 64"):
        build_generator("procedural", {"height": 32, "width": 64})


def test_the_settings_have_the_keys_of_earlier_versions():
    assert build_generator("procedural").settings == {"painter": 1, "style": 2}
