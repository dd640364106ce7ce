"""What paints pictures from prompts. A new generator is a file here with a registered function."""

from __future__ import annotations

from clouds.generation.generators import procedural, stable_diffusion
from clouds.generation.generators.registry import (
    GENERATOR_REGISTRY,
    Generator,
    Picture,
    build_generator,
)

__all__ = [
    "GENERATOR_REGISTRY",
    "Generator",
    "Picture",
    "build_generator",
    "procedural",
    "stable_diffusion",
]
