from __future__ import annotations

import os
import pickle

import pytest
import safetensors.torch
import torch
from engine_toy import Toy
from tiny_model import tiny_model
from torch import nn

from clouds.engine import checkpoint as checkpoint_module
from clouds.engine.checkpoint import Checkpointer, PeriodicCheckpointer
from clouds.weights_io import read_checkpoint


class Counter:
    """A checkpointable with one number as state."""

    def __init__(self, value=0):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


class RunsCode:
    """Its pickle creates a folder when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def other_model(seed=1):
    torch.manual_seed(seed)
    model = Toy()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def same_weights(first, second):
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_round_trip(tmp_path, caplog):
    caplog.set_level("INFO")
    model, counter = other_model(), Counter(5)
    saver = Checkpointer(
        model, str(tmp_path), provenance={"version": "1"}, optimizer=Counter(3), teacher=counter
    )
    saver.save("model_0000009", iteration=9)
    assert caplog.messages == [f"saved {tmp_path / 'model_0000009.pth'}"]
    content = torch.load(tmp_path / "model_0000009.pth", weights_only=True)
    assert set(content) == {"model", "optimizer", "teacher", "clouds", "iteration"}
    assert content["clouds"] == {"version": "1"}
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000009.pth"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_0000009.pth"]

    restored, counters = Toy(), {"optimizer": Counter(), "teacher": Counter()}
    checkpointer = Checkpointer(restored, str(tmp_path), **counters)
    assert checkpointer.saved_iteration == -1
    assert checkpointer.resume() == {"clouds": {"version": "1"}, "iteration": 9}
    assert saver.saved_iteration == checkpointer.saved_iteration == 9
    saver.save("model_final")
    assert saver.saved_iteration == -1
    assert same_weights(restored, model)
    assert (counters["optimizer"].value, counters["teacher"].value) == (3, 5)


def test_loading_weights_leaves_the_optimizer_unchanged(tmp_path):
    Checkpointer(other_model(), str(tmp_path), optimizer=Counter(3)).save("a", iteration=9)
    model, optimizer = Toy(), Counter(7)
    Checkpointer(model, optimizer=optimizer).load_weights(str(tmp_path / "a.pth"))
    assert same_weights(model, other_model())
    assert optimizer.value == 7


def test_other_processes_save_nothing(tmp_path):
    saver = Checkpointer(Toy(), str(tmp_path), save_to_disk=False)
    PeriodicCheckpointer(saver, period=1, max_to_keep=1).step(0)
    saver.save("a", iteration=3)
    assert list(tmp_path.iterdir()) == []
    assert saver.saved_iteration == 3


def test_without_a_folder_nothing_is_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Checkpointer(Toy()).save("a", iteration=3)
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    saver = Checkpointer(other_model(), str(tmp_path))
    saver.save("model_final", iteration=1)
    before = (tmp_path / "model_final.pth").read_bytes()

    def full_disk(content, file):
        file.write(b"half a checkpo")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module.torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        saver.save("model_final", iteration=2)
    assert (tmp_path / "model_final.pth").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_final.pth"]


def test_only_the_newest_are_kept_also_in_a_resumed_run(tmp_path):
    def names():
        return sorted(path.stem for path in tmp_path.glob("*.pth"))

    saver = Checkpointer(nn.Linear(1, 1), str(tmp_path))
    saver.save("model_final", iteration=99)
    periodic = PeriodicCheckpointer(saver, period=2, max_to_keep=2)
    for iteration in range(6):
        periodic.step(iteration)
    assert names() == ["model_0000003", "model_0000005", "model_final"]
    resumed = PeriodicCheckpointer(saver, period=2, max_to_keep=2)
    resumed.adopt_existing()
    for iteration in range(6, 8):
        resumed.step(iteration)
    assert names() == ["model_0000005", "model_0000007", "model_final"]


FORMATS = {
    "in 'model'": lambda w, p: torch.save({"model": w, "iteration": 1}, p),
    "in 'state_dict'": lambda w, p: torch.save({"state_dict": w, "epoch": 1}, p),
    "plain": lambda w, p: torch.save(w, p),
    "module.": lambda w, p: torch.save({f"module.{k}": v for k, v in w.items()}, p),
    "old format": lambda w, p: torch.save(w, p, _use_new_zipfile_serialization=False),
    "safetensors": lambda w, p: safetensors.torch.save_file(w, p),
}


@pytest.mark.parametrize("form", FORMATS)
def test_formats_that_can_be_read(tmp_path, form):
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    weights = dict(other_model().state_dict())
    FORMATS[form](weights, path)
    model = Toy()
    Checkpointer(model).load_weights(str(path))
    assert same_weights(model, other_model())


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth' does not exist"):
        Checkpointer(Toy()).load_weights(str(tmp_path / "none.pth"))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("suffix", ["pth", "old.pth", "safetensors"])
def test_truncated_file(tmp_path, suffix, share):
    path = tmp_path / f"w.{suffix}"
    forms = {"pth": "in 'model'", "old.pth": "old format", "safetensors": "safetensors"}
    FORMATS[forms[suffix]](dict(Toy().state_dict()), path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match=r"w\..*(truncated|refused)"):
        Checkpointer(Toy()).load_weights(str(path))


@pytest.mark.parametrize("form", ["in a checkpoint", "plain pickle"])
def test_code_is_refused_and_not_run(tmp_path, form):
    path, trace = tmp_path / "evil.pth", tmp_path / "ran"
    content = {"model": Toy().state_dict(), "extra": RunsCode(trace)}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"evil\.pth.*could run code"):
        read_checkpoint(path)
    assert not trace.exists()
    # Loading the file without protection runs the code.
    torch.save(content, path)
    torch.load(path, weights_only=False)
    assert trace.exists()


def save_weights_of_another_model(path):
    weights = dict(other_model().state_dict())
    weights["conv.weight"] = torch.zeros(9, 4, 3, 3)
    del weights["query.weight"]
    weights |= {f"teacher.layer{number}.weight": torch.zeros(1) for number in range(40)}
    torch.save(weights, path)


def test_another_model_is_an_error_with_a_short_report(tmp_path):
    path = tmp_path / "w.pth"
    save_weights_of_another_model(path)
    model = Toy()
    with pytest.raises(ValueError, match="of another model") as error:
        Checkpointer(model).load_weights(str(path))
    text = str(error.value)
    assert f"{path}: 5 of the model's 7 tensors match" in text
    assert "only in the model (1):\n    query.weight\n" in text
    assert "conv.weight: (9, 4, 3, 3) in the file, (8, 4, 3, 3) in the model" in text
    assert "only in the file (40):" in text
    assert "… and 34 more" in text
    assert "MODEL.WEIGHTS_PARTIAL True" in text
    assert len(text.splitlines()) <= 24
    assert same_weights(model, Toy())  # unchanged


def test_another_model_loads_partially_if_allowed(tmp_path, caplog):
    path = tmp_path / "w.pth"
    save_weights_of_another_model(path)
    model = Toy()
    Checkpointer(model, partial=True).load_weights(str(path))
    loaded, fresh, there = model.state_dict(), Toy().state_dict(), other_model().state_dict()
    for name in loaded:
        source = fresh if name in ("conv.weight", "query.weight") else there
        assert torch.equal(loaded[name], source[name])
    assert "5 of the model's 7 tensors match" in caplog.text


def test_no_matching_tensor_is_an_error_even_if_partial(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="No tensor matches"):
        Checkpointer(Toy(), partial=True).load_weights(str(tmp_path / "w.pth"))


def test_resuming_is_never_partial(tmp_path):
    Checkpointer(nn.Linear(1, 1), str(tmp_path)).save("a", iteration=1)
    checkpointer = Checkpointer(nn.Linear(2, 1), str(tmp_path), partial=True)
    with pytest.raises(ValueError, match="of another model"):
        checkpointer.resume()
    assert checkpointer.partial


def test_additional_weights_are_reported_and_ignored(tmp_path, caplog):
    torch.save({**other_model().state_dict(), "extra": torch.ones(1)}, tmp_path / "w.pth")
    model = Toy()
    Checkpointer(model).load_weights(str(tmp_path / "w.pth"))
    assert same_weights(model, other_model())
    assert "only in the file (1):\n    extra" in caplog.text


# ------------------------------------------------------------------ files of other projects
def filled(model, seed=1):
    """The model with random values in all floating-point tensors."""
    generator = torch.Generator().manual_seed(seed)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator))
    return model


def as_pickle(weights, path):
    """The format of model zoos of Detectron2 projects."""
    arrays = {name: value.numpy() for name, value in weights.items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody"}, protocol=2))


def test_an_fc_clip_checkpoint_of_other_classes_loads_into_the_text_head(tmp_path, caplog):
    there = filled(tiny_model(MODEL__MASK_FORMER__TRANSFORMER_DECODER_NAME="text"))
    weights = dict(there.state_dict())
    weights["criterion.empty_weight"] = torch.full((134,), 0.5)  # COCO's classes, and no_object
    torch.save({"model": weights, "iteration": 7, "trainer": {}}, tmp_path / "fcclip.pth")
    model = tiny_model(MODEL__MASK_FORMER__TRANSFORMER_DECODER_NAME="text")
    Checkpointer(model).load_weights(str(tmp_path / "fcclip.pth"))
    loaded = model.state_dict()
    for name, value in weights.items():
        assert torch.equal(loaded[name], value) == (name != "criterion.empty_weight"), name
    assert loaded["criterion.empty_weight"].tolist() == pytest.approx([1.0] * 19 + [0.1])
    assert "(134,) in the file, (20,) in the model (built from the config instead)" in caplog.text


def test_an_fc_clip_checkpoint_does_not_match_the_linear_head(tmp_path):
    there = tiny_model(MODEL__MASK_FORMER__TRANSFORMER_DECODER_NAME="text")
    torch.save({"model": there.state_dict()}, tmp_path / "fcclip.pth")
    with pytest.raises(ValueError, match="of another model") as error:
        Checkpointer(tiny_model()).load_weights(str(tmp_path / "fcclip.pth"))
    assert "only in the model (2):\n    sem_seg_head.predictor.class_embed" in str(error.value)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("kind", ["pth", "pkl"])
def test_a_mask2former_head_loads_partially(tmp_path, old, kind, caplog):
    """The head of another backbone and of COCO's classes, under present and older names."""
    there = filled(tiny_model()).state_dict()
    expected = {k: v for k, v in there.items() if k.startswith("sem_seg_head.")}
    classes = {name for name in expected if ".class_embed." in name}
    weights = {
        "backbone.stem.conv1.weight": torch.ones(1),
        "criterion.empty_weight": torch.ones(134),
    }
    for name, value in expected.items():
        if name in classes:
            value = torch.ones(134, *value.shape[1:])
        if old:
            name = name.replace(".query_feat.", ".static_query.").replace(".pixel_decoder.", ".")
        weights[name] = value
    path = tmp_path / f"m2f.{kind}"
    if kind == "pkl":
        as_pickle(weights, path)
    else:
        torch.save({"model": weights}, path)

    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS_PARTIAL True") as error:
        Checkpointer(tiny_model()).load_weights(str(path))
    assert "predictor.class_embed.weight: (134, 32) in the file, (20, 32) in the model" in str(
        error.value
    )

    model, fresh = tiny_model(), tiny_model().state_dict()
    Checkpointer(model, partial=True).load_weights(str(path))
    loaded = model.state_dict()
    for name in loaded:
        source = expected if name in expected.keys() - classes else fresh
        assert torch.equal(loaded[name], source[name]), name
    assert "with another shape (3)" in caplog.text  # class_embed twice, empty_weight


