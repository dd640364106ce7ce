"""Filters of pseudo-labels, each an option that is off in the published recipe."""

from __future__ import annotations

from clouds.self_training.filters.base import Filter, build_filters

__all__ = ["Filter", "build_filters"]
