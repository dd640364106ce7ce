"""Prompt files: reading, near-duplicates, length in tokens."""

from __future__ import annotations

import itertools
import pickle
import time

import numpy as np
import pytest

from clouds.generation.prompts import (
    Prompt,
    cut_by_clip,
    cut_prompts,
    near_duplicates,
    over_long,
    read_prompts,
)
from clouds.generation.words import content_words


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
    ids = tokenizer.tokenize([text])[0].tolist()
    read = tokenizer.decode(__import__("torch").tensor(ids[1:-1])).strip()
    assert len(read.split()) == 75  # and the start and end token
    assert f"{read} {cut_by_clip(text)}" == text
    assert cut_by_clip(" ".join(words[:75])) == ""
    assert cut_by_clip(" ".join(words[:76])) == words[75]


def test_a_word_of_many_tokens_is_cut_whole():
    text = " ".join(["bus"] * 74) + " Llanfairpwllgwyngyll tram"
    assert cut_by_clip(text) == "Llanfairpwllgwyngyll tram"
    assert cut_by_clip("x" * 1000) == "x" * 1000


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


def test_a_single_letter_is_no_plural():
    assert content_words("a letter S, s's and 2 cars") == {"letter", "s", "2", "car"}
    assert near_duplicates(["S", "s", "cars"]) == [(0, 1, 1.0)]
