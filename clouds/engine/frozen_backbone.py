"""Checkpoints without the frozen backbone, which are loaded over the backbone's own weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clouds import comm
from clouds.messages import format_examples
from clouds.modeling.backbone.adapters import adapter_of

BACKBONE = "backbone."
"""Begins the names of the backbone's tensors in a model."""

ENTRY = "frozen_backbone"
"""Entry of a checkpoint that leaves the frozen backbone out: the fingerprints of its tensors."""

TOLERANCE = 1e-4
"""Of a fingerprint, relative to the norm of the tensor: larger than rounding in the decompositions
that an adapter starts with."""


def frozen_names(model: nn.Module) -> set[str]:
    """Names of the backbone's tensors, in the model's state dict, that training does not change.

    Buffers change in modules whose parameters train.
    """
    changing = set()
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        names = {name for name, parameter in own.items() if parameter.requires_grad}
        if names:
            names |= {name for name, _ in module.named_buffers(recurse=False)}
        changing |= {f"{prefix}.{name}" if prefix else name for name in names}
    return {n for n in model.state_dict() if n.startswith(BACKBONE)} - changing


def is_left_out(weights: Mapping[str, Tensor], missing: Iterable[str], model: nn.Module) -> bool:
    """Whether a file leaves the frozen backbone out: all that it lacks is of it, and it has none of
    its matrices. (SoMA's published files have frozen biases.)

    Args:
        weights: of the file, under the model's names.
        missing: names of the model's tensors that are not in the file.
        model: the model.
    """
    frozen = frozen_names(model)
    state = model.state_dict()
    matrices = {name for name in frozen if state[name].dim() >= 2}
    return bool(matrices) and set(missing) <= frozen and not matrices & weights.keys()


def fingerprints(model: nn.Module) -> dict[str, list[float]]:
    """Of each frozen tensor of the backbone, two numbers: its norm, and a projection.

    A collective operation if the model is sharded.
    """
    state = model.state_dict()
    names = (n for n in sorted(frozen_names(model)) if state[n].is_floating_point())
    return {name: _fingerprint(state[name]) for name in names}


@torch.no_grad()
def _fingerprint(tensor: Tensor) -> list[float]:
    whole: Tensor = comm.gather_whole(tensor.detach())
    values = whole.flatten().double()
    direction = torch.arange(len(values), device=values.device, dtype=torch.float64).sin_()
    return [float(values.norm()), float(values @ direction)]


def check_fingerprints(path: str, saved: Any, model: nn.Module) -> None:
    """Compare the model's frozen backbone with the one that a checkpoint was saved beside.

    Raises:
        ValueError: tensors have other values; or the entry is no mapping of fingerprints.
    """
    present = fingerprints(model)
    try:
        pairs = {name: (saved[name], present[name]) for name in present if name in saved}
        others = [
            n for n, (a, b) in pairs.items() if abs(a[1] - b[1]) > TOLERANCE * max(a[0], b[0])
        ]
    except (TypeError, IndexError, KeyError) as error:
        raise ValueError(
            f"the entry {ENTRY!r} of checkpoint '{path}' is damaged. Copy or download it again."
        ) from error
    if others or not pairs:
        raise ValueError(
            f"checkpoint '{path}' leaves the frozen backbone out, and was trained over other "
            f"weights than the backbone has now: {len(others)} of {len(present)} tensors differ "
            f"({format_examples(others)}). Name the backbone's weights that the config of the "
            "checkpoint names, with the same MODEL.BACKBONE keys."
        )


def adapter_tensors(names: Iterable[str]) -> list[str]:
    """Those of the names that are of an adapter's own tensors."""
    return [n for n in names if n.startswith(f"{BACKBONE}adapter.") or ".updates." in n]


def start_adapter(model: nn.Module, loaded: Mapping[str, Tensor]) -> None:
    """Let the adapter start from weights of the backbone that were loaded without an adapter."""
    backbone = getattr(model, "backbone", None)
    matrices = {n for n, v in loaded.items() if n.startswith(BACKBONE) and v.dim() >= 2}
    if isinstance(backbone, nn.Module) and matrices and not adapter_tensors(loaded):
        adapter_of(backbone).fit(backbone)
