"""Checkpoints: atomic writes, reading without running code, comparison with the model.

A file is `{"model", "optimizer", "scheduler", "iteration", "clouds", ...}` as in Detectron2:
`model` is the state dict, `iteration` the last completed one (counted from 0), `clouds` the
versions and the config that wrote it, and any further checkpointable (a gradient scaler, an EMA
teacher) has its own entry. With SOLVER.CHECKPOINT_ADAPTERS_ONLY, `model` lacks the frozen backbone,
and `frozen_backbone` identifies it. Names are `model_0001999.pth` and `model_final.pth`; the text
file `last_checkpoint` contains the name of the newest. Neither are weights saved that are not
finite nor are such loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fvcore.common.checkpoint as fvcore_checkpoint
import torch
from torch import nn

from clouds import comm
from clouds.engine.config_changes import config_value
from clouds.engine.frozen_backbone import ENTRY as FROZEN_BACKBONE
from clouds.engine.frozen_backbone import (
    check_fingerprints,
    fingerprints,
    frozen_names,
    start_adapter,
)
from clouds.engine.load_report import compare_tensors, refuse_other_adapter, rename_older_tensors
from clouds.engine.newest_checkpoint import (
    TAG,
    numbered_checkpoints,
    read_newest,
    tagged_checkpoint,
)
from clouds.engine.parallel import is_sharded, load_weights
from clouds.engine.step_result import NonFiniteLossError
from clouds.files import atomic_write
from clouds.messages import format_examples
from clouds.weights_io import nonfinite_tensors, read_checkpoint

logger = logging.getLogger(__name__)

FINITE_ENTRIES = ("optimizer", "teacher", "average")
"""Entries, besides the model, whose tensors must be finite. Those of hooks may be anything."""


class NonFiniteWeightsError(NonFiniteLossError):
    """Weights, or what belongs to them, are not finite and were not saved."""


class Checkpointer(fvcore_checkpoint.Checkpointer):  # type: ignore[misc]
    """fvcore's Checkpointer with atomic writes, safe reads and a strict match.

    Args:
        model: its state dict is the entry `model`, without the prefix of DistributedDataParallel.
        save_dir: folder of the checkpoints.
        save_to_disk: False on all processes but one.
        provenance: entry `clouds` of saved files: text and numbers only.
        partial: load weights although some are missing or have another shape
            (MODEL.WEIGHTS_PARTIAL); not when resuming.
        adapters_only: leave the frozen backbone out of saved files
            (SOLVER.CHECKPOINT_ADAPTERS_ONLY).
        load_backbone: called with the path of a file that leaves the frozen backbone out; gives the
            model's backbone its own weights, or raises ValueError. None: it has them.
        before_save: called before a file is written; an error that it raises prevents that.
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
        adapters_only: bool = False,
        load_backbone: Callable[[str], None] | None = None,
        before_save: Callable[[], None] = lambda: None,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.logger = logger
        self.provenance = dict(provenance or {})
        self.partial = partial
        self.adapters_only = adapters_only
        self.load_backbone = load_backbone
        self.before_save = before_save
        self.saved_iteration = -1
        self._resumed_from = ""
        self._fingerprints: dict[str, list[float]] | None = None

    def save(self, name: str, **entries: Any) -> None:
        """Write `{save_dir}/{name}.pth`, the newest checkpoint; entries include `iteration`.

        Raises:
            NonFiniteWeightsError: see `check_finite`; earlier files are unchanged.
            OSError: it cannot be written; earlier files are unchanged.
        """
        self.before_save()
        self.check_finite()
        if self.save_dir and self._takes_part:
            states = {key: value.state_dict() for key, value in self.checkpointables.items()}
            path = self._write(name, {**states, **entries})
            if self.save_to_disk:
                self.tag_last_checkpoint(path.name)
                logger.info("saved %s", path)
        self.saved_iteration = int(entries.get("iteration", -1))
        self._resumed_from = ""

    def save_weights(self, name: str, **entries: Any) -> None:
        """Write the present weights to `{save_dir}/{name}.pth`, which no run is resumed from.

        Raises:
            NonFiniteWeightsError, OSError: see `save`.
        """
        self.before_save()
        self.check_finite()
        if self.save_dir and self._takes_part:
            path = self._write(name, entries)
            if self.save_to_disk:
                logger.info("saved %s", path)

    @property
    def _takes_part(self) -> bool:
        """Whether this process is needed for saving: all are for a sharded model."""
        return self.save_to_disk or is_sharded(self.model)

    def _write(self, name: str, entries: Mapping[str, Any]) -> Path:
        """Write the model, `entries` and the provenance; returns the file.

        A collective operation if the model is sharded. One process writes.
        """
        content = {**self._weights(), **entries, "clouds": self.provenance}
        path = Path(self.save_dir, f"{name}.pth")
        if is_sharded(self.model):
            content = comm.gather_whole(content, keep=self.save_to_disk)
        if not self.save_to_disk:
            return path
        with atomic_write(path) as file:
            torch.save(content, file)
        return path

    def _weights(self) -> dict[str, Any]:
        """The entry `model`, and where it leaves the frozen backbone out the backbone's marks."""
        state = self.model.state_dict()
        if not self.adapters_only:
            return {"model": state}
        if self._fingerprints is None:
            self._fingerprints = fingerprints(self.model)
        frozen = frozen_names(self.model)
        kept = {name: value for name, value in state.items() if name not in frozen}
        return {"model": kept, FROZEN_BACKBONE: self._fingerprints}

    def check_finite(self) -> None:
        """Check that the weights, and the states in FINITE_ENTRIES, are finite.

        A collective operation if the model is sharded.

        Raises:
            NonFiniteWeightsError: they are not; the message names tensors.
        """
        state = comm.own_part(self.model.state_dict())
        broken = nonfinite_tensors(state, "", self._buffers())
        for name in FINITE_ENTRIES:
            if name in self.checkpointables:
                states = comm.own_part(self.checkpointables[name].state_dict())
                broken += self._nonfinite_state(name, states)
        if is_sharded(self.model):
            broken = list(dict.fromkeys(n for names in comm.all_gather(broken) for n in names))
        if broken:
            raise NonFiniteWeightsError(
                f"no checkpoint is saved, because these tensors are not finite: "
                f"{format_examples(broken)}. Training has diverged."
            )

    def _buffers(self) -> set[str]:
        """Names of the model's buffers: they may be infinite, as those of attention masks are."""
        return {name for name, _ in self.model.named_buffers()}

    def _nonfinite_state(self, name: str, state: Any) -> list[str]:
        return nonfinite_tensors(state, name, {f"{name}.{buffer}" for buffer in self._buffers()})

    def get_checkpoint_file(self) -> str:
        """The checkpoint that was last saved or resumed from, or else that of `last_checkpoint`.

        Raises:
            ValueError: `last_checkpoint` is no name.
        """
        return self._resumed_from or str(tagged_checkpoint(Path(self.save_dir)) or "")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with atomic_write(Path(self.save_dir, TAG), "w") as file:
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
        return self._restore(path, entries, checkpointables)

    def _restore(
        self,
        path: str,
        entries: dict[str, Any],
        checkpointables: list[str] | None = None,
        resuming: bool = False,
    ) -> dict[str, Any]:
        """`load` with the entries that were read from `path`."""
        marks = entries.pop(FROZEN_BACKBONE, None)
        self.load_model(path, entries.pop("model"), resuming, marks)
        for name in self.checkpointables if checkpointables is None else checkpointables:
            if name not in entries:
                logger.warning(
                    "%s has no state of '%s', which starts from its initial state", path, name
                )
                continue
            state = entries.pop(name)
            if name in FINITE_ENTRIES:
                _refuse_nonfinite(path, self._nonfinite_state(name, state))
            try:
                self.checkpointables[name].load_state_dict(state)
            except Exception as error:  # torch raises any for a state of another form
                raise ValueError(
                    f"the state of '{name}' in checkpoint '{path}' does not fit this config "
                    f"({type(error).__name__}: {error}). {_start_anew(path)}"
                ) from error
        return entries

    def load_weights(self, path: str) -> None:
        """Load the model's weights only."""
        self.load(path, checkpointables=[])

    def resume(self) -> dict[str, Any] | None:
        """Restore everything from the newest checkpoint of `save_dir`.

        If that is damaged, the one before it is used, with a warning.

        Returns:
            Its entries that were not used, including `iteration`; None if there is no
            checkpoint.

        Raises:
            FileNotFoundError, ValueError: as `load`; or all checkpoints are damaged, the file has
                no iteration, or it is of another optimizer.
        """
        newest = read_newest(Path(self.save_dir))
        if newest is None:
            return None
        path, entries = str(newest.path), newest.entries
        if newest.warning:
            logger.warning("%s", newest.warning)
        self._refuse_other_optimizer(path, entries)
        rest = self._restore(path, entries, resuming=True)
        iteration = rest.get("iteration")
        if type(iteration) is not int or iteration < 0:
            found = f"the entry 'iteration' {iteration!r}, which is no whole number of at least 0"
            found = found if "iteration" in rest else "no entry 'iteration'"
            raise ValueError(
                f"checkpoint '{path}' has {found}, so no run can be resumed from it. "
                "To start from its weights, set MODEL.WEIGHTS, without --resume."
            )
        self.saved_iteration, self._resumed_from = iteration, path
        return rest

    def _refuse_other_optimizer(self, path: str, entries: Mapping[str, Any]) -> None:
        """Raise ValueError if the file's config and the present one name different optimizers."""
        key = "SOLVER.OPTIMIZER"
        texts = entries.get("clouds"), self.provenance
        kinds = [config_value(t.get("config"), key) for t in texts if isinstance(t, Mapping)]
        if len(kinds) == 2 and None not in kinds and kinds[0] != kinds[1]:
            raise ValueError(
                f"checkpoint '{path}' has the state of {kinds[0]}, but {key} is {kinds[1]}. "
                f"Set {key} {kinds[0]} to resume. {_start_anew(path)}"
            )

    def load_model(
        self,
        path: str,
        weights: Mapping[str, torch.Tensor],
        resuming: bool = False,
        marks: Any = None,
    ) -> None:
        """Load `weights`, which were read from `path`, into the model if they match it.

        Args:
            path: the file, for messages.
            weights: its entry `model`.
            resuming: the model must match as a whole.
            marks: its entry `frozen_backbone`, where it leaves that out.

        Raises:
            ValueError: they do not match, in part only if `partial` and not `resuming`; those that
                do are not finite; they leave out the frozen backbone, which has no weights of its
                own or others than at saving.
        """
        weights = rename_older_tensors(weights, self.model)
        report = compare_tensors(path, weights, self.model)
        partial = self.partial and not resuming
        if not (report.complete or (partial and report.matched > 0)):
            hint = "No tensor matches."
            if report.matched:
                hint = "To load the tensors that match, set MODEL.WEIGHTS_PARTIAL True."
            hint = _start_anew(path) if resuming else hint
            raise ValueError(f"these weights are of another model.\n{report}\n{hint}")
        if not partial:
            refuse_other_adapter(report)
        if report.left_out and self.load_backbone is not None:
            self.load_backbone(path)
        present = report.matched + len(report.left_out)
        exact = present == report.total and not report.unexpected
        logger.log(logging.INFO if exact else logging.WARNING, "%s", report)
        unusable = {name for name, _, _ in report.mismatched}.union(report.unexpected)
        usable = {name: value for name, value in weights.items() if name not in unusable}
        _refuse_nonfinite(path, nonfinite_tensors(usable, "", self._buffers()))
        load_weights(self.model, usable, strict=False)
        if partial:
            start_adapter(self.model, usable)
        if report.left_out and marks is not None:
            check_fingerprints(path, marks, self.model)


