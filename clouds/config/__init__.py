"""Configuration: every key in one table, checked together, loaded from YAML and overrides."""

from __future__ import annotations

from clouds.config.check import ConfigError, problems
from clouds.config.defaults import KEYS, Key, add_clouds_config, get_cfg
from clouds.config.load import load_config

__all__ = [
    "KEYS",
    "ConfigError",
    "Key",
    "add_clouds_config",
    "get_cfg",
    "load_config",
    "problems",
]
