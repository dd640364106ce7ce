"""Configuration: every key in one table, checked together, loaded from YAML and overrides."""

from __future__ import annotations

from clouds.config.defaults import KEYS, Key, add_clouds_config, get_cfg

__all__ = ["KEYS", "Key", "add_clouds_config", "get_cfg"]
