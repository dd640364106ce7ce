"""Reading of weight files without running code that they may contain."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clouds.messages import format_examples

PICKLED_ARRAYS = {
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.multiarray", "scalar") for core in ("core", "_core")),
}
"""Modules and names that a pickle of NumPy arrays needs; no others are loaded."""


def read_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without running any code that it may contain.

    Args:
        path: a `.safetensors` file, or a file of `torch.save`: `{"model": weights, …}`,
            `{"state_dict": weights, …}` or the weights alone; or a `.pkl` of NumPy arrays in the
            same forms, as in model zoos of Detectron2 projects. A prefix `module.` of all names is
            removed.
        mmap: read a tensor of a file of `torch.save` only when its values are used, so that names
            and shapes of a large file are there at once.

    Returns:
        Its entries; `model` is the state dict.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is a folder; it is truncated or not a checkpoint; it is a pickle of other
            objects than tensors and plain values, which could run code; it has no weights.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(_why_no_folder(path))
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint '{path}' does not exist.{_why_no_address(path)}")
    content: Any
    if path.suffix == ".safetensors":
        content = read_safetensors(path)
    elif path.suffix == ".pkl" and not zipfile.is_zipfile(path):
        content = read_pickle(path)
    else:
        content = read_torch(path, mmap)
    if not isinstance(content, Mapping):
        raise ValueError(
            f"checkpoint '{path}' contains a {type(content).__name__}, not a dictionary of weights."
        )
    entries = dict(content)
    for key in ("model", "state_dict"):
        if isinstance(entries.get(key), Mapping):
            return {**entries, "model": to_tensors(path, entries.pop(key))}
    return {"model": to_tensors(path, entries)}


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file."""
    import safetensors
    import safetensors.torch

    try:
        return dict(safetensors.torch.load_file(path, device="cpu"))
    except safetensors.SafetensorError as error:
        raise ValueError(f"checkpoint '{path}' is truncated or not safetensors: {error}") from error


def read_torch(path: Path, mmap: bool = False) -> Any:
    """Read a file of `torch.save`, tensors and plain values only; for `mmap` see above."""
    mmap = mmap and zipfile.is_zipfile(path)  # files of torch before 1.6 are read as a whole
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")
        try:
            source = path if mmap else file
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
        except MemoryError:
            raise
        except Exception as error:
            # On damaged bytes torch.load raises any error of its parsers, including KeyError and
            # OSError, so the types cannot be listed.
            raise ValueError(_why_unreadable(path, error)) from error


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of NumPy arrays and plain values, and no others."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in PICKLED_ARRAYS:
            raise pickle.UnpicklingError(f"GLOBAL {module_name}.{global_name}")
        return super().find_class(module_name, global_name)


def read_pickle(path: Path) -> Any:
    """Read a pickle of NumPy arrays and plain values."""
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # NumPy's modules were renamed
        try:
            return ArrayUnpickler(file, encoding="latin1").load()
        except MemoryError:
            raise
        except Exception as error:  # as in read_torch
            raise ValueError(_why_unreadable(path, error)) from error


def _why_no_folder(folder: Path) -> str:
    """Message for a folder in place of a file: the checkpoints in it, newest first."""
    files = [f for f in folder.iterdir() if f.suffix in (".pth", ".safetensors") and f.is_file()]
    files.sort(key=lambda file: file.stat().st_mtime_ns, reverse=True)
    if not files:
        return (
            f"checkpoint '{folder}' is a folder, and it has no .pth or .safetensors file. Name the "
            "file of a checkpoint."
        )
    tag = folder / "last_checkpoint"
    last = f"; its last_checkpoint names {tag.read_text().strip()}" if tag.is_file() else ""
    names = format_examples([file.name for file in files], 10)
    return (
        f"checkpoint '{folder}' is a folder. Name one of its files, newest first: {names}{last}. "
        f"For example '{files[0]}'."
    )


def _why_no_address(path: Path) -> str:
    """Advice for an address in place of a file, such as `detectron2://…`; else empty."""
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        return ""
    return " It looks like an address; download what is there, and name the file."


def _why_unreadable(path: Path, error: Exception) -> str:
    """Message for a file on which a pickle loader raised `error`."""
    forbidden = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
    if not isinstance(error, pickle.UnpicklingError) or forbidden is None:
        return (
            f"checkpoint '{path}' ({path.stat().st_size} bytes) cannot be read: it is truncated, "
            "or not a file of torch.save (a plain pickle is refused, since loading it could run "
            "code). Copy or download it again."
        )
    return (
        f"checkpoint '{path}' is refused: it is a pickle that contains '{forbidden[1]}', and "
        "loading that could run code. Allowed are tensors and plain values, as torch.save "
        "writes them from state dicts, NumPy arrays in a .pkl, or a .safetensors file."
    )


def to_tensors(path: Path, weights: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """`weights` as tensors, without the prefix `module.` if all names have it."""
    tensors: dict[str, torch.Tensor] = {}
    wrapped = bool(weights) and all(str(name).startswith("module.") for name in weights)
    for name, value in weights.items():
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if not isinstance(value, torch.Tensor):
            raise ValueError(
                f"checkpoint '{path}' has no weights: entry {name!r} is a {type(value).__name__}; "
                "expected are tensors, or an entry 'model' of tensors."
            )
        tensors[str(name).removeprefix("module.") if wrapped else str(name)] = value
    return tensors
