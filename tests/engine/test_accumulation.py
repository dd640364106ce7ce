"""SOLVER.ACCUMULATE: the parts of a batch, one after the other, train as the whole batch."""

from __future__ import annotations

import pytest
import torch
from engine_toy import Toy, losses_of, toy_batches, toy_config
from run_files import resume, saved, train_until

from clouds.data.build import check_batch_size
from clouds.engine import Trainer
from clouds.engine.train_loop import HookBase


class Calls(HookBase):
    """Gradient norms when hooks may change gradients."""

    def __init__(self):
        self.iterations = []

    def after_backward(self):
        assert self.trainer.model.conv.weight.grad is not None
        self.iterations.append(self.trainer.iter)


def trainer_of(folder, accumulate, *overrides, model=None, dropout=0.0):
    cfg = toy_config(folder, "SOLVER.ACCUMULATE", str(accumulate), *overrides)
    return Trainer(cfg, model=model or Toy(dropout), loader=toy_batches)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_parts_train_as_the_whole_batch(tmp_path, accumulate):
    trainer_of(tmp_path / "whole", 1).train()
    trainer = trainer_of(tmp_path / "parts", accumulate)
    hook = Calls()
    trainer.register_hooks([hook])
    trainer.train()
    assert hook.iterations == list(range(12))
    assert trainer.model.calls == 12 * accumulate
    whole, parts = losses_of(tmp_path / "whole"), losses_of(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for iteration, values in whole.items():
        assert parts[iteration] == pytest.approx(values, rel=1e-5)
    weights, expected = saved(tmp_path / "parts")["model"], saved(tmp_path / "whole")["model"]
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-5)


def test_a_resumed_run_is_exact(tmp_path):
    trainer_of(tmp_path / "whole", 2, dropout=0.3).train()
    train_until(trainer_of(tmp_path / "parts", 2, dropout=0.3), 6)
    resume(trainer_of(tmp_path / "parts", 2, dropout=0.3))
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")
    for name, value in saved(tmp_path / "whole")["model"].items():
        assert torch.equal(value, saved(tmp_path / "parts")["model"][name])


class Weighted(Toy):
    """Losses that are weighted means over the batch: the weight of an image is in its pixels."""

    def prepare_parts(self, parts):
        total = sum(float(one["image"].abs().sum()) for part in parts for one in part)
        return [total] * len(parts)

    def forward(self, batch, total=None):
        weights = [float(one["image"].abs().sum()) for one in batch]
        total = sum(weights) if total is None else total
        losses = {}
        for weight, one in zip(weights, batch, strict=True):
            for name, loss in super().forward([one]).items():
                losses[name] = losses.get(name, 0) + weight / total * loss
        return losses


def test_a_model_that_prepares_parts_has_the_loss_of_the_batch(tmp_path):
    trainer_of(tmp_path / "whole", 1, model=Weighted()).train()
    trainer_of(tmp_path / "parts", 4, model=Weighted()).train()
    whole, parts = losses_of(tmp_path / "whole"), losses_of(tmp_path / "parts")
    for iteration, values in whole.items():
        assert parts[iteration] == pytest.approx(values, rel=1e-5)


def test_a_loss_that_is_not_finite_in_one_part_is_seen(tmp_path):
    model = Toy()
    model.loss_factor = lambda call: float("nan") if call == 5 else 1.0
    with pytest.raises(FloatingPointError, match="diverged in iteration 1: loss_ce is nan"):
        trainer_of(tmp_path, 4, model=model).train()


def test_batches_that_cannot_be_divided_are_refused(tmp_path):
    check_batch_size(8, 2, 4)
    with pytest.raises(ValueError, match=r"SOLVER.ACCUMULATE is 3, .* has 4 images .* of 4"):
        check_batch_size(8, 2, 3)
    with pytest.raises(ValueError, match=r"SOLVER.ACCUMULATE is 8"):
        trainer_of(tmp_path, 8)
