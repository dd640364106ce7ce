"""Configs with the defaults of the table."""

from __future__ import annotations

from typing import Any

from clouds.config.defaults import KEYS
from clouds.d2 import CfgNode
from clouds.data.datasets import Datasets, embed


def get_value(cfg: CfgNode, name: str) -> Any:
    """Value of the key with the dotted `name`."""
    node = cfg
    for part in name.split("."):
        node = node[part]
    return node


def set_value(cfg: CfgNode, name: str, value: Any) -> None:
    """Set the key with the dotted `name`; sections that `cfg` lacks are added."""
    *parents, leaf = name.split(".")
    node = cfg
    for part in parents:
        if part not in node:
            node[part] = CfgNode()
        node = node[part]
    node[leaf] = value


def with_value(cfg: CfgNode, name: str, value: Any) -> CfgNode:
    """A frozen copy of `cfg` in which the key with the dotted `name` has this value."""
    cfg = cfg.clone()
    cfg.defrost()
    set_value(cfg, name, value)
    cfg.freeze()
    return cfg


def get_defaults() -> CfgNode:
    """A config of the table's defaults as they are, so with NUM_CLASSES 0."""
    cfg = CfgNode()
    for key in KEYS:
        set_value(cfg, key.name, key.default)
    return cfg


def get_cfg() -> CfgNode:
    """A config of the table's defaults, with NUM_CLASSES of the default DATASETS.TRAIN."""
    cfg = get_defaults()
    resolve(cfg)
    return cfg


def add_clouds_config(cfg: CfgNode) -> None:
    """Set every key of the table on `cfg`, in place, as in projects of Detectron2.

    Keys that `cfg` already has (a config of Detectron2's `get_cfg`) get the default of the table,
    except MODEL.DEVICE, where Detectron2 does not accept 'auto'; its other keys stay.
    MODEL.SEM_SEG_HEAD.NUM_CLASSES is that of the default DATASETS.TRAIN; after DATASETS.TRAIN is
    set to data with another label space, set it to 0 and call `resolve`.
    """
    for key in KEYS:
        if key.name != "MODEL.DEVICE" or "DEVICE" not in cfg.get("MODEL", {}):
            set_value(cfg, key.name, key.default)
    resolve(cfg)


def resolve(cfg: CfgNode) -> None:
    """Make the config complete, in place, so that it does not depend on other files.

    A MODEL.SEM_SEG_HEAD.NUM_CLASSES of 0 is replaced by the number of classes of the training label
    space, and each file in DATASETS.DESCRIPTIONS by its text.

    Raises:
        FileNotFoundError: no such description.
        ValueError: the training label space is not known, or a description is not valid.
    """
    cfg.DATASETS.DESCRIPTIONS = tuple(embed(entry) for entry in cfg.DATASETS.DESCRIPTIONS)
    if cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 0:
        label_space = Datasets.from_config(cfg).label_space
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = label_space.num_classes
