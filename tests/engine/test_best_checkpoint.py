"""model_best.pth: the weights of the best evaluation, and what says how they were chosen."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from engine_toy import Toy, toy_batches, toy_config

from clouds.engine import Trainer
from clouds.engine.best_checkpoint import BestCheckpoint
from clouds.engine.checkpoint import Checkpointer
from clouds.engine.metrics import MetricsFile
from clouds.evaluation.report import describe_run

NAN = float("nan")


def trainer_of(folder, values, *overrides):
    """Evaluations after iterations 5, 10 and 12 have these values; checkpoints after 4 and 8."""
    values = iter(values)

    def evaluate():
        value = next(values)
        return SimpleNamespace(flat=lambda: {"mean/mIoU": value}, panels={})

    words = ("TEST.EVAL_PERIOD", "5", "SOLVER.BEST_ON", "test", "DATASETS.TEST", ("bdd_val",))
    cfg = toy_config(folder, *words, *overrides)
    return Trainer(cfg, Toy(), toy_batches, evaluate=evaluate)


def best(folder):
    return torch.load(folder / "model_best.pth", weights_only=True)


def weights_after(folder, iterations):
    """Of a run of as many iterations with the same learning rates."""
    trainer = Trainer(toy_config(folder), Toy(), toy_batches)
    trainer.resume_or_load(resume=False)
    trainer.max_iter = iterations
    trainer.train()
    return trainer.model.state_dict()


@pytest.mark.parametrize(
    ("values", "iteration"), [((10, 30, 20), 9), ((30, 10, 20), 4), ((10, 10, NAN), 4)]
)
def test_the_best_weights_are_kept(tmp_path, values, iteration):
    trainer_of(tmp_path / "run", values).train()
    content = best(tmp_path / "run")
    assert content["iteration"] == iteration
    expected = weights_after(tmp_path / "other", iteration + 1)
    assert all(torch.equal(content["model"][name], expected[name]) for name in expected)
    # it is not what a run is resumed from
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_final.pth"
    assert "optimizer" not in content


@pytest.mark.parametrize("values", [(30, 10, 20), (10, 30, 20), (10, 20, 30)])
@pytest.mark.parametrize("tag", ["model_0000003.pth", "model_0000007.pth"])
def test_a_resumed_run_keeps_the_same(tmp_path, values, tag):
    trainer_of(tmp_path, values).train()
    before = best(tmp_path)
    (tmp_path / "last_checkpoint").write_text(tag)
    resumed = trainer_of(tmp_path, values if tag == "model_0000003.pth" else values[1:])
    resumed.resume_or_load(resume=True)
    resumed.train()
    after = best(tmp_path)
    assert after["iteration"] == before["iteration"]
    assert all(torch.equal(after["model"][n], value) for n, value in before["model"].items())


def test_a_best_file_that_is_missing(tmp_path, caplog):
    trainer_of(tmp_path, (30, 10, 20)).train()
    (tmp_path / "model_best.pth").unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000007.pth")
    resumed = trainer_of(tmp_path, (10, 20))
    resumed.resume_or_load(resume=True)
    resumed.train()
    assert "best weights so far (iteration 5) is missing" in caplog.text
    assert best(tmp_path)["iteration"] == 11


def test_a_best_file_of_an_evaluation_that_is_repeated(tmp_path, caplog):
    """It has the weights after 10 iterations, which the resumed run, at 8, trains again."""
    trainer_of(tmp_path, (20, 30, 10)).train()
    assert best(tmp_path)["iteration"] == 9
    (tmp_path / "last_checkpoint").write_text("model_0000007.pth")
    resumed = trainer_of(tmp_path, (5, 10))  # other scores, as where training is not exact
    resumed.resume_or_load(resume=True)
    resumed.train()
    assert "iteration 5) has been replaced by those of iteration 10" in caplog.text
    assert best(tmp_path)["iteration"] == 11
    assert "10.00 %" in best(tmp_path)["selection"]


def test_a_best_file_that_is_damaged(tmp_path, caplog):
    trainer_of(tmp_path, (30, 10, 20)).train()
    (tmp_path / "model_best.pth").write_bytes(b"x")
    (tmp_path / "last_checkpoint").write_text("model_0000007.pth")
    resumed = trainer_of(tmp_path, (10, 20))
    resumed.resume_or_load(resume=True)
    resumed.train()
    assert "iteration 5) is damaged" in caplog.text and best(tmp_path)["iteration"] == 11


def test_a_choice_on_the_test_data_is_said(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    trainer = trainer_of(tmp_path, (10, 30, 20))
    trainer.train()
    assert "model_best.pth is chosen by the test datasets bdd_val" in caplog.text
    text = describe_run(trainer.cfg, trainer.model, weights=str(tmp_path / "model_best.pth"))[
        "selection"
    ]
    assert "after iteration 10" in text and "on the test datasets bdd_val: 30.00 %" in text
    assert "never saw them" in text
    final = describe_run(trainer.cfg, trainer.model, weights=str(tmp_path / "model_final.pth"))
    assert final["selection"] is None


def test_by_default_the_source_decides(tmp_path):
    cfg = toy_config(tmp_path, "DATASETS.SOURCE_VAL_FRACTION", "0.1")
    file = MetricsFile(tmp_path / "metrics.json")
    kept = BestCheckpoint.from_config(cfg, Checkpointer(Toy(), str(tmp_path)), file)
    assert kept is not None
    scores = {"mean/mIoU": 50.0, "source_val/mean/mIoU": 60.0}
    kept.update(scores, 4)
    kept.update({"mean/mIoU": 70.0, "source_val/mean/mIoU": 59.0}, 9)
    content = best(tmp_path)
    assert content["iteration"] == 4
    assert content["selection"] == (
        "Weights after iteration 5, the best of the run's evaluations by mIoU on held-out images "
        "of the source gta5: 60.00 %."
    )


def test_without_held_out_images_there_is_none(tmp_path):
    file = MetricsFile(tmp_path / "metrics.json")
    assert BestCheckpoint.from_config(toy_config(tmp_path), Checkpointer(Toy()), file) is None
