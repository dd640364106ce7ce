from __future__ import annotations

import itertools
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import check_prompts as tool
import numpy as np
import pytest

from clouds.data.label_space import CITYSCAPES_19
from clouds.generation import scene_lexicon
from clouds.generation.prompts import (
    BANK,
    Prompt,
    clip_tokens,
    coverage,
    cut_prompts,
    near_duplicates,
    over_long,
    read_prompts,
    read_scene,
)
from clouds.scenes import Contents
from clouds.scenes.style import PLACES, TIMES, WEATHERS

REPOSITORY = Path(__file__).resolve().parents[1]
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
    assert read_scene(text).classes == classes


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
    scene = read_scene(text)
    assert scene.unwanted == unwanted
    assert scene.classes == classes


@pytest.mark.parametrize("text", ["An empty street", "The road is deserted.", "a deserted town"])
def test_nothing_moves_in_an_empty_street(text):
    scene = read_scene(text)
    moving = {"person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"}
    assert scene.unwanted == moving
    assert scene.bustle == "quiet"
    one = read_scene(text + " with one parked bus")
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
    assert getattr(read_scene(text), field) == value


def test_every_class_is_read_by_its_own_name_and_every_value_by_a_word():
    for name in CITYSCAPES_19.names:
        assert name in read_scene(f"a {name}").classes
    assert set(scene_lexicon.CLASS_WORDS) == set(CITYSCAPES_19.names)
    assert set(scene_lexicon.WEATHER_WORDS) == set(WEATHERS)
    assert set(scene_lexicon.TIME_WORDS) == set(TIMES)
    assert set(scene_lexicon.PLACE_WORDS) == set(PLACES)


def test_what_is_read_can_be_painted():
    for prompt in read_prompts(BANK):
        scene = read_scene(prompt)
        Contents(scene.place, tuple(scene.classes), tuple(scene.unwanted))  # raises otherwise


