"""Damaged, foreign and malicious files of weights. Refused is every file whose bytes changed."""

import io
import json
import logging
import os
import random
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from tiny_model import CONVNEXT

from clouds.weights_io import (
    DamagedFileError,
    nonfinite_tensors,
    read_checkpoint,
    to_tensors,
    write_safetensors,
)

HOLE = 4096


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (64, 3, 7, 7), "a.bias": (64,), "b.weight": (300, 400), "scale": ()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def with_hole(content, rng):
    """4 KiB at a random place are zeros, random bytes or another part of the content."""
    start = rng.randrange(len(content) - HOLE)
    other = rng.randrange(len(content) - HOLE)
    filling = rng.choice([bytes(HOLE), rng.randbytes(HOLE), content[other : other + HOLE]])
    return content[:start] + filling + content[start + HOLE :]


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_files_with_holes_are_refused(tmp_path, suffix):
    path = tmp_path / f"w.{suffix}"
    if suffix == "pth":
        torch.save({"model": weights(), "iteration": 1}, path)
    else:
        with path.open("wb") as file:
            write_safetensors(weights(), file)
    content, rng, holes = path.read_bytes(), random.Random(0), 0
    while holes < 200:
        damaged = with_hole(content, rng)
        if damaged == content:
            continue
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"w\.{suffix}'"):
            read_checkpoint(path, mmap=holes % 2 == 0)
        holes += 1


def test_the_damaged_member_is_named(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(weights(), path)
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data/2"))  # b.weight
        value = archive.read(name)[1000:1016]
    content = path.read_bytes()
    assert content.count(value) == 1
    path.write_bytes(content.replace(value, bytes(16)))
    torch.load(path, weights_only=True)  # torch does not see it
    with pytest.raises(DamagedFileError, match=r"w\.pth' .*data/2 does not match its checksum"):
        read_checkpoint(path)


def test_a_file_without_checksums_is_told_so(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    torch.save(weights(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(weights(), tmp_path / "theirs.safetensors")
    torch.save(weights(), tmp_path / "new.pth")
    with (tmp_path / "ours.safetensors").open("wb") as file:
        write_safetensors(weights(), file)
    for name in ("old.pth", "theirs.safetensors", "new.pth", "ours.safetensors"):
        caplog.clear()
        for key, value in read_checkpoint(tmp_path / name)["model"].items():
            assert torch.equal(value, weights()[key])
        told = [f"{name} has no checksum" in message for message in caplog.messages]
        assert told == ([True] if name in ("old.pth", "theirs.safetensors") else [])


def test_every_flipped_byte_of_our_safetensors_values_is_seen(tmp_path):
    path = tmp_path / "w.safetensors"
    values = {"a": torch.arange(5.0), "b": torch.tensor(1, dtype=torch.int16)}
    values |= {"c": torch.ones(3, dtype=torch.bfloat16), "d": torch.empty(0, 2)}
    with path.open("wb") as file:
        write_safetensors(values, file)
    with safetensors.safe_open(path, "pt") as file:  # the library reads it
        names = list(file.keys())
        assert sorted(names) == sorted(values)
        for name in names:
            assert torch.equal(file.get_tensor(name), values[name])
    content = path.read_bytes()
    data = 8 + struct.unpack("<Q", content[:8])[0]
    for position in range(data, len(content)):
        path.write_bytes(
            content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :]
        )
        with pytest.raises(DamagedFileError, match="do not match the checksum"):
            read_checkpoint(path)
    header = json.loads(content[8:data])
    header["A"] = header.pop("a")  # another name of a tensor
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[data:])
    with pytest.raises(DamagedFileError, match="do not match the checksum"):
        read_checkpoint(path)


def test_a_prefix_of_some_names_only_is_kept(tmp_path):
    weights = {"module.a": torch.ones(1), "b": torch.ones(1)}
    torch.save(weights, tmp_path / "w.pth")
    assert set(read_checkpoint(tmp_path / "w.pth")["model"]) == {"module.a", "b"}


def test_a_folder_lists_its_checkpoints_newest_first(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder, and it has no \.pth or \.safetensors file"):
        read_checkpoint(tmp_path)
    for age, name in enumerate(("b.pth", "c.safetensors", "a.pth", "log.txt")):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    with pytest.raises(ValueError, match=r"newest first: b\.pth, c\.safetensors, a\.pth\. "):
        read_checkpoint(tmp_path)
    (tmp_path / "last_checkpoint").write_text("a.pth")
    with pytest.raises(ValueError, match=r"a\.pth; its last_checkpoint names a\.pth\. .*/b\.pth'"):
        read_checkpoint(tmp_path)


def test_names_and_shapes_are_read_without_the_values(tmp_path):
    torch.save({"model": {"module.w": torch.ones(2, 3)}}, tmp_path / "a.pth")
    weights = read_checkpoint(tmp_path / "a.pth", mmap=True)["model"]
    assert list(weights) == ["w"] and torch.equal(weights["w"], torch.ones(2, 3))
    old = tmp_path / "old.pth"
    torch.save({"w": torch.ones(4)}, old, _use_new_zipfile_serialization=False)
    assert read_checkpoint(old, mmap=True)["model"]["w"].shape == (4,)
    (tmp_path / "b.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated"):
        read_checkpoint(tmp_path / "b.pth", mmap=True)


@pytest.mark.parametrize("content", [b"<html>404</html>", bytes(range(256)) * 20])
def test_a_file_of_another_type(tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.pth.*cannot be read"):
        read_checkpoint(tmp_path / "w.pth")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"model": {"a": "text"}}])
def test_a_file_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth.*(contains a list|has no weights)"):
        read_checkpoint(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (np.array(["a"], object), "NumPy array of object"),
        (np.array(["a"]), "NumPy array of <U1"),
        (torch.eye(2).to_sparse(), "sparse or quantized tensor"),
    ],
)
def test_other_arrays_and_tensors_are_refused(value, kind):
    with pytest.raises(ValueError, match=f"entry 'a' is a {kind}"):
        to_tensors(Path("w"), {"a": value})


