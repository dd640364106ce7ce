"""Outputs of the published adapters' code: `peft` in the folder of `reference_files`."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from reference_files import REFERENCE, arrays, facts, weights_rule

from clouds.config import get_cfg
from clouds.modeling.backbone.adapters import AdaptedLayers, build_adapter

FOLDER = REFERENCE / "peft"

needs_adapter_reference = pytest.mark.skipif(
    not (FOLDER / "rein.npz").is_file(),
    reason=f"no outputs of the published adapters in {FOLDER} (set CLOUDS_REFERENCE)",
)


def peft_arrays(name):
    return arrays(f"peft/{name}")


def peft_facts(name):
    return facts(f"peft/{name}")


def value_of(entry):
    """The value of a parameter that is listed as name, shape and gain."""
    value = weights_rule().value_for(entry["name"], entry["shape"])
    return torch.from_numpy(np.asarray(value * np.float32(entry["gain"])))


def cotangent(name, shape):
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    return torch.from_numpy(values.astype(np.float32))


def assert_close(ours, theirs, tolerance=1e-4, name=""):
    """By the measure of the reference: the largest difference against the largest value."""
    ours = ours.detach().numpy() if isinstance(ours, torch.Tensor) else np.asarray(ours)
    assert ours.shape == theirs.shape, name
    worst = np.abs(ours.astype(np.float64) - theirs).max()
    assert worst <= tolerance * max(1, np.abs(theirs).max()), f"{name}: off by {worst}"


def adapter_config(name, **options):
    """The defaults with an adapter; options by the keys in its section."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.ADAPTER.NAME = name
    for key, value in options.items():
        section = cfg.MODEL.BACKBONE.ADAPTER[name.upper()]
        assert key in section, key
        section[key] = value
    return cfg


def adapted(name, blocks, width, *, is_transformer=True, cfg=None, **options):
    """An adapter of these blocks, which it changes."""
    layers = AdaptedLayers(
        backbone="a test's",
        names=[f"blocks.{i}" for i in range(len(blocks))],
        blocks=list(blocks),
        widths=[width] * len(blocks) if isinstance(width, int) else width,
        root="",
        is_transformer=is_transformer,
    )
    return build_adapter(cfg or adapter_config(name, **options), layers)
