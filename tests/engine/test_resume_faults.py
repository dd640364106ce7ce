"""Resuming from torn and older checkpoints, with another config, and weights that diverged."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from engine_toy import Toy, losses_of, toy_batches, toy_config
from torch import nn

from clouds.engine import EMAHook, HookBase, NonFiniteLossError, Trainer
from clouds.engine.checkpoint import Checkpointer, NonFiniteWeightsError, PeriodicCheckpointer


def trainer_of(folder, *overrides, model=None, hooks=()):
    trainer = Trainer(toy_config(folder, *overrides), model=model or Toy(), loader=toy_batches)
    trainer.register_hooks(hooks)
    return trainer


def weights_in(path):
    return torch.load(path, weights_only=True)["model"]


def names(folder):
    return sorted(path.name for path in folder.glob("*.pth"))


def tear(path, how="truncated"):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if how == "truncated":
        content = content[:middle]
    elif how == "empty":
        content = b""
    else:
        content[middle : middle + 512] = bytes(512)
    path.write_bytes(content)


@pytest.fixture
def run(tmp_path):
    """A finished run of 12 iterations: checkpoints after 4, 8 and all."""
    trainer_of(tmp_path / "run").train()
    assert names(tmp_path / "run") == ["model_0000003.pth", "model_0000007.pth", "model_final.pth"]
    return tmp_path / "run"


@pytest.mark.parametrize("how", ["truncated", "empty", "a hole"])
def test_the_checkpoint_before_a_torn_one_is_used(run, how, caplog):
    expected = weights_in(run / "model_final.pth")
    tear(run / "model_final.pth", how)
    trainer = trainer_of(run)
    assert trainer.resume_or_load(resume=True) == 8
    (text,) = [m for m in caplog.messages if "before it" in m]
    assert "model_final.pth'" in text and "model_0000007.pth' (iteration 7)" in text
    assert trainer.checkpointer.get_checkpoint_file() == str(run / "model_0000007.pth")
    trainer.train()
    assert all(torch.equal(weights_in(run / "model_final.pth")[k], expected[k]) for k in expected)
    assert sorted(losses_of(run)) == list(range(12))


def test_the_newest_whole_one_of_several_is_used(run, caplog):
    for name in ("model_final.pth", "model_0000007.pth"):
        tear(run / name)
    assert trainer_of(run).resume_or_load(resume=True) == 4
    tear(run / "model_0000003.pth")
    with pytest.raises(
        ValueError, match=r"model_final\.pth(.*\n){3}.*no whole checkpoint before it"
    ):
        trainer_of(run).resume_or_load(resume=True)


def test_a_newer_one_is_not_used_in_place_of_a_torn_one(run):
    """After going back to iteration 3, the file of iteration 7 is not the one before."""
    tear(run / "model_0000003.pth")
    (run / "last_checkpoint").write_text("model_0000003.pth")
    with pytest.raises(ValueError, match=r"model_0000003\.pth.*\n.*no whole checkpoint before it"):
        trainer_of(run).resume_or_load(resume=True)


def test_going_back_deletes_no_newer_checkpoint(tmp_path):
    saver = Checkpointer(nn.Linear(1, 1), str(tmp_path))
    periodic = PeriodicCheckpointer(saver, period=2)
    for iteration in range(10):
        periodic.step(iteration)
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    again = Checkpointer(nn.Linear(1, 1), str(tmp_path))
    again.resume()
    resumed = PeriodicCheckpointer(again, period=1, max_to_keep=2)
    for name in ("other_0000001.pth", "model_4.pth"):  # of another run, and newer
        torch.save({}, tmp_path / name)
    resumed.adopt_existing()
    assert resumed.recent_checkpoints == [f"{tmp_path}/model_000000{n}.pth" for n in (1, 3)]
    for name in ("other_0000001.pth", "model_4.pth"):
        (tmp_path / name).unlink()
    resumed.step(4, note="kept")
    assert torch.load(tmp_path / "model_0000004.pth")["note"] == "kept"
    # of the files up to iteration 4 the newest two are left, and all that are newer than 3 before
    assert names(tmp_path) == [f"model_000000{n}.pth" for n in (3, 4, 5, 7, 9)]


# ------------------------------------------------- another config
def test_another_optimizer_says_what_is_possible(run):
    trainer = trainer_of(run, "SOLVER.OPTIMIZER", "SGD")
    before = [value.clone() for value in trainer.model.state_dict().values()]
    with pytest.raises(
        ValueError, match=r"state of ADAMW, but SOLVER\.OPTIMIZER is SGD\."
    ) as error:
        trainer.resume_or_load(resume=True)
    assert "Set SOLVER.OPTIMIZER ADAMW to resume" in str(error.value)
    assert f"MODEL.WEIGHTS {run / 'model_final.pth'}, without --resume" in str(error.value)
    after = trainer.model.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_other_trained_parameters_say_what_is_possible(run):
    model = Toy()
    model.query.requires_grad_(False)
    with pytest.raises(ValueError, match=r"state of 'optimizer' in .*does not fit") as error:
        trainer_of(run, model=model).resume_or_load(resume=True)
    assert "in another OUTPUT_DIR" in str(error.value)


def test_another_head_says_what_is_possible(run):
    model = Toy()
    model.query = nn.Embedding(5, 8)
    with pytest.raises(ValueError, match=r"of another model") as error:
        trainer_of(run, "MODEL.WEIGHTS_PARTIAL", "True", model=model).resume_or_load(resume=True)
    assert "query.weight: (2, 8) in the file, (5, 8) in the model" in str(error.value)
    assert "A run is resumed with the model and the optimizer" in str(error.value)
    assert "without --resume, in another OUTPUT_DIR; MODEL.WEIGHTS_PARTIAL True" in str(error.value)


def test_another_number_of_processes_or_batch_size_is_told(run, caplog):
    path = run / "model_final.pth"
    content = torch.load(path, weights_only=True)
    assert content["clouds"]["processes"] == 1
    content["clouds"]["processes"] = 8
    torch.save(content, path)
    trainer_of(run, "SOLVER.IMS_PER_BATCH", "8").resume_or_load(resume=True)
    assert "saved by 8 processes and is resumed by 1" in caplog.text
    assert "SOLVER.IMS_PER_BATCH: 4 -> 8" in caplog.text


# ------------------------------------------------- weights that are not finite
class SetWeight(HookBase):
    """Sets a weight to a value after an iteration, as an optimizer step that overflows."""

    def __init__(self, iteration, value):
        self.iteration, self.value = iteration, value

    def after_step(self):
        if self.trainer.iter == self.iteration:
            with torch.no_grad():
                self.trainer.model.conv.weight[0, 0, 0, 0] = self.value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, value):
    trainer = trainer_of(tmp_path, hooks=[SetWeight(7, value)])
    with pytest.raises(NonFiniteLossError, match=r"not finite: conv\.weight\.") as error:
        trainer.train()
    assert f"last checkpoint is '{tmp_path}/model_0000003.pth'" in str(error.value)
    assert names(tmp_path) == ["model_0000003.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"
    assert trainer.checkpointer.saved_iteration == 3


def test_a_process_that_does_not_save_stops_in_the_same_iteration(tmp_path):
    model = nn.Linear(1, 1)
    periodic = PeriodicCheckpointer(Checkpointer(model, str(tmp_path), save_to_disk=False), 3)
    periodic.step(2)
    nn.init.constant_(model.weight, math.nan)
    periodic.step(3)
    with pytest.raises(NonFiniteWeightsError, match=r"not finite: weight\."):
        periodic.step(5)


class Masked(nn.Module):
    """Its mask is infinite on purpose, as that of CLIP's text encoder."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("mask", torch.full((2, 2), -math.inf).triu(1))