def test_a_file_without_empty_weight_is_complete(tmp_path):
    weights = filled(tiny_model()).state_dict()
    del weights["criterion.empty_weight"]
    torch.save(weights, tmp_path / "w.pth")
    Checkpointer(tiny_model()).load_weights(str(tmp_path / "w.pth"))


def test_a_pickle_of_arrays_does_not_run_code(tmp_path):
    path, trace = tmp_path / "evil.pkl", tmp_path / "ran"
    path.write_bytes(pickle.dumps({"model": {}, "extra": RunsCode(trace)}, protocol=2))
    with pytest.raises(ValueError, match=r"evil\.pkl.*could run code"):
        read_checkpoint(path)
    assert not trace.exists()


def test_a_truncated_pickle(tmp_path):
    as_pickle(other_model().state_dict(), tmp_path / "w.pkl")
    content = (tmp_path / "w.pkl").read_bytes()
    (tmp_path / "w.pkl").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"w\.pkl.*cannot be read"):
        read_checkpoint(tmp_path / "w.pkl")


def test_a_file_of_torch_save_may_be_named_pkl(tmp_path):
    torch.save({"model": {"a": torch.ones(2)}}, tmp_path / "w.pkl")
    assert read_checkpoint(tmp_path / "w.pkl")["model"]["a"].tolist() == [1, 1]


