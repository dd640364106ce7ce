"""What a generator is, and the table of those that exist."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from clouds.d2 import Registry

GENERATOR_REGISTRY = Registry("GENERATOR")
"""Name -> function that makes the generator; its keyword-only arguments are the options."""

LARGEST_SEED = (1 << 63) - 1

Setting = str | int | float


@dataclass(frozen=True)
class Picture:
    """One painted picture.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        label: (H, W) uint8 train ids, 255 for unlabelled; None where the generator does not know.
    """

    image: npt.NDArray[np.uint8]
    label: npt.NDArray[np.uint8] | None = None


class Generator(Protocol):
    """Paints pictures from prompts.

    Attributes:
        name: under which it is registered.
        model: what it was loaded with, such as a hub id; empty when it has no weights.
        size: (rows, columns) of its pictures, pixels.
        settings: whatever else its pictures depend on, as values that JSON can hold.
        batch_size: how many prompts it takes at a time.
        labelled: whether its pictures come with labels.
    """

    name: str
    model: str
    size: tuple[int, int]
    settings: Mapping[str, Setting]
    batch_size: int
    labelled: bool

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Picture]:
        """Paint one picture for each prompt.

        Picture i is a function of prompt i, seed i and the settings, never of its neighbours.

        Args:
            prompts: at most `batch_size`.
            seeds: as many, 0 to `LARGEST_SEED`.
        """
        ...

    def remarks(self, prompts: Sequence[str]) -> list[str]:
        """What of these prompts it will not follow, a sentence each; for warnings."""
        ...


def build_generator(name: str, options: Mapping[str, object] | None = None) -> Generator:
    """Make a generator.

    Args:
        name: of `GENERATOR_REGISTRY`.
        options: by name; those that are left out have the generator's defaults.

    Raises:
        ValueError: an unknown name, an option that this generator does not have, or a value that
            it cannot take.
        FileNotFoundError, ImportError: its weights or packages are missing; says how to get them.
    """
    names = [known for known, _ in GENERATOR_REGISTRY]
    if name not in names:
        raise ValueError(f"unknown generator {name!r}; known: {', '.join(sorted(names))}")
    make: Callable[..., Generator] = GENERATOR_REGISTRY.get(name)
    given = dict(options or {})
    allowed = option_names(make)
    for option in given:
        if option not in allowed:
            raise ValueError(
                f"the generator {name!r} has no option {_flag(option)}; it takes "
                f"{', '.join(_flag(known) for known in allowed)}"
            )
    return make(**given)


def option_names(make: Callable[..., Any]) -> list[str]:
    """Names of the options of a registered generator."""
    return list(inspect.signature(make).parameters)


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")
