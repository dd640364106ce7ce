"""Reading the folder of a run: what it did, and what is wrong with it."""

from __future__ import annotations

import json

import pytest
from report_runs import COUNTS, write_records, write_run

from clouds.evaluation.results_file import number
from clouds.report.run import read_run, read_runs, short_names


def test_a_complete_run(tmp_path):
    folder = write_run(tmp_path / "a", {"bdd_val": COUNTS}, scores={"0.png": 12.5}, SEED=3)
    run = read_run(folder, "a")
    assert run.is_complete and run.status() == "complete: 15 of 15 iterations"
    assert [record["total_loss"] for record in run.training] == [8, 4, 2]
    assert [record["bdd_val/mIoU"] for record in run.evaluations] == pytest.approx([50])
    assert run.config["SEED"] == 3 and run.config["SOLVER.MAX_ITER"] == 15
    assert run.command == "clouds train --config-file x"
    assert run.image_scores == {"bdd_val": {"0.png": 12.5}}


@pytest.mark.parametrize(
    "datasets,losses,iteration,status",
    [
        (None, (8.0,), 14, "(interrupted, or still running): 5 of 15 iterations; there are no"),
        (None, (8.0, 4.0, 2.0), 14, "(its last evaluation is missing): 15 of 15 iterations; there"),
        ({"bdd_val": COUNTS}, (8.0, 4.0), 7, "10 of 15 iterations; the scores are those after 8 "),
    ],
)
def test_runs_that_are_not_complete(tmp_path, datasets, losses, iteration, status):
    run = read_run(write_run(tmp_path, datasets, losses=losses, iteration=iteration), "a")
    assert not run.is_complete
    assert run.status().startswith("not complete (") and status in run.status()


def test_an_evaluation(tmp_path):
    run = read_run(write_run(tmp_path, {"bdd_val": COUNTS}, iteration=None), "a")
    assert run.is_complete and run.status() == "evaluation of random weights"
    assert run.config["SOLVER.MAX_ITER"] == 15  # of results.json


def test_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'.*nowhere' does not exist"):
        read_run(tmp_path / "nowhere", "a")
    with pytest.raises(ValueError, match=r"neither results.json nor metrics.json.*`clouds eval`"):
        read_run(tmp_path, "a")
    write_run(tmp_path / "eval/native_x", {"bdd_val": COUNTS}, iteration=None)
    with pytest.raises(ValueError, match="There are runs in it: eval/native_x"):
        read_run(tmp_path, "a")
    with pytest.raises(ValueError, match=r"is a file; name the folder"):
        read_run(tmp_path / "eval/native_x/results.json", "a")
    with pytest.raises(ValueError, match="no run is given"):
        read_runs([])


@pytest.mark.parametrize(
    "name,text,reason",
    [
        ("results.json", '{"datasets": ', "Expecting value"),
        ("results.json", "[1]", "it holds a list"),
        ("results.json", "{}", "no scores by dataset"),
        ("results.json", '{"datasets": {"a": {}}}', "a has no IoU by class"),
        ("results.json", '{"datasets": {}, "iteration": "x"}', "its iteration is 'x'"),
        (
            "results.json",
            '{"datasets": {"a": {"IoU": {"road": 1}, "confusion-matrix": [[-1]]}}}',
            "the confusion matrix of a is not 1 x 1",
        ),
        ("per_image.json", '{"datasets": {"a": [{"file": "x"}]}}', "no list of images"),
        ("results.json", "[" * 100_000, "recursion"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, text, reason):
    write_run(tmp_path, {"bdd_val": COUNTS})
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}' is damaged: .*{reason}.*delete the file"):
        read_run(tmp_path, "a")


def test_incomplete_lines_of_metrics_are_skipped(tmp_path):
    write_records(tmp_path, (8.0, 4.0))
    with (tmp_path / "metrics.json").open("a") as file:
        file.write('{"iteration": 14, "total_l')
    assert [r["iteration"] for r in read_run(tmp_path, "a").training] == [4, 9]


def test_numbers_of_json():
    values = json.loads('[1, 2.5, NaN, Infinity, null, "3", true]')
    assert list(map(number, values)) == [1.0, 2.5, None, None, None, None, None]


def test_names(tmp_path):
    folders = [tmp_path / name for name in ("a", "b")]
    assert short_names(folders) == ["a", "b"]
    folders = [tmp_path / name for name in ("0/joint", "1/joint", "1/warmup")]
    assert short_names(folders) == ["0/joint", "1/joint", "1/warmup"]
    write_run(tmp_path / "a", None)
    with pytest.raises(ValueError, match=r"/a is given more than once"):
        read_runs([tmp_path / "a", tmp_path / "x/../a"])
