"""Checkpoints: written whole or not at all, read without running code, compared before loading.

A file is `{"model", "optimizer", "scheduler", "iteration", "clouds", ...}` as Detectron2 lays it
out: `model` is the state dict, `iteration` the last finished one (counted from 0), `clouds` says
what wrote it, and any further checkpointable (a gradient scaler, an EMA teacher) has an entry of
its own. Names are `model_0001999.pth` and `model_final.pth`; the text file `last_checkpoint` names
the newest.
"""

from __future__ import annotations

import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fvcore.common.checkpoint as fvcore_checkpoint
import numpy as np
import torch
import yaml
from torch import nn

from clouds.d2 import CfgNode
from clouds.files import written_whole

logger = logging.getLogger(__name__)

NAMES_SHOWN = 6
"""Tensors listed per section of a load report: a report is one screen."""

HARMLESS_KEYS = (
    "DATALOADER.NUM_WORKERS",
    "DATASETS.TEST",
    "LOG_PERIOD",
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",
    "MODEL.WEIGHTS_PARTIAL",
    "OUTPUT_DIR",
    "SOLVER.CHECKPOINTS_KEPT",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST",
)
"""Configuration that may differ in a resumed run without changing what is trained."""

DERIVED = ("criterion.empty_weight",)
"""Tensors that the config determines: a file need not have them, nor in the model's shape."""

OLDER_NAMES = (
    (re.compile(r"^sem_seg_head\.(?!predictor\.|pixel_decoder\.)"), "sem_seg_head.pixel_decoder."),
    (re.compile(r"^sem_seg_head\.predictor\.static_query\."), "sem_seg_head.predictor.query_feat."),
)
"""Names in checkpoints of MaskFormer and of early Mask2Former, and what became of them."""

PICKLED_ARRAYS = {
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.multiarray", "scalar") for core in ("core", "_core")),
}
"""All that a pickle of NumPy arrays needs: modules and names."""


