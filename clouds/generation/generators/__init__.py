"""Image generators. A new one is a file here with a registered function, or a package of its own
with an entry point in the group `clouds.generators`.
"""

from __future__ import annotations

from clouds.generation.generators import stable_diffusion
from clouds.generation.generators.registry import (
    ENTRY_POINT_GROUP,
    GENERATOR_REGISTRY,
    GeneratedImage,
    Generator,
    LabelConditioned,
    build_generator,
    generator_names,
)

__all__ = [
    "ENTRY_POINT_GROUP",
    "GENERATOR_REGISTRY",
    "GeneratedImage",
    "Generator",
    "LabelConditioned",
    "build_generator",
    "generator_names",
    "stable_diffusion",
]
