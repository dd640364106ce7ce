"""Datasets by name: how to list their samples, and what is known about them."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

Samples = list[dict[str, Any]]


class _DatasetCatalog(UserDict[str, Callable[[], Samples]]):
    """Dataset names to functions that list their samples."""

    def register(self, name: str, func: Callable[[], Samples]) -> None:
        """Make a dataset known.

        Args:
            name: its name; it must be new.
            func: returns the samples, the same ones at every call. It is not called now.
        """
        assert callable(func), f"dataset {name!r}: register a function that lists the samples"
        assert name not in self, f"dataset {name!r} is registered already"
        self[name] = func

    # Detectron2's `get` calls the function, where a dict's would hand it out.
    def get(self, name: str) -> Samples:  # type: ignore[override]
        """Samples of the dataset `name`.

        Raises:
            KeyError: there is none of that name; the message lists those there are.
        """
        if name not in self:
            known = ", ".join(sorted(self)) or "none"
            raise KeyError(f"dataset {name!r} is not registered; registered are: {known}")
        return self[name]()

    def list(self) -> list[str]:
        """Names of all datasets."""
        return [*self]

    def remove(self, name: str) -> None:
        """Forget a dataset; KeyError if there is none of that name."""
        del self[name]


class Metadata(SimpleNamespace):
    """What is known about one dataset, as attributes: class names, colors, kind of evaluation.

    An attribute may be set again to an equal value, but not to another one.
    """

    name: str

    def __getattr__(self, key: str) -> Any:
        # Python asks here only for what is not set. `vars` cannot come back to this method.
        known = vars(self)
        raise AttributeError(
            f"metadata of dataset {known.get('name', '?')!r} has no {key!r}; "
            f"it has: {', '.join(known)}"
        )

    def __setattr__(self, key: str, value: Any) -> None:
        known = vars(self)
        if key in known:
            # Not an `assert` statement: data would be lost where Python runs with -O.
            if known[key] != value:
                raise AssertionError(
                    f"{key!r} in the metadata of dataset {known.get('name', '?')!r} is set "
                    f"already, to {known[key]!r}; it cannot become {value!r}"
                )
            return
        super().__setattr__(key, value)

    def set(self, **values: Any) -> Metadata:
        """Set several attributes; returns itself."""
        for key, value in values.items():
            setattr(self, key, value)
        return self

    def get(self, key: str, default: Any = None) -> Any:
        """The attribute, or `default` when it is not set."""
        return getattr(self, key, default)

    def as_dict(self) -> dict[str, Any]:
        """All attributes; a copy."""
        return dict(vars(self))


class _MetadataCatalog(UserDict[str, Metadata]):
    """Dataset names to their metadata."""

    def get(self, name: str) -> Metadata:  # type: ignore[override]
        """Metadata of the dataset `name`, always the same object; empty when first asked for."""
        assert name, "a dataset needs a name"
        if name not in self:
            self[name] = Metadata(name=name)
        return self[name]

    def list(self) -> list[str]:
        """Names of all datasets with metadata."""
        return [*self]

    def remove(self, name: str) -> None:
        """Forget the metadata of a dataset; KeyError if there is none."""
        del self[name]


DatasetCatalog = _DatasetCatalog()
MetadataCatalog = _MetadataCatalog()
