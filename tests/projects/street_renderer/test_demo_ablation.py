"""The demo's runs and their table: order, what is not repeated, scores; with fake trainings."""

from __future__ import annotations

import json

import pytest
from ablation_files import fake_train  # noqa: F401
from street_renderer import ablation
from street_renderer.ablation import ROWS

from clouds.ablation.statistics import paired_difference

pytestmark = pytest.mark.usefixtures("fake_train")
ALL = {**ROWS, **ablation.FURTHER_ROWS}
FAST = ("SOLVER.BASE_LR", "0.03")


def planned(output, overrides=FAST, seeds=(0, 2), rows=ROWS):
    return ablation.plan(rows, seeds, output, overrides)


def train(runs, processes=3, **options):
    return ablation.train(runs, processes, {}, **options)


def starts(runs):
    files = [run.folder / "starts" for run in runs]
    return [file.read_text().split() if file.exists() else [] for file in files]


def test_runs_are_configs_of_their_rows(tmp_path):
    runs = {(run.setting, run.seed): run for run in planned(tmp_path, rows=ALL)}
    joint = runs["joint", 2]
    assert joint.folder == tmp_path / "joint_2"
    assert str(tmp_path / "warmup_2/model_final.pth") == joint.cfg.MODEL.WEIGHTS
    assert (joint.cfg.SEED, joint.cfg.SOLVER.BASE_LR) == (2, 0.03)
    same = [
        {runs[name, 0].cfg.SOLVER.MAX_ITER for name in ("source alone", "generated", "joint")},
        {runs[name, 0].cfg.SOLVER.IMS_PER_BATCH for name in ("source alone", "generated", "joint")},
    ]
    assert [len(values) for values in same] == [1, 1]
    assert runs["source alone", 0].cfg.DATASETS.TRAIN == ("gta5",)
    assert len({run.cfg.dump() for run in runs.values()}) == len(runs) == 2 * len(ALL)
    assert ablation.TITLES.keys() == ROWS.keys()


def test_make_demo_trains_half_as_long_as_the_table(tmp_path):
    table = {run.setting: run for run in planned(tmp_path, seeds=[5])}
    short = {run.setting: run for run in ablation.plan(ROWS, [5], tmp_path, full=False)}
    assert table.keys() == short.keys() == ROWS.keys()
    for name, run in short.items():
        solver = run.cfg.SOLVER
        assert 2 * solver.MAX_ITER == table[name].cfg.SOLVER.MAX_ITER
        assert solver.MAX_ITER % solver.CHECKPOINT_PERIOD == 0
    assert short["joint"].folder == tmp_path / "joint"
    given = ablation.plan(ROWS, [5], tmp_path, ("SOLVER.MAX_ITER", "7"), full=False)
    assert {run.cfg.SOLVER.MAX_ITER for run in given} == {7}


def test_all_runs_end_and_none_is_repeated(tmp_path):
    """Fake trainings fail if the weights that they start from do not exist yet."""
    runs = planned(tmp_path)
    for _ in range(2):
        assert train(runs) == ""
    assert starts(runs) == len(runs) * [["new"]]
    assert train(runs, afresh=True) == ""
    assert all(times == 2 * ["new"] for times in starts(runs))


def test_the_longest_runs_start_first(tmp_path):
    """Of those that can start: joint training waits for the weights of source pre-training."""
    runs = planned(tmp_path, rows=ALL)
    assert train(runs, processes=1) == ""
    first = sorted(runs, key=lambda run: (run.folder / "starts").stat().st_mtime_ns)
    names = [(run.setting, run.seed) for run in first]
    assert names[:3] == [("trained random", 0), ("trained random", 2), ("frozen CLIP", 0)]
    assert names[3] == ("joint", 0)


def test_a_failure_is_named_and_runs_that_need_it_do_not_start(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL", "warmup_2")
    runs = planned(tmp_path)
    message = train(runs)
    assert message.startswith("frozen CLIP, seed 2: exit status 2: error: no such data")
    assert f"Its log is in {tmp_path / 'warmup_2'}" in message
    assert starts(runs[:4]) == 4 * [["new"]]
    assert starts(runs[5:]) == 3 * [[]]


def test_the_table_and_the_record(tmp_path):
    """mIoU of a fake training is 1000 BASE_LR + SEED, the teacher's half of it."""
    runs = planned(tmp_path)
    assert train(runs) == ""
    table = ablation.table_of(ROWS, runs)
    assert [row.name for row in table.rows] == list(ROWS)
    joint = table.rows[-1].values(ablation.METRICS["mIoU"])
    assert joint == {0: 30.0, 2: 32.0}
    assert table.difference(table.rows[-1], "mIoU") == paired_difference(joint, joint)
    content = ablation.record(table, "clouds demo --full", 2)
    files = ablation.write(table, content, tmp_path / "new")
    assert [file.name for file in files] == ["street_world.json", "street_world.md"]
    read = json.loads(files[0].read_text())
    assert read["rows"] == {name: {"0": 30.0, "2": 32.0} for name in ROWS}
    assert read["pixel accuracy"]["joint"] == {"0": 60.0, "2": 64.0}
    assert read["labels: teacher"]["joint"] == {"0": 15.0, "2": 16.0}
    assert (read["command"], read["threads"], read["processes"]) == ("clouds demo --full", 1, 2)
    assert read["machine"] and read["versions"] == {"torch": "2.0"}
    assert "31.0 ± 1.4" in files[1].read_text()
