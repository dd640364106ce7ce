"""Configuration: the table of keys, its validation, and loading from YAML and overrides."""

from __future__ import annotations

from clouds.config.check import ConfigError, problems
from clouds.config.config import add_clouds_config, get_cfg, resolve
from clouds.config.defaults import KEYS
from clouds.config.key import Key
from clouds.config.load import load_config

__all__ = [
    "KEYS",
    "ConfigError",
    "Key",
    "add_clouds_config",
    "get_cfg",
    "load_config",
    "problems",
    "resolve",
]
