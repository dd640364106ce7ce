"""Prompts of weather and time for images whose content is given by a label."""

from __future__ import annotations

from itertools import product

_TIMES = ("by day", "at dusk", "at night", "in the low sun of the morning")
_WEATHERS = ("in clear weather", "under an overcast sky", "in the rain", "in fog", "in snow")

SCENE_PROMPTS: tuple[str, ...] = tuple(
    f"a photo of a street from a driving car {time} {weather}"
    for time, weather in product(_TIMES, _WEATHERS)
)
"""Every pair of a time and a weather; the classes of the label are added to each."""
