"""Building a model from a config file in one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

import clouds.modeling  # noqa: F401 - registers what configs name
from clouds.config import load_config
from clouds.engine.checkpoint import Checkpointer
from clouds.modeling.build import build_seeded


def build(
    config_file: str | Path,
    overrides: Sequence[Any] = (),
    weights: str | Path | None = None,
) -> nn.Module:
    """Build the model that a YAML file describes, in evaluation mode.

    Args:
        config_file: a config, with `_BASE_` or without, or the short name of one of the package.
        overrides: KEY, VALUE, KEY, VALUE, … as on the command line, e.g. ["MODEL.DEVICE", "cpu"].
        weights: checkpoint to load instead of the config's MODEL.WEIGHTS; "": none.

    Returns:
        The model, on MODEL.DEVICE. Without a checkpoint, its weights are a function of SEED.

    Raises:
        FileNotFoundError: no such config or checkpoint.
        ValueError: the config or the checkpoint is invalid; the message has the reason.
    """
    cfg = load_config(config_file, list(overrides))
    model = build_seeded(cfg)
    path = cfg.MODEL.WEIGHTS if weights is None else str(weights)
    if path:
        Checkpointer(model, partial=cfg.MODEL.WEIGHTS_PARTIAL).load_weights(path)
    return model.eval()
