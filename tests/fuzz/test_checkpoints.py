"""Mutated checkpoint files."""

from __future__ import annotations

import io
import pickle

import numpy as np
import safetensors.torch
import torch
from fuzzing import ACCEPTED, VALUES, fuzz, mutate, mutations
from hypothesis import strategies as st

from clouds.weights_io import read_checkpoint

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2, dtype=torch.int64)}


def saved(content, **options):
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


TORCH = (
    saved({"model": WEIGHTS, "iteration": 3}),
    saved({f"module.{name}": value for name, value in WEIGHTS.items()}),
    saved({"state_dict": WEIGHTS}, _use_new_zipfile_serialization=False),
)
ARRAYS = {name: value.numpy() for name, value in WEIGHTS.items()}
PICKLES = (pickle.dumps({"model": ARRAYS}), pickle.dumps(ARRAYS, protocol=2))
SAFETENSORS = (
    safetensors.torch.save(WEIGHTS),
    safetensors.torch.save({"c": torch.ones(3, dtype=torch.bfloat16)}, {"format": "pt"}),
)


def check_checkpoint(attempt, path, *modes):
    for mmap in modes or (False,):
        outcome, entries = attempt(lambda mmap=mmap: read_checkpoint(path, mmap), path.name)
        if outcome == ACCEPTED:
            assert all(isinstance(value, torch.Tensor) for value in entries["model"].values())
            assert all(isinstance(name, str) for name in entries["model"])


@fuzz(".pth, bytes", 6000, drawn=mutations(len(TORCH)))
def test_torch(attempt, tmp_path, drawn):
    path = tmp_path / "a.pth"
    path.write_bytes(mutate(TORCH[drawn[0]], drawn[1]))
    check_checkpoint(attempt, path, False, True)


@fuzz(".pkl, bytes", 6000, drawn=mutations(len(PICKLES)))
def test_pickle(attempt, tmp_path, drawn):
    path = tmp_path / "a.pkl"
    path.write_bytes(mutate(PICKLES[drawn[0]], drawn[1]))
    check_checkpoint(attempt, path)


@fuzz(".safetensors, bytes", 8000, drawn=mutations(len(SAFETENSORS)))
def test_safetensors(attempt, tmp_path, drawn):
    path = tmp_path / "a.safetensors"
    path.write_bytes(mutate(SAFETENSORS[drawn[0]], drawn[1]))
    check_checkpoint(attempt, path)


CONTENTS = VALUES | st.dictionaries(
    st.sampled_from(["model", "state_dict", "module.a", "x"]),
    VALUES | st.sampled_from([np.ones(2), torch.ones(2)]),
)


@fuzz(".pth, contents", 3000, content=CONTENTS)
def test_contents(attempt, tmp_path, content):
    path = tmp_path / "a.pth"
    torch.save(content, path)
    check_checkpoint(attempt, path)
