"""A model from a config file, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import clouds.modeling  # noqa: F401 - registers what configs name
from clouds.config import load_config
from clouds.d2 import CfgNode, build_model
from clouds.device import resolve_device
from clouds.engine.checkpoint import Checkpointer


def build(
    config_file: str | Path,
    overrides: Sequence[Any] = (),
    weights: str | Path | None = None,
) -> nn.Module:
    """Build the model that a YAML file describes, in evaluation mode.

    Args:
        config_file: a config, with `_BASE_` or without.
        overrides: KEY, VALUE, KEY, VALUE, … as on the command line, e.g. ["MODEL.DEVICE", "cpu"].
        weights: checkpoint to load in place of the config's MODEL.WEIGHTS; "": none at all.

    Returns:
        The model, on MODEL.DEVICE. Without weights its initial values are a function of SEED.

    Raises:
        FileNotFoundError: no such config or checkpoint.
        ValueError: a config or checkpoint that cannot be used; the message says why.
    """
    cfg = load_config(config_file, list(overrides))
    model = build_seeded(cfg)
    path = cfg.MODEL.WEIGHTS if weights is None else str(weights)
    if path:
        Checkpointer(model, partial=cfg.MODEL.WEIGHTS_PARTIAL).load_weights(path)
    return model.eval()


def build_seeded(cfg: CfgNode) -> nn.Module:
    """The config's model, its initial weights drawn from SEED; the global generator stays."""
    device = resolve_device(cfg.MODEL.DEVICE)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(cfg.SEED)
        return build_model(cfg)
