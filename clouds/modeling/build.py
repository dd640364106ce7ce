"""From a config to a model on its device."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import torch
from torch import nn

from clouds.d2 import META_ARCH_REGISTRY, CfgNode
from clouds.device import resolve_device
from clouds.modeling.backbone.pretrained import skip_pretrained_weights

logger = logging.getLogger(__name__)


def build_model(cfg: CfgNode) -> nn.Module:
    """The model that MODEL.META_ARCHITECTURE names, built from `cfg`, on MODEL.DEVICE.

    It loads no checkpoint (MODEL.WEIGHTS).

    Raises:
        KeyError: no such meta-architecture is registered; the message lists those that are.
        ValueError: MODEL.DEVICE is not available.
    """
    device = resolve_device(cfg.MODEL.DEVICE)
    model = _construct(cfg)
    model.to(device)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    name = cfg.MODEL.META_ARCHITECTURE
    logger.info("built %s on %s: %d parameters, %d of them train", name, device, total, trained)
    return model


def build_seeded(cfg: CfgNode, skip_pretrained: bool = False) -> nn.Module:
    """`build_model` with initial weights drawn from SEED; torch's global generator is unchanged.

    Args:
        cfg: the config.
        skip_pretrained: do not fetch the backbone's pretrained weights: they are random, and the
            caller loads its weights. The other weights are the same in both cases.
    """
    device = resolve_device(cfg.MODEL.DEVICE)
    skipping = skip_pretrained_weights() if skip_pretrained else nullcontext()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), skipping:
        torch.manual_seed(cfg.SEED)
        return build_model(cfg)


def build_on_meta(cfg: CfgNode) -> nn.Module:
    """The model that `build_model` builds, on torch's meta device: shapes without values.

    It takes neither memory nor weights; torch's global generator is unchanged.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"), skip_pretrained_weights():
        return _construct(cfg)


def _construct(cfg: CfgNode) -> nn.Module:
    name = cfg.MODEL.META_ARCHITECTURE
    if name not in META_ARCH_REGISTRY:
        known = ", ".join(sorted(entry for entry, _ in META_ARCH_REGISTRY)) or "none"
        raise KeyError(
            f"MODEL.META_ARCHITECTURE {name!r} is not registered. Registered are: {known}."
        )
    model: nn.Module = META_ARCH_REGISTRY.get(name)(cfg)
    return model
