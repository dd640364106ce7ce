"""Captions: they name what is in a crop, where it is, and in which color."""

from __future__ import annotations

import numpy as np
import pytest
from street_models.captions import MAX_PHRASES, color_name, crop_caption, object_caption
from street_models.scenes import Facts

from clouds.data.label_space import CITYSCAPES_19

ID = {name: number for number, name in enumerate(CITYSCAPES_19.names)}
FACTS = Facts("rain", "night", "rural", 1.0, 0.0)


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((220, 20, 20), "red"), ((30, 60, 200), "blue"), ((40, 160, 50), "green"),
        ((240, 200, 40), "yellow"), ((128, 128, 128), "gray"), ((10, 10, 12), "black"),
        ((245, 245, 245), "white"), ((110, 70, 40), "brown"), ((240, 130, 20), "orange"),
    ],
)  # fmt: skip
def test_names_of_colors(rgb, name):
    assert color_name(np.array(rgb, np.float64)) == name


def test_a_caption_of_an_object_has_a_word_of_its_class_alone():
    others = [w for c, ws in enumerate(CITYSCAPES_19.synonyms) if c != ID["bus"] for w in ws]
    captions = {object_caption(np.random.default_rng(i), ID["bus"]) for i in range(200)}
    assert len(captions) > 20
    for caption in captions:
        words = caption.replace(".", "").split()
        assert "bus" in words or "buses" in words
        assert not set(words) & {w for w in others if " " not in w}


def half_and_half(left: str, right: str):
    """A crop with one class in its left half and another in its right, a red and a blue one."""
    label = np.full((40, 40), ID[left], np.uint8)
    label[:, 20:] = ID[right]
    image = np.full((40, 40, 3), (200, 20, 20), np.uint8)
    image[:, 20:] = (20, 40, 200)
    return image, label, np.zeros_like(label)


def test_positions_and_colors_are_true():
    captions = [
        crop_caption(np.random.default_rng(i), *half_and_half("car", "bus"), FACTS, False)
        for i in range(300)
    ]
    said = " ".join(captions)
    for true in ("on the left", "on the right", "red", "blue"):
        assert true in said
    for false in ("at the top", "at the bottom", "in the middle", "green", "yellow", "clear"):
        assert false not in said
    for caption in captions:
        for part in caption.replace(" and ", ", ").split(", "):
            if "on the left" in part:
                assert ("car" in part) and "blue" not in part
            if "on the right" in part:
                assert "bus" in part and "red" not in part


def test_both_classes_are_named_and_absent_ones_never():
    for i in range(100):
        rng = np.random.default_rng(i)
        text = crop_caption(rng, *half_and_half("sky", "person"), FACTS, False)
        assert "person" in text and ("sky" in text or "clouds" in text)
        assert "car" not in text.split() and "train" not in text


def test_a_small_share_is_not_named():
    image, label, instances = half_and_half("sky", "sky")
    label[0, :20] = ID["bicycle"]  # 1.25 %
    for i in range(50):
        text = crop_caption(np.random.default_rng(i), image, label, instances, FACTS, False)
        assert "bicycle" not in text and "bike" not in text


def test_at_most_four_classes():
    label = np.repeat(np.arange(19, dtype=np.uint8), 40).reshape(19, 40)
    image = np.zeros((19, 40, 3), np.uint8)
    for i in range(20):
        rng = np.random.default_rng(i)
        text = crop_caption(rng, image, label, np.zeros_like(label), FACTS, True)
        assert text.count(", ") + text.count(" and ") <= MAX_PHRASES - 1


def test_whole_scenes_tell_weather_time_and_place():
    said = " ".join(
        crop_caption(np.random.default_rng(i), *half_and_half("road", "sky"), FACTS, True)
        for i in range(100)
    )
    assert "in the rain" in said and "at night" in said and "in the countryside" in said
    assert "seen from near the ground" in said and "autumn" not in said


def test_a_crop_without_a_labelled_pixel_has_a_caption():
    label = np.full((40, 40), 255, np.uint8)
    image = np.zeros((40, 40, 3), np.uint8)
    crop_caption(np.random.default_rng(0), image, label, np.zeros_like(label), FACTS, False)
