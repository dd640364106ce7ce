"""From a checkpoint file to a `Segmenter` in one call."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import clouds.modeling  # noqa: F401 - registers what configs name
from clouds.config.defaults import KEYS
from clouds.config.load import config_of, load_settings, pair_up, parse_text
from clouds.config.values import Setting
from clouds.d2 import CfgNode
from clouds.data.label_space import LabelSpace
from clouds.device import resolve_device
from clouds.engine.initial_weights import load_complete
from clouds.files import expand_user
from clouds.inference.classes import (
    label_space_of,
    numbered_label_space,
    parse_classes,
    use_label_space,
)
from clouds.inference.exported import is_exported, read_exported
from clouds.inference.segmenter import Segmenter
from clouds.modeling.backbone.adapters import merge_updates
from clouds.modeling.build import build_seeded
from clouds.modeling.meta_arch.clouds import CLOUDS
from clouds.weights_io import read_checkpoint

logger = logging.getLogger(__name__)


def load(
    weights: str | Path,
    config_file: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    classes: str | Sequence[str] | None = None,
    overrides: Sequence[Any] = (),
    merge_adapters: bool = False,
) -> Segmenter:
    """Load a checkpoint for inference.

    Args:
        weights: the checkpoint, e.g. `model_final.pth`; it must have every tensor of the model. Or
            a folder that `clouds export` wrote. The backbone's own weights are in it and are not
            downloaded, unless it leaves a frozen backbone out.
        config_file: its config; None: the one that the checkpoint carries. Checkpoints of this
            project's trainer carry it, published and converted ones do not.
        device: 'auto', 'cpu', 'cuda' or 'cuda:N'; None: MODEL.DEVICE of the config if this machine
            has it, otherwise the CPU.
        classes: names of the classes to predict, as a list or separated by commas, for a model with
            a text class head; a class that the model was trained on keeps its words and its color.
            None: those of the training data.
        overrides: KEY, VALUE, KEY, VALUE, … that change the config, e.g. ["TEST.SHORT_SIDE", 512].
        merge_adapters: fold low-rank adapters into the weights, which is faster; outputs differ by
            rounding.

    Returns:
        The segmenter, with the model in evaluation mode.

    Raises:
        FileNotFoundError: no such checkpoint or config.
        TypeError, ValueError: the checkpoint is unreadable, incomplete, of another model, or has
            weights that are not finite; it carries no config and none is named; the config, the
            device or the classes are invalid.
    """
    path = expand_user(weights)
    names = None if classes is None else parse_classes(classes)
    if path.is_dir() and not is_exported(path):
        raise ValueError(
            f"'{path}' is a folder; name the checkpoint in it, e.g. {path / 'model_final.pth'}."
        )
    entries = read_exported(path) if path.is_dir() else read_checkpoint(path)
    settings = _settings(path, entries, config_file, overrides)
    cfg = config_of([*settings, *_settings_for_inference(settings, device)])
    model = build_seeded(cfg, skip_pretrained=True)
    if not isinstance(model, CLOUDS):
        raise ValueError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}; only CLOUDS is supported."
        )
    load_complete(cfg, model, str(path), entries)
    if merge_adapters:
        logger.info("%d low-rank updates are merged into the weights", merge_updates(model))
    label_space = model.label_space or numbered_label_space(cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
    if names is not None:
        label_space = _own_classes(cfg, model, names)
    return Segmenter(model.eval(), cfg, label_space)


def _settings(
    path: Path, entries: Mapping[str, Any], config_file: str | Path | None, overrides: Sequence[Any]
) -> list[Setting]:
    """The config of a checkpoint as settings, changed by `overrides`."""
    if config_file is not None:
        return load_settings(config_file, overrides)
    carried = entries.get("clouds")
    text = carried.get("config") if isinstance(carried, Mapping) else None
    if not isinstance(text, str):
        raise ValueError(
            f"checkpoint '{path}' carries no config: it is a published or converted one, or holds "
            "weights alone. Name the config it was trained with: config_file (--config-file), "
            "e.g. configs/warmup/gta_convnext_large.yaml."
        )
    return [*parse_text(text, path), *pair_up(overrides)]


def _settings_for_inference(
    settings: Sequence[Setting], device: str | torch.device | None
) -> list[Setting]:
    """Settings of the device, and on a CPU of what needs a GPU."""
    values = {key.name: key.default for key in KEYS} | {s.name: s.value for s in settings}
    wanted = str(values["MODEL.DEVICE"] if device is None else device)
    try:
        used = str(resolve_device(wanted, "MODEL.DEVICE" if device is None else "device"))
    except ValueError:
        if device is not None or not wanted.startswith("cuda"):
            raise
        used = "cpu"
        logger.info("MODEL.DEVICE of the config is %s, which is not available: cpu", wanted)
    changes: dict[str, Any] = {"MODEL.DEVICE": used}
    changes["MODEL.COMPILE"] = "none"  # it would compile for every size of image
    if used == "cpu":
        if str(values["SOLVER.AMP.ENABLED"]) == "True" and values["SOLVER.AMP.DTYPE"] == "fp16":
            logger.info("SOLVER.AMP.DTYPE fp16 needs a GPU: float32 instead")
            changes |= {"SOLVER.AMP.ENABLED": False, "SOLVER.AMP.DTYPE": "bf16"}
        if values["MODEL.SEM_SEG_HEAD.DEFORMABLE_ATTENTION"] == "triton":
            changes["MODEL.SEM_SEG_HEAD.DEFORMABLE_ATTENTION"] = "auto"
    return [Setting(name, value, "inference") for name, value in changes.items()]


def _own_classes(cfg: CfgNode, model: CLOUDS, names: Sequence[str]) -> LabelSpace:
    """Let the model predict the classes `names`."""
    if not model.sem_seg_head.needs_text:
        head = cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME
        raise ValueError(
            f"classes of one's own need a text class head, and this model has the head {head!r}, "
            "whose classes were fixed in training. Leave classes (--classes) out, or use a model "
            "trained with MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME text."
        )
    label_space = label_space_of(names, model.label_space)
    use_label_space(model, label_space)
    return label_space
