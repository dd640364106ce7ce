"""Runs and evaluations that are kept apart in OUTPUT_DIR."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_toy import Toy, losses_of, toy_batches, toy_config

from clouds.engine import Trainer
from clouds.engine.run_folder import evaluation_folder, prepare


def trainer_of(folder, *overrides, loader=toy_batches):
    return Trainer(toy_config(folder, *overrides), model=Toy(), loader=loader)


def contents(folder):
    """Name -> bytes of all files."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    trainer_of(folder, "SOLVER.MAX_ITER", "5").train()
    return folder


@pytest.fixture
def used(finished, tmp_path):
    """A folder with a run of five iterations, and files that are not of a run."""
    folder = tmp_path / "used"
    for name, content in contents(finished).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for name in ("notes.txt", "config.yaml", "log.txt", "log.txt.rank1"):
        (folder / name).write_text(f"{name} of the first run")
    return folder


def test_a_used_folder_is_refused(used):
    before = contents(used)
    trainer = trainer_of(used)
    with pytest.raises(ValueError, match="holds a run") as error:
        trainer.resume_or_load(resume=False)
    for part in (str(used), "last_checkpoint", "--resume", "--overwrite", "OUTPUT_DIR <folder>"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="holds a run"):
        trainer_of(used).train()
    assert contents(used) == before


@pytest.mark.parametrize(
    "name", ["model_0000003.pth", "last_checkpoint", "metrics.json", "results.json"]
)
def test_any_file_of_iterations_is_a_run(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=re.escape(f"holds a run ({name})")):
        prepare(tmp_path, resume=False, overwrite=False)


def test_a_folder_without_iterations_is_used(tmp_path):
    for name in ("config.yaml", "log.txt", "notes.txt", ".model_0000003.pth.part"):
        (tmp_path / name).write_text("")
    assert prepare(tmp_path, resume=False, overwrite=False) is None
    assert prepare(tmp_path / "none", resume=False, overwrite=True) is None
    assert len(contents(tmp_path)) == 4


def test_overwrite_moves_the_run_and_nothing_else(used, caplog):
    before = contents(used)
    trainer = trainer_of(used, "SOLVER.MAX_ITER", "2")
    trainer.resume_or_load(resume=False, overwrite=True)
    (moved,) = (used / "earlier").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d{6}", moved.name)
    assert f"the earlier run are now in '{moved}'" in caplog.text
    notes = before.pop("notes.txt")
    assert contents(moved) == before
    assert (used / "notes.txt").read_bytes() == notes
    trainer.train()
    assert sorted(losses_of(used)) == [0, 1]
    assert sorted(losses_of(moved)) == [0, 1, 2, 3, 4]
    # once more, in the same second: a folder for each
    prepare(used, resume=False, overwrite=True)
    assert len(list((used / "earlier").iterdir())) == 2


def test_a_run_that_ends_before_its_first_checkpoint_is_the_one_that_resumes(used):
    """The earlier run's `last_checkpoint` was taken up by --resume."""
    trainer = trainer_of(used)
    trainer.resume_or_load(resume=False, overwrite=True)
    trainer.train_step = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert trainer_of(used).resume_or_load(resume=True) == 0


def test_overwrite_keeps_the_weights_to_start_from(used):
    weights = used / "model_final.pth"
    before = contents(used)
    trainer = trainer_of(used, "MODEL.WEIGHTS", weights)
    with pytest.raises(ValueError, match=r"MODEL.WEIGHTS .*model_final.pth' is a file of the run"):
        trainer.resume_or_load(resume=False, overwrite=True)
    assert contents(used) == before


def test_resume_finds_a_checkpoint_without_the_file_that_names_it(used, caplog):
    """A kill between writing the first checkpoint and last_checkpoint leaves this."""
    (used / "last_checkpoint").unlink()
    assert trainer_of(used).resume_or_load(resume=True) == 4
    assert "has no last_checkpoint; 'model_0000003.pth' is its newest checkpoint" in caplog.text
    (used / "model_0000003.pth").unlink()
    with pytest.raises(ValueError, match=r"has model_final.pth, but no file last_checkpoint"):
        trainer_of(used).resume_or_load(resume=True)


