"""Checkpoints: atomic writes, reading without running code, comparison with the model.

A file is `{"model", "optimizer", "scheduler", "iteration", "clouds", ...}` as in Detectron2:
`model` is the state dict, `iteration` the last completed one (counted from 0), `clouds` the
versions and the config that wrote it, and any further checkpointable (a gradient scaler, an EMA
teacher) has its own entry. Names are `model_0001999.pth` and `model_final.pth`; the text file
`last_checkpoint` contains the name of the newest.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fvcore.common.checkpoint as fvcore_checkpoint
import torch
from torch import nn

from clouds.engine.weights_io import read_checkpoint
from clouds.files import atomic_write

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
    """

    path: str
    matched: int
    total: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    @property
    def complete(self) -> bool:
        """Whether the file has every tensor of the model that the config does not determine."""
        unmatched = {*self.missing, *(name for name, _, _ in self.mismatched)}
        return unmatched <= set(DERIVED)

    def __str__(self) -> str:
        shapes = [
            f"{name}: {in_file} in the file, {in_model} in the model{_comment(name)}"
            for name, in_file, in_model in self.mismatched
        ]
        lines = [f"{self.path}: {self.matched} of the model's {self.total} tensors match."]
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
    return LoadReport(
        path=path,
        matched=len(state) - len(missing) - len(mismatched),
        total=len(state),
        missing=missing,
        unexpected=tuple(name for name in weights if name not in state),
        mismatched=mismatched,
    )


def rename_older_tensors(
    weights: Mapping[str, torch.Tensor], model: nn.Module
) -> dict[str, torch.Tensor]:
    """`weights` with the names in OLDER_NAMES replaced where the model has the new name."""
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


class Checkpointer(fvcore_checkpoint.Checkpointer):  # type: ignore[misc]
    """fvcore's Checkpointer with atomic writes, safe reads and a strict match.

    Args:
        model: its state dict is the entry `model`, without the prefix of DistributedDataParallel.
        save_dir: folder of the checkpoints.
        save_to_disk: False on all processes but one.
        provenance: entry `clouds` of saved files: text and numbers only.
        partial: load weights although some are missing or have another shape
            (MODEL.WEIGHTS_PARTIAL); not when resuming.
        checkpointables: further objects with `state_dict` and `load_state_dict`, by entry;
            `add_checkpointable` adds more.

    Attributes:
        saved_iteration: entry `iteration` of the file last saved or resumed from; -1: none.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool = True,
        provenance: Mapping[str, Any] | None = None,
        partial: bool = False,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.logger = logger
        self.provenance = dict(provenance or {})
        self.partial = partial
        self.saved_iteration = -1

    def save(self, name: str, **entries: Any) -> None:
        """Write `{save_dir}/{name}.pth`, the newest checkpoint; entries include `iteration`."""
        iteration = int(entries.get("iteration", -1))
        if not self.save_dir or not self.save_to_disk:
            self.saved_iteration = iteration
            return
        content = {"model": self.model.state_dict()}
        content |= {key: value.state_dict() for key, value in self.checkpointables.items()}
        content |= {"clouds": self.provenance, **entries}
        path = Path(self.save_dir, f"{name}.pth")
        with atomic_write(path) as file:
            torch.save(content, file)
        self.tag_last_checkpoint(path.name)
        self.saved_iteration = iteration
        logger.info("saved %s", path)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with atomic_write(Path(self.save_dir, "last_checkpoint"), "w") as file:
            file.write(last_filename_basename)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load weights, and the state of checkpointables, from a file or URL.

        Args:
            path: empty: nothing is loaded.
            checkpointables: entries to restore; None: all. One that is not in the file keeps its
                present state, with a warning.

        Returns:
            The entries that were not used.

        Raises:
            FileNotFoundError: no such file.
            ValueError: see `read_checkpoint`; the weights are of another model (and `partial` is
                not set, or no tensor matches); the state of a checkpointable does not match.
        """
        if not path:
            return {}
        entries = read_checkpoint(self.path_manager.get_local_path(path))
        self.load_model(path, entries.pop("model"))
        for name in self.checkpointables if checkpointables is None else checkpointables:
            if name in entries:
                self.checkpointables[name].load_state_dict(entries.pop(name))
            else:
                logger.warning(
                    "%s has no state of '%s', which starts from its initial state", path, name
                )
        return entries

    def load_weights(self, path: str) -> None:
        """Load the model's weights only."""
        self.load(path, checkpointables=[])

    def resume(self) -> dict[str, Any] | None:
        """Restore everything from the newest checkpoint of `save_dir`.

        Returns:
            Its entries that were not used, including `iteration`; None if there is no
            checkpoint.

        Raises:
            FileNotFoundError, ValueError: as `load`; or the file has no iteration.
        """
        if not self.has_checkpoint():
            return None
        path = self.get_checkpoint_file()
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"'{self.save_dir}/last_checkpoint' names '{Path(path).name}', which does not "
                "exist. Write the name of one of the folder's .pth files into it."
            )
        allowed, self.partial = self.partial, False
        try:
            rest = self.load(path)
        finally:
            self.partial = allowed
        if "iteration" not in rest:
            raise ValueError(
                f"checkpoint '{path}' has no entry 'iteration', so no run can be resumed from it. "
                "To start from its weights, set MODEL.WEIGHTS, without --resume."
            )
        self.saved_iteration = int(rest["iteration"])
        return rest

    def load_model(self, path: str, weights: Mapping[str, torch.Tensor]) -> None:
        """Load `weights`, which were read from `path`, into the model if they match it."""
        weights = rename_older_tensors(weights, self.model)
        report = compare_tensors(path, weights, self.model)
        if not (report.complete or (self.partial and report.matched > 0)):
            hint = "No tensor matches."
            if report.matched:
                hint = "To load the tensors that match, set MODEL.WEIGHTS_PARTIAL True."
            raise ValueError(f"these weights are of another model.\n{report}\n{hint}")
        exact = report.matched == report.total and not report.unexpected
        logger.log(logging.INFO if exact else logging.WARNING, "%s", report)
        unusable = {name for name, _, _ in report.mismatched}.union(report.unexpected)
        self.model.load_state_dict(
            {name: value for name, value in weights.items() if name not in unusable}, strict=False
        )


class PeriodicCheckpointer(fvcore_checkpoint.PeriodicCheckpointer):  # type: ignore[misc]
    """fvcore's PeriodicCheckpointer that also counts the checkpoints of an interrupted run."""

    def adopt_existing(self) -> None:
        """Count the periodic checkpoints on disk, oldest first."""
        folder = Path(self.checkpointer.save_dir)
        self.recent_checkpoints = [
            str(path) for path in sorted(folder.glob(f"{self.file_prefix}_[0-9]*.pth"))
        ]

    def step(self, iteration: int, **entries: Any) -> None:
        """Save after `iteration` if it is due; the process that saves also deletes."""
        if self.checkpointer.save_to_disk:
            super().step(iteration, **entries)
