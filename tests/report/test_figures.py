"""Curves of a report: values of metrics.json, valid for plotly, colors that can be told apart."""

from __future__ import annotations

import pytest
from report_runs import COUNTS, LOSSES, write_run

from clouds.report.figures import COLORS, figures
from clouds.report.run import read_runs

BACKGROUNDS = ("#ffffff", "#121417")


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path / "a", {"bdd_val": COUNTS}, losses=(8.0, float("nan"), 2.0))
    write_run(tmp_path / "b", {"bdd_val": COUNTS}, pseudo_labels=True)
    return read_runs([tmp_path / "a", tmp_path / "b"])


def lines(runs, title):
    (figure,) = [figure for figure in figures(runs) if figure.title == title]
    return {line["name"]: (line["x"], line["y"]) for line in figure.spec["data"]}


def test_values(runs):
    # iterations are counted from 1; a loss that is not finite is a gap
    assert lines(runs, "Loss") == {
        "a": ([5, 10, 15], [8.0, None, 2.0]),
        "b": ([5, 10, 15], list(LOSSES)),
    }
    assert lines(runs[1:], "Loss") == {"": ([5, 10, 15], list(LOSSES))}
    assert set(lines(runs, "Parts of the loss")) == {"a", "b"}  # not of earlier layers
    scores = lines(runs, "mIoU")
    assert set(scores) == {"a · mean", "a · bdd_val", "b · mean", "b · bdd_val"}
    assert scores["a · bdd_val"] == ([15], [pytest.approx(50)])
    assert lines(runs, "Learning rate")["a"][1] == pytest.approx([0.1, 0.05, 0.1 / 3])
    assert lines(runs, "Pseudo-labels")["b · sd_x teacher where refined"] == ([15], [40.0])


def test_a_run_that_was_interrupted_before_its_results(tmp_path):
    write_run(tmp_path, {"bdd_val": COUNTS}, pseudo_labels=True)
    (tmp_path / "results.json").unlink()
    with (tmp_path / "metrics.json").open("a") as file:
        file.write(
            '{"iteration": 19, "evaluation": true, "bdd_val/mIoU": 60, "average/bdd_val/mIoU": 1}\n'
        )
    runs = read_runs([tmp_path])
    assert list(lines(runs, "mIoU")) == ["mean", "bdd_val"]
    assert lines(runs, "mIoU")["bdd_val"] == ([15, 20], [pytest.approx(50), 60])
    assert "sd_x student" in lines(runs, "Pseudo-labels")


def test_a_run_without_records_has_no_figure(tmp_path):
    write_run(tmp_path, {"bdd_val": COUNTS}, iteration=None)
    assert figures(read_runs([tmp_path])) == []


def test_many_datasets_are_not_drawn(tmp_path):
    write_run(tmp_path, {f"cityscapes_c_fog_{i}": COUNTS for i in range(20)})
    assert set(lines(read_runs([tmp_path]), "mIoU")) == {"mean"}


def test_plotly_accepts_them(runs):
    graph_objects = pytest.importorskip("plotly.graph_objects")
    found = figures(runs)
    assert len(found) == 6
    for figure in found:
        graph_objects.Figure(figure.spec)  # raises ValueError for an unknown property


def luminance(color):
    """Relative luminance of WCAG 2.2 of a color #rrggbb."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_lines_have_the_contrast_of_graphics(color, background):
    # WCAG 2.2, success criterion 1.4.11: at least 3:1
    bright, dark = sorted((luminance(color), luminance(background)), reverse=True)
    assert (bright + 0.05) / (dark + 0.05) >= 3
