"""Parameters of the layout sampler for each type of place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from street_renderer.layout import BlockKind, Horizon
from street_renderer.style import Place


@dataclass(frozen=True)
class PlacePreset:
    """Parameters of a type of place; pairs are ranges in meters, shares are 0 to 1.

    Attributes:
        lane_width: width of a lane.
        lanes_beside: minimum and maximum number of lanes on each side of the ego lane.
        parking: share of streets with parked cars.
        sidewalk: width, or None for places without one.
        verge: width of the grass next to the footpath.
        blocks: weights of the types of building.
        setback: distance of buildings from the verge.
        gap: distance between buildings.
        barrier: share of sides with walls, fences or hedges.
        crossing: share of scenes with a side street.
        trees, people, traffic: relative amounts, 1 is average.
        curve: standard deviation of the road's curvature, radians per meter.
        horizon: possible backgrounds.
    """

    lane_width: tuple[float, float]
    lanes_beside: tuple[int, int]
    parking: float
    sidewalk: tuple[float, float] | None
    verge: tuple[float, float]
    blocks: Mapping[BlockKind, float]
    setback: tuple[float, float]
    gap: tuple[float, float]
    barrier: float
    crossing: float
    trees: float
    people: float
    traffic: float
    curve: float
    horizon: tuple[Horizon, ...]


PLACE_PRESETS: dict[Place, PlacePreset] = {
    "downtown": PlacePreset(
        (3.1, 3.5), (0, 2), 0.55, (3.0, 5.0), (0.0, 0.0), {"tower": 3, "flats": 2}, (0.0, 1.0),
        (0.0, 5.0), 0.06, 0.65, 0.35, 1.6, 1.3, 0.0004, ("city", "city", "trees"),
    ),
    "street": PlacePreset(
        (2.9, 3.3), (0, 1), 0.8, (1.8, 3.4), (0.0, 0.0), {"terrace": 3, "flats": 2}, (0.0, 0.5),
        (0.0, 2.5), 0.10, 0.45, 0.3, 1.1, 1.0, 0.0012, ("city", "trees"),
    ),
    "residential": PlacePreset(
        (3.0, 3.4), (0, 0), 0.55, (1.5, 2.2), (0.8, 2.5), {"house": 1}, (4.0, 8.0),
        (4.0, 10.0), 0.6, 0.35, 0.8, 0.6, 0.7, 0.0016, ("trees", "trees", "hills"),
    ),
    "avenue": PlacePreset(
        (3.1, 3.5), (0, 1), 0.35, (2.0, 3.5), (1.5, 5.0), {"flats": 2, "hall": 1}, (5.0, 14.0),
        (6.0, 30.0), 0.5, 0.35, 1.5, 0.8, 1.1, 0.001, ("trees", "city"),
    ),
    "highway": PlacePreset(
        (3.5, 3.8), (1, 2), 0.0, None, (3.0, 8.0), {"hall": 2, "tower": 1}, (18.0, 40.0),
        (30.0, 90.0), 0.65, 0.0, 0.7, 0.0, 1.5, 0.0014, ("hills", "trees", "city"),
    ),
    "rural": PlacePreset(
        (3.0, 3.5), (0, 0), 0.0, None, (5.0, 12.0), {"house": 2, "hall": 1}, (6.0, 24.0),
        (25.0, 90.0), 0.45, 0.1, 1.3, 0.12, 0.6, 0.0024, ("hills", "trees"),
    ),
    "industrial": PlacePreset(
        (3.2, 3.7), (0, 1), 0.35, (1.5, 2.5), (0.5, 3.0), {"hall": 3, "flats": 1}, (3.0, 14.0),
        (6.0, 25.0), 0.75, 0.3, 0.4, 0.35, 1.0, 0.0006, ("city", "hills"),
    ),
}  # fmt: skip

EXTRAS: Mapping[str, float] = {
    "train": 0.19, "bus": 0.17, "truck": 0.17, "motorcycle": 0.22, "rider": 0.28, "bicycle": 0.26,
    "wall": 0.22, "fence": 0.28, "traffic light": 0.3, "traffic sign": 0.5, "person": 0.45,
    "terrain": 0.3, "sidewalk": 0.0, "vegetation": 0.3, "car": 0.7, "pole": 0.6,
}  # fmt: skip
"""Probability that a class is requested at random, so that no class is too rare."""
ON_FOOT = ("person", "bicycle", "traffic light")
"""Classes that are requested less often in places without pedestrians."""


@dataclass(frozen=True)
class BlockSize:
    """Dimensions of a type of building, meters: ranges of front and height, and the depth."""

    front: tuple[float, float]
    height: tuple[float, float]
    depth: float


BLOCK_SIZES: dict[BlockKind, BlockSize] = {
    "tower": BlockSize((14, 30), (16, 46), 18),
    "flats": BlockSize((12, 24), (9, 22), 13),
    "terrace": BlockSize((7, 13), (7, 13), 11),
    "house": BlockSize((8, 13), (4.6, 6.4), 9),
    "hall": BlockSize((18, 40), (5.5, 10), 22),
}
