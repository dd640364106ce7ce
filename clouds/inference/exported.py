"""The folder that `clouds export` writes, read as a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clouds.weights_io import read_checkpoint

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
LIBRARY = "clouds"
"""Value of `library_name` in CONFIG_FILE, as the Hugging Face hub names libraries."""


def is_exported(folder: Path) -> bool:
    """Whether a folder has the file by which exported ones are recognized."""
    return (folder / CONFIG_FILE).is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config in CONFIG_FILE.

    Raises:
        ValueError: the file is not JSON, or was not written by an export.
    """
    path = folder / CONFIG_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is not valid JSON ({error}). Copy the folder again.") from error
    config = content.get("config") if isinstance(content, dict) else None
    if not isinstance(config, dict) or content.get("library_name") != LIBRARY:
        raise ValueError(
            f"'{path}' is not of a folder that `clouds export` wrote: it has no 'library_name' "
            f"{LIBRARY!r}, or no 'config'. Name the file of a checkpoint instead."
        )
    return config


def read_exported(folder: Path) -> dict[str, Any]:
    """The entries of a checkpoint (`clouds.weights_io.read_checkpoint`), with the model's config.

    Raises:
        ValueError: the config is not JSON, or of another library; the weights were not exported.
        DamagedFileError: the weights are damaged.
    """
    config = read_config(folder)
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise ValueError(
            f"'{folder}' was exported without {WEIGHTS_FILE}, which is needed to load it. Export "
            "it again with --format safetensors, or use its other files in their own runtimes."
        )
    # JSON is YAML, as long as other characters than ASCII are not escaped.
    text = json.dumps(config, ensure_ascii=False, indent=1)
    return {**read_checkpoint(weights), "clouds": {"config": text}}
