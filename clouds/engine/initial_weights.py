"""Building a model, and loading its weights, without fetching the backbone's weights in vain.

They are fetched by open_clip or timm, which takes a network and minutes. They are not needed where
a checkpoint brings them, and needed where it leaves the frozen backbone out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from clouds.config.config import get_value
from clouds.config.defaults_model import WEIGHTS_KEYS
from clouds.d2 import BACKBONE_REGISTRY, CfgNode
from clouds.engine.checkpoint import Checkpointer
from clouds.engine.frozen_backbone import ENTRY
from clouds.engine.load_report import compare_tensors, rename_older_tensors
from clouds.engine.parallel import load_weights
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
    entries = read_checkpoint(path) if path else {"model": {}}
    weights = entries["model"]
    skip = has_backbone(weights)
    model = build_seeded(cfg, skip_pretrained=skip)
    if skip:
        fetch_what_is_missing(cfg, model, path)
    if path:
        checkpointer = Checkpointer(model, partial=cfg.MODEL.WEIGHTS_PARTIAL)
        checkpointer.load_model(path, weights, marks=entries.get(ENTRY))
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
            is fetched for it unless it leaves the frozen backbone out, since loading it is an error
            if any other tensor is missing.
    """
    if path:
        weights = rename_older_tensors(read_checkpoint(path, mmap=True)["model"], model)
        report = compare_tensors(path, weights, model)
        if report.left_out:
            require_own_weights(cfg, path)
        elif not cfg.MODEL.WEIGHTS_PARTIAL:
            return
        unmatched = [*report.missing, *report.left_out, *(name for name, _, _ in report.mismatched)]
        missing = [name for name in unmatched if name.startswith(PREFIX)]
        if not missing:
            return
        logger.info("%s lacks %d tensors of the backbone", path, len(missing))
    fetch_backbone(cfg, model)


def fetch_backbone(cfg: CfgNode, model: nn.Module) -> None:
    """Load the backbone's own weights, and what an adapter starts with, into `model`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.SEED)  # as `build_seeded`, which builds the backbone first
        backbone = BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)(cfg, None)
    load_weights(model.get_submodule(PREFIX[:-1]), backbone.state_dict())


def require_own_weights(cfg: CfgNode, path: str) -> None:
    """Raise ValueError if the config names no weights of the backbone, which `path` leaves out."""
    for key, backbones in WEIGHTS_KEYS.items():
        if cfg.MODEL.BACKBONE.NAME in backbones and not get_value(cfg, key):
            raise ValueError(
                f"checkpoint '{path}' leaves the frozen backbone out, and {key} names no weights: "
                "the backbone would be random. Name there the weights that it was trained over."
            )


def load_complete(cfg: CfgNode, model: nn.Module, path: str, entries: Mapping[str, Any]) -> None:
    """Load the weights among the entries of `path`; they must be complete and finite.

    Args:
        cfg: the config of the model.
        model: was built by `build_seeded` with `skip_pretrained`: if the weights leave a frozen
            backbone out, its own are loaded.
        path: for messages.
        entries: of the checkpoint.

    Raises:
        ValueError: a tensor is missing, has another shape, or has values that are not finite; the
            backbone is left out, and the config names no weights of it.
    """
    weights = rename_older_tensors(entries["model"], model)
    report = compare_tensors(path, weights, model)
    if not report.complete:
        raise ValueError(
            f"these weights are not complete, or of another model than the config's.\n{report}\n"
            "Name the config that they were trained with by config_file (--config-file); a "
            "checkpoint of another project must have every tensor (`clouds convert`)."
        )
    if report.left_out:
        require_own_weights(cfg, path)
        fetch_backbone(cfg, model)
    Checkpointer(model).load_model(path, weights, marks=entries.get(ENTRY))
