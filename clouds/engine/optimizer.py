"""Parameter groups, the optimizer and gradient clipping.

Weight decay follows the published recipe: none on norm layers (including their biases) and on
`nn.Embedding` weights, such as the queries; all other parameters decay, including biases. A
parameter that is assigned to a module directly, such as the pixel decoder's level embedding, is not
an `nn.Embedding` and decays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from clouds import comm
from clouds.d2 import CfgNode
from clouds.engine.parallel import clip_sharded
from clouds.messages import format_examples

NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
"""The first is the base of all batch and instance norms."""

POSITION_TABLES = ("relative_position_bias_table", "absolute_pos_embed")
"""Names of position parameters of window-attention backbones, which do not decay."""

FUSED_ON = ("cpu", "cuda")
"""Device types for which every supported version of torch has fused optimizers."""

UNSHARDED = ".unsharded"
"""Ends the names of groups of a sharded model whose parameters every process has."""

ClipGradients = Callable[[], torch.Tensor]
"""Clips the gradients of the optimizer's parameters in place. Returns their joint norm before
clipping, a scalar tensor on their device."""


@runtime_checkable
class TrainableGroups(Protocol):
    """A backbone with its own learning rates or weight decays for some of its parameters."""

    def param_group_options(self) -> Mapping[str, Mapping[str, float]]:
        """Options of parameters by prefix of their names.

        A prefix is the name of a module or parameter relative to the backbone, or a pattern of
        such names, `*` for any characters; the longest one that matches a parameter applies.
        Options are `lr_factor`, which multiplies the learning
        rate of the backbone, and `weight_decay`, which replaces that of the config.
        """


OPTIONS = ("lr_factor", "weight_decay")
"""Options of `TrainableGroups.param_group_options`."""


def parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters, grouped by learning rate and weight decay.

    A parameter that has several names is listed once, under the first. The learning rate of the
    backbone is SOLVER.BACKBONE_MULTIPLIER times that of the head. If `model.backbone` has
    `TrainableGroups`, its options apply to its parameters.

    Returns:
        Groups as torch optimizers take them: `params`, `lr`, `weight_decay`, and for logs and
        checkpoints `param_names` and `name`: 'head', 'head.norm', 'head.embed', 'head.position',
        the same for 'backbone', and 'backbone.<prefix>' with the same suffixes. Of a sharded model
        parameters of one number are in groups of their own, the last, '<name>.unsharded'.

    Raises:
        ValueError: no parameter is trainable; an unknown option of the backbone.
    """
    options = _backbone_options(model)
    sharded = any(comm.is_sharded(parameter) for parameter in model.parameters())
    groups: dict[str, dict[str, Any]] = {}
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            name = f"{module_name}.{leaf}" if module_name else leaf
            suffix, decay = _weight_decay(cfg, module, leaf)
            if sharded and not comm.is_sharded(parameter):
                suffix += UNSHARDED
            part, factor = "head", 1.0
            if "backbone" in name.split("."):
                part, factor = "backbone", cfg.SOLVER.BACKBONE_MULTIPLIER
                prefix = _longest_prefix(options, name.removeprefix("backbone."))
                if prefix is not None:
                    part = f"backbone.{prefix}"
                    factor = factor * options[prefix].get("lr_factor", 1.0)
                    decay = options[prefix].get("weight_decay", decay)
            options_of_group = {"lr": cfg.SOLVER.BASE_LR * factor, "weight_decay": decay}
            new = {"params": [], **options_of_group, "name": part + suffix, "param_names": []}
            group = groups.setdefault(part + suffix, new)
            group["params"].append(parameter)
            group["param_names"].append(name)
    if not groups:
        raise ValueError("no parameter of the model is trainable: all have requires_grad False.")
    return sorted(groups.values(), key=lambda group: str(group["name"]).endswith(UNSHARDED))


def _backbone_options(model: nn.Module) -> Mapping[str, Mapping[str, float]]:
    """Options of the backbone's parameters by prefix; empty if it has none."""
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, TrainableGroups):
        return {}
    options = backbone.param_group_options()
    for prefix, values in options.items():
        unknown = sorted(set(values) - set(OPTIONS))
        if unknown:
            raise ValueError(
                f"the backbone's option {unknown[0]!r} of the parameters {prefix!r} is unknown; "
                f"options are {', '.join(OPTIONS)}."
            )
    return options


def _longest_prefix(prefixes: Iterable[str], name: str) -> str | None:
    """The longest prefix of a dotted name that ends at a dot or at its end; None: none matches."""
    matching = [prefix for prefix in prefixes if fnmatchcase(f"{name}.", f"{prefix}.*")]
    return max(matching, key=len, default=None)


