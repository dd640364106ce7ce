"""tools/check_prompts.py on the repository's prompts and on faulty files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from street_renderer.prompt_reader import coverage

from clouds.cli import check_prompts as tool
from clouds.cli.prompt_reader import prompt_reader
from clouds.data.label_space import BUILTIN_LABEL_SPACES
from clouds.generation.prompts import DEFAULT_PROMPTS, read_prompts

REPOSITORY = Path(__file__).resolve().parents[2]


def test_tool_shows_coverage_of_the_prompts(capsys):
    assert tool.main([str(DEFAULT_PROMPTS), "--strict", "--at-least", "30"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    trains = coverage(read_prompts(DEFAULT_PROMPTS))["class"]["train"]
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


OWN = """
name: campus
images: images
labels: labels
classes:
  - {name: path, ids: [0], words: [path, gravel walk]}
  - {name: bench, ids: [1]}
  - {name: goose, ids: [2], words: [goose, geese]}
"""


def table_of(out: str) -> dict[str, str]:
    """Class -> number of prompts, of the printed table."""
    lines = [line.split() for line in out.splitlines()]
    return {" ".join(words[:-3]): words[-3] for words in lines if words and words[-1] == "%"}


def test_classes_of_a_description(tmp_path, capsys):
    (tmp_path / "campus.yaml").write_text(OWN)
    path = tmp_path / "p.txt"
    path.write_text(
        "Two Benches beside a pathway.\nGeese on gravel walks at dawn.\nA red bus in rain.\n"
    )
    options = [str(path), "--descriptions", str(tmp_path / "campus.yaml")]
    assert tool.main(options) == 0
    out = capsys.readouterr().out
    assert table_of(out) == {"path": "1", "bench": "1", "goose": "1"}
    assert "line 3 names no class: 'A red bus in rain.'" in out
    assert "weather" not in out
    assert tool.main([*options, "--strict"]) == 1
    path.write_text("Two benches beside a path.\nGeese on gravel walks at dawn.\n")
    assert tool.main([*options, "--strict"]) == 0
    capsys.readouterr()
    assert tool.main([*options, "--strict", "--at-least", "2"]) == 1
    out = capsys.readouterr().out
    assert "class goose: 1 of at least 2 prompts name it" in out
    assert "class path:" not in out


def test_classes_of_a_label_space(tmp_path, capsys):
    path = tmp_path / "p.txt"
    path.write_text("A cyclist passes two trees.\nA pedestrian waits under a sign.\n")
    assert tool.main([str(path), "--label-space", "camvid_11"]) == 0
    counts = table_of(capsys.readouterr().out)
    assert len(counts) == 11
    named = {name for name, count in counts.items() if count != "0"}
    assert named == {"bicyclist", "tree", "pedestrian", "sign"}


def test_label_spaces_that_do_not_exist(tmp_path, capsys):
    path = tmp_path / "p.txt"
    path.write_text("A red bus in rain.\n")
    for options, message in (
        (["--label-space", "cityscapes"], "cityscapes_19, camvid_11, mapillary_65"),
        (["--descriptions", str(tmp_path / "no.yaml")], "no.yaml does not exist"),
        (["--descriptions", "a.yaml", "--label-space", "camvid_11"], "not allowed with"),
    ):
        with pytest.raises(SystemExit) as leaving:
            tool.main([str(path), *options])
        assert leaving.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool.main(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in BUILTIN_LABEL_SPACES)


def test_tool_says_in_one_line_that_there_is_no_file(tmp_path):
    paths = [REPOSITORY, REPOSITORY / "projects/street_renderer"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
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


def test_without_a_reader_of_prompts_the_message_names_it(monkeypatch):
    monkeypatch.setattr("clouds.plugins.names", lambda group: [])
    with pytest.raises(ImportError, match=r"'english' of the group 'clouds\.prompt_readers'"):
        prompt_reader()
