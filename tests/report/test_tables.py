"""Tables of a report, against numbers by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_runs import BETTER, COUNTS, write_run

from clouds.report import tables
from clouds.report.confusion import normalized
from clouds.report.run import Run, read_runs


def texts(table):
    """Title of each row -> text and difference of its cells."""
    return {row.title: [(cell.text, cell.delta) for cell in row.cells] for row in table.rows}


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path / "a", {"bdd_val": COUNTS, "acdc_fog_val": COUNTS}, SOLVER__BASE_LR=0.5)
    write_run(tmp_path / "b", {"bdd_val": BETTER, "camvid_val": COUNTS}, pseudo_labels=True)
    return read_runs([tmp_path / "a", tmp_path / "b"])


def test_classes(runs):
    # a: (75 + 75 + 50 + 0) / 4; b: (100 + 30 / 35 + 75 + 100) / 4
    rows = texts(tables.class_table(runs, "bdd_val"))
    assert rows["road"] == [("75.0", ""), ("100.0", "+25.0")]
    assert rows["vegetation"] == [("75.0", ""), ("85.7", "+10.7")]
    assert rows["train"] == [("–", ""), ("–", "")]
    assert rows["mIoU"] == [("50.0", ""), ("90.2", "+40.2")]
    assert rows["pixel accuracy"] == [("76.9", ""), ("96.2", "+19.2")]
    assert rows["images"] == [("3", ""), ("3", "")]
    row = next(row for row in tables.class_table(runs, "bdd_val").rows if row.title == "road")
    assert [(cell.tone, cell.share) for cell in row.cells] == [("", 0.75), ("better", 1.0)]
    worse = tables.class_table(runs[::-1], "bdd_val").rows[0].cells[1]
    assert (worse.delta, worse.tone) == ("−25.0", "worse")


def test_datasets_that_one_run_has(runs):
    rows = texts(tables.score_table(runs))
    assert list(rows) == ["bdd_val", "acdc_fog_val", "camvid_val"]  # one is shared: no mean
    assert rows["acdc_fog_val"] == [("50.0", ""), ("–", "")]
    assert rows["camvid_val"] == [("–", ""), ("50.0", "")]
    assert tables.shared_datasets(runs) == ["bdd_val"]


def test_the_mean_is_that_of_the_shared_datasets(tmp_path):
    write_run(tmp_path / "a", {"bdd_val": COUNTS, "acdc_fog_val": BETTER, "camvid_val": COUNTS})
    write_run(tmp_path / "b", {"bdd_val": COUNTS, "acdc_fog_val": COUNTS})
    rows = texts(tables.score_table(read_runs([tmp_path / "a", tmp_path / "b"])))
    assert rows["mean of the 2 shared datasets"] == [("70.1", ""), ("50.0", "−20.1")]
    one = texts(tables.score_table(read_runs([tmp_path / "a"])))
    assert one["mean"] == [("63.4", "")]  # (50 + 90.18 + 50) / 3


def test_time(runs):
    # 15 iterations of 0.75 s and 0.25 s waiting, two datasets of 6 s
    rows = texts(tables.time_table(runs))
    assert rows["training steps"] == [("11 s", "42 %"), ("11 s", "42 %")]
    assert rows["waiting for training data"][0] == ("3.8 s", "14 %")
    assert rows["evaluation: acdc_fog_val"] == [("6.0 s", "22 %"), ("–", "")]
    assert rows["sum of these"][0] == ("27 s", "")
    assert rows["images per second, median"][0] == ("4", "")


@pytest.mark.parametrize(
    "seconds,text",
    [(0.84, "0.8 s"), (42.4, "42 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"),
     (7800, "2 h 10 min"), (3599.8, "1 h 00 min")],
)  # fmt: skip
def test_durations(seconds, text):
    assert tables.duration(seconds) == text


def test_configs(runs):
    assert texts(tables.config_table(runs)) == {"SOLVER.BASE_LR": [("0.5", ""), ("1e-05", "")]}
    alone = texts(tables.config_table(runs[:1]))
    assert alone["SOLVER.BASE_LR"] == [("1e-05", ""), ("0.5", "")]  # after the default
    assert alone["SOLVER.MAX_ITER"][1] == ("15", "")
    assert "OUTPUT_DIR" not in alone


def test_environment(runs):
    rows = texts(tables.environment_table(runs))
    assert rows["seed"] == [("0", ""), ("0", "")]  # not a missing number
    assert rows["command"][0] == ("clouds train --config-file x", "")
    assert rows["torch"][0][0] == runs[0].results["versions"]["torch"]


def test_pseudo_labels(runs):
    rows = texts(tables.pseudo_label_table(runs))
    assert rows["sd_x: teacher, mIoU"] == [("–", ""), ("40.0", "")]
    assert rows["sd_x: pixels in refined masks"] == [("–", ""), ("90.0", "")]


def test_confusion(runs):
    matrix = normalized("a", runs[0].datasets["bdd_val"])
    assert matrix.columns == ("road", "vegetation", "terrain", "bus")
    assert {row.name: row.shares for row in matrix.rows} == {
        "road": (1, 0, 0, 0),
        "vegetation": (0, 1, 0, 0),
        "terrain": (1, 0, 0, 0),
        "bus": (0, 0.5, 0, 0.5),
    }
    assert [row.pixels for row in matrix.rows] == [60, 30, 20, 20]
    assert matrix.confusions == (
        "100 % of terrain is predicted as road",
        "50 % of bus is predicted as vegetation",
    )
    assert normalized("a", {"IoU": {"road": None}}) is None


def run_with(name, **results):
    return Run(name, Path(name), {"datasets": {}, **results}, (), (), {}, "", {})


def test_further_metrics():
    scores = [
        {"mIoU": 1.0, "IoU": {"road": 1.0}, "ECE": ece, "boundary-mIoU": 40.0, "images": 3}
        | {"boundary-IoU-road": 7.0, "seconds": 2.0}
        for ece in (10.0, 8.0)
    ]
    runs = [run_with(str(i), datasets={"bdd_val": score}) for i, score in enumerate(scores)]
    rows = {row.title: row.cells for row in tables.class_table(runs, "bdd_val").rows}
    assert list(rows) == ["road", "mIoU", "ECE", "boundary-mIoU", "images"]
    assert [(c.text, c.delta, c.tone) for c in rows["ECE"]] == [
        ("10.0", "", ""),
        ("8.0", "−2.0", "better"),
    ]


def test_corruptions_and_unknown_objects():
    found = {"mIoU": 30.0, "retention": 60.0, "by-corruption": {"fog": 20.0, "snow": 40.0}}
    sets = {"road_anomaly21": {"AUPR": 12.0, "FPR95": 50.0, "AUROC": None, "images": 10}}
    datasets = {"cityscapes_c_fog_1": {"mIoU": 20.0, "IoU": {}}}
    runs = [
        run_with("a", datasets=datasets, corruptions=found, **{"anomaly-sets": sets}),
        run_with("b", corruptions=None),
    ]
    assert texts(tables.corruption_table(runs)) == {
        "fog": [("20.0", ""), ("–", "")],
        "snow": [("40.0", ""), ("–", "")],
        "mean": [("30.0", ""), ("–", "")],
        "part of the mIoU without corruption": [("60.0", ""), ("–", "")],
    }
    assert texts(tables.anomaly_table(runs)) == {
        "road_anomaly21: AUPR": [("12.0", ""), ("–", "")],
        "road_anomaly21: FPR95": [("50.0", ""), ("–", "")],
        "road_anomaly21: AUROC": [("–", ""), ("–", "")],
    }
    assert tables.dataset_names(runs) == []  # 75 sections would hide the others
    assert tables.corruption_table(runs[1:]).rows == tables.anomaly_table(runs[1:]).rows == ()
