"""Objects of other packages, which these offer in groups of entry points."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any


def names(group: str) -> list[str]:
    """Names in a group of entry points, sorted."""
    return sorted(entry_points(group=group).names)


def distribution(group: str, name: str) -> str:
    """Name of the installed distribution that offers the entry point `name`."""
    return _distribution(_find(group, name))


def load(group: str, name: str, kind: str) -> Any:
    """The object of the entry point `name`; `kind` is what it is called in messages.

    Raises:
        ImportError: its package cannot be imported, or does not have the object.
        KeyError: there is no such entry point; `names` has those that there are.
    """
    entry_point = _find(group, name)
    what = f"the {kind} {name!r} ({entry_point.value})"
    source = _distribution(entry_point)
    again = (
        f"It belongs to the distribution {source!r}: install that again (`pip install {source}`, "
        "or `pip install -e .` in its repository)"
    )
    try:
        return entry_point.load()
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{what} needs the package {error.name!r}, which is not installed. {again}"
        ) from error
    except (ImportError, AttributeError) as error:
        raise ImportError(f"{what} cannot be imported: {error}. {again}") from error


def _find(group: str, name: str) -> EntryPoint:
    found = list(entry_points(group=group, name=name))
    if not found:
        raise KeyError(f"no entry point {name!r} in the group {group!r}")
    return found[0]


def _distribution(entry_point: EntryPoint) -> str:
    return entry_point.dist.name if entry_point.dist else entry_point.module
