"""What loading a checkpoint reports: names, numbers and levels of the log."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from clouds.engine.checkpoint import Checkpointer
from clouds.engine.load_report import compare_tensors, rename_older_tensors


def linear(value=0.0):
    """A model of the tensors 0.weight (1, 2) and 0.bias (1,)."""
    model = nn.Sequential(nn.Linear(2, 1))
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


@pytest.mark.parametrize(("count", "last"), [(6, "    t5"), (7, "    … and 1 more")])
def test_at_most_six_names_are_shown(count, last):
    weights = {**linear().state_dict(), **{f"t{i}": torch.ones(1) for i in range(count)}}
    report = compare_tensors("w.pth", weights, linear())
    lines = str(report).splitlines()
    assert lines[:2] == [
        "w.pth: 2 of the model's 2 tensors match.",
        f"  only in the file ({count}):",
    ]
    assert lines[2:8] == [f"    t{i}" for i in range(6)]
    assert lines[-1] == last and len(lines) == 2 + count


def test_a_complete_file_is_reported_without_a_warning(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "w.pth"
    torch.save(linear(3.0).state_dict(), path)
    Checkpointer(linear()).load_weights(str(path))
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage() == f"{path}: 2 of the model's 2 tensors match."


@pytest.mark.parametrize("difference", ["missing", "unexpected"])
def test_a_difference_is_a_warning(tmp_path, caplog, difference):
    weights = linear(3.0).state_dict()
    if difference == "missing":
        del weights["0.weight"]
    else:
        weights["1.weight"] = torch.ones(1)
    torch.save(weights, tmp_path / "w.pth")
    model = linear()
    # one tensor that matches is enough
    Checkpointer(model, partial=True).load_weights(str(tmp_path / "w.pth"))
    assert model[0].bias.item() == 3
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_no_tensor_matches_says_so_alone(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"\n    a\nNo tensor matches\.$"):
        Checkpointer(linear(), partial=True).load_weights(str(tmp_path / "w.pth"))


def test_renamed_tensors_are_counted(caplog):
    caplog.set_level(logging.INFO)
    model = nn.ModuleDict()
    model["sem_seg_head"] = nn.ModuleDict(
        {"pixel_decoder": nn.ModuleDict({"conv": nn.Linear(2, 1)})}
    )
    older = {"sem_seg_head.conv.weight": torch.ones(1, 2), "sem_seg_head.conv.bias": torch.ones(1)}
    assert rename_older_tensors(older, model).keys() == model.state_dict().keys()
    assert caplog.messages == ["2 tensors have older names in the file and were renamed"]
    caplog.clear()
    assert rename_older_tensors(model.state_dict(), model).keys() == model.state_dict().keys()
    assert caplog.messages == []


def test_tensors_that_the_config_determines_are_marked():
    model = nn.ModuleDict({"criterion": nn.Module(), "a": nn.Linear(1, 1)})
    model["criterion"].register_buffer("empty_weight", torch.ones(2))
    report = compare_tensors("w.pth", {}, model)
    assert not report.complete
    assert str(report).splitlines() == [
        "w.pth: 0 of the model's 3 tensors match.",
        "  only in the model (3):",
        "    criterion.empty_weight (built from the config instead)",
        "    a.weight",
        "    a.bias",
    ]
    assert compare_tensors(
        "w.pth", {f"a.{n}": v for n, v in model["a"].state_dict().items()}, model
    ).complete


def test_an_older_name_does_not_replace_the_present_one():
    model = nn.ModuleDict()
    model["sem_seg_head"] = nn.ModuleDict({"pixel_decoder": nn.Linear(1, 1, bias=False)})
    old, new = "sem_seg_head.weight", "sem_seg_head.pixel_decoder.weight"
    values = {new: torch.tensor([[1.0]]), old: torch.tensor([[2.0]])}
    assert rename_older_tensors(values, model) == values
    # nor is there a replacement that the model does not have
    foreign = {"sem_seg_head.other.weight": torch.ones(1)}
    assert rename_older_tensors(foreign, model).keys() == foreign.keys()


def test_loading_in_part_is_for_weights_alone():
    weights = {"0.bias": torch.tensor([3.0])}
    model = linear()
    Checkpointer(model, partial=True).load_model("w.pth", weights)
    assert model[0].bias.item() == 3
    with pytest.raises(ValueError) as error:
        Checkpointer(linear(), partial=True).load_model("w.pth", weights, resuming=True)
    assert "To start a new run from its weights: MODEL.WEIGHTS w.pth, without --resume" in str(
        error.value
    )
    with pytest.raises(ValueError) as error:
        Checkpointer(linear()).load_model("w.pth", weights)
    assert str(error.value).splitlines()[-1] == (
        "To load the tensors that match, set MODEL.WEIGHTS_PARTIAL True."
    )


def test_weights_that_are_not_finite_name_their_file():
    weights = {"0.bias": torch.tensor([torch.nan]), "0.weight": torch.ones(1, 2)}
    with pytest.raises(
        ValueError, match=r"^checkpoint 'w\.pth' has weights that are not finite: 0\."
    ):
        Checkpointer(linear()).load_model("w.pth", weights)