def test_masks_may_be_infinite(tmp_path):
    Checkpointer(Masked(), str(tmp_path)).save("a", iteration=0)
    model = Masked()
    model.mask.zero_()
    Checkpointer(model).load_weights(str(tmp_path / "a.pth"))
    assert model.mask[0, 1] == -math.inf
    model.mask[0, 0] = math.nan
    with pytest.raises(NonFiniteWeightsError, match="mask"):
        Checkpointer(model, str(tmp_path)).save("b", iteration=1)


def test_masks_of_the_teacher_may_be_infinite(tmp_path):
    model, teacher = Masked(), Masked()
    saver = Checkpointer(model, str(tmp_path), teacher=teacher)
    saver.save("a", iteration=0)
    teacher.mask.zero_()
    assert saver.resume() == {"clouds": {}, "iteration": 0}
    assert teacher.mask[0, 1] == -math.inf
    nn.init.constant_(teacher.linear.weight, math.inf)
    with pytest.raises(NonFiniteWeightsError, match=r"not finite: teacher\.linear\.weight\."):
        saver.save("b", iteration=1)


class Teacher:
    """An average that diverged."""

    def __init__(self, value):
        self.value = torch.tensor([value])

    def reset(self):
        pass

    def due(self, iteration):
        return False

    def state_dict(self):
        return {"head.weight": self.value}

    def load_state_dict(self, state):
        self.value = state["head.weight"]


def test_a_teacher_that_is_not_finite_is_not_saved_nor_loaded(tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"not finite: teacher\.head\.weight"):
        trainer_of(tmp_path / "diverged", hooks=[EMAHook(Teacher(math.nan))]).train()
    assert names(tmp_path / "diverged") == []
    trainer_of(tmp_path, hooks=[EMAHook(Teacher(1.0))]).train()
    path = tmp_path / "model_final.pth"
    content = torch.load(path, weights_only=True)
    content["teacher"]["head.weight"].fill_(math.inf)
    torch.save(content, path)
    trainer = trainer_of(tmp_path, hooks=[EMAHook(Teacher(1.0))])
    with pytest.raises(
        ValueError, match=rf"'{path}' has .* not finite: teacher\.head\.weight.*earlier checkpoint"
    ):
        trainer.resume_or_load(resume=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_loaded(run, value, tmp_path):
    path = shutil.copy(run / "model_final.pth", tmp_path / "w.pth")
    content = torch.load(path, weights_only=True)
    content["model"]["conv.weight"][0] = value
    content["model"]["query.weight"][1, 1] = value
    torch.save(content, path)
    model = Toy()
    with pytest.raises(ValueError, match=r"not finite: conv\.weight, query\.weight\."):
        Checkpointer(model).load_weights(str(path))
    fresh = Toy().state_dict()
    assert all(torch.equal(v, fresh[k]) for k, v in model.state_dict().items())


def test_other_errors_leave_the_state_of_saving(tmp_path, monkeypatch):
    """A save that fails does not count as saved."""
    saver = Checkpointer(nn.Linear(1, 1), str(tmp_path))
    saver.save("a", iteration=1)
    monkeypatch.setattr(torch, "save", lambda *args: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        saver.save("b", iteration=2)
    assert saver.saved_iteration == 1
