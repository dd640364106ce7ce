"""Handing a model on: a folder with weights, graphs for other runtimes, and a model card."""

from __future__ import annotations

from clouds.export.folder import FORMATS, export

__all__ = ["FORMATS", "export"]
