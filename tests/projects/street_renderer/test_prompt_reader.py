"""The prompt reader on hand-labeled sentences, and the coverage of the repository's prompts."""

from __future__ import annotations

import pytest
from street_renderer import Contents, prompt_lexicon
from street_renderer.prompt_reader import coverage, parse_scene
from street_renderer.style import PLACES, TIMES, WEATHERS

from clouds.data.label_space import CITYSCAPES_19
from clouds.generation.prompts import DEFAULT_PROMPTS, near_duplicates, over_long, read_prompts

RARE = [*"train bus rider motorcycle wall fence truck".split(), "traffic light"]


# ---------------------------------------------------------------------- words
@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("A tram passes a cyclist and two pedestrians", {"train", "rider", "bicycle", "person"}),
        ("Trucks, lorries and a pickup", {"truck"}),
        ("motorbikes behind buses", {"motorcycle", "bus"}),
        ("people at a bus stop", {"person"}),
        ("a street lamp", {"pole"}),
        ("a street", {"road"}),
        ("street signs and stop signs", {"traffic sign"}),
        ("shop signs", {"building"}),
        ("women and children", {"person"}),
        ("taxis and cabs", {"car"}),
        ("a man on a red bicycle", {"rider", "bicycle"}),
        ("a man beside a red bicycle", {"person", "bicycle"}),
        ("snow on a parked motorcycle", {"motorcycle"}),
        ("girls riding scooters", {"rider", "motorcycle"}),
        ("scooters weave through the cars", {"rider", "motorcycle", "car"}),
        ("a no parking sign on a pole", {"traffic sign", "pole"}),
        ("Palm trees and hedges; grass", {"vegetation", "terrain"}),
        ("a country lane", {"road"}),
        ("she carries a carpet, busily training", set()),  # inside other words
        ("CARS!", {"car"}),
        ("", set()),
    ],
)
def test_classes_are_read_by_whole_words_and_longest_phrases(text, classes):
    assert parse_scene(text).classes == classes


@pytest.mark.parametrize(
    ("text", "unwanted", "classes"),
    [
        ("a road with no cars", {"car"}, {"road"}),
        ("no cars, a tram passes", {"car"}, {"train"}),
        ("no cars or trucks in the street", {"car", "truck"}, {"road"}),
        ("no cars, trucks or buses on the road", {"car", "truck", "bus"}, {"road"}),
        ("without traffic lights and poles, a bus", {"traffic light", "pole"}, {"bus"}),
        ("no trees but a wall", {"vegetation"}, {"wall"}),
        ("not a single truck in sight", {"truck"}, set()),
        ("a car-free avenue", {"car"}, {"road"}),
        ("a street free of cars", {"car"}, {"road"}),
        ("no cars except one car", set(), {"car"}),
        ("a rider without a helmet", set(), {"rider"}),
        ("no doubt a bus", set(), {"bus"}),
        ("no traffic", {"car", "truck", "bus", "train", "motorcycle"}, set()),
        ("nobody on the sidewalk", {"person", "rider"}, {"sidewalk"}),
        ("an alley, no one there", {"person", "rider"}, {"road"}),
        ("no sky, no road", set(), set()),  # they are always there
        ("an empty bottle on the road", set(), {"road"}),
    ],
)
def test_negation(text, unwanted, classes):
    scene = parse_scene(text)
    assert scene.unwanted == unwanted
    assert scene.classes == classes


