"""The average of the weights over training: its formula, resuming, evaluation, files."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from engine_toy import Toy, losses_of, toy_batches, toy_config
from run_files import resume, train_until
from torch import nn

from clouds.config import ConfigError, load_config
from clouds.engine import Trainer
from clouds.engine.checkpoint import Checkpointer
from clouds.engine.metrics import MetricsFile
from clouds.engine.run_folder import prepare
from clouds.engine.train_loop import HookBase
from clouds.engine.weight_average import WeightAverage

AVERAGE = ("SOLVER.WEIGHT_AVERAGE.ENABLED", "True", "SOLVER.WEIGHT_AVERAGE.DECAY", "0.75")


class History(HookBase):
    """The trained weights after each iteration."""

    def __init__(self):
        self.weights = []

    def after_step(self):
        model = self.trainer.model
        self.weights.append(model.conv.weight.detach().double().clone())


class Evaluation:
    """The sum of the weights that are evaluated, as a score."""

    def __init__(self, model):
        self.model = model

    def __call__(self):
        score = float(self.model.conv.weight.detach().double().sum())
        return SimpleNamespace(flat=lambda: {"toy/mIoU": score}, panels={})


def trainer_of(folder, *overrides, dropout=0.0, evaluated=False):
    model = Toy(dropout)
    evaluate = Evaluation(model) if evaluated else None
    cfg = toy_config(folder, *AVERAGE, *overrides)
    return Trainer(cfg, model=model, loader=toy_batches, evaluate=evaluate)


def averaged_by_hand(weights, start, decay=0.75):
    """A copy of the weights up to `start` iterations (at least one), then the moving average."""
    average = weights[max(start, 1) - 1]
    for value in weights[max(start, 1) :]:
        average = decay * average + (1 - decay) * value
    return average


@pytest.mark.parametrize("start", [0, 1, 5, 11])
def test_a_copy_until_the_start_then_an_average_of_each_iteration(tmp_path, start):
    trainer = trainer_of(tmp_path, "SOLVER.WEIGHT_AVERAGE.START_ITER", str(start))
    history = History()
    trainer.register_hooks([history])
    trainer.train()
    expected = averaged_by_hand(history.weights, start)
    found = trainer.average.values["conv.weight"].double()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(expected, history.weights[-1], atol=1e-4)
    assert "backbone.weight" not in trainer.average.values


def test_the_average_is_saved_as_weights_that_no_run_resumes_from(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    final, file = (
        torch.load(tmp_path / f"{name}.pth", weights_only=True)
        for name in ("model_final", "model_average")
    )
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert file.keys() == {"model", "iteration", "clouds"} and file["iteration"] == 11
    assert file["model"].keys() == final["model"].keys()
    for name, value in file["model"].items():
        expected = final["average"].get(name, final["model"][name])
        assert torch.equal(value, expected), name
        assert torch.equal(trainer.model.state_dict()[name], final["model"][name]), name
    assert not torch.equal(file["model"]["conv.weight"], final["model"]["conv.weight"])
    model = Toy()
    Checkpointer(model).load_weights(str(tmp_path / "model_average.pth"))
    assert torch.equal(model.conv.weight, final["average"]["conv.weight"])


def test_training_is_the_same_without_it(tmp_path):
    trainer_of(tmp_path / "a", evaluated=True).train()
    trainer_of(tmp_path / "b", "SOLVER.WEIGHT_AVERAGE.ENABLED", "False").train()
    assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b")
    assert not (tmp_path / "b" / "model_average.pth").exists()


@pytest.mark.parametrize("start", [0, 7])
def test_a_resumed_run_has_the_same_average(tmp_path, start):
    words = ("SOLVER.WEIGHT_AVERAGE.START_ITER", str(start))
    trainer_of(tmp_path / "whole", *words, dropout=0.3).train()
    train_until(trainer_of(tmp_path / "parts", *words, dropout=0.3), 9)
    second = trainer_of(tmp_path / "parts", *words, dropout=0.3)
    resume(second)
    assert second.start_iter == 9
    for name in ("model_final", "model_average"):
        one, other = (
            torch.load(tmp_path / run / f"{name}.pth", weights_only=True)
            for run in ("whole", "parts")
        )
        for entry in ("model", "average"):
            for key, value in one.get(entry, {}).items():
                assert torch.equal(value, other[entry][key]), (name, entry, key)


def test_it_is_evaluated_beside_the_last_weights_where_it_differs(tmp_path):
    words = ("TEST.EVAL_PERIOD", "4", "SOLVER.WEIGHT_AVERAGE.START_ITER", "6")
    trainer = trainer_of(tmp_path, *words, evaluated=True)
    history = History()
    trainer.register_hooks([history])
    trainer.train()
    records = MetricsFile(tmp_path / "metrics.json").records()
    scores = {r["iteration"]: r for r in records if r.get("evaluation")}
    assert scores.keys() == {3, 7, 11}
    for iteration, record in scores.items():
        last = history.weights[: iteration + 1]
        assert record["toy/mIoU"] == pytest.approx(float(last[-1].sum()), abs=1e-5)
        if iteration == 3:  # still a copy
            assert "average/toy/mIoU" not in record
        else:
            expected = float(averaged_by_hand(last, 6).sum())
            assert record["average/toy/mIoU"] == pytest.approx(expected, abs=1e-5)
            assert abs(expected - float(last[-1].sum())) > 1e-3


def test_a_complete_run_that_is_resumed_keeps_the_file(tmp_path):
    trainer_of(tmp_path).train()
    before = (tmp_path / "model_average.pth").stat().st_mtime_ns
    trainer = trainer_of(tmp_path, evaluated=True)
    trainer.resume_or_load()
    trainer.train()
    assert (tmp_path / "model_average.pth").stat().st_mtime_ns == before
    (record,) = [r for r in MetricsFile(tmp_path / "metrics.json").records() if "evaluation" in r]
    assert record["average/toy/mIoU"] != record["toy/mIoU"]


def test_an_average_that_begins_in_a_resumed_run_is_told(tmp_path, caplog):
    off = ("SOLVER.WEIGHT_AVERAGE.ENABLED", "False", "SOLVER.MAX_ITER", "4")
    trainer_of(tmp_path, *off).train()
    trainer = trainer_of(tmp_path)
    assert trainer.resume_or_load() == 4
    history = History()
    trainer.register_hooks([history])
    weights = trainer.model.conv.weight.detach().double().clone()
    trainer.train()
    assert "no weight average of the iterations before 4" in caplog.text
    expected = averaged_by_hand([weights, *history.weights], 0)
    found = trainer.average.values["conv.weight"].double()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_an_average_of_other_parameters_is_refused():
    model = nn.Linear(2, 2)
    average = WeightAverage(model, 0.5, 0, Checkpointer(model))
    with pytest.raises(ValueError, match=r"of other parameters .*: bias"):
        average.load_state_dict({"weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"of other parameters .*: weight"):
        average.load_state_dict({"weight": torch.zeros(1, 2), "bias": torch.zeros(2)})


def test_weights_return_and_keep_their_versions_after_an_error():
    model = nn.Linear(2, 2)
    average = WeightAverage(model, 0.5, 0, Checkpointer(model))
    average.load_state_dict({"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    parameter, before = model.weight, (model.weight.tolist(), model.weight._version)
    with pytest.raises(RuntimeError), average.apply():
        assert average.applied and model.weight.tolist() == [[1, 1], [1, 1]]
        raise RuntimeError
    assert model.weight is parameter and not average.applied
    assert (model.weight.tolist(), model.weight._version) == before
    assert average.values["weight"].tolist() == [[1, 1], [1, 1]]


def test_its_results_have_a_folder_that_is_set_aside_with_the_run(tmp_path, monkeypatch):
    folders = []

    def evaluate(cfg, model, **options):
        folders.append((cfg.OUTPUT_DIR, options["weights"]))
        return SimpleNamespace(flat=dict, panels={})

    monkeypatch.setattr("clouds.engine.trainer.evaluate_model", evaluate)
    monkeypatch.setattr("clouds.engine.trainer.check_test_data", lambda *_: None)
    cfg = toy_config(tmp_path, *AVERAGE, "DATASETS.TEST", ("cityscapes_val",))
    Trainer(cfg, model=Toy(), loader=toy_batches).train()
    assert folders == [
        (str(tmp_path), str(tmp_path / "model_final.pth")),
        (str(tmp_path / "average"), str(tmp_path / "model_average.pth")),
    ]
    (tmp_path / "average").mkdir()
    (tmp_path / "average" / "results.json").write_text(json.dumps({}))
    aside = prepare(tmp_path, resume=False, overwrite=True)
    assert (aside / "average" / "results.json").exists()
    assert not (tmp_path / "average").exists() and not (tmp_path / "model_average.pth").exists()


def test_a_start_after_the_last_iteration_is_refused():
    words = ["SOLVER.WEIGHT_AVERAGE.START_ITER", 40000]
    load_config(None, words)  # not enabled
    with pytest.raises(ConfigError, match=r"must be below SOLVER.MAX_ITER, 40000"):
        load_config(None, [*words, "SOLVER.WEIGHT_AVERAGE.ENABLED", True])