def test_resume_without_a_checkpoint(tmp_path):
    checkpointer = Checkpointer(Toy(), str(tmp_path))
    assert checkpointer.resume() is None
    assert checkpointer.get_checkpoint_file() == ""


def test_resume_from_a_missing_file(tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    with pytest.raises(
        FileNotFoundError,
        match=r"last_checkpoint' names 'model_0000001\.pth', which does not exist",
    ):
        Checkpointer(Toy(), str(tmp_path)).resume()


def test_resume_from_weights_only(tmp_path):
    torch.save(Toy().state_dict(), tmp_path / "w.pth")
    (tmp_path / "last_checkpoint").write_text("w.pth")
    with pytest.raises(ValueError, match=r"w\.pth' has no entry 'iteration', so.*MODEL\.WEIGHTS"):
        Checkpointer(Toy(), str(tmp_path)).resume()


def test_a_checkpointable_that_is_not_in_the_file_is_reported(tmp_path, caplog):
    Checkpointer(Toy(), str(tmp_path), other=Counter(3)).save("a", iteration=1)
    teacher, other = Counter(4), Counter(5)
    Checkpointer(Toy(), str(tmp_path), teacher=teacher, other=other).resume()
    assert (teacher.value, other.value) == (4, 3)
    path = tmp_path / "a.pth"
    assert (
        f"{path} has no state of 'teacher', which starts from its initial state" in caplog.messages
    )


def test_a_state_that_does_not_fit_says_why(tmp_path):
    class Strict(Counter):
        def load_state_dict(self, state):
            raise KeyError("missing")

    Checkpointer(Toy(), str(tmp_path), other=Counter()).save("a", iteration=1)
    path = tmp_path / "a.pth"
    with pytest.raises(ValueError) as error:
        Checkpointer(Toy(), str(tmp_path), other=Strict()).resume()
    assert str(error.value).startswith(
        f"the state of 'other' in checkpoint '{path}' does not fit this config "
        "(KeyError: 'missing')"
    )
    assert f"MODEL.WEIGHTS {path}, without --resume" in str(error.value)
