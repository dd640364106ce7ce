"""Hooks: Detectron2's protocol, state in checkpoints, scalars, and the update of a teacher."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_toy import Toy, losses_of, script_environment, toy_batches, toy_config
from run_files import resume

from clouds.engine import EMAHook, HookBase, NonFiniteLossError, Trainer

TESTS = Path(__file__).resolve().parents[1]


def trainer_of(folder, *overrides, model=None, hooks=()):
    trainer = Trainer(
        toy_config(folder, *overrides), model=model or Toy(), loader=toy_batches, evaluate=None
    )
    trainer.register_hooks(hooks)
    return trainer


class Calls:
    """Records the calls of the protocol, as a mixin or as a hook that inherits from nothing."""

    def __init__(self):
        self.calls = []

    def record(self, name):
        self.calls.append((name, self.trainer.iter))

    def before_train(self):
        assert (self.trainer.start_iter, self.trainer.max_iter) == (0, 2)
        self.record("before_train")

    def before_step(self):
        self.record("before_step")

    def after_backward(self):
        self.record("after_backward")

    def after_step(self):
        self.record("after_step")

    def after_train(self):
        self.record("after_train")


class Subclass(Calls, HookBase):
    """A hook that inherits from `HookBase`."""


@pytest.mark.parametrize("hook_class", [Calls, Subclass])
def test_order_of_calls(tmp_path, hook_class):
    hook = hook_class()
    trainer = trainer_of(tmp_path, "SOLVER.MAX_ITER", "2", hooks=[hook, None])
    trainer.train()
    step = ("before_step", "after_backward", "after_step")
    assert hook.calls == [
        ("before_train", 0),
        *((name, 0) for name in step),
        *((name, 1) for name in step),
        ("after_train", 2),  # as in Detectron2, iter is max_iter at the end
    ]
    assert hook.trainer is trainer


def test_a_hook_may_lack_methods(tmp_path):
    class OnlyAfterStep:
        count = 0

        def after_step(self):
            self.count += 1

    hook = OnlyAfterStep()
    trainer_of(tmp_path, hooks=[hook]).train()
    assert hook.count == 12


def test_after_train_is_not_called_when_training_fails(tmp_path):
    hook, model = Subclass(), Toy()
    model.loss_factor = lambda call: float("nan") if call == 1 else 1.0
    with pytest.raises(NonFiniteLossError):
        trainer_of(tmp_path, "SOLVER.MAX_ITER", "2", model=model, hooks=[hook]).train()
    assert hook.calls[-2:] == [("before_step", 1), ("after_backward", 1)]


def test_a_hook_changes_gradients_after_the_backward_pass(tmp_path):
    """With zero gradients and no weight decay, AdamW leaves the weights unchanged."""

    class ZeroGradients(HookBase):
        def after_backward(self):
            for parameter in self.trainer.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()

    trainer = trainer_of(tmp_path, "SOLVER.WEIGHT_DECAY", "0.0", hooks=[ZeroGradients()])
    trainer.train()
    for name, value in Toy().state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value)
    assert [grad_norm for *_, grad_norm, _ in losses_of(tmp_path).values()] == [0.0] * 12


def test_gradients_are_unscaled_after_the_backward_pass(tmp_path):
    norms = []

    class Norm(HookBase):
        def after_backward(self):
            gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
            norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())

    trainer = trainer_of(tmp_path, hooks=[Norm()])
    trainer.train_step.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.train()
    assert norms == pytest.approx([losses_of(tmp_path)[i][4] for i in range(12)], rel=1e-5)


class Counter(HookBase):
    """Sums the iterations; a hook with state."""

    total = 0

    def after_step(self):
        self.total += self.trainer.iter

    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, state):
        self.total = state["total"]


def test_state_of_hooks_is_restored(tmp_path):
    first, second = Counter(), Counter()
    trainer_of(tmp_path, "SOLVER.MAX_ITER", "5", hooks=[first, second]).train()
    assert first.total == 0 + 1 + 2 + 3 + 4
    file = torch.load(tmp_path / "model_0000003.pth", weights_only=True)
    # saved after the hooks of the same iteration; hooks of the same class are numbered
    assert file["hooks.Counter"] == file["hooks.Counter.2"] == {"total": 0 + 1 + 2 + 3}
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    hooks = [Counter(), Counter()]
    resume(trainer_of(tmp_path, "SOLVER.MAX_ITER", "6", hooks=hooks))
    assert [hook.total for hook in hooks] == [0 + 1 + 2 + 3 + 4 + 5] * 2


def test_checkpoints_have_no_entries_of_hooks_without_state(tmp_path):
    trainer_of(tmp_path, "SOLVER.MAX_ITER", "2", hooks=[Subclass()]).train()
    file = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert set(file) == {"model", "optimizer", "scheduler", "metrics", "iteration", "clouds"}


class Scalars(HookBase):
    """Puts scalars as hooks of Detectron2 do."""

    def after_step(self):
        storage, iteration = self.trainer.storage, self.trainer.iter
        assert storage.iter == iteration
        storage.put_scalar("square", torch.tensor(iteration**2))
        storage.put_scalars(last=iteration, smoothing_hint=False)
        if iteration == 0:
            storage.put_scalar("once", 7)
        total, at = storage.latest()["total_loss"]
        assert (total, at) == (self.trainer.last_step.total_loss, iteration)


def test_scalars_of_hooks_are_recorded(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer_of(tmp_path, "LOG_PERIOD", "4", hooks=[Scalars()]).train()
    records = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [r["square"] for r in records] == [
        (0 + 1 + 4 + 9) / 4, (16 + 25 + 36 + 49) / 4, (64 + 81 + 100 + 121) / 4,
    ]  # fmt: skip
    assert [r["last"] for r in records] == [3, 7, 11]
    assert [r.get("once") for r in records] == [7, None, None]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/last")] == [(3, 3), (7, 7), (11, 11)]


class FakeTeacher:
    """Records calls; an update is due every third iteration."""

    def __init__(self):
        self.calls = []

    def reset(self):
        self.calls.append("reset")

    def due(self, iteration):
        return (iteration + 1) % 3 == 0

    def momentum_at(self, iteration):
        return iteration / 10

    def update(self, momentum):
        self.calls.append("update")
        self.momentum = momentum

    def state_dict(self):
        return {"updates": self.calls.count("update")}

    def load_state_dict(self, state):
        self.calls.append(f"load {state['updates']}")


def test_ema_hook(tmp_path):
    teacher = FakeTeacher()
    trainer_of(tmp_path, "SOLVER.MAX_ITER", "7", hooks=[EMAHook(teacher)]).train()
    assert teacher.calls == ["reset", "update", "update"]
    assert teacher.momentum == 0.5  # that of iteration 5, the last one with an update
    file = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert file["teacher"] == {"updates": 2}
    resumed = FakeTeacher()
    resume(trainer_of(tmp_path, "SOLVER.MAX_ITER", "9", hooks=[EMAHook(resumed)]))
    assert resumed.calls == ["load 2", "update"]


CALLBACK_HOOK = """
import sys
from detectron2.engine.hooks import CallbackHook
from engine_toy import Toy, toy_batches, toy_config
from clouds.engine import Trainer

