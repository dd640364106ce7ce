"""Differences between the config of a checkpoint and that of the run which resumes it."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from clouds.config.compat import NO_EFFECT, translate
from clouds.config.values import Setting, flatten
from clouds.d2 import CfgNode
from clouds.yaml_core import BoundedLoader

logger = logging.getLogger(__name__)

HARMLESS_KEYS = (
    "DATALOADER.NUM_WORKERS",
    "DATALOADER.TIMEOUT",
    "DATASETS.TEST",
    "DIST_TIMEOUT",
    "LOGGER",
    "LOG_PERIOD",
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",
    "MODEL.WEIGHTS_PARTIAL",
    "OUTPUT_DIR",
    "SOLVER.BEST_ON",
    "SOLVER.CHECKPOINTS_KEPT",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST",
)
"""Keys and sections that may differ in a resumed run without an effect on training."""


def changed_keys(
    saved_config: object, cfg: CfgNode, harmless_keys: Sequence[str] = HARMLESS_KEYS
) -> list[str]:
    """Lines 'KEY: saved -> present' of keys that differ in a resumed run.

    Keys of earlier versions are compared by their present names; those without effect are skipped.
    Of texts of several lines, only the lines that differ are told, those of the saved one after '-'
    and those of the present one after '+'.

    Args:
        saved_config: YAML of the saved run's config.
        cfg: the present one.
        harmless_keys: keys and sections that are not told.

    Raises:
        ValueError: it is another object, or other text.
    """
    saved = _with_present_names(_parse(saved_config))
    present = dict(flatten(yaml.safe_load(cfg.dump())))
    return [
        f"{key}: {_difference(saved.get(key, '(absent)'), present.get(key, '(absent)'))}"
        for key in sorted(saved.keys() | present.keys())
        if saved.get(key) != present.get(key)
        and not any(key == harmless or key.startswith(harmless + ".") for harmless in harmless_keys)
    ]


def warn_changes(saved_config: object, cfg: CfgNode) -> None:
    """Log `changed_keys` as a warning, or why they are not known."""
    try:
        changes = changed_keys(saved_config, cfg)
    except ValueError as error:
        logger.warning("it is not known whether the config has changed: %s", error)
        return
    if changes:
        logger.warning(
            "the config differs from that of the checkpoint, so the result differs from that of an "
            "uninterrupted run:\n  %s",
            "\n  ".join(changes),
        )


def _difference(saved: Any, present: Any) -> str:
    both = [_lines(saved), _lines(present)]
    if max(map(len, both)) < 2:
        return f"{saved!r} -> {present!r}"
    return "; ".join(line for line in difflib.ndiff(both[0], both[1]) if line[:1] in "-+")


def _lines(value: Any) -> list[str]:
    """The lines of a text, or of all texts in a list; else one line."""
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        return [repr(value)]
    return [line for text in texts for line in text.splitlines()]


def config_value(saved_config: object, name: str) -> Any:
    """Value of a key in the YAML of a saved config; None: it has none, or is no such YAML."""
    if not isinstance(saved_config, str):
        return None
    try:
        saved = yaml.load(saved_config, BoundedLoader)
    except yaml.YAMLError:
        return None
    return dict(flatten(saved)).get(name) if isinstance(saved, Mapping) else None


def _with_present_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Present name and value of every key, without those that have no effect or only one value."""
    present: dict[str, Any] = {}
    for name, value in flatten(config):
        if name in NO_EFFECT:
            continue
        settings, problems = translate([Setting(name, value, "checkpoint")])
        present |= {setting.name: setting.value for setting in settings}
        if problems:
            present[name] = value
    return present


def _parse(saved_config: object) -> Mapping[str, Any]:
    """The tree of a saved config; raises as `changed_keys`."""
    if not isinstance(saved_config, str):
        raise ValueError(
            f"the config in the checkpoint is no text, but a {type(saved_config).__name__}"
        )
    try:
        tree = yaml.load(saved_config, BoundedLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the config in the checkpoint is not YAML ({reason})") from error
    if not isinstance(tree, Mapping | type(None)):
        raise ValueError(f"the config in the checkpoint is {tree!s:.80}, not KEY: VALUE pairs")
    return tree or {}
