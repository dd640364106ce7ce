"""tools/write_prompts.py with a tiny random Llama and with a scripted model."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_models import TEMPLATE, ObedientModel, save_tiny_llama
from street_renderer.prompt_reader import coverage

from clouds.cli import write_prompts as tool
from clouds.generation import language_model
from clouds.generation.prompts import read_prompts


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {
        name: save_tiny_llama(tmp_path_factory.mktemp(name), template)
        for name, template in (("plain", None), ("chat", TEMPLATE))
    }


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


def test_tool_runs_a_real_model_and_stops_at_useless_answers(folders, tmp_path, capsys):
    """Five tokens are five words, and no prompt has fewer than six."""
    path = tmp_path / "p.txt"
    avoid = tmp_path / "avoid.txt"
    avoid.write_text("A red bus waits beside a brick wall.\n")
    more = ["--patience", "2", "--avoid", str(avoid)]
    assert exit_code(arguments(folders["chat"], path, *more)) == 1
    err = capsys.readouterr().err
    assert "error: 2 consecutive rounds gave no valid prompt" in err
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# written by tools/write_prompts.py: {")
    assert lines[1:] == ["# end of round 0", "# end of round 1"]
    assert exit_code(arguments(folders["chat"], path, *more)) == 1  # two more rounds
    assert path.read_text().splitlines()[3:] == ["# end of round 2", "# end of round 3"]


def test_tool_writes_with_an_obedient_model(folders, tmp_path, capsys, monkeypatch):
    def answer(self, instructions, seed):
        return ObedientModel().answer(instructions, seed)

    monkeypatch.setattr(language_model.LanguageModel, "answer", answer)
    path = tmp_path / "p.txt"
    assert exit_code(arguments(folders["plain"], path, "--quota", "2")) == 0
    assert f"{path}: {len(read_prompts(path))} prompts" in capsys.readouterr().out
    assert min(coverage(read_prompts(path))["class"].values()) >= 2
    assert exit_code(arguments(folders["plain"], path, "--seed", "4", "--quota", "2")) == 2
    assert "started with seed 0 (now 4)" in capsys.readouterr().err


def test_tool_asks_for_the_words_of_a_description(folders, tmp_path, capsys, monkeypatch):
    """The model writes what it is asked for, so the quota is reached."""
    classes = "[{name: path, ids: [0], words: [path, gravel walk]}, {name: bench, ids: [1]}]"
    own = tmp_path / "campus.yaml"
    own.write_text(f"name: campus\nimages: a\nlabels: b\nclasses: {classes}\n")
    asked = []

    def answer(self, instructions, seed):
        asked.extend(instructions)
        noise = [" ".join(f"{a}{b}{len(asked)}x" for a in "bdfg") for b in "aeiou"]
        lines = [f"Beside a gravel walk stands one bench {words}." for words in noise]
        return ["\n".join(lines)] * len(instructions)

    monkeypatch.setattr(language_model.LanguageModel, "answer", answer)
    path = tmp_path / "p.txt"
    options = [*arguments(folders["plain"], path), "--quota", "3"]
    assert exit_code([*options, "--descriptions", str(own)]) == 0
    assert len(read_prompts(path)) == 3
    assert any("path or gravel walk" in text for text in asked)
    assert not any("buildings" in text for text in asked)
    assert exit_code([*options, "--label-space", "camvid_11"]) == 2
    assert "was started with classes" in capsys.readouterr().err


def test_interrupted_tool_says_how_to_resume(folders, tmp_path, capsys, monkeypatch):
    writer = ObedientModel(interrupt_after=1)
    monkeypatch.setattr(
        language_model.LanguageModel, "answer", lambda _, *a, **k: writer.answer(*a, **k)
    )
    path = tmp_path / "p.txt"
    assert exit_code([*arguments(folders["plain"], path), "--count", "50"]) == 130
    assert f"The same command resumes {path}" in capsys.readouterr().err
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
def test_user_errors_of_write_prompts_are_one_line(folders, tmp_path, capsys, more, message):
    assert exit_code(arguments(folders["plain"], tmp_path / "p.txt", *more)) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    assert line.startswith(message)
    assert not (tmp_path / "p.txt").exists()
