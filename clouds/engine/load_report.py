"""Which tensors of a file are those of a model: renaming, and a report on one screen."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from clouds.engine.frozen_backbone import adapter_tensors, is_left_out
from clouds.engine.mmseg_names import from_mmseg, is_mmseg
from clouds.messages import format_examples

logger = logging.getLogger(__name__)

NAMES_SHOWN = 6
"""Maximum number of tensor names per section of a load report."""

DERIVED = ("criterion.empty_weight",)
"""Tensors that the config determines: they may be missing in a file, or have another shape."""

OLDER_NAMES = (
    (re.compile(r"^sem_seg_head\.(?!predictor\.|pixel_decoder\.)"), "sem_seg_head.pixel_decoder."),
    (re.compile(r"^sem_seg_head\.predictor\.static_query\."), "sem_seg_head.predictor.query_feat."),
)
"""Names in checkpoints of MaskFormer and of early Mask2Former, and their replacements."""


@dataclass(frozen=True)
class LoadReport:
    """Comparison of the tensors of the file `path` with those of a model.

    Attributes:
        matched: number of tensors with the name and shape of a tensor of the model.
        total: number of tensors of the model.
        missing, unexpected: names that only the model, or only the file has.
        mismatched: name, shape in the file, shape in the model.
        left_out: names of the model's frozen backbone in a file that leaves it out, see
            `clouds.engine.frozen_backbone`; they are not among `missing`.
    """

    path: str
    matched: int
    total: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    left_out: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether the file has every tensor of the model that the config does not determine.

        A frozen backbone may be left out as a whole.
        """
        unmatched = {*self.missing, *(name for name, _, _ in self.mismatched)}
        return unmatched <= set(DERIVED)

    def __str__(self) -> str:
        shapes = [
            f"{name}: {in_file} in the file, {in_model} in the model{_comment(name)}"
            for name, in_file, in_model in self.mismatched
        ]
        lines = [f"{self.path}: {self.matched} of the model's {self.total} tensors match."]
        if self.left_out:
            count = len(self.left_out)
            lines.append(f"  the backbone's own weights, which the file leaves out ({count})")
        lines += _section("only in the model", [name + _comment(name) for name in self.missing])
        lines += _section("with another shape", shapes)
        lines += _section("only in the file", self.unexpected)
        return "\n".join(lines)


def _comment(name: str) -> str:
    return " (built from the config instead)" if name in DERIVED else ""


def _section(title: str, names: tuple[str, ...] | list[str]) -> list[str]:
    """Lines of a report: the number of names, and at most NAMES_SHOWN of them."""
    if not names:
        return []
    more = len(names) - NAMES_SHOWN
    lines = [f"  {title} ({len(names)}):", *(f"    {name}" for name in names[:NAMES_SHOWN])]
    return [*lines, f"    … and {more} more"] if more > 0 else lines


def compare_tensors(path: str, weights: Mapping[str, torch.Tensor], model: nn.Module) -> LoadReport:
    """Match the tensors of the file `path` with those of `model`, by name and shape."""
    state = model.state_dict()
    shapes = ((n, tuple(weights[n].shape), tuple(state[n].shape)) for n in state if n in weights)
    mismatched = tuple(names for names in shapes if names[1] != names[2])
    missing = tuple(name for name in state if name not in weights)
    matched = len(state) - len(missing) - len(mismatched)
    needed = [name for name in missing if name not in DERIVED]
    left_out: tuple[str, ...] = ()
    if is_left_out(weights, needed, model):
        left_out, missing = tuple(needed), tuple(name for name in missing if name in DERIVED)
    unexpected = tuple(name for name in weights if name not in state)
    return LoadReport(path, matched, len(state), missing, unexpected, mismatched, left_out)


def rename_older_tensors(
    weights: Mapping[str, torch.Tensor], model: nn.Module
) -> dict[str, torch.Tensor]:
    """`weights` with the names in OLDER_NAMES replaced where the model has the new name.

    Names of mmsegmentation's checkpoints are replaced as well.
    """
    if is_mmseg(weights):
        weights = from_mmseg(weights)
    names = model.state_dict().keys()
    renamed: dict[str, torch.Tensor] = {}
    for name, value in weights.items():
        replacements = (pattern.sub(new, name) for pattern, new in OLDER_NAMES)
        usable = [new for new in replacements if new in names and new not in weights]
        renamed[name if name in names or not usable else usable[0]] = value
    count = len(renamed.keys() - weights.keys())
    if count:
        logger.info("%d tensors have older names in the file and were renamed", count)
    return renamed


def refuse_other_adapter(report: LoadReport) -> None:
    """Refuse tensors of an adapter that the model has not.

    The other weights alone would be those of another network.

    Raises:
        ValueError: there are such tensors.
    """
    names = adapter_tensors(report.unexpected)
    if names:
        raise ValueError(
            f"these weights have an adapter that the model has not: {format_examples(names)}.\n"
            f"{report}\nSet MODEL.BACKBONE.ADAPTER as in training, or merge the adapter "
            "(`clouds convert --merge-adapters`)."
        )
