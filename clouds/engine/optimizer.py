"""Parameter groups, the optimizer and gradient clipping.

Weight decay follows the published recipe: none on norm layers (their biases included) and on
`nn.Embedding` weights, which the queries are; everything else, biases too, decays. A parameter that
is declared directly on a module, such as the pixel decoder's level embedding, is no `nn.Embedding`
and decays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from clouds.d2 import CfgNode

NORM_LAYERS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
    nn.RMSNorm,
)

POSITION_TABLES = ("relative_position_bias_table", "absolute_pos_embed")
"""Names of position parameters of window-attention backbones, which never decay."""

FUSED_ON = ("cpu", "cuda")
"""Device types on which torch has fused optimizers in every version that we allow."""

ClipGradients = Callable[[], torch.Tensor]
"""Clips the gradients of the parameters that it was built for, in place. Returns their norm over
the whole model before clipping, a scalar tensor on their device."""


def parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    """The parameters that train, grouped by learning rate and weight decay.

    A parameter that has several names is listed once, under the first.

    Returns:
        Groups as torch optimizers take them: `params`, `lr`, `weight_decay`, and for logs and
        checkpoints `name` ('head', 'head.norm', 'head.embed', 'head.position' and the same for
        'backbone') and `param_names`.

    Raises:
        ValueError: nothing trains.
    """
    groups: dict[str, dict[str, Any]] = {}
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            name = f"{module_name}.{leaf}" if module_name else leaf
            part = "backbone" if "backbone" in name.split(".") else "head"
            kind, decay = weight_decay_of(cfg, module, leaf)
            group = groups.setdefault(
                part + kind,
                {
                    "params": [],
                    "lr": cfg.SOLVER.BASE_LR
                    * (cfg.SOLVER.BACKBONE_MULTIPLIER if part == "backbone" else 1.0),
                    "weight_decay": decay,
                    "name": part + kind,
                    "param_names": [],
                },
            )
            group["params"].append(parameter)
            group["param_names"].append(name)
    if not groups:
        raise ValueError("no parameter of the model trains: every one has requires_grad False.")
    return list(groups.values())


def weight_decay_of(cfg: CfgNode, module: nn.Module, leaf: str) -> tuple[str, float]:
    """Suffix of the group and weight decay of the parameter called `leaf` on `module`."""
    if leaf in POSITION_TABLES:
        return ".position", 0.0
    if isinstance(module, NORM_LAYERS):
        return ".norm", cfg.SOLVER.WEIGHT_DECAY_NORM
    if isinstance(module, nn.Embedding):
        return ".embed", cfg.SOLVER.WEIGHT_DECAY_EMBED
    return "", cfg.SOLVER.WEIGHT_DECAY


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """SOLVER.OPTIMIZER over the parameters of `model` that train.

    Its `load_state_dict` matches state to parameters by name and keeps the learning rates and
    weight decays of `cfg`, so that a run can be resumed with other ones.

    Raises:
        ValueError: nothing trains, or SOLVER.OPTIMIZER is unknown.
    """
    groups = parameter_groups(cfg, model)
    optimizer: torch.optim.Optimizer
    rate, fused = cfg.SOLVER.BASE_LR, can_fuse(groups)
    if cfg.SOLVER.OPTIMIZER == "ADAMW":
        optimizer = torch.optim.AdamW(groups, lr=rate, fused=fused)
    elif cfg.SOLVER.OPTIMIZER == "SGD":
        momentum = cfg.SOLVER.MOMENTUM
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=momentum, fused=fused)
    else:
        raise ValueError(f"SOLVER.OPTIMIZER is {cfg.SOLVER.OPTIMIZER!r}; use ADAMW or SGD.")
    optimizer.register_load_state_dict_pre_hook(match_by_name)
    return optimizer


def can_fuse(groups: Iterable[dict[str, Any]]) -> bool:
    """Whether torch updates these parameters in one pass over them, rather than in a dozen."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    return all(p.device.type in FUSED_ON and p.is_floating_point() for p in parameters)


def match_by_name(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """Saved optimizer state laid out for `optimizer`: state by name, groups as they are now.

    Raises:
        ValueError: the saved state is of other parameters.
    """
    groups = optimizer.state_dict()["param_groups"]
    here = index_by_name(groups)
    there = index_by_name(saved["param_groups"])
    if here.keys() != there.keys():
        raise ValueError(
            "the optimizer's state in the checkpoint is of other parameters than those that train "
            f"now. Only in the checkpoint: {a_few(there.keys() - here.keys())}. "
            f"Only now: {a_few(here.keys() - there.keys())}. "
            "Was the backbone frozen or thawed (MODEL.BACKBONE.FREEZE)? To go on from the weights "
            "alone, start without --resume and with MODEL.WEIGHTS."
        )
    state = {
        here[name]: saved["state"][there[name]] for name in here if there[name] in saved["state"]
    }
    return {"state": state, "param_groups": groups}


def index_by_name(groups: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Name to index in the optimizer's state; empty names of a foreign optimizer do not count."""
    return {
        name: index
        for group in groups
        for name, index in zip(group.get("param_names", ()), group["params"], strict=False)
    }


def a_few(names: Iterable[str], limit: int = 5) -> str:
    """At most `limit` of `names`, sorted, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return (", ".join(ordered[:limit]) or "none") + more


def build_clipping(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> ClipGradients:
    """SOLVER.CLIP_GRADIENTS over the parameters of `optimizer`.

    'full_model' scales all gradients by one factor so that the norm over the whole model is at
    most CLIP_VALUE; 'norm' does so for each parameter on its own; 'value' clamps every element.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    bound, order = float(clip.CLIP_VALUE), float(clip.NORM_TYPE)

    def whole(maximum: float = bound) -> torch.Tensor:
        return nn.utils.clip_grad_norm_(parameters, maximum, norm_type=order)

    def measure() -> torch.Tensor:
        return whole(float("inf"))

    def each_norm() -> torch.Tensor:
        norm = measure()
        for parameter in parameters:
            nn.utils.clip_grad_norm_(parameter, bound, norm_type=order)
        return norm

    def each_value() -> torch.Tensor:
        norm = measure()
        nn.utils.clip_grad_value_(parameters, bound)
        return norm

    if not clip.ENABLED:
        return measure
    return {"full_model": whole, "norm": each_norm, "value": each_value}[clip.CLIP_TYPE]
