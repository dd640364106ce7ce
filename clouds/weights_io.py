"""Reading of weight files: no code that they contain runs, and damaged ones are refused.

Files of `torch.save` are zip archives with a CRC-32 per member, which torch itself does not check.
Safetensors files have no checksum of their own; ours carry one in their metadata. Of other files,
those of torch before 1.6 and pickles of arrays included, a log line says that they have none.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Container, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from clouds.files import raw_bytes
from clouds.messages import format_examples

logger = logging.getLogger(__name__)

CHECKSUM = "clouds_sha256"
"""Name of the checksum in the metadata of our safetensors files, see `tensors_sha256`."""

PICKLED_ARRAYS = {
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.multiarray", "scalar") for core in ("core", "_core")),
}
"""Modules and names that a pickle of NumPy arrays needs; no others are loaded."""


class DamagedFileError(ValueError):
    """A file of weights is truncated, or other bytes are in it than were written."""


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
        DamagedFileError: a ValueError; it is truncated, fails its checksum or is no checkpoint.
        ValueError: it is a folder; it is a pickle of other objects than tensors and plain values,
            which could run code; it has no weights.
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
    """Read a safetensors file; the checksum is checked if it has one, see `write_safetensors`."""
    import safetensors
    import safetensors.torch

    try:
        with safetensors.safe_open(path, "pt") as file:
            expected = (file.metadata() or {}).get(CHECKSUM)
        weights = dict(safetensors.torch.load_file(path, device="cpu"))
    except safetensors.SafetensorError as error:
        raise DamagedFileError(
            f"checkpoint '{path}' is truncated or not safetensors: {error}. Copy or download it "
            "again."
        ) from error
    if expected is None:
        _log_unchecked(path)
    elif tensors_sha256(weights) != expected:
        raise DamagedFileError(
            f"checkpoint '{path}' is damaged: its tensors do not match the checksum in its "
            "metadata. Copy or convert it again."
        )
    return weights


def write_safetensors(weights: Mapping[str, torch.Tensor], file: IO[bytes]) -> None:
    """Write contiguous tensors that share no memory, with their checksum in the metadata."""
    import safetensors.torch

    metadata = {"format": "pt", CHECKSUM: tensors_sha256(weights)}
    file.write(safetensors.torch.save(dict(weights), metadata))


def tensors_sha256(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256, hexadecimal, of names, types, shapes and values of tensors, in order of names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def check_archive(path: Path) -> bool:
    """Check the CRCs of a zip archive; returns False for a file that is none.

    Raises:
        DamagedFileError: a member does not match its CRC; the message names it.
    """
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError) as error:
        damaged = f"its table of contents ({error})"
    if damaged is not None:
        raise DamagedFileError(
            f"checkpoint '{path}' ({path.stat().st_size} bytes) is damaged: {damaged} does not "
            "match its checksum (CRC-32). Copy or download it again, or use another checkpoint. "
            "If it was written without checksums (torch.serialization.set_crc32_options), load it "
            "there and save it again with them."
        )
    return True


@cache
def _log_unchecked(path: Path) -> None:
    """Say once that damage cannot be seen."""
    logger.info("%s has no checksum, so damage to its values could not be found", path)


def read_torch(path: Path, mmap: bool = False) -> Any:
    """Read a file of `torch.save`, tensors and plain values only; for `mmap` see above.

    Raises:
        DamagedFileError: it cannot be read, or a member does not match its CRC.
        ValueError: it contains other objects, which could run code.
    """
    is_archive = check_archive(path)
    mmap = mmap and is_archive  # files of torch before 1.6 are read as a whole
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")
        try:
            source = path if mmap else file
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:
            # On damaged bytes torch.load raises any error of its parsers, including KeyError and
            # OSError, so the types cannot be listed.
            raise _unreadable(path, error) from error
    if not is_archive:
        _log_unchecked(path)
    return content


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
            content = ArrayUnpickler(file, encoding="latin1").load()
        except Exception as error:  # as in read_torch
            raise _unreadable(path, error) from error
    _log_unchecked(path)
    return content


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
    last = (
        f"; its last_checkpoint names {tag.read_text(errors='replace').strip()}"
        if tag.is_file()
        else ""
    )
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


def _unreadable(path: Path, error: Exception) -> ValueError:
    """Error for a file on which a pickle loader raised `error`."""
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return ValueError(
            f"checkpoint '{path}' ({path.stat().st_size} bytes) needs more memory than there is. "
            "Free some; or if that cannot be, the file is damaged: copy or download it again."
        )
    forbidden = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
    if not isinstance(error, pickle.UnpicklingError) or forbidden is None:
        return DamagedFileError(
            f"checkpoint '{path}' ({path.stat().st_size} bytes) cannot be read: it is truncated, "
            "or not a file of torch.save (a plain pickle is refused, since loading it could run "
            "code). Copy or download it again."
        )
    return ValueError(
        f"checkpoint '{path}' is refused: it is a pickle that contains '{forbidden[1]}', and "
        "loading that could run code. Allowed are tensors and plain values, as torch.save "
        "writes them from state dicts, NumPy arrays in a .pkl, or a .safetensors file."
    )


def to_tensors(path: Path, weights: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """`weights` as tensors, without the prefix `module.` if all names have it."""
    tensors: dict[str, torch.Tensor] = {}
    wrapped = bool(weights) and all(str(name).startswith("module.") for name in weights)
    for name, value in weights.items():
        kind = type(value).__name__
        if isinstance(value, np.ndarray):
            kind = f"NumPy array of {value.dtype}"
            value = torch.from_numpy(value) if value.dtype.kind in "biuf" else None
        elif isinstance(value, torch.Tensor) and (
            value.layout is not torch.strided or value.is_quantized
        ):
            kind, value = f"sparse or quantized tensor of {value.dtype}", None
        if not isinstance(value, torch.Tensor):
            raise ValueError(
                f"checkpoint '{path}' has no weights: entry {name!r} is a {kind}; expected are "
                "dense tensors, or an entry 'model' of such."
            )
        tensors[str(name).removeprefix("module.") if wrapped else str(name)] = value
    return tensors


def nonfinite_tensors(values: Any, name: str = "", buffers: Container[str] = ()) -> list[str]:
    """Names of the tensors in nested dictionaries and lists that are not finite.

    Args:
        values: a tensor, or a mapping, list or tuple of such; other values are not looked at.
        name: of `values`; those of its parts are `<name>.<key>`.
        buffers: names of tensors that may be infinite, such as attention masks, but not NaN.
    """
    if isinstance(values, torch.Tensor):
        if not (values.is_floating_point() or values.is_complex()) or values.is_meta:
            return []
        broken = values.isnan().any() if name in buffers else ~values.isfinite().all()
        return [name] if broken else []
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(values, Mapping):
        items = values.items()
    elif isinstance(values, (list, tuple)):
        items = enumerate(values)
    prefix = f"{name}." if name else ""
    return [n for key, v in items for n in nonfinite_tensors(v, f"{prefix}{key}", buffers)]
