"""Tensors of a TorchScript archive, such as OpenAI's CLIP files, without running its code.

An archive of `torch.jit.save` is a zip: the pickle `data.pkl` with the objects, files `data/<key>`
with the values of tensors, and `code/`, which is neither read nor compiled here.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from clouds.weights_io import DamagedFileError, check_archive

DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
"""Types of values by their names in the pickle."""


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive of `torch.jit.save`."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.split("/")[1:2] == ["code"] for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of the modules in a TorchScript archive, by dotted name, on the CPU.

    These are parameters and buffers, and other attributes that are tensors.

    Raises:
        DamagedFileError: it is no such archive, or not whole.
        ValueError: it contains other objects than modules, tensors and plain values.
    """
    check_archive(path)
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].split("/")[0]
        try:
            with archive.open(f"{root}/data.pkl") as file:
                module = _ArchiveUnpickler(file, archive, root).load()
        except pickle.UnpicklingError as error:
            raise ValueError(f"'{path}' is refused: {error}") from error
        except MemoryError:
            raise
        except Exception as error:  # a faulty pickle may raise anything
            raise DamagedFileError(
                f"'{path}' cannot be read: {type(error).__name__}: {error}. Download it again."
            ) from error
    if not isinstance(module, _Module):
        raise ValueError(f"'{path}' holds a {type(module).__name__}; expected is a module.")
    return dict(module.tensors(""))


class _Module:
    """A module of the archive, with its attributes."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.attributes = dict(state)

    def tensors(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in self.attributes.items():
            if isinstance(value, torch.Tensor):
                yield prefix + name, value
            elif isinstance(value, _Module):
                yield from value.tensors(f"{prefix}{name}.")


class _ArchiveUnpickler(pickle.Unpickler):
    """Unpickles modules, tensors and plain values; of the names in the pickle it calls none."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(file)
        self._archive, self._root = archive, root

    def find_class(self, module_name: str, global_name: str) -> Any:
        if module_name == "__torch__" or module_name.startswith("__torch__."):
            # a class for each use, as a pickle may change the attributes of a class
            return type(global_name, (_Module,), {})
        functions: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("collections", "OrderedDict"): self._ordered_dict,
        }
        lists = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")
        if (module_name, global_name) in functions:
            return functions[module_name, global_name]
        if module_name == "torch.jit._pickle" and global_name in lists:
            return self._list
        if module_name == "torch" and global_name in DTYPES:
            return DTYPES[global_name]
        raise pickle.UnpicklingError(
            f"it contains '{module_name}.{global_name}', and loading that could run code; allowed "
            "are modules, tensors and plain values. Load it where you trust it, and save its "
            "state_dict() by torch.save."
        )

    def persistent_load(self, pid: Any) -> torch.Tensor:
        """All values of a storage, one-dimensional."""
        _, dtype, key, _, count = pid
        content = bytearray(self._archive.read(f"{self._root}/data/{key}"))
        if not content:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(content, dtype=dtype, count=count)

    def _tensor(
        self, values: torch.Tensor, offset: int, size: Any, stride: Any, *_: Any
    ) -> torch.Tensor:
        return values.as_strided(size, stride, offset)  # raises beyond the end of the values

    def _ordered_dict(self, *arguments: Any) -> OrderedDict[Any, Any]:
        return OrderedDict(*arguments)

    def _list(self, values: Any) -> list[Any]:
        return list(values)
