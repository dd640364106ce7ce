"""The reader of prompts that `write-prompts` and `check-prompts` take from an installed package."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from clouds import plugins

READERS = "clouds.prompt_readers"
"""Entry point group of objects that are a `PromptReader`; `ENGLISH` is used."""
ENGLISH = "english"


class PromptReader(Protocol):
    """Finds the content of prompts; a module or an object."""

    def named_classes(self, text: str) -> frozenset[str]:
        """Names of the classes that a prompt names."""
        ...

    def coverage(self, prompts: Iterable[str]) -> dict[str, dict[str, int]]:
        """Topic, one of them "class" -> value -> number of prompts."""
        ...


def prompt_reader() -> PromptReader:
    """The reader of English prompts, from an installed package.

    Raises:
        ImportError: there is none.
    """
    if ENGLISH not in plugins.names(READERS):
        raise ImportError(
            f"no installed package reads prompts (entry point {ENGLISH!r} of the group "
            f"{READERS!r}). street_renderer has one: install CLOUDS again, `pip install -e .` in "
            "its repository."
        )
    reader: PromptReader = plugins.load(READERS, ENGLISH, "prompt reader")
    return reader
