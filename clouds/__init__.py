"""CLOUDS: domain-generalized semantic segmentation with collaborating foundation models.

Importing the package imports nothing heavy; `clouds.build` and `clouds.load` bring the rest when
they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clouds.version import __version__

if TYPE_CHECKING:
    from clouds.engine.defaults import build
    from clouds.inference.load import load

__all__ = ["__version__", "build", "load"]


def __getattr__(name: str) -> Any:
    if name == "build":
        from clouds.engine.defaults import build

        return build
    if name == "load":
        from clouds.inference.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
