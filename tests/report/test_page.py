"""The HTML of a report: its numbers, its safety, that it needs nothing else; and in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from report_runs import BETTER, COUNTS, LOSSES, Page, write_run

from clouds.report import page, write_report
from clouds.report.run import read_runs

FILES = {"0.png": 10.0, "1.png": 30.0}
TAG = "<img src=x onerror=alert(1)>"


def html_of(folders, **options):
    return page.render(
        read_runs(folders), "/* plotly */", **{"images": 0, "device": None} | options
    )


@pytest.fixture
def two(tmp_path):
    write_run(tmp_path / "a", {"bdd_val": COUNTS, "acdc_fog_val": BETTER})
    write_run(tmp_path / TAG, {"bdd_val": BETTER, "acdc_fog_val": COUNTS}, pseudo_labels=True)
    return [tmp_path / "a", tmp_path / TAG]


def test_numbers_are_those_of_results_json(two):
    parsed = Page(html_of(two))
    results = [json.loads((folder / "results.json").read_text()) for folder in two]
    for number, name in enumerate(("bdd_val", "acdc_fog_val"), 1):
        a, b = (result["datasets"][name] for result in results)
        assert parsed.rows("scores")[name][:2] == [f"{s['mIoU']:.1f}" for s in (a, b)]
        rows = parsed.rows(f"dataset-{number}")
        for class_name, iou in a["IoU"].items():
            other = b["IoU"][class_name]
            if iou is None:
                assert rows[class_name] == ["–", "–", ""]
            else:
                difference = f"{other - iou:+.1f}".replace("-", "−").replace("+0.0", "0.0")
                assert rows[class_name] == [f"{iou:.1f}", f"{other:.1f}", difference]
        for table, scores in ((1, a), (2, b)):
            counts = np.array(scores["confusion-matrix"])
            shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
            matrix = parsed.rows(f"dataset-{number}", table)
            columns = matrix.pop("")
            names = list(a["IoU"])
            assert set(matrix) == {names[i] for i in np.flatnonzero(counts.sum(1))}
            for label, cells in matrix.items():
                expected = [shares[names.index(label), names.index(n)] for n in columns]
                assert cells == [f"{value:.0f}" if value >= 1 else "" for value in expected]
    means = [f"{result['mean']['mIoU']:.1f}" for result in results]
    assert parsed.rows("scores")["mean"][:2] == means


def test_curves_are_in_the_page(two):
    text = html_of(two)
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', text)[1])
    assert [line["y"] for line in figures[0]["data"]] == [list(LOSSES)] * 2


def test_it_needs_no_other_file(two):
    text = html_of(two)
    parsed = Page(text)
    for tag, attributes in parsed.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base"), tag
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:")), attributes
    assert not re.search(r"https?:|//\w|url\(|@import", text)
    (policy,) = [a["content"] for _, a in parsed.tags if "http-equiv" in a]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_names_are_no_html(two):
    parsed = Page(html_of(two))
    assert not any("onerror" in attributes for _, attributes in parsed.tags)
    assert f"a · {TAG}" in parsed.texts["h1"]
    assert "<script>" not in page.breakable("<script>a_b/c.d")
    assert page.breakable("a_b/c.d & e.") == "a_<wbr>b/<wbr>c.<wbr>d &amp; e."


def notes_of(folders):
    return page.comparison_notes(read_runs(folders))


def test_notes(tmp_path, two):
    assert notes_of(two[:1]) == []
    write_run(tmp_path / "c", {"camvid_val": COUNTS}, iteration=7, losses=(8.0, float("nan")))
    notes = " ".join(notes_of([*two[:1], tmp_path / "c"]))
    assert "c is not complete (interrupted, or still running): 10 of 15 iterations" in notes
    assert "Only some runs are evaluated on bdd_val, acdc_fog_val: a is." in notes
    assert "Only some runs are evaluated on camvid_val: c is." in notes
    assert "share no dataset" in notes
    assert "c: the loss is not finite in the records of iterations 9." in notes
    write_run(tmp_path / "d", {"bdd_val": COUNTS})
    path = tmp_path / "d/results.json"
    content = json.loads(path.read_text())
    content["protocol"] = "slide"
    content["datasets"]["bdd_val"]["images"] = 5
    del content["datasets"]["bdd_val"]["confusion-matrix"]
    path.write_text(json.dumps(content))
    notes = " ".join(notes_of([*two[:1], tmp_path / "d"]))
    assert "The protocols differ (native, slide)" in notes
    assert "bdd_val has different numbers of images: 3, 5." in notes
    assert "d: its results.json is of an earlier version" in notes
    assert "<h3>Confusion</h3>" in html_of([tmp_path / "d", two[0]])
    assert "<h3>Confusion</h3>" not in html_of([tmp_path / "d"])


def test_notes_on_weights_that_are_chosen(tmp_path):
    write_run(tmp_path / "a", {"bdd_val": COUNTS})
    path = tmp_path / "a/results.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "selection": "Chosen on the test data."}))
    assert notes_of([tmp_path / "a"]) == ["a: Chosen on the test data."]
    content["config"] = {"SOLVER": {"BEST_ON": "test"}}
    (tmp_path / "a/config.yaml").unlink(missing_ok=True)
    path.write_text(json.dumps({**content, "selection": None}))
    (note,) = notes_of([tmp_path / "a"])
    assert "model_best.pth is chosen by the test datasets" in note


def test_an_interrupted_run_has_what_there_is(tmp_path):
    write_run(tmp_path, None, losses=(8.0, 4.0))
    parsed = Page(html_of([tmp_path]))
    assert "scores" not in parsed.tables and parsed.rows("time")["training steps"][0] == "7.5 s"
    assert any("there are no results yet" in text for text in parsed.texts["li"])


def test_without_checkpoints_the_panels_are_shown(tmp_path):
    write_run(tmp_path, {"bdd_val": COUNTS}, scores=FILES)
    panel = tmp_path / "visualizations/bdd_val/0.png"
    panel.parent.mkdir(parents=True)
    Image.new("RGB", (30, 20)).save(panel)
    text = html_of([tmp_path], images=1)
    assert "no predictions, since results.json names no checkpoint" in text
    images = [attributes for tag, attributes in Page(text).tags if tag == "img"]
    assert [image["src"][:15] for image in images] == ["data:image/webp"]


def test_without_plotly(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ImportError, match=r'needs plotly: pip install "clouds-dgss\[report\]"'):
        write_report([write_run(tmp_path, None)])
    assert not (tmp_path / "report.html").exists()


@pytest.fixture
def chromium():
    pytest.importorskip("plotly")
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    program = next((name for name in found if name), None)
    if program is None:
        pytest.skip("needs Chromium (Debian's package chromium) in PATH")
    return program


PROBE = """<script>
document.querySelectorAll("details").forEach((details) => { details.open = true; });
const frame = document.createElement("output");
frame.id = "probe";
setTimeout(() => {
  frame.textContent = JSON.stringify({
    width: document.documentElement.scrollWidth,
    plots: [...document.querySelectorAll(".plot svg.main-svg")].length,
    right: Math.max(...[...document.querySelectorAll(".plot, .sample, .panel")]
      .map((part) => part.getBoundingClientRect().right)),
    sliders: document.querySelectorAll(".slider .stage").length,
    errors: window.errors,
  });
  document.body.append(frame);
}, 1000);
</script></body>"""
"""Writes what a browser has made of the page into the page."""


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1280])
def test_in_a_browser(two, tmp_path, chromium, width):
    report = write_report(two, tmp_path / "report.html", images=0)
    text = report.read_text()
    assert len(text) > 3_000_000  # plotly is in it
    text = PROBE.join(text.rsplit("</body>", 1))
    text = text.replace(
        "<style>", "<script>window.errors = []; onerror = (m) => errors.push(m);</script><style>", 1
    )
    (tmp_path / "probed.html").write_text(text)
    # headless windows are at least 500 pixels wide: a frame is of any width
    frame = f'<iframe id="f" src="probed.html" style="width:{width}px;height:800px;border:0">'
    (tmp_path / "frame.html").write_text(frame)
    inside = """const timer = setInterval(() => {
      const probe = document.getElementById("f").contentDocument.getElementById("probe");
      if (probe) { clearInterval(timer); document.body.append(probe.textContent); }
    }, 100)"""
    with (tmp_path / "frame.html").open("a") as file:
        file.write(f"</iframe><script>{inside}</script>")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [
        "--hide-scrollbars",
        "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command += ["--virtual-time-budget=30000", (tmp_path / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(re.search(r"\{.*\}", done.stdout.split("</script>")[-1])[0])
    assert found["errors"] == []
    assert found["width"] == width  # the page does not scroll sideways
    assert found["right"] <= width
    assert found["plots"] >= 6
