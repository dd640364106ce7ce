"""`clouds report`: its file, its errors and its exit status."""

from __future__ import annotations

import pytest
from report_runs import COUNTS, write_run

from clouds.cli import report
from clouds.report.page import IMAGES


def run(*words):
    """Exit status of the command."""
    try:
        report.main([str(word) for word in words])
    except SystemExit as end:
        return end.code
    return 0


def test_the_default_is_that_of_the_library():
    assert report.IMAGES == IMAGES
    assert report.parse(["a"]).images == IMAGES
    assert report.parse(["a", "--no-images"]).images == 0


def test_it_writes_one_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("clouds.report.page.plotly_script", lambda: "/* plotly */")
    write_run(tmp_path / "a", {"bdd_val": COUNTS})
    assert run(tmp_path / "a", "--no-images") == 0
    file = tmp_path / "a/report.html"
    assert file.read_text().startswith("<!doctype html>")
    assert capsys.readouterr().out == f"{file} ({file.stat().st_size / 2**20:.1f} MiB)\n"
    assert run(tmp_path / "a", "--no-images", "--output", tmp_path / "new/b.html") == 0
    assert (tmp_path / "new/b.html").is_file()


def test_a_folder_without_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("clouds.report.page.plotly_script", lambda: "/* plotly */")
    assert run(tmp_path) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: run '{tmp_path}' has neither results.json nor")
    assert message.count("\n") == 1


@pytest.mark.parametrize("words", [(), ("a", "--images", "-1"), ("a", "--images", "x")])
def test_usage(words, capsys):
    assert run(*words) == 2
    assert "usage:" in capsys.readouterr().err
