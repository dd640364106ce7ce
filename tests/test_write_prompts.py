from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import write_prompts as tool

from clouds.data.label_space import CITYSCAPES_19
from clouds.generation.language_model import load_language_model
from clouds.generation.prompt_writer import (
    CLASS_ASKED_AS,
    NothingUsableError,
    WritingOptions,
    fault,
    instruction,
    parse_answer,
    write_prompts,
)
from clouds.generation.prompts import coverage, near_duplicates, read_prompts

REPOSITORY = Path(__file__).resolve().parents[1]


THINGS = {
    "road": "an avenue", "sidewalk": "a sidewalk", "building": "a church", "wall": "a brick wall",
    "fence": "a fence", "pole": "a lamp post", "traffic light": "a traffic light",
    "traffic sign": "a stop sign", "vegetation": "an oak", "terrain": "a lawn", "sky": "the sky",
    "person": "a pedestrian", "rider": "a motorcyclist", "car": "a sedan", "truck": "a lorry",
    "bus": "a minibus", "train": "a tram", "motorcycle": "a moped", "bicycle": "a tandem",
}  # fmt: skip
NOISE = [a + b + c + d for a in "bdfgk" for b in "aeiou" for c in "lmnrt" for d in "aeiou"]


class Obedient:
    """Writes what it is asked for, with noise words so that no two lines are alike."""

    def __init__(self, die_after: int | None = None):
        self.calls: list[tuple[tuple[str, ...], int]] = []
        self.die_after = die_after

    def answer(self, instructions, seed):
        if len(self.calls) == self.die_after:
            raise KeyboardInterrupt
        self.calls.append((tuple(instructions), seed))
        rng = np.random.default_rng(seed)
        return [self.one(text, rng) for text in instructions]

    @staticmethod
    def one(text, rng):
        asked = [THINGS[name] for name, words in CLASS_ASKED_AS.items() if words in text]
        words = [" ".join(rng.choice(NOISE, 8)) for _ in range(5)]
        lines = [f"{i + 1}. A photo of {', '.join(asked)} {w}." for i, w in enumerate(words)]
        return "\n".join(["Here are your lines:", *lines])


class Scripted:
    def __init__(self, *rounds: list[str]):
        self.rounds = list(rounds)

    def answer(self, instructions, seed):
        answers = self.rounds.pop(0) if len(self.rounds) > 1 else self.rounds[0]
        return (answers * len(instructions))[: len(instructions)]


def options(**changes) -> WritingOptions:
    return WritingOptions(**{"count": 20, "batch_size": 2, "per_answer": 5} | changes)


# ---------------------------------------------------------------------- answers
def test_numbers_bullets_quotes_and_thoughts_are_stripped():
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
        ("A bowl of soup on a wooden table at home.", "no street scene"),
        ("Here are ten buses and cars for you all:", "heading"),
        ("一辆红色的公共汽车 a b c d e f g h", "not plain English"),
        ("A bus and a car " + "pass a wall " * 30, "too long"),
        ("A bus and a car " + "pass a wall " * 15, None),
    ],
)
def test_what_is_no_prompt(line, reason):
    assert fault(line) == reason


def test_a_last_line_that_was_cut_off_is_dropped(tmp_path):
    good = "A red bus waits beside a brick wall."
    writer = Scripted([f"{good}\nA tram and a car pass by the chur"])
    with pytest.raises(NothingUsableError, match="unfinished"):
        write_prompts(writer, tmp_path / "p.txt", options(batch_size=1, patience=1, count=2), {})
    assert read_prompts(tmp_path / "p.txt") == [good]


