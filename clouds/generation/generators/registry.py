"""The interface of image generators and their registry.

Those of other packages have entry points (name = "module:function") in `ENTRY_POINT_GROUP`; the
function is what would be registered in `GENERATOR_REGISTRY`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from clouds import plugins
from clouds.d2 import Registry
from clouds.generation.condition import Condition, LabelConditions

GENERATOR_REGISTRY = Registry("GENERATOR")
"""Name -> function that builds the generator; its keyword-only arguments are the options."""

ENTRY_POINT_GROUP = "clouds.generators"
MAX_SEED = (1 << 63) - 1

SettingValue = str | int | float
"""A value of a generator's settings, as JSON stores it."""


@dataclass(frozen=True)
class GeneratedImage:
    """One generated image.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        label: (H, W) uint8 train ids, 255 for unlabeled; None if the generator has no labels.
        approximate: the image was generated for the label, and may differ from it.
    """

    image: npt.NDArray[np.uint8]
    label: npt.NDArray[np.uint8] | None = None
    approximate: bool = False


class Generator(Protocol):
    """Generates images from prompts.

    Attributes:
        name: the name that it is registered under.
        model: hub id or folder of its weights; empty if it has none.
        size: (height, width) of its images, pixels.
        settings: all other values that its images depend on.
        batch_size: the largest number of prompts per call.
        has_labels: whether its images have labels.
    """

    name: str
    model: str
    size: tuple[int, int]
    settings: Mapping[str, SettingValue]
    batch_size: int
    has_labels: bool

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[GeneratedImage]:
        """Generate one image per prompt.

        Image i is a function of prompt i, seed i and the settings, not of the rest of the batch.

        Args:
            prompts: at most `batch_size`.
            seeds: one per prompt, 0 to `MAX_SEED`.
        """
        ...

    def prompt_warnings(self, prompts: Sequence[str]) -> list[str]:
        """One sentence for each part of these prompts that the generator ignores."""
        ...


@runtime_checkable
class LabelConditioned(Protocol):
    """A generator that can also generate images for labels (`clouds generate --condition`)."""

    def check_conditions(self, conditions: LabelConditions) -> None:
        """Raise ValueError if it cannot generate images for the labels of this dataset."""
        ...

    def generate_for_labels(
        self, prompts: Sequence[str], seeds: Sequence[int], conditions: Sequence[Condition]
    ) -> list[GeneratedImage]:
        """Generate one image with a label per condition, as `Generator.generate`."""
        ...


def build_generator(name: str, options: Mapping[str, object] | None = None) -> Generator:
    """Build the generator `name` with these options, by name, and defaults of the others.

    Raises:
        ValueError: unknown name, an option that this generator does not have, or an invalid value.
        FileNotFoundError, ImportError: weights or packages are missing; the message says how to
            get them.
    """
    build = get_generator(name)
    given = options or {}
    allowed = option_names(build)
    for option in given:
        if option not in allowed:
            raise ValueError(
                f"the generator {name!r} has no option {_flag(option)}; it takes "
                f"{', '.join(_flag(known) for known in allowed)}"
            )
    return build(**given)


def generator_names() -> list[str]:
    """Names of all registered generators and of those of installed packages, sorted."""
    registered = {name for name, _ in GENERATOR_REGISTRY}
    return sorted(registered | set(plugins.names(ENTRY_POINT_GROUP)))


def get_generator(name: str) -> Callable[..., Generator]:
    """The function that builds a generator: from the registry, else from an entry point.

    Raises:
        ValueError: unknown name.
        ImportError: the package of its entry point cannot be imported.
    """
    build: Callable[..., Generator]
    if name in GENERATOR_REGISTRY:
        build = GENERATOR_REGISTRY.get(name)
        return build
    if name not in plugins.names(ENTRY_POINT_GROUP):
        raise ValueError(f"unknown generator {name!r}; known: {', '.join(generator_names())}")
    build = plugins.load(ENTRY_POINT_GROUP, name, "generator")
    return build


def option_names(build: Callable[..., Any]) -> list[str]:
    """Names of the options of a registered generator."""
    return list(inspect.signature(build).parameters)


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")
