"""Scores of results.json by name, metrics, and runs that cannot be compared."""

from __future__ import annotations

import copy
import json

import pytest
from fake_train import results
from report_runs import BETTER, COUNTS, write_run

from clouds.ablation.scores import (
    RunResults,
    check_comparable,
    check_metrics,
    metric_value,
    parse_metrics,
    read_run_results,
)

RESULTS = results(3, 40.0, 899, {"SEED": 3})


def run(tmp_path, content):
    return RunResults(tmp_path / "results.json", content)


def test_names_are_those_of_metrics_json(tmp_path):
    assert run(tmp_path, RESULTS).scores() == {
        "mean/mIoU": 40.0,
        "bdd_val/mIoU": 40.0,
        "bdd_val/pixel-accuracy": 80.0,
        "bdd_val/IoU-road": 40.0,
        "sd_x/teacher-mIoU": 20.0,
        "sd_x/refined-covered": 1.0,
    }


def test_scores_of_a_results_file_are_those_of_metrics_json(tmp_path):
    """As the evaluation writes both."""
    write_run(tmp_path, {"bdd_val": COUNTS, "acdc_fog_val": BETTER}, pseudo_labels=True)
    line = json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1])
    del line["iteration"], line["evaluation"]
    expected = {name: value for name, value in line.items() if value is not None}
    assert read_run_results(tmp_path / "results.json").scores() == expected


def test_metrics_are_means_over_the_matching_scores():
    scores = {"mean/mIoU": 9.0, "a/mIoU": 1.0, "b/mIoU": 2.0, "a/IoU-pole": 5.0, "a/IoU-sky": 8.0}
    assert metric_value(["mean/mIoU"], scores) == 9.0
    assert metric_value(["*/mIoU"], scores) == 1.5  # without that of mean
    assert metric_value(["*/IoU-pole", "*/IoU-sky", "a/*-sky"], scores) == 6.5
    assert metric_value(["*/IoU-car"], scores) is None


def test_metrics_of_a_command_line():
    assert parse_metrics(["mean/mIoU", "thin=*/IoU-pole,*/IoU-fence"]) == {
        "mean/mIoU": ("mean/mIoU",),
        "thin": ("*/IoU-pole", "*/IoU-fence"),
    }
    for words in (["=a"], ["a="], ["a", "a=b"]):
        with pytest.raises(ValueError, match=r"is given"):
            parse_metrics(words)


def test_a_metric_that_no_run_has(tmp_path):
    with pytest.raises(ValueError, match=r"metric 'x': no run has a score 'mean/mIOU'.*mean/mIoU"):
        check_metrics({"x": ("mean/mIOU",)}, [run(tmp_path, RESULTS)])


def test_damaged_and_other_files(tmp_path):
    path = tmp_path / "results.json"
    path.write_text('{"mean": ')
    with pytest.raises(ValueError, match="damaged"):
        read_run_results(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"damaged: it holds a list, not an object"):
        read_run_results(path)
    path.write_text('{"datasets": {}, "seed": 1}')
    with pytest.raises(ValueError, match=r"damaged: it has no mean, protocol, config, iteration"):
        read_run_results(path)
    path.write_text(json.dumps(RESULTS))
    assert read_run_results(path).seed == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(protocol="slide"), "the protocol of .*: native; of .*: slide"),
        (lambda c: c["datasets"].update(x={}), r"the datasets of .*\['bdd_val'\]; of .*'x'"),
        (lambda c: c["datasets"]["bdd_val"].update(images=4), "numbers of images"),
        (lambda c: c["datasets"]["bdd_val"].update({"unscored-classes": ["sky"]}), "classes"),
    ],
)
def test_runs_that_cannot_be_compared(tmp_path, change, message):
    other = copy.deepcopy(RESULTS)
    check_comparable([run(tmp_path, RESULTS), run(tmp_path, other)])
    change(other)
    with pytest.raises(ValueError, match=message):
        check_comparable([run(tmp_path, RESULTS), run(tmp_path, other)])