# ---------------------------------------------------------------------- instructions
def test_instruction_names_what_lacks_most():
    asked = [instruction(np.random.default_rng(i), 7, {"train": 40, "bus": 1}) for i in range(20)]
    assert all("Write 7 " in text for text in asked)
    assert all(CLASS_ASKED_AS["train"] in text for text in asked)
    assert not any(CLASS_ASKED_AS["truck"] in text for text in asked)
    weights = {"train": 1000, **dict.fromkeys(("bus", "car", "wall", "fence"), 1)}
    asked = [instruction(np.random.default_rng(i), 7, weights) for i in range(50)]
    assert sum(CLASS_ASKED_AS["train"] in text for text in asked) >= 48
    free = {
        name
        for i in range(200)
        for name, words in CLASS_ASKED_AS.items()
        if words in instruction(np.random.default_rng(i), 7, {})
    }
    assert free == set(CITYSCAPES_19.names)


# ---------------------------------------------------------------------- a run
def test_count_and_quota_are_reached_without_repetition(tmp_path):
    path = tmp_path / "new" / "p.txt"
    shown = []
    end = write_prompts(
        Obedient(), path, options(quota=6), {}, show=lambda p: shown.append((p.written, p.rounds))
    )
    prompts = read_prompts(path)
    assert len(prompts) == end.written >= 20
    assert min(coverage(prompts)["class"].values()) >= 6
    assert not near_duplicates(prompts, 0.6)
    assert shown[0] == (0, 0) and shown[-1][0] == len(prompts)
    assert end.lacking == {}
    assert end.dropped["heading"] > 0


def test_count_alone_is_met_exactly(tmp_path):
    write_prompts(Obedient(), tmp_path / "p.txt", options(count=13), {})
    assert len(read_prompts(tmp_path / "p.txt")) == 13


def test_what_is_there_already_is_not_repeated_and_stays(tmp_path):
    one, two, three = (
        "A red bus waits beside a brick wall.",
        "Two trams pass a church at dusk.",
        "A truck and a car climb a snowy hill.",
    )
    path = tmp_path / "p.txt"
    path.write_text(f"# mine\n{one}")
    writer = Scripted([f"{one.replace('waits', 'waiting')}\n{two}\n{three}\n{three}\n"])
    end = write_prompts(writer, path, options(count=1, batch_size=1), {}, avoid=[two])
    assert read_prompts(path) == [one, three]
    assert path.read_text().startswith(f"# mine\n{one}\n# written by")
    assert end.dropped == {"repeated": 2}


def test_the_same_seed_gives_the_same_file_and_another_seed_another(tmp_path):
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_prompts(Obedient(), tmp_path / name, options(seed=seed), {"model": "m"})
        texts.append(read_prompts(tmp_path / name))
    assert texts[0] == texts[1]
    assert not set(texts[0]) & set(texts[2])


@pytest.mark.parametrize("death", [0, 1, 3])
@pytest.mark.parametrize("torn", [0, 1, 40, 400])
def test_a_broken_off_run_goes_on_as_the_unbroken_one(tmp_path, death, torn):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    quota = options(count=45, quota=8)
    write_prompts(Obedient(), whole, quota, {})
    with pytest.raises(KeyboardInterrupt):
        write_prompts(Obedient(die_after=death), broken, quota, {})
    # what a power cut leaves: the next round, written in part
    done = broken.read_bytes()
    assert whole.read_bytes().startswith(done)
    broken.write_bytes(whole.read_bytes()[: len(done) + torn])
    rest = Obedient()
    write_prompts(rest, broken, quota, {})
    assert broken.read_bytes() == whole.read_bytes()
    assert len(rest.calls) >= 1
    finished = Obedient(die_after=0)
    write_prompts(finished, broken, quota, {})  # asks for nothing more
    assert broken.read_bytes() == whole.read_bytes()


