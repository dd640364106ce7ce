"""Prompt writing with scripted language models: filters, quota, resuming, errors."""

from __future__ import annotations

import numpy as np
import pytest
from chat_models import NOISE, ObedientModel, ScriptedModel
from street_renderer.prompt_reader import coverage, named_classes

from clouds.data.label_space import CITYSCAPES_19
from clouds.generation.prompt_writing import (
    CLASS_DESCRIPTIONS,
    NothingUsableError,
    Progress,
    WritingOptions,
    instruction,
    parse_answer,
    rejection_reason,
    write_prompts,
)
from clouds.generation.prompts import near_duplicates, read_prompts


def options(**changes) -> WritingOptions:
    return WritingOptions(**{"count": 20, "batch_size": 2, "per_answer": 5} | changes)


def write(model, path, options, settings=(), **more) -> Progress:
    return write_prompts(model, path, options, dict(settings), named_classes, **more)


# ---------------------------------------------------------------------- answers
def test_numbers_bullets_quotes_and_thinking_are_stripped():
    answer = """<think>
    1. A bus? Or a tram?
    </think>
    Sure, here are some:

    1. A bus in the rain.
    2) "A tram at night."
    - A car,  parked.
    * **A truck** on a bridge.
    (4) 'A cyclist in fog.'
    10: A wall.
    \u2022 \u201cA fence.\u201d
    a) A pole.
    A quiet street in 1999.
    2 buses pass.
    """
    assert parse_answer(answer) == [
        "Sure, here are some:",
        "A bus in the rain.",
        "A tram at night.",
        "A car, parked.",
        "A truck on a bridge.",
        "A cyclist in fog.",
        "A wall.",
        "A fence.",
        "A pole.",
        "A quiet street in 1999.",
        "2 buses pass.",
    ]
    assert parse_answer("A bus.\n<think>never closed\nA tram.") == ["A bus."]
    assert parse_answer("") == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("A red bus waits beside a wall.", None),
        ("A bus and a car.", "too short"),
        ("A bowl of soup on a wooden table at home.", "too few classes"),
        ("Here are ten buses and cars for you all:", "heading"),
        ("一辆红色的公共汽车 a b c d e f g h", "not plain English"),
        ("A bus and a car " + "pass a wall " * 30, "too long"),
        ("A bus and a car " + "pass a wall " * 15, None),
    ],
)
def test_lines_that_are_rejected(line, reason):
    assert rejection_reason(line, named_classes) == reason


def test_a_last_line_that_was_cut_off_is_dropped(tmp_path):
    good = "A red bus waits beside a brick wall."
    writer = ScriptedModel([f"{good}\nA tram and a car pass by the chur"])
    with pytest.raises(NothingUsableError, match="unfinished"):
        write(writer, tmp_path / "p.txt", options(batch_size=1, patience=1, count=2))
    assert read_prompts(tmp_path / "p.txt") == [good]


# ---------------------------------------------------------------------- instructions
def test_instruction_names_the_most_lacking_classes():
    asked = [instruction(np.random.default_rng(i), 7, {"train": 40, "bus": 1}) for i in range(20)]
    assert all("Write 7 " in text for text in asked)
    assert all(CLASS_DESCRIPTIONS["train"] in text for text in asked)
    assert not any(CLASS_DESCRIPTIONS["truck"] in text for text in asked)
    weights = {"train": 1000, **dict.fromkeys(("bus", "car", "wall", "fence"), 1)}
    asked = [instruction(np.random.default_rng(i), 7, weights) for i in range(50)]
    assert sum(CLASS_DESCRIPTIONS["train"] in text for text in asked) >= 48
    free = {
        name
        for i in range(200)
        for name, words in CLASS_DESCRIPTIONS.items()
        if words in instruction(np.random.default_rng(i), 7, {})
    }
    assert free == set(CITYSCAPES_19.names)


def test_dense_instructions_ask_for_six_classes_place_time_and_weather():
    asked = [instruction(np.random.default_rng(i), 7, {"train": 9}, dense=True) for i in range(20)]
    for text in asked:
        wanted = text.split("names all of these: ")[1].split(".\n")[0].split("; ")
        assert (
            len(set(wanted)) == 6 <= sum(words in wanted for words in CLASS_DESCRIPTIONS.values())
        )
        assert all(word in text for word in ("names the place", "time of day", "the weather"))
    assert sum(CLASS_DESCRIPTIONS["train"] in text for text in asked) >= 18
    few = {"tree": "trees", "path": "a path"}
    assert "trees" in instruction(np.random.default_rng(0), 7, {}, few, dense=True)


def test_dense_prompts_name_four_classes(tmp_path):
    two = "A red bus waits beside a brick wall in the rain."
    four = "A red bus waits beside a brick wall while a cyclist passes two parked cars at dusk."
    writer = ScriptedModel([f"{two}\n{four}"])
    write(writer, tmp_path / "p.txt", options(batch_size=1, count=1, dense=True))
    assert read_prompts(tmp_path / "p.txt") == [four]
    with pytest.raises(ValueError, match="dense"):
        write(writer, tmp_path / "p.txt", options(batch_size=1, count=2))


