"""The table of the demo's rows, from results by hand, and its rows' configs."""

from __future__ import annotations

import json

import pytest
from street_renderer import ablation

from clouds.config import load_config


def result(miou, *accuracies, teacher=None):
    labels = {"teacher": teacher, "refined": 31.0, "student": 33.0}
    return {
        "mean": {"mIoU": miou},
        "datasets": {str(i): {"pixel-accuracy": a} for i, a in enumerate(accuracies)},
        "pseudo-labels": {} if teacher is None else {"sd_demo": {"mIoU": labels}},
        "versions": {"torch": "2.0"},
    }


RESULTS = {
    "frozen CLIP": [result(30.0, 60.0, 70.0), result(34.0, 70.0, 80.0)],
    "joint": [result(35.125, 70.0, teacher=30.0), result(39.0, 72.0, teacher=32.0)],
}


def test_the_table():
    head, _, first, second = ablation.table(RESULTS).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (first, second)]
    assert "labels: refined" in head
    assert cells == [
        [ablation.TITLES["frozen CLIP"], "32.0 ± 2.8", "30.0, 34.0", "70.0 ± 7.1", "-", "-", "-"],
        [
            ablation.TITLES["joint"], "37.1 ± 2.7", "35.1, 39.0", "71.0 ± 1.4", "31.0 ± 1.4",
            "31.0 ± 0.0", "33.0 ± 0.0",
        ],
    ]  # fmt: skip


def test_the_record_has_every_run(tmp_path):
    content = ablation.record(RESULTS, [0, 2], "clouds demo --full", 2)
    files = ablation.write(RESULTS, content, tmp_path / "new")
    assert [file.name for file in files] == ["street_world.json", "street_world.md"]
    read = json.loads(files[0].read_text())
    rows = {"frozen CLIP": {"0": 30.0, "2": 34.0}, "joint": {"0": 35.12, "2": 39.0}}
    assert read["rows"] == {name: pytest.approx(row, abs=0.006) for name, row in rows.items()}
    assert read["labels of generated images"]["teacher"] == {"joint": {"0": 30.0, "2": 32.0}}
    assert (read["command"], read["threads"], read["processes"]) == ("clouds demo --full", 1, 2)
    assert read["machine"] and read["versions"] == {"torch": "2.0"}
    assert files[1].read_text() == ablation.table(RESULTS) + "\n"


def test_rows_are_configs_that_differ_and_start_from_rows():
    rows = {**ablation.ROWS, **ablation.FURTHER_ROWS}
    configs = {n: load_config(s.config, list(s.overrides)) for n, s in rows.items()}
    assert {row.start for row in rows.values()} <= rows.keys() | {""}
    assert len({(c.dump(), rows[n].start, rows[n].train) for n, c in configs.items()}) == len(rows)
    iterations = {configs[name].SOLVER.MAX_ITER for name in ("source alone", "generated", "joint")}
    batches = {configs[n].SOLVER.IMS_PER_BATCH for n in ("source alone", "generated", "joint")}
    assert len(iterations) == len(batches) == 1
    assert configs["source alone"].DATASETS.TRAIN == ("gta5",)
    assert configs["generated"].MODEL.CLOUDS.REFINER == "none"
    assert ablation.TITLES.keys() == ablation.ROWS.keys()
