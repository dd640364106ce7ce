"""One value that somebody wrote down for a key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One value that somebody wrote down.

    Attributes:
        name: dotted name of the key.
        value: as YAML reads it, or the text of an override.
        origin: where it stands, for messages.
    """

    name: str
    value: Any
    origin: str
