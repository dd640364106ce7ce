"""A scene on the drawing board: the street, its sides, and what has been put there so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import pi

from clouds.scenes.layout import Barrier, Block, Contents, Thing
from clouds.scenes.plans import Plan
from clouds.scenes.style import Place

_MARGIN = 0.2
"""Between the outermost lane and the edge of the road, metres."""


@dataclass(frozen=True)
class Side:
    """The cross section of one side of the street; positions grow away from the road, metres.

    Attributes:
        sign: -1 left, 1 right.
        edge: where lanes end and parking, if any, begins.
        parking, walk, verge: widths of parking strip, footpath and grass; 0 for none.
    """

    sign: int
    edge: float
    parking: float
    walk: float
    verge: float

    @property
    def curb(self) -> float:
        """Where the footpath begins."""
        return self.edge + self.parking

    @property
    def line(self) -> float:
        """Where gardens, walls and fences begin."""
        return self.curb + self.walk + self.verge


@dataclass(frozen=True)
class Lanes:
    """The lanes of the road, all of one width, metres.

    Attributes:
        left, right: lanes of the own direction beside the own one.
        oncoming: lanes of the other direction.
        median: width of the strip between the directions.
    """

    width: float
    left: int
    right: int
    oncoming: int
    median: float

    @property
    def middle(self) -> float:
        """Lateral position of the left end of the own direction."""
        return -(self.left + 0.5) * self.width

    def edge(self, sign: int) -> float:
        """How far the road reaches to one side."""
        if sign > 0:
            return (self.right + 0.5) * self.width + _MARGIN
        return -self.middle + self.median + self.oncoming * self.width + _MARGIN

    def all(self) -> list[tuple[float, float]]:
        """Middle and heading of every lane; the own one is at 0."""
        ours = [(number * self.width, 0.0) for number in range(-self.left, self.right + 1)]
        first = self.middle - self.median - self.width / 2
        return ours + [(first - number * self.width, pi) for number in range(self.oncoming)]


@dataclass
class StreetPlan:
    """A scene in the making.

    Attributes:
        wanted: classes that must be there: those asked for, and some chance ones.
        amount: number of things, 1 for usual.
        crossing, crosswalk: distances (near, far) of a side street and of a zebra crossing.
    """

    place: Place
    plan: Plan
    contents: Contents
    wanted: frozenset[str]
    amount: float
    lanes: Lanes
    sides: tuple[Side, Side]
    crossing: tuple[float, float] | None
    crosswalk: tuple[float, float] | None
    rails: list[float] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    barriers: list[Barrier] = field(default_factory=list)
    things: list[Thing] = field(default_factory=list)

    def allowed(self, name: str) -> bool:
        """Whether a class may be there."""
        return name not in self.contents.unwanted

    def in_crossing(self, near: float, far: float, margin: float = 0.0) -> bool:
        """Whether a stretch of the street touches the side street."""
        if self.crossing is None:
            return False
        return near < self.crossing[1] + margin and far > self.crossing[0] - margin