# ---------------------------------------------------------------------- a run
def test_count_and_quota_are_reached_without_repetition(tmp_path):
    path = tmp_path / "new" / "p.txt"
    shown = []
    end = write(
        ObedientModel(),
        path,
        options(quota=6),
        {},
        show=lambda p: shown.append((p.written, p.rounds)),
    )
    prompts = read_prompts(path)
    assert len(prompts) == end.written >= 20
    assert min(coverage(prompts)["class"].values()) >= 6
    assert not near_duplicates(prompts, 0.6)
    assert shown[0] == (0, 0) and shown[-1][0] == len(prompts)
    assert end.lacking == {}
    assert end.dropped["heading"] > 0


def test_count_alone_is_met_exactly(tmp_path):
    write(ObedientModel(), tmp_path / "p.txt", options(count=13), {})
    assert len(read_prompts(tmp_path / "p.txt")) == 13


def test_existing_prompts_are_kept_and_not_repeated(tmp_path):
    one, two, three = (
        "A red bus waits beside a brick wall.",
        "Two trams pass a church at dusk.",
        "A truck and a car climb a snowy hill.",
    )
    path = tmp_path / "p.txt"
    path.write_text(f"# mine\n{one}")
    writer = ScriptedModel([f"{one.replace('waits', 'waiting')}\n{two}\n{three}\n{three}\n"])
    end = write(writer, path, options(count=1, batch_size=1), {}, avoid=[two])
    assert read_prompts(path) == [one, three]
    assert path.read_text().startswith(f"# mine\n{one}\n# written by")
    assert end.dropped == {"repeated": 2}


def test_the_same_seed_gives_the_same_file_and_another_seed_another(tmp_path):
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write(ObedientModel(), tmp_path / name, options(seed=seed), {"model": "m"})
        texts.append(read_prompts(tmp_path / name))
    assert texts[0] == texts[1]
    assert not set(texts[0]) & set(texts[2])


@pytest.mark.parametrize("death", [0, 1, 3])
@pytest.mark.parametrize("torn", [0, 1, 40, 400])
def test_an_interrupted_run_is_resumed_with_the_same_result(tmp_path, death, torn):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    quota = options(count=45, quota=8)
    write(ObedientModel(), whole, quota, {})
    with pytest.raises(KeyboardInterrupt):
        write(ObedientModel(interrupt_after=death), broken, quota, {})
    # the next round, partly written
    done = broken.read_bytes()
    assert whole.read_bytes().startswith(done)
    broken.write_bytes(whole.read_bytes()[: len(done) + torn])
    rest = ObedientModel()
    write(rest, broken, quota, {})
    assert broken.read_bytes() == whole.read_bytes()
    assert len(rest.calls) >= 1
    finished = ObedientModel(interrupt_after=0)
    write(finished, broken, quota, {})  # asks for nothing more
    assert broken.read_bytes() == whole.read_bytes()


def test_an_incomplete_settings_line_is_written_again(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for path in (whole, broken):
        path.write_text("# mine\n")
        write(ObedientModel(), path, options(), {})
    header = whole.read_text().index("\n# end")
    broken.write_text(whole.read_text()[: min(header, 70)])
    write(ObedientModel(), broken, options(), {})
    assert read_prompts(broken) == read_prompts(whole)


def test_a_larger_count_extends_the_file(tmp_path):
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    write(ObedientModel(), whole, options(count=34), {})
    write(ObedientModel(), grown, options(count=13), {})
    write(ObedientModel(), grown, options(count=34), {})
    assert grown.read_bytes() == whole.read_bytes()


def test_other_settings_are_refused(tmp_path):
    path = tmp_path / "p.txt"
    write(ObedientModel(), path, options(), {"model": "a"})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"started with model 'a' \(now 'b'\), seed 0 \(now 3\)"):
        write(ObedientModel(), path, options(seed=3), {"model": "b"})
    with pytest.raises(ValueError, match="avoid"):
        write(ObedientModel(), path, options(), {"model": "a"}, avoid=["A bus."])
    with pytest.raises(ValueError, match="is a folder"):
        write(ObedientModel(), tmp_path, options(), {})
    assert path.read_bytes() == before


def test_useless_answers_end_with_an_error(tmp_path):
    with pytest.raises(
        NothingUsableError, match=r"5 consecutive rounds.*0 of 20.*10 too short"
    ) as e:
        write(ScriptedModel(["asdf"]), tmp_path / "p.txt", options(patience=5), {})
    assert "'asdf'" in str(e.value)
    with pytest.raises(NothingUsableError, match="the answers were empty"):
        write(ScriptedModel([""]), tmp_path / "q.txt", options(patience=2), {})


def test_a_quota_that_cannot_be_reached_ends_with_an_error(tmp_path):
    class OnlyBuses(ObedientModel):
        @staticmethod
        def one(text, rng):
            return "\n".join(
                f"A bus on an avenue, {' '.join(rng.choice(NOISE, 8))}." for _ in range(5)
            )

    with pytest.raises(NothingUsableError, match="still lacking: sidewalk, building") as e:
        write(OnlyBuses(), tmp_path / "p.txt", options(quota=3, patience=3), {})
    assert "not of a lacking class" in str(e.value)
    assert len(read_prompts(tmp_path / "p.txt")) == 20


@pytest.mark.parametrize(
    "changes", [{"count": 0}, {"batch_size": 0}, {"quota": -1}, {"similarity": 0}, {"patience": 0}]
)
def test_bad_options(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        options(**changes)
