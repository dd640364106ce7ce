"""What identifies evaluated weights: hashes, and how a checkpoint was selected."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from clouds.files import file_sha256, raw_bytes

SELECTION = "selection"
"""Entry of a checkpoint whose weights were chosen by a score: how, as a sentence."""


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file in hexadecimal; cached until its size or modification time changes."""
    path = Path(path).resolve()
    status = path.stat()
    return _hash_file(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=16)
def _hash_file(path: Path, modified: int, size: int) -> str:
    return file_sha256(path)


def hash_model(model: nn.Module) -> str:
    """SHA-256 in hexadecimal of the names, types, shapes and values in a model's state dict."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(raw_bytes(value))
    return digest.hexdigest()


def selection_of(checkpoint: Mapping[str, Any]) -> str | None:
    """How the weights of a read checkpoint were chosen, if it says so (model_best.pth)."""
    text = checkpoint.get(SELECTION)
    return text if isinstance(text, str) else None