def tensorboard_curve(folder):
    """Step and value of loss/total as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(e.step, pytest.approx(e.value)) for e in events.Scalars("loss/total")]


def curve(folder):
    return [(i, values[0]) for i, values in sorted(losses_of(folder).items())]


def failing(at, seed_offset=0):
    """A loader that raises at batch `at`; with an offset, other images."""

    def load(start):
        batches = toy_batches(start + seed_offset)
        for number in range(start, 10**6):
            if number == at:
                raise OSError("the folder of the images is gone")
            yield next(batches)

    return load


def test_tensorboard_shows_the_run_that_is_there(tmp_path):
    with pytest.raises(OSError, match="is gone"):
        trainer_of(tmp_path, loader=failing(6, seed_offset=100)).train()
    first = curve(tmp_path)
    assert tensorboard_curve(tmp_path) == first and len(first) == 6
    again = trainer_of(tmp_path, "SOLVER.MAX_ITER", "8")
    again.resume_or_load(resume=False, overwrite=True)
    again.train()
    assert tensorboard_curve(tmp_path) == curve(tmp_path)
    assert [step for step, _ in curve(tmp_path)] == list(range(8))
    (moved,) = (tmp_path / "earlier").iterdir()
    assert tensorboard_curve(moved) == first


@pytest.mark.parametrize("killed_at", [2, 6])
def test_tensorboard_of_a_resumed_run_has_each_step_once(tmp_path, killed_at):
    """Steps after the checkpoint, or all if there is none, are written again."""
    with pytest.raises(OSError, match="is gone"):
        trainer_of(tmp_path, loader=failing(killed_at)).train()
    (tmp_path / f"model_{killed_at - 1:07d}.pth").unlink()  # as a kill would have left it
    if killed_at == 6:
        (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    else:
        (tmp_path / "last_checkpoint").unlink()
    images = torch.zeros(4, 6, 3, dtype=torch.uint8).numpy()

    results = SimpleNamespace(flat=lambda: {"toy/mIoU": 1.0}, panels={"toy": images})
    resumed = Trainer(toy_config(tmp_path), Toy(), toy_batches, evaluate=lambda: results)
    assert resumed.resume_or_load(resume=True) == (4 if killed_at == 6 else 0)
    resumed.train()
    assert tensorboard_curve(tmp_path) == curve(tmp_path)
    assert [step for step, _ in tensorboard_curve(tmp_path)] == list(range(12))


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        ("{out}/model_0000999.pth", "native_bdd_val+acdc_fog_val_model_0000999"),
        ("output/a/model_final.pth", "native_bdd_val+acdc_fog_val_a_model_final"),
        ("", "native_bdd_val+acdc_fog_val_random"),
        ("x/we ird:ü.pth", "native_bdd_val+acdc_fog_val_x_we_ird"),
    ],
)
def test_folder_of_an_evaluation(tmp_path, weights, name):
    weights = weights.format(out=tmp_path)
    folder = evaluation_folder(tmp_path, "native", ("bdd_val", "acdc_fog_val"), weights)
    assert folder == tmp_path / "eval" / name


def test_names_of_folders_of_evaluations_are_short_and_differ(tmp_path):
    many = [f"dataset_number_{i}" for i in range(40)]
    folders = [evaluation_folder(tmp_path, "slide", many[n:], "a.pth") for n in (0, 1)]
    folders.append(evaluation_folder(tmp_path, "slide", [*many[:-1], "another"], "a.pth"))
    assert len(set(folders)) == 3
    assert max(len(folder.name) for folder in folders) < 255
    assert all(Path(folder).parent == tmp_path / "eval" for folder in folders)
