"""Objects given to a loaded model as images, and mutated configs of its checkpoint."""

from __future__ import annotations

import importlib
import tempfile
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from fuzzing import ACCEPTED, VALUES, fuzz, mutate, mutations
from hypothesis import assume
from hypothesis import strategies as st
from PIL import Image
from tiny_checkpoint import save_checkpoint

import clouds
from clouds.config import KEYS
from clouds.inference.images import to_rgb

LOAD = importlib.import_module("clouds.inference.load")


@cache
def segmenter():
    with tempfile.TemporaryDirectory() as folder:
        path, _ = save_checkpoint(folder)
        return clouds.load(path)


SIDES = st.integers(0, 5)
SHAPES = st.lists(SIDES, max_size=5).map(tuple) | st.sampled_from([(4, 5, 3), (3, 4, 5)])
NUMBERS = st.sampled_from([0, 1, 0.5, -1, 255, float("nan"), float("inf"), 1e30, 1 + 1e-9])
TYPES = st.sampled_from(
    "uint8 int8 int64 uint16 float16 float32 float64 bool complex64 object U3 M8[s]".split()
)
TORCH_TYPES = st.sampled_from(
    [
        *(torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.bool),
        *(torch.complex64, torch.float8_e4m3fn, torch.uint16),
    ]
)
MODES = st.sampled_from(["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "I", "F", "I;16"])
GOOD = st.tuples(st.just((4, 5, 3)), st.sampled_from(["uint8", "float32"]), st.sampled_from([0, 1]))
OBJECTS = st.one_of(
    GOOD.map(lambda good: ("array", *good)),
    st.tuples(st.just("array"), SHAPES, TYPES, NUMBERS),
    st.tuples(st.just("tensor"), SHAPES, TORCH_TYPES, NUMBERS),
    st.tuples(st.just("pillow"), st.tuples(st.integers(0, 4), st.integers(0, 4)), MODES, NUMBERS),
    st.tuples(st.just("other"), VALUES, st.none(), st.none()),
)


def built(kind, shape, dtype, number):
    with np.errstate(all="ignore"):
        if kind == "array":
            return (
                np.full(shape, number).astype(dtype) if dtype != "M8[s]" else np.zeros(shape, dtype)
            )
        if kind == "tensor":
            return torch.full(shape, number, dtype=torch.float32).to(dtype)
        return Image.new(dtype, shape) if kind == "pillow" else shape


@fuzz("objects given to a model", 8000, drawn=OBJECTS)
def test_objects(attempt, tmp_path, drawn):
    try:
        image = built(*drawn)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        assume(False)  # NumPy or torch has no such object
    attempt.also = (TypeError,)
    names = ["image", *([str(Path(image)), repr(image)] if isinstance(image, str) else [])]
    outcome, pixels = attempt(lambda: to_rgb(image), *names)
    if outcome == ACCEPTED:
        assert pixels.dtype == np.uint8 and pixels.shape[2] == 3 and pixels.size


@fuzz("images given to a model", 100, drawn=OBJECTS, others=st.lists(OBJECTS, max_size=2))
def test_model(attempt, tmp_path, drawn, others):
    try:
        images = [built(*one) for one in (drawn, *others)]
    except (ValueError, TypeError, RuntimeError, OverflowError):
        assume(False)
    attempt.also = (TypeError,)
    names = ["image", *(image for image in images if isinstance(image, str))]
    outcome, results = attempt(lambda: segmenter()(images), *names)
    if outcome == ACCEPTED:
        assert len(results) == len(images)
        for image, result in zip(images, results, strict=True):
            height, width = to_rgb(image).shape[:2]
            assert result.labels.shape == (height, width) and result.labels.max() < 19
            assert np.isfinite(result.confidence).all()


class BuiltError(Exception):
    """The config is valid, and the model would be built."""


CARRIED = (
    b"MODEL:\n  DEVICE: cpu\n  WEIGHTS: a.pth\nSOLVER:\n  STEPS: [10]\n  BASE_LR: 0.1\nSEED: 3\n",
    b"",
)


@fuzz("config in a checkpoint", 1500, drawn=mutations(len(CARRIED)), value=st.none() | VALUES)
def test_carried_config(attempt, tmp_path, drawn, value):
    text = mutate(CARRIED[drawn[0]], drawn[1]).decode("latin1") if value is None else value
    path = tmp_path / "a.pth"
    torch.save({"model": {"x": torch.ones(1)}, "clouds": {"config": text}}, path)

    def build():
        with mock.patch.object(LOAD, "build_seeded", side_effect=BuiltError):
            try:
                clouds.load(path)
            except BuiltError:
                return True

    outcome, built = attempt(build, "a.pth", *(key.name for key in KEYS))
    assert built or outcome != ACCEPTED
