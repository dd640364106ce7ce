"""What is in a scene and where, in metres, with no word about how it looks.

Lateral positions are measured from the middle of the own lane, positive to the right, along a
road that may curve; distances run forward from the camera. Traffic keeps to the right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from clouds.data.label_space import CITYSCAPES_19
from clouds.scenes.camera import Floats
from clouds.scenes.style import PLACES, Place

CLASSES: tuple[str, ...] = CITYSCAPES_19.names
"""The 19 classes; the position of a name is its train id."""

FAR = 130.0
"""Nothing that stands is placed farther away than this many metres."""

_BENDING = 90.0
"""The road bends up to this distance, metres, and runs straight on behind it."""

Ground = Literal["road", "parking", "curb", "sidewalk", "terrain", "soil"]
BlockKind = Literal["tower", "flats", "terrace", "house", "hall"]
BarrierKind = Literal["wall", "fence", "hedge"]
Horizon = Literal["city", "trees", "hills", "bare"]


@dataclass(frozen=True)
class Contents:
    """A request for what a scene should hold.

    Attributes:
        place: kind of place, or None to let the style choose.
        wanted: class names (`CLASSES`) that must be there, near enough to be seen well.
        unwanted: class names that must not be there; road and sky always are.
        density: number of things, 1 for usual.

    Raises:
        ValueError: an unknown place or class, or a class both wanted and unwanted.
    """

    place: Place | None = None
    wanted: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    density: float = 1.0

    def __post_init__(self) -> None:
        if self.place is not None and self.place not in PLACES:
            raise ValueError(f"unknown place {self.place!r}; known: {', '.join(PLACES)}")
        for name in (*self.wanted, *self.unwanted):
            if name not in CLASSES:
                raise ValueError(f"unknown class {name!r}; known: {', '.join(CLASSES)}")
        both = sorted(set(self.wanted) & set(self.unwanted))
        if both:
            raise ValueError(f"classes both wanted and unwanted: {', '.join(both)}")
        if not 0 <= self.density <= 4:
            raise ValueError(f"density is {self.density}; allowed are 0 to 4")


@dataclass(frozen=True)
class Thing:
    """One object: what, where, which way.

    Attributes:
        kind: a name that `clouds.scenes.painter` knows how to draw.
        lateral, distance: position of its middle on the ground, metres.
        heading: radians; 0 goes away from the camera, pi/2 to the right.
        scale: size relative to the usual one.
        variant: a number from which its shape is chosen.
        behind: stands beyond the barriers along the street.
    """

    kind: str
    lateral: float
    distance: float
    heading: float = 0.0
    scale: float = 1.0
    variant: int = 0
    behind: bool = False


@dataclass(frozen=True)
class Block:
    """A building: its street front runs from `near` to `far` at `lateral`, metres."""

    kind: BlockKind
    lateral: float
    near: float
    far: float
    height: float
    depth: float
    shops: bool = False


@dataclass(frozen=True)
class Barrier:
    """A wall, fence or hedge along the street from `near` to `far` at `lateral`, metres."""

    kind: BarrierKind
    lateral: float
    near: float
    far: float
    height: float
    variant: int


@dataclass(frozen=True)
class Band:
    """A strip of ground between two lateral positions, metres."""

    start: float
    end: float
    ground: Ground


@dataclass(frozen=True)
class LaneMark:
    """A painted line along the road; `center` ones part the two directions."""

    lateral: float
    dashed: bool
    center: bool = False


@dataclass(frozen=True)
class SceneLayout:
    """Everything in a scene.

    Attributes:
        curve: change of direction of the road per metre, radians (positive to the right).
        bands: strips of ground from left to right; they cover all of it.
        crossing: distances (near, far) of a side street, or None.
        crosswalk: distances (near, far) of a zebra crossing, or None.
        rails: lateral positions of the middle of tram tracks in the road.
        horizon: what closes the view: distant buildings, trees, hills, or nothing.
    """

    place: Place
    curve: float
    bands: tuple[Band, ...]
    marks: tuple[LaneMark, ...]
    crossing: tuple[float, float] | None
    crosswalk: tuple[float, float] | None
    rails: tuple[float, ...]
    blocks: tuple[Block, ...]
    barriers: tuple[Barrier, ...]
    things: tuple[Thing, ...]
    horizon: Horizon

    @property
    def road(self) -> tuple[float, float]:
        """Lateral positions of the edges of the road, parking included."""
        edges = [e for b in self.bands if b.ground in ("road", "parking") for e in (b.start, b.end)]
        return min(edges), max(edges)

    def bend(self, distance: Floats) -> Floats:
        """How far the road has turned aside at distances, metres to the right."""
        near = np.minimum(distance, _BENDING)
        straight_on = np.maximum(distance - _BENDING, 0)
        return np.asarray(0.5 * self.curve * near * near + self.curve * _BENDING * straight_on)

    def bend_at(self, distance: float) -> float:
        """`bend` at one distance."""
        near = min(distance, _BENDING)
        return self.curve * (0.5 * near * near + _BENDING * max(distance - _BENDING, 0.0))
