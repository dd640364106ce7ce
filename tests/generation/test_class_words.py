"""Classes that are named in prompts, by the words of a label space."""

from __future__ import annotations

import pytest

from clouds.data.label_space import BUILTIN_LABEL_SPACES, LabelSpace, builtin_label_space
from clouds.generation.class_words import ClassWords, request_of

WORDS = {
    "light": ("traffic light", "signal"),
    "bus": ("bus",),
    "berry": ("berry",),
    "hero": ("hero",),
    "sign (back)": ("sign (back)",),
    "street_lamp": ("street_lamp",),
    "man": ("man",),
    "odd": ("---",),
}
SPACE = LabelSpace("own", tuple(WORDS), ((0, 0, 0),) * len(WORDS), tuple(WORDS.values()))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("A TRAFFIC Light at night.", {"light"}),
        ("Two traffic lights, and signals.", {"light"}),
        ("Traffic, lights of a house", set()),
        ("A traffic jam by the light", set()),
        ("traffics light", set()),
        ("Buses, and a signalman", {"bus"}),
        ("busy, abus, business", set()),
        ("the bus's door", {"bus"}),
        ("A bus-stop", {"bus"}),
        ("berries of heroes", {"berry", "hero"}),
        ("the sign back home", {"sign (back)"}),
        ("street lamps", {"street_lamp"}),
        ("men and women", {"man"}),
        ("bus", {"bus"}),
        ("", set()),
        ("---", set()),
    ],
)
def test_named_classes(text, names):
    assert ClassWords(SPACE).named_classes(text) == names


def test_coverage_counts_prompts_not_words():
    prompts = ["A bus, a bus and a hero.", "Buses.", "Nothing."]
    counts = ClassWords(SPACE).coverage(prompts)
    assert list(counts) == ["class"]
    assert list(counts["class"]) == list(WORDS)
    assert {name: n for name, n in counts["class"].items() if n} == {"bus": 2, "hero": 1}


@pytest.mark.parametrize("name", BUILTIN_LABEL_SPACES)
def test_every_word_of_a_builtin_label_space_names_its_class(name):
    space = builtin_label_space(name).label_space
    reader = ClassWords(space)
    for class_name, words in zip(space.names, space.synonyms, strict=True):
        for word in words:
            assert class_name in reader.named_classes(f"Here is a {word}, seen from a car.")
            assert class_name in reader.named_classes(f"{word}s".upper())


def test_request_has_all_words():
    assert request_of(SPACE)["light"] == "traffic light or signal"
    assert list(request_of(SPACE)) == list(WORDS)
