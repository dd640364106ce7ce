"""CLOUDS: domain-generalized semantic segmentation with collaborating foundation models.

Importing the package imports nothing heavy; `clouds.build` brings the rest when it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clouds.version import __version__

if TYPE_CHECKING:
    from clouds.engine.defaults import build

__all__ = ["__version__", "build"]


def __getattr__(name: str) -> Any:
    if name == "build":
        from clouds.engine.defaults import build

        return build
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