def test_arrays_are_converted(tmp_path):
    weights = to_tensors(Path("w"), {"a": np.ones(2, np.float32)})
    assert torch.equal(weights["a"], torch.ones(2))


def test_nonfinite_tensors_are_named():
    nan, inf = torch.tensor([1, torch.nan]), torch.tensor([1, -torch.inf])
    values = {"a": nan, "b": {"c": [torch.ones(2), inf], 3: {"exp_avg": nan}}, "d": float("nan")}
    values |= {"mask": inf, "e": torch.tensor([1, 2]), "f": torch.empty(0), "half": inf.half()}
    expected = ["state.a", "state.b.c.1", "state.b.3.exp_avg", "state.half"]
    assert nonfinite_tensors(values, "state", {"state.mask"}) == expected
    assert nonfinite_tensors({"mask": nan}, "", {"mask"}) == ["mask"]


class RunsCode:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def malicious(path, trace):
    """Files of torch.save that make the folder `trace` when they are loaded without protection."""
    buffer = io.BytesIO()
    torch.save({"model": {"weight": RunsCode(trace)}}, buffer)
    path.write_bytes(buffer.getvalue())
    buffer.seek(0)
    torch.load(buffer, weights_only=False)
    trace.rmdir()


def readers(path):
    """Everything in the library that reads a file of weights, by name, and what it raises."""
    from clouds.inference.load import load
    from clouds.modeling.backbone.open_clip_models import create_clip
    from clouds.self_training.refiners.sam.model import read_weights

    return {
        "read_checkpoint": lambda: read_checkpoint(path),
        "names only": lambda: read_checkpoint(path, mmap=True),
        "inference": lambda: load(path),
        "CLIP": lambda: create_clip(CONVNEXT, str(path)),
        "SAM": lambda: read_weights(path, "tiny"),
    }


@pytest.mark.parametrize("reader", ["read_checkpoint", "names only", "inference", "CLIP", "SAM"])
@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".pt", ".safetensors", ".bin"])
def test_code_is_not_run(tmp_path, reader, suffix):
    path, trace = tmp_path / f"evil{suffix}", tmp_path / "ran"
    malicious(path, trace)
    with pytest.raises(ValueError, match=r"evil\."):
        readers(path)[reader]()
    assert not trace.exists()