@pytest.mark.parametrize("text", ["An empty street", "The road is deserted.", "a deserted town"])
def test_moving_classes_are_excluded_in_an_empty_street(text):
    scene = parse_scene(text)
    moving = {"person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"}
    assert scene.unwanted == moving
    assert scene.bustle == "quiet"
    one = parse_scene(text + " with one parked bus")
    assert one.classes >= {"bus"}
    assert one.unwanted == moving - {"bus"}


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("drizzle", "weather", "rain"),
        ("a foggy morning", "weather", "fog"),
        ("snowy and foggy", "weather", "snow"),
        ("under a leaden sky", "weather", "overcast"),
        ("a cloudless noon", "weather", "clear"),
        ("no rain today", "weather", None),
        ("a clear view of the truck", "weather", None),
        ("snow-capped peaks", "weather", None),
        ("a red wall", "weather", None),
        ("at dawn", "time", "dusk"),
        ("after dark", "time", "night"),
        ("bright noon", "time", "day"),
        ("a sunny street", "time", "day"),
        ("on a sunny evening", "time", "dusk"),
        ("Sunday", "time", None),
        ("downtown Lima", "place", "downtown"),
        ("a country road through fields", "place", "rural"),
        ("warehouses by a motorway", "place", "industrial"),
        ("shops in a suburb", "place", "residential"),
        ("autumn leaves", "season", "autumn"),
        ("in deep snow", "season", "winter"),
        ("a late snowfall in April", "season", "spring"),
        ("seen through the windshield", "viewpoint", "car"),
        ("from a footbridge", "viewpoint", "high"),
        ("a bustling square", "bustle", "busy"),
    ],
)
def test_conditions(text, field, value):
    assert getattr(parse_scene(text), field) == value


def test_every_class_is_read_by_its_own_name_and_every_value_by_a_word():
    for name in CITYSCAPES_19.names:
        assert name in parse_scene(f"a {name}").classes
    assert set(prompt_lexicon.CLASS_WORDS) == set(CITYSCAPES_19.names)
    assert set(prompt_lexicon.WEATHER_WORDS) == set(WEATHERS)
    assert set(prompt_lexicon.TIME_WORDS) == set(TIMES)
    assert set(prompt_lexicon.PLACE_WORDS) == set(PLACES)


def test_every_described_scene_can_be_requested():
    for prompt in read_prompts(DEFAULT_PROMPTS):
        scene = parse_scene(prompt)
        Contents(scene.place, tuple(scene.classes), tuple(scene.unwanted))  # raises otherwise


# ---------------------------------------------------------------------- coverage
def test_coverage_counts_each_prompt_once_for_a_class():
    counts = coverage(["A bus, a bus and two buses in rain", "No bus, a car at night", "Nothing"])
    assert list(counts["class"]) == list(CITYSCAPES_19.names)
    assert {name: n for name, n in counts["class"].items() if n} == {"bus": 1, "car": 1}
    assert counts["weather"] == {
        "clear": 0, "overcast": 0, "rain": 1, "fog": 0, "snow": 0, "not named": 2
    }  # fmt: skip
    assert counts["time"]["night"] == 1
    for topic, values in counts.items():
        assert topic == "class" or sum(values.values()) == 3


# ---------------------------------------------------------------------- prompts of the repository
def test_the_prompts_are_many_balanced_short_and_without_repetition():
    prompts = read_prompts(DEFAULT_PROMPTS)
    assert len(prompts) >= 240
    counts = coverage(prompts)
    assert min(counts["class"].values()) >= 30
    assert min(counts["class"][name] for name in RARE) >= 40
    for topic in ("weather", "time", "place"):
        assert min(n for value, n in counts[topic].items() if value != "not named") >= 20
    for topic in ("season", "viewpoint"):
        assert min(counts[topic].values()) >= 4
    assert near_duplicates(prompts, 0.3) == []
    assert over_long(prompts) == []
    assert all(prompt.isascii() and len(prompt.split()) >= 10 for prompt in prompts)
    openings = {" ".join(prompt.lower().split()[:3]) for prompt in prompts}
    assert len(openings) > 0.85 * len(prompts)  # no template


def test_any_first_part_of_the_prompts_is_balanced():
    prompts = read_prompts(DEFAULT_PROMPTS)
    whole = coverage(prompts)["class"]
    start = coverage(prompts[:80])["class"]
    for name in CITYSCAPES_19.names:
        assert start[name] == pytest.approx(whole[name] * 80 / len(prompts), rel=0.35, abs=3)