@dataclass(frozen=True)
class LoadReport:
    """How a checkpoint's tensors fit a model.

    Attributes:
        path: the file.
        matched: tensors with the name and shape of one of the model's.
        total: tensors of the model.
        missing: names that the model has and the file lacks.
        unexpected: names that the file has and the model lacks.
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
        """Whether every tensor of the model came from the file, or from the config alone."""
        lacking = {*self.missing, *(name for name, _, _ in self.mismatched)}
        return lacking <= set(DERIVED)

    def __str__(self) -> str:
        shapes = [
            f"{name}: {there} in the file, {here} here{_comment(name)}"
            for name, there, here in self.mismatched
        ]
        lines = [f"{self.path}: {self.matched} of the model's {self.total} tensors match."]
        lines += section("only in the model", [name + _comment(name) for name in self.missing])
        lines += section("of another shape", shapes)
        lines += section("only in the file", self.unexpected)
        return "\n".join(lines)


def _comment(name: str) -> str:
    return " (made from the config instead)" if name in DERIVED else ""


def section(title: str, names: tuple[str, ...] | list[str]) -> list[str]:
    """Lines of a report on `names`, at most NAMES_SHOWN of them by name."""
    if not names:
        return []
    more = len(names) - NAMES_SHOWN
    lines = [f"  {title} ({len(names)}):", *(f"    {name}" for name in names[:NAMES_SHOWN])]
    return [*lines, f"    … and {more} more"] if more > 0 else lines


def compare(path: str, there: Mapping[str, torch.Tensor], model: nn.Module) -> LoadReport:
    """Match the tensors of a file with those of `model`, by name and shape."""
    here = model.state_dict()
    mismatched = tuple(
        (name, tuple(there[name].shape), tuple(here[name].shape))
        for name in here
        if name in there and there[name].shape != here[name].shape
    )
    missing = tuple(name for name in here if name not in there)
    return LoadReport(
        path=path,
        matched=len(here) - len(missing) - len(mismatched),
        total=len(here),
        missing=missing,
        unexpected=tuple(name for name in there if name not in here),
        mismatched=mismatched,
    )


def with_present_names(
    weights: Mapping[str, torch.Tensor], model: nn.Module
) -> dict[str, torch.Tensor]:
    """`weights`, those under an older name of one of the model's tensors under its present name."""
    here = set(model.state_dict())
    present: dict[str, torch.Tensor] = {}
    for name, value in weights.items():
        candidates = (pattern.sub(new, name) for pattern, new in OLDER_NAMES)
        renamed = [c for c in candidates if c in here and c not in weights]
        present[name if name in here or not renamed else renamed[0]] = value
    count = len(present.keys() - weights.keys())
    if count:
        logger.info("%d tensors have older names in the file and were renamed", count)
    return present


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without running any code that it may hold.

    Args:
        path: a `.safetensors` file, or one that `torch.save` wrote: `{"model": weights, …}`,
            `{"state_dict": weights, …}` or the weights alone; or a `.pkl` of NumPy arrays in the
            same forms, as model zoos of Detectron2 projects have them. A prefix `module.` on all
            names goes.

    Returns:
        Its entries; `model` is the state dict.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated or not a checkpoint at all; a pickle of anything but tensors and
            plain values (loading it could run code); no weights in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint '{path}' does not exist.")
    readers = {".safetensors": read_safetensors, ".pkl": read_pickle}
    content = readers.get(path.suffix, read_torch)(path)
    if not isinstance(content, Mapping):
        raise ValueError(
            f"checkpoint '{path}' holds a {type(content).__name__}, not a dictionary of weights."
        )
    entries = dict(content)
    for key in ("model", "state_dict"):
        if isinstance(entries.get(key), Mapping):
            return {**entries, "model": clean_weights(path, entries.pop(key))}
    return {"model": clean_weights(path, entries)}


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file."""
    import safetensors
    import safetensors.torch

    try:
        return dict(safetensors.torch.load_file(path, device="cpu"))
    except safetensors.SafetensorError as error:
        raise ValueError(f"checkpoint '{path}' is truncated or no safetensors: {error}") from error


def read_torch(path: Path) -> Any:
    """What `torch.save` wrote to a file, tensors and plain values only."""
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:
            # On damaged bytes torch.load raises whatever its parsers stumble over, KeyError and
            # OSError included, so the kinds cannot be listed.
            raise ValueError(_why_unreadable(path, error)) from error


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of NumPy arrays and plain values, and no others."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in PICKLED_ARRAYS:
            raise pickle.UnpicklingError(f"GLOBAL {module_name}.{global_name}")
        return super().find_class(module_name, global_name)


def read_pickle(path: Path) -> Any:
    """A pickle of NumPy arrays and plain values; one of `torch.save` with that ending too."""
    if zipfile.is_zipfile(path):
        return read_torch(path)
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # NumPy's modules were renamed
        try:
            return ArrayUnpickler(file, encoding="latin1").load()
        except MemoryError:
            raise
        except Exception as error:  # as in read_torch
            raise ValueError(_why_unreadable(path, error)) from error


def _why_unreadable(path: Path, error: Exception) -> str:
    """Message for a file that a loader of pickles gave up on."""
    forbidden = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
    if not isinstance(error, pickle.UnpicklingError) or forbidden is None:
        return broken_message(path)
    return (
        f"checkpoint '{path}' is refused: it is a pickle with '{forbidden[1]}' in it, and "
        "loading that could run code. Allowed are tensors and plain values, as torch.save "
        "writes them from state dicts, NumPy arrays in a .pkl, or a .safetensors file."
    )


def broken_message(path: Path) -> str:
    """Message for a file that is no readable checkpoint."""
    return (
        f"checkpoint '{path}' ({path.stat().st_size} bytes) cannot be read: it is truncated, or "
        "not a file of torch.save (a plain pickle is refused, since loading it could run code). "
        "Copy or download it again."
    )


def clean_weights(path: Path, weights: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """`weights` as tensors, without a prefix `module.` that all names share."""
    tensors: dict[str, torch.Tensor] = {}
    wrapped = bool(weights) and all(str(name).startswith("module.") for name in weights)
    for name, value in weights.items():
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if not isinstance(value, torch.Tensor):
            raise ValueError(
                f"checkpoint '{path}' holds no weights: entry {name!r} is a "
                f"{type(value).__name__}, where tensors, or an entry 'model' of them, belong."
            )
        tensors[str(name).removeprefix("module.") if wrapped else str(name)] = value
    return tensors


class Checkpointer(fvcore_checkpoint.Checkpointer):  # type: ignore[misc]
    """fvcore's Checkpointer with whole writes, safe reads and a strict match.

    Args:
        model: its state dict is the entry `model`; DistributedDataParallel is looked through.
        save_dir: folder of the checkpoints.
        save_to_disk: False on all processes but one.
        provenance: entry `clouds` of what is saved: text and numbers only.
        partial: let weights miss or mismatch when loading (MODEL.WEIGHTS_PARTIAL); resuming never
            does.
        checkpointables: further things with `state_dict` and `load_state_dict`, by entry. More
            can come by `add_checkpointable`.

    Attributes:
        saved_iteration: entry `iteration` of what was last saved or resumed from; -1: none.
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
        """Write `{save_dir}/{name}.pth` and note it as the newest.

        Args:
            name: without its ending.
            entries: further entries, `iteration` among them.
        """
        self.saved_iteration = int(entries.get("iteration", -1))
        if not self.save_dir or not self.save_to_disk:
            return
        content = {"model": self.model.state_dict()}
        content |= {key: thing.state_dict() for key, thing in self.checkpointables.items()}
        content |= {"clouds": self.provenance, **entries}
        path = Path(self.save_dir, f"{name}.pth")
        with written_whole(path) as file:
            torch.save(content, file)
        self.tag_last_checkpoint(path.name)
        logger.info("saved %s", path)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Note the newest checkpoint in the file `last_checkpoint`."""
        with written_whole(Path(self.save_dir, "last_checkpoint"), "w") as file:
            file.write(last_filename_basename)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load weights, and the state of checkpointables, from a file or URL.

        Args:
            path: empty: nothing is loaded.
            checkpointables: entries to restore; None: all that there are. One that the file
                lacks keeps its present state, with a warning.

        Returns:
            The entries that were not used here.

        Raises:
            FileNotFoundError: no such file.
            ValueError: see `read_checkpoint`; the weights are not the model's (and `partial` is
                not set, or nothing at all matches); the state of a checkpointable does not fit.
        """
        if not path:
            return {}
        entries = read_checkpoint(self.path_manager.get_local_path(path))
        self.load_model(path, entries.pop("model"))
        for name in self.checkpointables if checkpointables is None else checkpointables:
            if name in entries:
                self.checkpointables[name].load_state_dict(entries.pop(name))
            else:
                logger.warning("%s has no state of '%s', which starts afresh", path, name)
        return entries

    def load_weights(self, path: str) -> None:
        """Load the model's weights alone."""
        self.load(path, checkpointables=[])

    def resume(self) -> dict[str, Any] | None:
        """Restore everything from the newest checkpoint of `save_dir`.

        Returns:
            Its entries that were not used here, `iteration` among them, or None when there is no
            checkpoint.

        Raises:
            FileNotFoundError, ValueError: as `load`; or the file is no checkpoint of a run.
        """
        if not self.has_checkpoint():
            return None
        path = self.get_checkpoint_file()
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"'{self.save_dir}/last_checkpoint' names '{Path(path).name}', which is not there. "
                "Write the name of one of the folder's .pth files into it."
            )
        allowed, self.partial = self.partial, False
        try:
            rest = self.load(path)
        finally:
            self.partial = allowed
        if "iteration" not in rest:
            raise ValueError(
                f"checkpoint '{path}' has no entry 'iteration', so no run can be resumed from it. "
                "To start from its weights, use MODEL.WEIGHTS without --resume."
            )
        self.saved_iteration = int(rest["iteration"])
        return rest

    def load_model(self, path: str, weights: Mapping[str, torch.Tensor]) -> None:
        """Give the model `weights`, which came from `path`, if they are its own."""
        weights = with_present_names(weights, self.model)
        report = compare(path, weights, self.model)
        if not (report.complete or (self.partial and report.matched > 0)):
            hint = (
                "Nothing of it fits."
                if report.matched == 0
                else "To start from what matches, set MODEL.WEIGHTS_PARTIAL True."
            )
            raise ValueError(f"these weights are not this model's.\n{report}\n{hint}")
        clean = report.matched == report.total and not report.unexpected
        logger.log(logging.INFO if clean else logging.WARNING, "%s", report)
        unusable = {name for name, _, _ in report.mismatched}.union(report.unexpected)
        self.model.load_state_dict(
            {name: value for name, value in weights.items() if name not in unusable}, strict=False
        )


