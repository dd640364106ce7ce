"""Images of a report: their choice, and their predictions by checkpoints."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from dataset_files import write
from tiny_checkpoint import save_checkpoint

from clouds.config.config import with_value
from clouds.data.datasets import get_dataset
from clouds.evaluation import evaluate
from clouds.inference.load import load
from clouds.report.run import Run, read_runs
from clouds.report.samples import Choice, choose, predict


def scored(name, scores):
    return Run(name, None, {}, (), (), {}, "", {"bdd_val": scores})


def test_choice_of_one_run():
    run = scored("a", {"0": 10.0, "1": 30.0, "2": None, "3": 20.0})
    assert choose([run], "bdd_val", 1) == [
        Choice("1", ("best of a",)),
        Choice("0", ("worst of a",)),
    ]
    assert [c.file for c in choose([run], "bdd_val", 5)] == ["1", "3", "0"]  # each one once
    assert choose([run], "bdd_val", 5)[0].reasons == ("best of a", "worst of a")
    assert choose([run], "bdd_val", 0) == choose([run], "other", 2) == []


def test_choice_of_several_runs():
    first = scored("a", {"0": 10.0, "1": 30.0, "2": 50.0, "3": 20.0})
    last = scored("b", {"0": 10.0, "1": 45.0, "2": 49.0, "3": 15.0, "4": 90.0})
    assert choose([first, scored("x", {}), last], "bdd_val", 1) == [
        Choice("4", ("best of b",)),
        Choice("0", ("worst of b",)),
        Choice("1", ("largest gain from a to b",)),
        Choice("3", ("largest loss from a to b",)),
    ]
    assert len(choose([first, first], "bdd_val", 2)) == 4  # no gains, no losses


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Folder of an evaluated run, and the root of its dataset, with two images."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(folder / "data"))
        for i in range(2):
            write(folder / "data", "bdd_val", i, (48, 64))
        weights, model = save_checkpoint(folder, DATASETS__TEST=("bdd_val",))
        cfg = load(weights).cfg
        evaluate(with_value(cfg, "OUTPUT_DIR", str(folder)), model, weights=str(weights))
    return folder


def test_predictions_are_those_of_the_evaluation(evaluated, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(evaluated / "data"))
    runs = read_runs([evaluated])
    choices = {"bdd_val": [Choice("0001-abc.jpg", ("best",))]}
    samples, notes = predict(runs, choices, "cpu")
    assert notes == []
    (sample,) = samples
    record = get_dataset("bdd_val").records()[1]
    assert np.array_equal(sample.label, get_dataset("bdd_val").read_label(record))
    expected = load(evaluated / "model_final.pth")(record.image, keep_scores=False).labels
    assert np.array_equal(sample.predictions[runs[0].name], expected)
    assert sample.image.shape == (48, 64, 3)


def test_a_score_that_is_another_one_is_told(evaluated, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(evaluated / "data"))
    (run,) = read_runs([evaluated])
    run.image_scores["bdd_val"]["0001-abc.jpg"] = 99.0
    samples, notes = predict([run], {"bdd_val": [Choice("0001-abc.jpg", ())]}, "cpu")
    assert len(samples) == 1
    assert "mIoU 99.0 % in the evaluation" in notes[0] and "have changed" in notes[0]


def test_without_datasets_or_checkpoint(evaluated, monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    choices = {"bdd_val": [Choice("0001-abc.jpg", ())]}
    samples, notes = predict(read_runs([evaluated]), choices, "cpu")
    assert samples == [] and "the dataset root" in notes[0]
    monkeypatch.setenv("DETECTRON2_DATASETS", str(evaluated / "data"))
    wrong = {"bdd_val": [Choice("2.jpg", ())]}
    samples, notes = predict(read_runs([evaluated]), wrong, "cpu")
    assert samples == [] and "2.jpg is not in" in notes[0]
    for name in ("results.json", "per_image.json"):
        shutil.copy(evaluated / name, tmp_path)
    (run,) = read_runs([tmp_path])
    run.results["weights"]["file"] = "moved/x.pth"
    samples, notes = predict([run], choices, "cpu")
    assert samples == [] and notes[0].endswith("its checkpoint 'moved/x.pth' does not exist")
    shutil.copy(evaluated / "model_final.pth", tmp_path / "x.pth")  # beside results.json
    assert len(predict([run], choices, "cpu")[0]) == 1
