"""The reader of prompts of `write-prompts` and `check-prompts`, and the flags that choose it."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from clouds import plugins
from clouds.cli.command_line import path

if TYPE_CHECKING:
    from clouds.data.label_space import LabelSpace

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


def add_class_options(parser: argparse.ArgumentParser) -> None:
    """Flags of the classes that prompts are read for."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--label-space",
        metavar="NAME",
        help="look for the words of its classes: cityscapes_19, camvid_11 or mapillary_65 "
        "(default: the 19 classes of Cityscapes, by the words that the renderer knows)",
    )
    group.add_argument(
        "--descriptions",
        type=path,
        metavar="FILE",
        help="look for the words of the classes of this description of datasets, a YAML file",
    )


def label_space_of(args: argparse.Namespace) -> LabelSpace | None:
    """The label space that `add_class_options` names; None: none.

    Raises:
        FileNotFoundError: there is no such description.
        ValueError: there is no such label space, or the description is not valid.
    """
    from clouds.data.datasets import read_descriptions
    from clouds.data.label_space import BUILTIN_LABEL_SPACES, builtin_label_space

    if args.descriptions is not None:
        first, *_ = read_descriptions([str(args.descriptions)]).values()
        return first.label_space
    name = args.label_space
    if name is None:
        return None
    if name not in BUILTIN_LABEL_SPACES:
        raise ValueError(
            f"--label-space is {name!r}; allowed are {', '.join(BUILTIN_LABEL_SPACES)}. Classes of "
            "one's own are in a YAML file, named by --descriptions"
        )
    return builtin_label_space(name).label_space


def prompt_reader(label_space: LabelSpace | None = None) -> PromptReader:
    """The reader of the words of a label space; None: of English prompts, from another package.

    Raises:
        ImportError: no label space, and no package has a reader.
    """
    if label_space is not None:
        from clouds.generation.class_words import ClassWords

        return ClassWords(label_space)
    if ENGLISH not in plugins.names(READERS):
        raise ImportError(
            f"no installed package reads prompts (entry point {ENGLISH!r} of the group "
            f"{READERS!r}). street_renderer has one: install CLOUDS again, `pip install -e .` in "
            "its repository."
        )
    reader: PromptReader = plugins.load(READERS, ENGLISH, "prompt reader")
    return reader