class PeriodicCheckpointer(fvcore_checkpoint.PeriodicCheckpointer):  # type: ignore[misc]
    """fvcore's PeriodicCheckpointer that also counts checkpoints left by an earlier start.

    Args:
        checkpointer: does the saving.
        period: iterations between checkpoints.
        max_to_keep: newest periodic checkpoints that stay; None: all.
    """

    def __init__(
        self, checkpointer: Checkpointer, period: int, max_to_keep: int | None = None
    ) -> None:
        super().__init__(checkpointer, period, max_to_keep=max_to_keep)

    def adopt_existing(self) -> None:
        """Count the periodic checkpoints on disk as ours, oldest first."""
        folder = Path(self.checkpointer.save_dir)
        self.recent_checkpoints = [
            str(path) for path in sorted(folder.glob(f"{self.file_prefix}_[0-9]*.pth"))
        ]

    def step(self, iteration: int, **entries: Any) -> None:
        """Save after `iteration` if it is time to; the process that saves also deletes."""
        if self.checkpointer.save_to_disk:
            super().step(iteration, **entries)


def changed_keys(saved_config: str, cfg: CfgNode) -> list[str]:
    """Keys in which a run that is resumed differs from the run that was saved.

    Args:
        saved_config: YAML of the saved run's config.
        cfg: the config now.

    Returns:
        Lines 'KEY: then -> now', those in HARMLESS_KEYS left out.
    """
    then = dict(flatten(yaml.safe_load(saved_config) or {}))
    now = dict(flatten(yaml.safe_load(cfg.dump())))
    return [
        f"{key}: {then.get(key, '(absent)')!r} -> {now.get(key, '(absent)')!r}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
        and not any(key == harmless or key.startswith(harmless + ".") for harmless in HARMLESS_KEYS)
    ]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every leaf of nested dictionaries."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
