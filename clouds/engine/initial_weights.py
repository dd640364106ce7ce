"""Building a model, and loading its weights, without fetching CLIP's weights in vain.

CLIP's weights are fetched by open_clip, which takes a network and minutes. They are not needed
where a checkpoint brings them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import nn

from clouds.d2 import BACKBONE_REGISTRY, CfgNode
from clouds.engine.checkpoint import Checkpointer, compare_tensors
from clouds.modeling.build import build_seeded
from clouds.weights_io import read_checkpoint

logger = logging.getLogger(__name__)

PREFIX = "backbone."
"""Of the names of the backbone's tensors in a model."""


def build_and_load(cfg: CfgNode, path: str) -> nn.Module:
    """The model of a config with the weights of a checkpoint.

    The file is read before CLIP's weights are fetched, and they are not fetched if it has all of
    them.

    Args:
        cfg: the config; MODEL.WEIGHTS_PARTIAL tells whether the file may lack tensors.
        path: the checkpoint; empty: none is loaded.

    Raises:
        FileNotFoundError, ValueError: see `Checkpointer.load`; CLIP's weights are needed and cannot
            be fetched.
    """
    weights = read_checkpoint(path)["model"] if path else {}
    skip = has_backbone(weights)
    model = build_seeded(cfg, skip_pretrained=skip)
    if skip:
        fetch_what_is_missing(cfg, model, path)
    if path:
        Checkpointer(model, partial=cfg.MODEL.WEIGHTS_PARTIAL).load_model(path, weights)
    return model


def has_backbone(weights: Iterable[str]) -> bool:
    """Whether a state dict has tensors of the backbone, maybe not all."""
    return any(name.startswith(PREFIX) for name in weights)


def fetch_what_is_missing(cfg: CfgNode, model: nn.Module, path: str) -> None:
    """Load the backbone's pretrained weights if the checkpoint that follows has not all of them.

    Args:
        cfg: the config of the model.
        model: was built by `build_seeded` with `skip_pretrained`, so that its CLIP is random.
        path: the checkpoint that is loaded next; empty: none. Without MODEL.WEIGHTS_PARTIAL nothing
            is fetched for it, since loading it is an error if any tensor is missing.
    """
    if path:
        if not cfg.MODEL.WEIGHTS_PARTIAL:
            return
        report = compare_tensors(path, read_checkpoint(path, mmap=True)["model"], model)
        unmatched = [*report.missing, *(name for name, _, _ in report.mismatched)]
        missing = [name for name in unmatched if name.startswith(PREFIX)]
        if not missing:
            return
        logger.info("%s lacks %d tensors of the backbone", path, len(missing))
    with torch.random.fork_rng(devices=[]):
        backbone = BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)(cfg, None)
    model.get_submodule(PREFIX[:-1]).load_state_dict(backbone.state_dict())
