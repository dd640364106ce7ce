"""Contents and geometry of a scene in meters, without its appearance.

Lateral positions are relative to the center of the ego lane, positive to the right, along a road
that may curve; distances are forward from the camera. Traffic drives on the right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from clouds.data.label_space import CITYSCAPES_19
from street_renderer.camera import Floats
from street_renderer.style import PLACES, Place

CLASSES: tuple[str, ...] = CITYSCAPES_19.names
"""The 19 classes in the order of their train ids."""

FAR = 130.0
"""Maximum distance of objects, meters."""

_BENDING = 90.0
"""The road curves up to this distance, meters, and is straight beyond it."""

Ground = Literal["road", "parking", "curb", "sidewalk", "terrain", "soil"]
BlockKind = Literal["tower", "flats", "terrace", "house", "hall"]
BarrierKind = Literal["wall", "fence", "hedge"]
Horizon = Literal["city", "trees", "hills", "bare"]


@dataclass(frozen=True)
class Contents:
    """Requested contents of a scene.

    Attributes:
        place: type of place, or None to draw it from the style.
        wanted: class names (`CLASSES`) that must be clearly visible.
        unwanted: class names that must not be visible; ignored for road and sky.
        density: factor of the number of objects, 1 is average.

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
    """One object.

    Attributes:
        kind: type of object, see `street_renderer.objects`.
        lateral, distance: position of its center on the ground, meters.
        heading: radians; 0 is away from the camera, pi/2 to the right.
        scale: relative size.
        variant: number that selects its shape.
        behind: whether it is behind the barriers along the street.
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
    """A building: its street front runs from `near` to `far` at `lateral`, meters."""

    kind: BlockKind
    lateral: float
    near: float
    far: float
    height: float
    depth: float
    shops: bool = False


@dataclass(frozen=True)
class Barrier:
    """A wall, fence or hedge along the street from `near` to `far` at `lateral`, meters."""

    kind: BarrierKind
    lateral: float
    near: float
    far: float
    height: float
    variant: int


@dataclass(frozen=True)
class Band:
    """A strip of ground between two lateral positions, meters."""

    start: float
    end: float
    ground: Ground


@dataclass(frozen=True)
class LaneMark:
    """A lane mark along the road; `center` marks separate the two directions."""

    lateral: float
    dashed: bool
    center: bool = False


@dataclass(frozen=True)
class SceneLayout:
    """The complete layout of a scene.

    Attributes:
        curve: curvature of the road, radians per meter (positive to the right).
        bands: strips of ground from left to right, without gaps.
        crossing: distances (near, far) of a side street, or None.
        crosswalk: distances (near, far) of a crosswalk, or None.
        rails: lateral positions of the centers of tram tracks in the road.
        horizon: background: distant buildings, trees, hills, or nothing.
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
        """Lateral offset of the curved road at distances, meters to the right."""
        near = np.minimum(distance, _BENDING)
        straight_on = np.maximum(distance - _BENDING, 0)
        return np.asarray(0.5 * self.curve * near * near + self.curve * _BENDING * straight_on)

    def bend_at(self, distance: float) -> float:
        """`bend` at one distance."""
        near = min(distance, _BENDING)
        return self.curve * (0.5 * near * near + _BENDING * max(distance - _BENDING, 0.0))
