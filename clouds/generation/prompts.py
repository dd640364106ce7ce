"""Prompt files: one prompt a line; what they cover, repeat and lose."""

from __future__ import annotations

from clouds.generation.scene_words import SceneWords, read_scene

__all__ = ["SceneWords", "read_scene"]