calls = []
hook = CallbackHook(
    before_train=lambda trainer: calls.append(("before_train", trainer.iter)),
    before_step=lambda trainer: calls.append(("before_step", trainer.iter)),
    after_step=lambda trainer: (
        calls.append(("after_step", trainer.iter)),
        trainer.storage.put_scalars(doubled=2 * trainer.iter),
    ),
    after_train=lambda trainer: calls.append(("after_train", trainer.iter)),
)
config = toy_config(sys.argv[1], "SOLVER.MAX_ITER", "2")
trainer = Trainer(config, model=Toy(), loader=toy_batches)
trainer.register_hooks([hook])
trainer.train()
print(calls)
"""


def test_a_hook_of_detectron2(tmp_path):
    source = os.environ.get("DETECTRON2_SOURCE", "")
    if not source and importlib.util.find_spec("detectron2") is None:
        pytest.skip(
            "Detectron2 is not installed; set DETECTRON2_SOURCE to its source folder to run this"
        )
    folders = [folder for folder in (TESTS, source) if folder]
    done = subprocess.run(
        [sys.executable, "-c", CALLBACK_HOOK, str(tmp_path)],
        env=script_environment(*folders),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    steps = [(name, i) for i in (0, 1) for name in ("before_step", "after_step")]
    calls = [("before_train", 0), *steps, ("after_train", 2)]
    assert done.stdout.splitlines()[-1] == str(calls)
    records = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [record["doubled"] for record in records] == [0, 2]
