"""The demo's page of results: complete, well formed, and made for the width of a phone."""

from __future__ import annotations

import time
from html.parser import HTMLParser

import pytest
from PIL import Image
from street_renderer import demo, demo_run

from clouds.cli import report


class Page(HTMLParser):
    """Attributes of all tags by name, and the text of table cells."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes), list(self.open)))
        if tag in ("td", "th"):
            self.cells.append("")
        if tag == "div":
            self.open.append(dict(attributes).get("class"))

    def handle_endtag(self, tag):
        if tag == "div":
            self.open.pop()
        if tag == "table":
            self.cells.append("")

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data


def test_page(tmp_path):
    results = {}
    for name, row in demo_run.ROWS.items():
        panel = tmp_path / (row.folder or name) / "visualizations/bdd_val/0.png"
        panel.parent.mkdir(parents=True)
        Image.new("RGB", (1200, 200)).save(panel)
        scores = {domain: {"mIoU": 40 + i} for i, domain in enumerate(demo_run.DATASETS[1:])}
        labels = {"sd_demo": {"mIoU": {"teacher": 50.04, "refined": 51.06, "student": None}}}
        labels = labels if name == "joint" else {}
        results[name] = {"datasets": scores, "mean": {"mIoU": 41}, "pseudo-labels": labels}
    text = demo_run.page(["python a.py 'x y' <z>"], results, tmp_path, tmp_path / "g&h")
    page = Page(text)
    assert page.open == []  # every div is closed
    numbers = ["40.0", "41.0", "42.0", "41.0"]
    assert page.cells[:5] == ["mIoU, %", *demo_run.DATASETS[1:], "mean"]
    assert [cell for cell in page.cells if "." in cell][: 4 * 4] == 4 * numbers
    first = page.cells.index("50.0")
    assert page.cells[first - 1 : first + 3] == [demo_run.TITLES["joint"], "50.0", "51.1", "-"]
    viewports = [a for tag, a, _ in page.tags if tag == "meta" and a.get("name") == "viewport"]
    assert [a["content"] for a in viewports] == ["width=device-width, initial-scale=1"]
    images = [(a["src"], around) for tag, a, around in page.tags if tag == "img"]
    assert [source for source, _ in images] == [
        "joint/visualizations/bdd_val/0.png",
        "warmup/visualizations/bdd_val/0.png",
        "g&h/contact_sheet.png",
        "scenes.png",
    ]
    # what may be wider than a phone scrolls by itself, not the page
    wide = [around for tag, _, around in page.tags if tag in ("img", "table")]
    assert wide == [["wide"]] * 6


def test_commands_make_the_data_that_rows_train_on(tmp_path):
    args = demo.parse(["--data", str(tmp_path), "--generated", "7"])
    render, generate = demo_run.data_commands(args)
    assert render[0] == "make-demo-data" and set(demo_run.DATASETS) <= set(render)
    assert generate[generate.index("--count") + 1] == "7"
    assert generate[-1] == str(tmp_path / "stable_diffusion/demo")


def test_seeds_and_results_belong_to_the_whole_table(capsys):
    assert demo.parse([]).seeds == [0]
    assert demo.parse(["--full"]).seeds == [0, 1, 2]
    assert demo.parse(["--full", "--output", "a"]).results.name == "a"
    for words in (["--seeds", "0", "1"], ["--results", "docs"]):
        with pytest.raises(SystemExit):
            demo.parse(words)
        assert "are for --full" in capsys.readouterr().err


def test_the_demo_ends_with_a_report(tmp_path, monkeypatch, capsys):
    args = demo.parse(["--output", str(tmp_path)])
    names = list(demo_run.ROWS)
    command = demo_run.report_command(args, names)
    folders = ["warmup", "source", "generated", "joint"]
    assert report.parse(command[1:]).runs == [tmp_path / name for name in folders]
    started = []
    monkeypatch.setattr(demo_run, "run", lambda *call: started.append(call))
    monkeypatch.setattr(demo_run, "find_spec", lambda name: None)
    demo_run.compare(args, names)
    printed = capsys.readouterr().out
    assert started == []
    assert (
        'pip install "clouds-dgss[report]"' in printed and f"clouds {' '.join(command)}" in printed
    )
    monkeypatch.setattr(demo_run, "find_spec", lambda name: object())
    demo_run.compare(args, names)
    assert started == [(command, {"DETECTRON2_DATASETS": str(args.data)})]


def clouds_as(monkeypatch, tmp_path, source):
    """A package `clouds` for `python -m clouds` that is `source`."""
    (tmp_path / "clouds").mkdir()
    (tmp_path / "clouds/__main__.py").write_text(source)
    monkeypatch.chdir(tmp_path)


def test_the_baselines_run_while_the_demo_trains(tmp_path, monkeypatch, capsys):
    """The body waits for a file of theirs: after each other it would never end."""
    clouds_as(
        monkeypatch,
        tmp_path,
        "import pathlib, sys; pathlib.Path('started').touch(); print('scores', *sys.argv[1:])",
    )
    with demo_run.baselines(demo.parse([]), {}) as commands:
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert capsys.readouterr().out == ""
    (command,) = commands
    expected = "clouds baselines --config-file demo/warmup"
    assert command == expected
    assert capsys.readouterr().out == f"\n$ {expected}\nscores {expected.partition(' ')[2]}\n"


def test_baselines_that_fail_say_why(tmp_path, monkeypatch, capfd):
    clouds_as(monkeypatch, tmp_path, "raise SystemExit('error: no scikit-learn')")
    failure = pytest.raises(SystemExit, match="the command above exited with status 1")
    with failure, demo_run.baselines(demo.parse([]), {}):
        pass
    assert "error: no scikit-learn" in capfd.readouterr().err


def test_baselines_end_with_a_demo_that_failed(tmp_path, monkeypatch):
    clouds_as(monkeypatch, tmp_path, "import time; time.sleep(600)")
    started = time.monotonic()
    failure = pytest.raises(SystemExit, match="a training failed")
    with failure, demo_run.baselines(demo.parse([]), {}):
        raise SystemExit("a training failed")
    assert time.monotonic() - started < 60


def test_the_whole_table_has_no_baselines():
    with demo_run.baselines(demo.parse(["--full"]), {}) as commands:
        assert commands == []