def test_a_settings_line_that_was_cut_off_is_begun_again(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for path in (whole, broken):
        path.write_text("# mine\n")
        write_prompts(Obedient(), path, options(), {})
    header = whole.read_text().index("\n# end")
    broken.write_text(whole.read_text()[: min(header, 70)])
    write_prompts(Obedient(), broken, options(), {})
    assert read_prompts(broken) == read_prompts(whole)


def test_a_larger_count_extends_the_file(tmp_path):
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    write_prompts(Obedient(), whole, options(count=34), {})
    write_prompts(Obedient(), grown, options(count=13), {})
    write_prompts(Obedient(), grown, options(count=34), {})
    assert grown.read_bytes() == whole.read_bytes()


def test_other_settings_are_refused(tmp_path):
    path = tmp_path / "p.txt"
    write_prompts(Obedient(), path, options(), {"model": "a"})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"begun with model 'a' \(now 'b'\), seed 0 \(now 3\)"):
        write_prompts(Obedient(), path, options(seed=3), {"model": "b"})
    with pytest.raises(ValueError, match="avoid"):
        write_prompts(Obedient(), path, options(), {"model": "a"}, avoid=["A bus."])
    with pytest.raises(ValueError, match="is a folder"):
        write_prompts(Obedient(), tmp_path, options(), {})
    assert path.read_bytes() == before


def test_garbage_ends_with_an_error_instead_of_for_ever(tmp_path):
    with pytest.raises(NothingUsableError, match=r"5 rounds in a row.*0 of 20.*10 too short") as e:
        write_prompts(Scripted(["asdf"]), tmp_path / "p.txt", options(patience=5), {})
    assert "'asdf'" in str(e.value)
    with pytest.raises(NothingUsableError, match="the answers were empty"):
        write_prompts(Scripted([""]), tmp_path / "q.txt", options(patience=2), {})


def test_a_quota_that_cannot_be_reached_ends_with_an_error(tmp_path):
    class OnlyBuses(Obedient):
        @staticmethod
        def one(text, rng):
            return "\n".join(
                f"A bus on an avenue, {' '.join(rng.choice(NOISE, 8))}." for _ in range(5)
            )

    with pytest.raises(NothingUsableError, match="still lacking: sidewalk, building") as e:
        write_prompts(OnlyBuses(), tmp_path / "p.txt", options(quota=3, patience=3), {})
    assert "not of a class that lacks" in str(e.value)
    assert len(read_prompts(tmp_path / "p.txt")) == 20


