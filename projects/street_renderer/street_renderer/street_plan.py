"""The mutable state of a layout during sampling: the street, its sides, the objects so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import pi

from street_renderer.layout import Barrier, Block, Contents, Thing
from street_renderer.place_presets import PlacePreset
from street_renderer.style import Place

_MARGIN = 0.2
"""Distance between the outermost lane and the edge of the road, meters."""


@dataclass(frozen=True)
class Side:
    """Cross section of one side of the street; positions increase away from the road, meters.

    Attributes:
        sign: -1 left, 1 right.
        edge: outer edge of the lanes, where the parking strip starts.
        parking, walk, verge: widths of parking strip, footpath and grass; 0 for none.
    """

    sign: int
    edge: float
    parking: float
    walk: float
    verge: float

    @property
    def curb(self) -> float:
        """Position where the footpath starts."""
        return self.edge + self.parking

    @property
    def line(self) -> float:
        """Position of the property line, where gardens, walls and fences start."""
        return self.curb + self.walk + self.verge


@dataclass(frozen=True)
class Lanes:
    """The lanes of the road, all of the same width, meters.

    Attributes:
        left, right: number of lanes of the ego direction on each side of the ego lane.
        oncoming: number of lanes of the other direction.
        median: width of the strip between the directions.
    """

    width: float
    left: int
    right: int
    oncoming: int
    median: float

    @property
    def middle(self) -> float:
        """Lateral position of the left edge of the ego direction."""
        return -(self.left + 0.5) * self.width

    def edge(self, sign: int) -> float:
        """Distance from the ego lane to the edge of the road on one side."""
        if sign > 0:
            return (self.right + 0.5) * self.width + _MARGIN
        return -self.middle + self.median + self.oncoming * self.width + _MARGIN

    def all(self) -> list[tuple[float, float]]:
        """(lateral position, heading) of every lane; the ego lane is at 0."""
        ego = [(number * self.width, 0.0) for number in range(-self.left, self.right + 1)]
        first = self.middle - self.median - self.width / 2
        return ego + [(first - number * self.width, pi) for number in range(self.oncoming)]


@dataclass
class StreetPlan:
    """A layout during sampling.

    Attributes:
        wanted: classes that must be visible: requested ones, and some at random.
        amount: factor of the number of objects, 1 is average.
        crossing, crosswalk: distances (near, far) of a side street and of a crosswalk.
    """

    place: Place
    preset: PlacePreset
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
        """Whether a class is not excluded."""
        return name not in self.contents.unwanted

    def in_crossing(self, near: float, far: float, margin: float = 0.0) -> bool:
        """Whether an interval of distances intersects the side street."""
        if self.crossing is None:
            return False
        return near < self.crossing[1] + margin and far > self.crossing[0] - margin