def _weight_decay(cfg: CfgNode, module: nn.Module, leaf: str) -> tuple[str, float]:
    """Suffix of the group and weight decay of the parameter named `leaf` of `module`."""
    if leaf in POSITION_TABLES:
        return ".position", 0.0
    if isinstance(module, NORM_LAYERS):
        return ".norm", cfg.SOLVER.WEIGHT_DECAY_NORM
    if isinstance(module, nn.Embedding):
        return ".embed", cfg.SOLVER.WEIGHT_DECAY_EMBED
    return "", cfg.SOLVER.WEIGHT_DECAY


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """SOLVER.OPTIMIZER over the trainable parameters of `model`.

    Its `load_state_dict` matches state to parameters by name and keeps the learning rates and
    weight decays of `cfg`, so that a run can be resumed with other ones.

    Raises:
        ValueError: no parameter is trainable, or SOLVER.OPTIMIZER is unknown.
    """
    groups = parameter_groups(cfg, model)
    optimizer: torch.optim.Optimizer
    rate, fused = cfg.SOLVER.BASE_LR, can_fuse(groups)
    if cfg.SOLVER.OPTIMIZER == "ADAMW":
        optimizer = torch.optim.AdamW(groups, lr=rate, fused=fused)
    elif cfg.SOLVER.OPTIMIZER == "SGD":
        momentum = cfg.SOLVER.MOMENTUM
        # torch has no fused SGD of sharded parameters
        fused &= not any(comm.is_sharded(p) for group in groups for p in group["params"])
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=momentum, fused=fused)
    else:
        raise ValueError(f"SOLVER.OPTIMIZER is {cfg.SOLVER.OPTIMIZER!r}; use ADAMW or SGD.")
    optimizer.register_load_state_dict_pre_hook(match_by_name)
    return optimizer


def can_fuse(groups: Iterable[dict[str, Any]]) -> bool:
    """Whether torch has a fused optimizer, with one pass over memory, for these parameters."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    return all(p.device.type in FUSED_ON and p.is_floating_point() for p in parameters)


def match_by_name(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """Saved optimizer state in the order of `optimizer`: state by name, groups of `optimizer`.

    Raises:
        ValueError: the saved state is of other parameters.
    """
    groups = optimizer.state_dict()["param_groups"]
    present = _index_by_name(groups)
    in_file = _index_by_name(saved["param_groups"])
    if present.keys() != in_file.keys():
        raise ValueError(
            "the optimizer's state in the checkpoint is of other parameters than those that are "
            f"trainable now. Only in the checkpoint: {_names(in_file.keys() - present.keys())}. "
            f"Only now: {_names(present.keys() - in_file.keys())}. "
            "Was MODEL.BACKBONE.FREEZE changed? To start from the weights only, set MODEL.WEIGHTS, "
            "without --resume."
        )
    values = saved["state"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        present[name]: _sharded_state(parameters[present[name]], values[i])
        for name, i in in_file.items()
        if i in values
    }
    return {"state": state, "param_groups": groups}


def _sharded_state(parameter: nn.Parameter, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a parameter, sharded as this is: all that has its shape."""
    return {
        key: comm.sharded_like(parameter, value)
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape
        else value
        for key, value in state.items()
    }


def _index_by_name(groups: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Parameter name -> index in the optimizer's state; groups without names are skipped."""
    return {
        name: index
        for group in groups
        for name, index in zip(group.get("param_names", ()), group["params"], strict=False)
    }


def _names(names: Iterable[str]) -> str:
    return format_examples(sorted(names)) or "none"


def build_clipping(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> ClipGradients:
    """SOLVER.CLIP_GRADIENTS for the parameters of `optimizer`.

    'full_model' scales all gradients by one factor so that their joint norm is at most CLIP_VALUE;
    'norm' scales the gradient of each parameter separately; 'value' clamps every element.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    bound, order = float(clip.CLIP_VALUE), float(clip.NORM_TYPE)

    if any(comm.is_sharded(parameter) for parameter in parameters):
        kind = clip.CLIP_TYPE if clip.ENABLED else "none"
        return functools.partial(clip_sharded, parameters, kind, bound, order)

    def clip_joint_norm(maximum: float = bound) -> torch.Tensor:
        return nn.utils.clip_grad_norm_(parameters, maximum, norm_type=order)

    def only_norm() -> torch.Tensor:
        return clip_joint_norm(float("inf"))

    def clip_each_norm() -> torch.Tensor:
        norm = only_norm()
        for parameter in parameters:
            nn.utils.clip_grad_norm_(parameter, bound, norm_type=order)
        return norm

    def clip_values() -> torch.Tensor:
        norm = only_norm()
        nn.utils.clip_grad_value_(parameters, bound)
        return norm

    if not clip.ENABLED:
        return only_norm
    by_type = {"full_model": clip_joint_norm, "norm": clip_each_norm, "value": clip_values}
    return by_type[clip.CLIP_TYPE]
