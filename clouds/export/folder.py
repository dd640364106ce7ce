"""Writing the folder: weights, config, graphs and card, in the layout of the Hugging Face hub."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clouds.config.config import get_value, with_value
from clouds.config.defaults import KEYS
from clouds.d2 import CfgNode
from clouds.data.label_space import LabelSpace
from clouds.evaluation.evaluated_weights import hash_file, selection_of
from clouds.evaluation.results_file import damaged, read_results
from clouds.export.card import Card
from clouds.export.graphs import Check, require_onnx, trace, write_onnx, write_torch
from clouds.export.network import INPUT_TYPES, SemanticNetwork
from clouds.files import atomic_write, expand_user
from clouds.inference.exported import CONFIG_FILE, LIBRARY, WEIGHTS_FILE, read_config
from clouds.inference.load import load
from clouds.inference.segmenter import Segmenter
from clouds.modeling.backbone.adapters import merge_updates
from clouds.version import __version__
from clouds.weights_io import read_checkpoint, write_safetensors
from clouds.yaml_core import CoreLoader

logger = logging.getLogger(__name__)

FORMATS = ("onnx", "torch", "safetensors")
GRAPHS = {"torch": "model.pt2", "onnx": "model.onnx"}
"""Format -> its file."""

RESULTS = ("results.json", "average/results.json", "eval/*/results.json")
"""Where a run has results, relative to the folder of its checkpoints."""

WEIGHTS_NAMES = ("MODEL.BACKBONE.WEIGHTS", "MODEL.CLOUDS.CLIP_PRETRAINED_WEIGHTS")
"""Keys with a published name or a file of this machine."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: of the files, absolute.
        checks: name of each graph's file -> how it differs from the model.
        merged: number of low-rank updates that were merged into the weights.
        scores: number of results.json files of exactly these weights, whose scores the card has.
        licence: as given.
    """

    folder: Path
    checks: Mapping[str, Check]
    merged: int
    scores: int
    licence: str


def export(
    weights: str | Path,
    folder: str | Path,
    formats: Sequence[str] = FORMATS,
    *,
    config_file: str | Path | None = None,
    overrides: Sequence[Any] = (),
    input_type: str = "uint8",
    name: str = "",
    licence: str = "",
    overwrite: bool = False,
) -> Exported:
    """Export a checkpoint. Low-rank adapters are merged into the weights.

    The folder appears under its name when all files are written and checked.

    Args:
        weights: the checkpoint, see `clouds.load`.
        folder: is created.
        formats: of FORMATS; config and card are always written.
        config_file, overrides: see `clouds.load`.
        input_type: type of the graphs' images, of INPUT_TYPES.
        name: of the model in its card; empty: that of the folder.
        licence: identifier for the card, such as 'apache-2.0'; empty: not stated.
        overwrite: replace a folder that an export wrote before.

    Raises:
        ImportError: a package of the extra `export` is missing.
        FileNotFoundError, TypeError, ValueError: see `clouds.load`; a format or type is unknown;
            the folder exists; a graph cannot be made, or differs from the model.
    """
    weights, folder = expand_user(weights), expand_user(folder).resolve()
    _check_arguments(folder, formats, input_type, overwrite)
    if "onnx" in formats:
        require_onnx()
    segmenter = load(weights, config_file, device="cpu", overrides=overrides)
    merged = merge_updates(segmenter.model)
    with _complete_folder(folder) as partial:
        checks = _write_graphs(segmenter, partial, formats, input_type)
        if "safetensors" in formats:
            _write_weights(segmenter, partial / WEIGHTS_FILE)
        cfg = portable_config(segmenter.cfg, merged > 0)
        iteration, selection = _training_of(weights)
        card = Card(
            name=name or folder.name,
            cfg=cfg,
            label_space=segmenter.label_space,
            licence=licence,
            results=results_of(weights),
            iteration=iteration,
            selection=selection,
            merged=merged,
            input_type=input_type,
            checks=checks,
            has_weights="safetensors" in formats,
        )
        _write_text(partial / CONFIG_FILE, config_text(cfg, segmenter.label_space))
        _write_text(partial / "README.md", card.text())
    return Exported(folder, checks, merged, len(card.results), licence)


@contextlib.contextmanager
def _complete_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write to, which replaces `folder` at the end unless there is an error."""
    partial = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            shutil.rmtree(folder)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path, "w") as file:
        file.write(text)