def _refuse_nonfinite(path: str, names: list[str]) -> None:
    """Raise ValueError if there are names of tensors, read from `path`, that are not finite."""
    if names:
        raise ValueError(
            f"checkpoint '{path}' has weights that are not finite: {format_examples(names)}. Its "
            "training has diverged, or the file is damaged; use an earlier checkpoint (to resume "
            "from one, write its name into last_checkpoint)."
        )


def _start_anew(path: str) -> str:
    """What to do with a checkpoint that no run of the present config can be resumed from."""
    return (
        "A run is resumed with the model and the optimizer that it was saved with; batch size and "
        f"number of processes may change. To start a new run from its weights: MODEL.WEIGHTS "
        f"{path}, without --resume, in another OUTPUT_DIR; MODEL.WEIGHTS_PARTIAL True if the model "
        "is another."
    )


class PeriodicCheckpointer(fvcore_checkpoint.PeriodicCheckpointer):  # type: ignore[misc]
    """fvcore's PeriodicCheckpointer that also counts the checkpoints of an interrupted run."""

    def adopt_existing(self) -> None:
        """Count the periodic checkpoints on disk, oldest first, up to the one resumed from.

        After going back to an earlier one, later files are not counted, and so never deleted.
        """
        folder, resumed = Path(self.checkpointer.save_dir), self.checkpointer.saved_iteration
        files = numbered_checkpoints(folder, f"{self.file_prefix}_", before=resumed + 1)
        self.recent_checkpoints = [str(path) for path in reversed(files)]

    def step(self, iteration: int, **entries: Any) -> None:
        """Save after `iteration` if it is due; the process that saves also deletes.

        Raises:
            NonFiniteWeightsError: on all processes, see `Checkpointer.check_finite`.
        """
        checkpointer = self.checkpointer
        if checkpointer.save_to_disk:
            super().step(iteration, **entries)
        elif (iteration + 1) % self.period == 0 and is_sharded(checkpointer.model):
            checkpointer.save(f"{self.file_prefix}_{iteration:07d}", iteration=iteration)
        elif (iteration + 1) % self.period == 0:
            checkpointer.check_finite()
