"""Losses that are read in the next iteration, as on a GPU: same run, errors, signals, records."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from engine_toy import Toy, losses_of, toy_batches, toy_config
from run_files import resume, saved, train_until

from clouds import comm
from clouds.engine import HookBase, Interrupted, NonFiniteLossError, Trainer
from clouds.engine.launch import launch
from clouds.engine.metrics import ScalarStorage
from clouds.engine.step_result import HostCopy


def trainer_of(folder, *overrides, deferred=True, model=None, hooks=()):
    trainer = Trainer(toy_config(folder, *overrides), model=model or Toy(), loader=toy_batches)
    trainer.train_step.deferred = deferred
    trainer.register_hooks(hooks)
    return trainer


def records(folder):
    """Training records without what depends on the clock or the process."""
    lines = [json.loads(line) for line in Path(folder, "metrics.json").read_text().splitlines()]
    varying = {"seconds", "data_seconds", "images_per_second", "memory_gib"}
    return [{k: v for k, v in line.items() if k not in varying} for line in lines]


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.mark.parametrize("optimizer", ["ADAMW", "SGD"])
@pytest.mark.parametrize("period", [1, 5])
def test_a_run_is_the_same_bit_for_bit(tmp_path, optimizer, period):
    words = ["SOLVER.OPTIMIZER", optimizer, "LOG_PERIOD", str(period)]
    for name, deferred in (("now", False), ("later", True)):
        trainer_of(tmp_path / name, *words, deferred=deferred).train()
    assert_same_tensors(saved(tmp_path / "now")["model"], saved(tmp_path / "later")["model"])
    assert records(tmp_path / "now") == records(tmp_path / "later")
    assert [r["iteration"] for r in records(tmp_path / "later")][-1] == 11


def test_a_resumed_run_writes_the_records_of_an_uninterrupted_one(tmp_path):
    """Iteration 7 follows the checkpoint of 3: the values of 0 to 3 are of the record at 4."""
    trainer_of(tmp_path / "whole", "LOG_PERIOD", "5").train()
    train_until(trainer_of(tmp_path / "two", "LOG_PERIOD", "5"), 6)
    resume(trainer_of(tmp_path / "two", "LOG_PERIOD", "5"))
    assert records(tmp_path / "whole") == records(tmp_path / "two")
    assert_same_tensors(saved(tmp_path / "whole")["model"], saved(tmp_path / "two")["model"])


@pytest.mark.parametrize("optimizer", ["ADAMW", "SGD"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_iteration_that_is_not_finite_changes_no_weight(tmp_path, value, optimizer):
    """It is found in the next one, whose forward pass has the weights before the bad one."""
    model, seen = Toy(), []
    model.loss_factor = lambda call: (
        seen.append(model.conv.weight.detach().clone()) or (value if call == 6 else 1.0)
    )
    words = ["SOLVER.OPTIMIZER", optimizer, "LOG_PERIOD", "20"]
    with pytest.raises(NonFiniteLossError) as error:
        trainer_of(tmp_path, *words, model=model).train()
    assert f"iteration 6: loss_ce is {value}" in str(error.value)
    assert [f"toy_{n:05d}.png" in str(error.value) for n in (23, 24, 27, 28)] == [False] + [
        True
    ] * 2 + [False]
    assert len(seen) == 8
    assert torch.equal(seen[6], seen[7]) and torch.equal(seen[7], model.conv.weight)
    assert not torch.equal(seen[5], seen[6])
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == ["model_0000003.pth"]


def test_what_is_not_finite_is_found_before_a_record_and_a_checkpoint(tmp_path):
    for name, call, words in (
        ("record", 6, ["SOLVER.CHECKPOINT_PERIOD", "100"]),
        ("checkpoint", 3, ["LOG_PERIOD", "100"]),
    ):
        model = Toy()
        model.loss_factor = lambda number, call=call: math.nan if number == call else 1.0
        with pytest.raises(NonFiniteLossError, match=f"iteration {call}"):
            trainer_of(tmp_path / name, *words, model=model).train()
        assert model.calls == call + 1
        assert not list((tmp_path / name).glob("*.pth"))
    assert sorted(losses_of(tmp_path / "record")) == list(range(6))


def test_what_is_not_finite_is_not_saved_when_another_error_ends_training(tmp_path):
    model = Toy()
    model.loss_factor = lambda call: math.nan if call == 5 else 1.0
    trainer = trainer_of(tmp_path, "LOG_PERIOD", "100", model=model)
    train_until(trainer, 6)
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == ["model_0000003.pth"]


def test_a_step_that_overflows_in_fp16_is_skipped_as_without(tmp_path):
    for name, deferred in (("now", False), ("later", True)):
        model, calls = Toy(), []
        model.norm.weight.register_hook(
            lambda gradient, calls=calls: (
                calls.append(1) or gradient * (math.inf if len(calls) == 3 else 1.0)
            )
        )
        trainer = trainer_of(tmp_path / name, deferred=deferred, model=model)
        trainer.train_step.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        trainer.train()
    assert [r["loss_scale"] for r in records(tmp_path / "later")] == [1024.0] * 3 + [512.0] * 9
    assert records(tmp_path / "now") == records(tmp_path / "later")
    assert_same_tensors(saved(tmp_path / "now")["model"], saved(tmp_path / "later")["model"])


class StopAt(HookBase):
    """Sends this process SIGTERM in iteration 5."""

    def before_step(self):
        if self.trainer.iter == 5:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_stops_after_the_next_iteration_and_the_run_resumes(tmp_path):
    with pytest.raises(Interrupted, match="after 7 of 12 iterations"):
        trainer_of(tmp_path / "two", "LOG_PERIOD", "20", hooks=[StopAt()]).train()
    resume(trainer_of(tmp_path / "two", "LOG_PERIOD", "20"))
    trainer_of(tmp_path / "whole", "LOG_PERIOD", "20").train()
    assert records(tmp_path / "whole") == records(tmp_path / "two")


def in_two_processes(folder):
    torch.set_num_threads(1)
    folder, rank = Path(folder), comm.get_rank()
    trainer_of(folder / "now", "LOG_PERIOD", "5", deferred=False).train()
    trainer_of(folder / "later", "LOG_PERIOD", "5").train()
    model = Toy()
    model.loss_factor = lambda call: math.nan if call == 6 and rank == 1 else 1.0
    try:
        trainer_of(folder / "diverged", "LOG_PERIOD", "5", model=model).train()
    except NonFiniteLossError as error:
        (folder / f"diverged{rank}").write_text(str(error))
    hooks = [StopAt()] if rank == 1 else []
    try:
        trainer_of(folder / "stopped", "LOG_PERIOD", "20", hooks=hooks).train()
    except Interrupted as request:
        (folder / f"stopped{rank}").write_text(str(request))


def test_two_processes_read_errors_and_signals_in_the_same_iteration(tmp_path):
    launch(in_two_processes, (str(tmp_path),), num_gpus=2, device="cpu")
    assert records(tmp_path / "now") == records(tmp_path / "later")
    assert_same_tensors(saved(tmp_path / "now")["model"], saved(tmp_path / "later")["model"])
    for rank in (0, 1):
        assert "iteration 6: loss_ce is nan" in (tmp_path / f"diverged{rank}").read_text()
        assert "after 7 of 12 iterations" in (tmp_path / f"stopped{rank}").read_text()


def test_a_hook_gets_the_losses_of_its_iteration(tmp_path):
    class Reader(HookBase):
        def __init__(self):
            self.seen = []

        def after_step(self):
            self.seen.append(self.trainer.storage.latest()["total_loss"])

    hook = Reader()
    trainer_of(tmp_path, hooks=[hook]).train()
    assert [number for _, number in hook.seen] == list(range(12))
    assert [value for value, _ in hook.seen] == [r["total_loss"] for r in records(tmp_path)]


def test_stored_scalars_are_read_once_and_do_not_replace_later_ones():
    storage, reads = ScalarStorage(), []

    def scalars(number):
        return lambda: reads.append(number) or {"a": number, "b": -number}

    storage.iter = 1
    storage.put_later(scalars(1))
    storage.put_scalar("b", 7)
    assert storage.latest(read=False) == {"b": (7.0, 1)} and reads == []
    assert storage.latest() == {"a": (1.0, 1), "b": (7.0, 1)}
    storage.iter = 2
    storage.put_later(scalars(2))
    assert storage.latest(read=False)["a"] == (1.0, 1) and reads == [1]
    assert storage.latest() == {"a": (2.0, 2), "b": (-2.0, 2)} and reads == [1, 2]


def test_reading_is_not_counted_as_done_before_the_first_read():
    copy = HostCopy(torch.tensor([1.5, 2.0], dtype=torch.float64))
    assert not copy.is_read
    assert copy.read() == [1.5, 2.0] and copy.is_read