def _check_arguments(
    folder: Path, formats: Sequence[str], input_type: str, overwrite: bool
) -> None:
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown or not formats:
        raise ValueError(
            f"formats are {', '.join(unknown) or 'none'}; allowed are {', '.join(FORMATS)}."
        )
    if input_type not in INPUT_TYPES:
        raise ValueError(f"input type {input_type!r}; allowed are {', '.join(INPUT_TYPES)}.")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"'{folder}' exists, and is no folder; name another one.")
    if not any(folder.iterdir()):
        return
    try:
        read_config(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"'{folder}' exists, and no export wrote it; name another folder."
        ) from error
    if not overwrite:
        raise ValueError(f"'{folder}' exists; --overwrite replaces it.")


def _write_graphs(
    segmenter: Segmenter, folder: Path, formats: Sequence[str], input_type: str
) -> dict[str, Check]:
    wanted = [kind for kind in GRAPHS if kind in formats]
    if not wanted:
        return {}
    network = SemanticNetwork(segmenter.model)
    program = trace(network, input_type)
    write = {"torch": write_torch, "onnx": write_onnx}
    checks = {}
    for kind in wanted:
        path = folder / GRAPHS[kind]
        checks[path.name] = result = write[kind](program, network, path, input_type)
        logger.info(
            "%s: scores differ from the model's by at most %.1e; %.4f %% of the pixels have the "
            "same class",
            *(path.name, result.difference, 100 * result.agreement),
        )
    return checks


def _write_weights(segmenter: Segmenter, path: Path) -> None:
    state = segmenter.model.state_dict()
    # Clones, because safetensors refuses tensors that share memory.
    tensors = {name: value.detach().contiguous().clone() for name, value in state.items()}
    with atomic_write(path) as file:
        write_safetensors(tensors, file)


def portable_config(cfg: CfgNode, merged: bool) -> CfgNode:
    """The config of the exported weights: without adapter if it is merged, and without paths."""
    published = {name: str(get_value(cfg, name)) for name in WEIGHTS_NAMES}
    for key in KEYS:
        if key.is_path:
            cfg = with_value(cfg, key.name, key.default)
    for name, value in published.items():
        cfg = with_value(cfg, name, "" if Path(value).name != value else value)
    return with_value(cfg, "MODEL.BACKBONE.ADAPTER.NAME", "none") if merged else cfg


def config_text(cfg: CfgNode, label_space: LabelSpace) -> str:
    """CONFIG_FILE: the classes for other programs, and the whole config for `clouds.load`."""
    content = {
        "library_name": LIBRARY,
        "clouds_version": __version__,
        "architectures": [cfg.MODEL.META_ARCHITECTURE],
        "id2label": {str(i): name for i, name in enumerate(label_space.names)},
        "label_colors": [list(color) for color in label_space.colors],
        "config": _plain(yaml.load(cfg.dump(), CoreLoader)),
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Infinite numbers as text, which JSON has no number for."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def results_of(weights: Path) -> list[dict[str, Any]]:
    """The results.json files of the run that are of exactly this checkpoint, by its SHA-256."""
    found: list[dict[str, Any]] = []
    if weights.is_dir():
        return found
    paths = [path for pattern in RESULTS for path in sorted(weights.parent.glob(pattern))]
    digest = hash_file(weights) if paths else ""
    for path in paths:
        content = read_results(path)
        of = content.get("weights")
        if not isinstance(of, dict) or "sha256" not in of or "protocol" not in content:
            raise damaged(path, "it does not say which weights it is of, or no protocol")
        if of["sha256"] == digest:
            found.append(content)
        else:
            logger.info("%s is of other weights than %s: not in the card", path, weights.name)
    return found


def _training_of(weights: Path) -> tuple[int | None, str]:
    """Iteration of a checkpoint, and how it was chosen; None and empty if it does not say."""
    if weights.is_dir():
        return None, ""
    entries = read_checkpoint(weights, mmap=True)
    iteration = entries.get("iteration")
    return iteration if isinstance(iteration, int) else None, selection_of(entries) or ""
