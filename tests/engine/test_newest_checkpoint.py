"""Which checkpoint of a folder `--resume` uses, in training and in evaluation."""

from __future__ import annotations

import pytest
import torch
from engine_toy import toy_config

from clouds.cli.train import weights_to_evaluate
from clouds.engine.newest_checkpoint import find_newest, numbered_checkpoints, read_newest
from clouds.weights_io import DamagedFileError


def save(folder, *iterations, tag=None):
    """Checkpoints whose only weight is their iteration."""
    for iteration in iterations:
        content = {"model": {"a": torch.tensor([float(iteration)])}, "iteration": iteration}
        torch.save(content, folder / f"model_{iteration:07d}.pth")
    if tag is not None:
        (folder / "last_checkpoint").write_text(tag)


def tear(folder, *iterations):
    for iteration in iterations:
        path = folder / f"model_{iteration:07d}.pth"
        path.write_bytes(path.read_bytes()[:-100])


def test_the_named_checkpoint_is_read(tmp_path):
    save(tmp_path, 3, 7, 11, tag="model_0000007.pth\n")
    for mmap in (False, True):
        newest = read_newest(tmp_path, mmap)
        assert newest.path == tmp_path / "model_0000007.pth"
        assert newest.entries["iteration"] == 7
        assert newest.entries["model"]["a"].tolist() == [7]
        assert newest.warning == ""


def test_no_checkpoint(tmp_path):
    assert read_newest(tmp_path) is None
    assert read_newest(tmp_path / "none") is None
    torch.save({"a": torch.ones(1)}, tmp_path / "other_0000001.pth")
    assert read_newest(tmp_path) is None


def test_the_newest_whole_one_before_a_torn_one_is_read(tmp_path):
    save(tmp_path, 3, 7, 11, 15, tag="model_0000011.pth")
    tear(tmp_path, 7, 11)
    newest = read_newest(tmp_path)
    assert (newest.path.name, newest.entries["iteration"]) == ("model_0000003.pth", 3)
    first, second, last = newest.warning.splitlines()
    assert "model_0000011.pth' (" in first and "truncated" in first
    assert "model_0000007.pth' (" in second and "truncated" in second
    name = tmp_path / "model_0000003.pth"
    assert last == f"The checkpoint before it is used: '{name}' (iteration 3)."


def test_an_unknown_iteration_is_told_as_such(tmp_path):
    save(tmp_path, 7, tag="model_0000007.pth")
    tear(tmp_path, 7)
    torch.save({"a": torch.ones(1)}, tmp_path / "model_0000003.pth")
    assert read_newest(tmp_path).warning.endswith("model_0000003.pth' (iteration unknown).")


def test_all_are_torn(tmp_path):
    save(tmp_path, 3, 7, 11, tag="model_0000007.pth")
    tear(tmp_path, 3, 7)
    with pytest.raises(DamagedFileError) as error:
        read_newest(tmp_path)
    first, second, last = str(error.value).splitlines()
    assert "model_0000007.pth'" in first and "model_0000003.pth'" in second
    assert last.startswith(f"There is no whole checkpoint before it in '{tmp_path}'")
    assert "--overwrite" in last


def test_a_folder_without_last_checkpoint(tmp_path):
    save(tmp_path, 3, 20)
    newest = read_newest(tmp_path)
    assert newest.entries["iteration"] == 20
    assert newest.warning == (
        f"'{tmp_path}' has no last_checkpoint; 'model_0000020.pth' is its newest checkpoint."
    )
    tear(tmp_path, 20)
    newest = read_newest(tmp_path)
    assert newest.entries["iteration"] == 3
    assert len(newest.warning.splitlines()) == 3


def test_unnumbered_checkpoints_without_last_checkpoint(tmp_path):
    save(tmp_path, 3)
    (tmp_path / "model_0000003.pth").rename(tmp_path / "model_final.pth")
    with pytest.raises(ValueError, match=r"has model_final\.pth, but no file last_checkpoint"):
        find_newest(tmp_path)


@pytest.mark.parametrize(
    ("content", "fault"), [(b"", "empty"), (b" \n", "empty"), (b"\xff", "not text in UTF-8")]
)
def test_last_checkpoint_without_a_name(tmp_path, content, fault):
    save(tmp_path, 3)
    (tmp_path / "last_checkpoint").write_bytes(content)
    with pytest.raises(ValueError, match=f"last_checkpoint' is damaged: it is {fault}. Write the"):
        read_newest(tmp_path)


def test_last_checkpoint_names_no_file(tmp_path):
    save(tmp_path, 3, tag="model_0000007.pth")
    with pytest.raises(
        FileNotFoundError, match=r"names 'model_0000007\.pth', which does not exist"
    ):
        read_newest(tmp_path)


def test_numbers_are_compared_as_numbers(tmp_path):
    for name in ("model_9.pth", "model_10.pth", "model_final.pth", "model_2.txt", "x_11.pth"):
        (tmp_path / name).touch()

    def names(*arguments, **options):
        return [path.name for path in numbered_checkpoints(tmp_path, *arguments, **options)]

    assert names() == ["x_11.pth", "model_10.pth", "model_9.pth"]
    assert names("model_") == ["model_10.pth", "model_9.pth"]
    assert names(before=10) == ["model_9.pth"]
    assert names("model_", before=9) == []


def test_an_evaluation_uses_the_same_one(tmp_path):
    cfg = toy_config(tmp_path, "MODEL.WEIGHTS", "other.pth")
    save(tmp_path, 3, 7, tag="model_0000007.pth")
    assert weights_to_evaluate(cfg, False) == ("other.pth", "")
    assert weights_to_evaluate(cfg, True) == (str(tmp_path / "model_0000007.pth"), "")
    tear(tmp_path, 7)
    path, warning = weights_to_evaluate(cfg, True)
    assert path == str(tmp_path / "model_0000003.pth")
    assert warning == read_newest(tmp_path).warning != ""
    cfg = toy_config(tmp_path / "none", "MODEL.WEIGHTS", "other.pth")
    path, warning = weights_to_evaluate(cfg, True)
    assert path == "other.pth"
    assert f"no checkpoint in '{tmp_path / 'none'}'; MODEL.WEIGHTS 'other.pth'" in warning
