"""Formatting of messages."""

from pathlib import Path

import pytest

from clouds.messages import format_examples, repeated


@pytest.mark.parametrize(
    "items,text",
    [
        ([], ""),
        (["a"], "a"),
        (["a", "b"], "a, b"),
        (["a", "b", "c"], "a, b and 1 more"),
        (tuple(range(7)), "0, 1 and 5 more"),
        ([Path("x/y")], "x/y"),
    ],
)
def test_at_most_two_examples(items, text):
    assert format_examples(items, 2) == text


def test_five_examples_by_default():
    assert format_examples(list("abcdefg")) == "a, b, c, d, e and 2 more"


@pytest.mark.parametrize(
    ("names", "twice"), [("", []), ("abc", []), ("abcb", ["b"]), ("cabcbcx", ["b", "c"])]
)
def test_names_that_occur_more_than_once(names, twice):
    assert repeated(names) == repeated(iter(names)) == twice