# ---------------------------------------------------------------------- files
def test_comments_and_blank_lines_are_no_prompts(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeff# title\n\n  A bus.  \n\t\n # no\nA tram, l\u00e0.\r\n".encode())
    prompts = read_prompts(path)
    assert prompts == ["A bus.", "A tram, là."]
    assert [p.line for p in prompts] == [3, 6]
    copy = pickle.loads(pickle.dumps(prompts[1]))
    assert (copy, copy.line) == ("A tram, là.", 6)
    assert type(copy.text) is str


def test_files_that_hold_no_prompt(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt does not exist.*street_scenes"):
        read_prompts(tmp_path / "nothing.txt")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_prompts(tmp_path)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n# only this\n   \n")
    with pytest.raises(ValueError, match=r"empty\.txt has no prompt in it \(3 lines"):
        read_prompts(empty)
    empty.write_bytes(b"A bus\n\xff\xfe")
    with pytest.raises(ValueError, match=r"not text in UTF-8 \(byte 6\)"):
        read_prompts(empty)


# ---------------------------------------------------------------------- coverage
def test_coverage_counts_each_prompt_once_for_a_class():
    counts = coverage(["A bus, a bus and two buses in rain", "No bus, a car at night", "Nothing"])
    assert list(counts["class"]) == list(CITYSCAPES_19.names)
    assert {name: n for name, n in counts["class"].items() if n} == {"bus": 1, "car": 1}
    assert counts["weather"] == {
        "clear": 0, "overcast": 0, "rain": 1, "fog": 0, "snow": 0, "not said": 2
    }  # fmt: skip
    assert counts["time"]["night"] == 1
    for topic, values in counts.items():
        assert topic == "class" or sum(values.values()) == 3


# ---------------------------------------------------------------------- repetition
def test_similarity_by_hand():
    prompts = [
        "A red bus in the rain",  # red bus rain
        "The red buses and the rain!",  # the same words
        "A red bus in snow",  # red bus snow: 2 of 4
        "Fog",
        "",
    ]
    assert near_duplicates(prompts, 0.5) == [(0, 1, 1.0), (0, 2, 0.5), (1, 2, 0.5)]
    assert near_duplicates(prompts, 0.51) == [(0, 1, 1.0)]
    assert near_duplicates([], 0.5) == near_duplicates(["Fog", ""]) == []
    with pytest.raises(ValueError, match="above 0"):
        near_duplicates(prompts, 0)


def test_similarity_of_many_prompts_equals_set_arithmetic_and_is_quick():
    rng = np.random.default_rng(0)
    vocabulary = [a + b + c for a, b, c in itertools.product("bdfgk", "aeiou", "lmnrt")]
    prompts = [" ".join(rng.choice(vocabulary, size=12)) for _ in range(2000)]
    started = time.perf_counter()
    found = near_duplicates(prompts, 0.25)
    assert time.perf_counter() - started < 10
    sets = [set(p.split()) for p in prompts[:150]]
    expected = {
        (i, j): len(sets[i] & sets[j]) / len(sets[i] | sets[j])
        for i, j in itertools.combinations(range(150), 2)
        if len(sets[i] & sets[j]) >= 0.25 * len(sets[i] | sets[j])
    }
    assert {(i, j): s for i, j, s in found if j < 150} == pytest.approx(expected)
    assert len(expected) > 3


# ---------------------------------------------------------------------- length
def test_what_clip_cuts_is_what_its_tokenizer_does_not_encode():
    from open_clip import tokenizer

    words = "a red bus in the rain and a car on the road by the wall".split() * 6
    text = " ".join(words)
    length = clip_tokens(text)
    ids = tokenizer.tokenize([text])[0].tolist()
    read = tokenizer.decode(__import__("torch").tensor(ids[1:-1])).strip()
    assert length.tokens == len(words) + 2
    assert f"{read} {length.cut}" == text
    assert clip_tokens(" ".join(words[:75])).cut == ""
    assert clip_tokens(" ".join(words[:76])).cut == words[75]


def test_a_word_of_many_tokens_is_cut_whole():
    text = " ".join(["bus"] * 74) + " Llanfairpwllgwyngyll tram"
    assert clip_tokens(text).cut == "Llanfairpwllgwyngyll tram"
    assert clip_tokens("x" * 1000).cut == "x" * 1000


def test_warnings_name_the_line():
    long = " ".join(["bus"] * 80)
    prompts = [Prompt("A bus.", 3), Prompt(long, 7)]
    assert over_long(prompts) == ["line 7: tokens beyond 77 are cut: 'bus bus bus bus bus'"]
    assert over_long([long]) == ["prompt 1: tokens beyond 77 are cut: 'bus bus bus bus bus'"]


def test_the_encoder_that_reads_furthest_decides():
    class Words:
        def __init__(self, limit):
            self.model_max_length = limit

        def __call__(self, text):
            return {"input_ids": text.split()}

    prompts = ["a b c d", "a b"]
    assert cut_prompts(prompts, []) == []
    assert cut_prompts(prompts, [Words(3)]) == ["prompt 1: tokens beyond 3 are cut: 'd'"]
    assert cut_prompts(prompts, [Words(3), Words(4)]) == []
    assert cut_prompts(prompts, [Words(3), Words(10**30)]) == []


# ---------------------------------------------------------------------- the bank
def test_the_bank_is_large_balanced_short_and_has_no_repetition():
    prompts = read_prompts(BANK)
    assert len(prompts) >= 240
    counts = coverage(prompts)
    assert min(counts["class"].values()) >= 30
    assert min(counts["class"][name] for name in RARE) >= 40
    for topic in ("weather", "time", "place"):
        assert min(n for value, n in counts[topic].items() if value != "not said") >= 20
    for topic in ("season", "viewpoint"):
        assert min(counts[topic].values()) >= 4
    assert near_duplicates(prompts, 0.3) == []
    assert over_long(prompts) == []
    assert all(prompt.isascii() and len(prompt.split()) >= 10 for prompt in prompts)
    openings = {" ".join(prompt.lower().split()[:3]) for prompt in prompts}
    assert len(openings) > 0.85 * len(prompts)  # no template


def test_any_beginning_of_the_bank_is_balanced():
    prompts = read_prompts(BANK)
    whole = coverage(prompts)["class"]
    start = coverage(prompts[:80])["class"]
    for name in CITYSCAPES_19.names:
        assert start[name] == pytest.approx(whole[name] * 80 / len(prompts), rel=0.35, abs=3)


# ---------------------------------------------------------------------- the tool
def test_tool_shows_coverage_of_the_bank(capsys):
    assert tool.main([str(BANK), "--strict", "--at-least", "30"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    trains = coverage(read_prompts(BANK))["class"]["train"]
    assert ["train", str(trains)] in [row[:2] for row in rows]
    assert "No near-duplicate" in out


def test_tool_names_what_is_wrong(tmp_path, capsys):
    path = tmp_path / "p.txt"
    long = "A tram " + "passes a house " * 40
    path.write_text(f"A red bus in rain.\n\nThe red buses, rain.\n{long}\nA bowl of soup.\n")
    assert tool.main([str(path)]) == 0
    assert tool.main([str(path), "--strict"]) == 1
    out = capsys.readouterr().out
    assert "class truck: 0 of at least 1 prompts name it" in out
    assert "class bus:" not in out
    assert "lines 1 and 3 are nearly equal (1.00)" in out
    assert re.search(r"line 4: tokens beyond 77 are cut: '.*passes a house'", out)
    assert "line 5 names no class: 'A bowl of soup.'" in out


def test_tool_says_in_one_line_that_there_is_no_file(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "tools/check_prompts.py", str(tmp_path / "no.txt")]
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("error: prompt file")
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize("options", [["--similarity", "0"], ["--at-least", "-1"], []])
def test_tool_refuses_bad_options(options, capsys):
    with pytest.raises(SystemExit) as leaving:
        tool.main([*options, *(["x"] if options else [])])
    assert leaving.value.code == 2
