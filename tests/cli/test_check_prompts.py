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