@pytest.mark.parametrize(
    "changes", [{"count": 0}, {"batch_size": 0}, {"quota": -1}, {"similarity": 0}, {"patience": 0}]
)
def test_bad_options(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        options(**changes)


# ---------------------------------------------------------------------- a real model
VOCABULARY = (
    "<pad> <s> </s> <unk> a the red bus car tram wall fence street in on rain night . , beside "
    "write user assistant"
).split()
TEMPLATE = (
    "{% for m in messages %}<s> {{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A tiny random Llama with a word tokenizer, saved with and without a chat template."""
    import tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    found = {}
    for name, template in (("plain", None), ("chat", TEMPLATE)):
        folder = tmp_path_factory.mktemp(name)
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        found[name] = folder
    return found


@pytest.mark.parametrize("name", ["plain", "chat"])
def test_a_real_model_answers_by_the_seed(folders, name):
    model = load_language_model(str(folders[name]), device="cpu", offline=True, max_new_tokens=12)
    before = torch.get_rng_state()
    asked = ["write a bus", "write the red tram in the rain"]
    first = model.answer(asked, seed=1)
    assert first == model.answer(asked, seed=1)
    assert first != model.answer(asked, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(first) == 2 and all(set(a.split()) <= set(VOCABULARY) for a in first)
    assert all("write" not in a.split()[:1] for a in first) or name == "plain"


def test_greedy_answer_equals_a_loop_over_the_likeliest_token(folders):
    """Oracle: no padding, no cache, no generate(); the shorter text of the batch is padded."""
    model = load_language_model(
        str(folders["chat"]), device="cpu", offline=True, temperature=0, max_new_tokens=6
    )
    asked = ["write the red tram in the rain", "write a bus"]
    answers = model.answer(asked, seed=0)
    for instruction_, answer in zip(asked, answers, strict=True):
        words = f"<s> user {instruction_} assistant".split()
        ids = [VOCABULARY.index(word) for word in words]
        start = len(ids)
        for _ in range(6):
            logits = model.model(torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == 2:
                break
        expected = [VOCABULARY[i] for i in ids[start:] if i not in (0, 1, 2, 3)]
        assert answer.split() == expected


def test_models_that_are_not_there(tmp_path, folders):
    with pytest.raises(FileNotFoundError, match="there is no folder /nowhere/model"):
        load_language_model("/nowhere/model")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load_language_model(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"hf download nobody/nothing.*leave --offline out"):
        load_language_model("nobody/nothing", offline=True)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folders["plain"].iterdir():
        if file.suffix == ".json":
            (broken / file.name).write_bytes(file.read_bytes())
    with pytest.raises(FileNotFoundError, match="weights or tokenizer are missing"):
        load_language_model(str(broken), offline=True)
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        load_language_model(str(folders["plain"]), dtype="int8")
    with pytest.raises(ValueError, match="--device is 'gpu'"):
        load_language_model(str(folders["plain"]), device="gpu")


# ---------------------------------------------------------------------- the tool
def arguments(folder: Path, output: Path, *more: str) -> list[str]:
    return [
        "--model", str(folder), "--output", str(output), "--count", "2", "--batch-size", "2",
        "--max-new-tokens", "5", "--device", "cpu", "--offline", *more,
    ]  # fmt: skip


def exit_code(words: list[str]) -> object:
    try:
        return tool.main(words)
    except SystemExit as leaving:
        return leaving.code


def test_tool_runs_a_real_model_and_gives_up_on_garbage(folders, tmp_path, capsys):
    """Five tokens are five words, and no prompt has fewer than six."""
    path = tmp_path / "p.txt"
    avoid = tmp_path / "avoid.txt"
    avoid.write_text("A red bus waits beside a brick wall.\n")
    more = ["--patience", "2", "--avoid", str(avoid)]
    assert exit_code(arguments(folders["chat"], path, *more)) == 1
    err = capsys.readouterr().err
    assert "error: 2 rounds in a row gave no prompt" in err
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# written by tools/write_prompts.py: {")
    assert lines[1:] == ["# end of round 0", "# end of round 1"]
    assert exit_code(arguments(folders["chat"], path, *more)) == 1  # two rounds more
    assert path.read_text().splitlines()[3:] == ["# end of round 2", "# end of round 3"]


def test_tool_writes_with_a_writer_that_obeys(folders, tmp_path, capsys, monkeypatch):
    from clouds.generation import language_model

    def obey(self, instructions, seed):
        return Obedient().answer(instructions, seed)

    monkeypatch.setattr(language_model.LanguageModel, "answer", obey)
    path = tmp_path / "p.txt"
    assert exit_code(arguments(folders["plain"], path, "--quota", "2")) == 0
    assert f"{path}: {len(read_prompts(path))} prompts" in capsys.readouterr().out
    assert min(coverage(read_prompts(path))["class"].values()) >= 2
    assert exit_code(arguments(folders["plain"], path, "--seed", "4", "--quota", "2")) == 2
    assert "begun with seed 0 (now 4)" in capsys.readouterr().err


def test_tool_that_is_stopped_says_how_to_go_on(folders, tmp_path, capsys, monkeypatch):
    from clouds.generation import language_model

    writer = Obedient(die_after=1)
    monkeypatch.setattr(
        language_model.LanguageModel, "answer", lambda _, *a, **k: writer.answer(*a, **k)
    )
    path = tmp_path / "p.txt"
    assert exit_code([*arguments(folders["plain"], path), "--count", "50"]) == 130
    assert f"The same command goes on with {path}" in capsys.readouterr().err
    assert path.read_text().endswith("# end of round 0\n")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "/nowhere/model"], "error: there is no folder /nowhere/model"),
        (["--avoid", "/nowhere/p.txt"], "error: prompt file /nowhere/p.txt does not exist"),
        (["--temperature", "-1"], "error: the temperature is -1.0"),
        (["--count", "0"], "error: count is 0"),
    ],
)
def test_tool_says_in_one_line_what_is_wrong(folders, tmp_path, capsys, more, message):
    assert exit_code(arguments(folders["plain"], tmp_path / "p.txt", *more)) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    assert line.startswith(message)
    assert not (tmp_path / "p.txt").exists()
