"""What is usual where: tables that the architect draws scenes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from clouds.scenes.layout import BlockKind, Horizon
from clouds.scenes.style import Place


@dataclass(frozen=True)
class Plan:
    """What is usual for a kind of place; pairs are ranges in metres, shares are 0 to 1.

    Attributes:
        lanes_beside: fewest and most lanes on each side of the own one.
        parking: share of streets with parked cars.
        sidewalk: width, or None where nobody walks.
        verge: width of the grass beside it.
        blocks: kinds of building and their weights.
        setback: distance of buildings from the verge.
        gap: distance between buildings.
        barrier: share of sides with walls, fences or hedges.
        crossing: share of scenes with a side street.
        trees, people, traffic: amounts, 1 for usual.
        curve: standard deviation of the road's curvature, radians per metre.
        horizon: what may close the view.
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


PLANS: dict[Place, Plan] = {
    "downtown": Plan(
        (3.1, 3.5), (0, 2), 0.55, (3.0, 5.0), (0.0, 0.0), {"tower": 3, "flats": 2}, (0.0, 1.0),
        (0.0, 5.0), 0.06, 0.65, 0.35, 1.6, 1.3, 0.0004, ("city", "city", "trees"),
    ),
    "street": Plan(
        (2.9, 3.3), (0, 1), 0.8, (1.8, 3.4), (0.0, 0.0), {"terrace": 3, "flats": 2}, (0.0, 0.5),
        (0.0, 2.5), 0.10, 0.45, 0.3, 1.1, 1.0, 0.0012, ("city", "trees"),
    ),
    "residential": Plan(
        (3.0, 3.4), (0, 0), 0.55, (1.5, 2.2), (0.8, 2.5), {"house": 1}, (4.0, 8.0),
        (4.0, 10.0), 0.6, 0.35, 0.8, 0.6, 0.7, 0.0016, ("trees", "trees", "hills"),
    ),
    "avenue": Plan(
        (3.1, 3.5), (0, 1), 0.35, (2.0, 3.5), (1.5, 5.0), {"flats": 2, "hall": 1}, (5.0, 14.0),
        (6.0, 30.0), 0.5, 0.35, 1.5, 0.8, 1.1, 0.001, ("trees", "city"),
    ),
    "highway": Plan(
        (3.5, 3.8), (1, 2), 0.0, None, (3.0, 8.0), {"hall": 2, "tower": 1}, (18.0, 40.0),
        (30.0, 90.0), 0.65, 0.0, 0.7, 0.0, 1.5, 0.0014, ("hills", "trees", "city"),
    ),
    "rural": Plan(
        (3.0, 3.5), (0, 0), 0.0, None, (5.0, 12.0), {"house": 2, "hall": 1}, (6.0, 24.0),
        (25.0, 90.0), 0.45, 0.1, 1.3, 0.12, 0.6, 0.0024, ("hills", "trees"),
    ),
    "industrial": Plan(
        (3.2, 3.7), (0, 1), 0.35, (1.5, 2.5), (0.5, 3.0), {"hall": 3, "flats": 1}, (3.0, 14.0),
        (6.0, 25.0), 0.75, 0.3, 0.4, 0.35, 1.0, 0.0006, ("city", "hills"),
    ),
}  # fmt: skip

EXTRAS: Mapping[str, float] = {
    "train": 0.19, "bus": 0.17, "truck": 0.17, "motorcycle": 0.22, "rider": 0.28, "bicycle": 0.26,
    "wall": 0.22, "fence": 0.28, "traffic light": 0.3, "traffic sign": 0.5, "person": 0.45,
    "terrain": 0.3, "sidewalk": 0.0, "vegetation": 0.3, "car": 0.7, "pole": 0.6,
}  # fmt: skip
"""How often each class is wanted though nobody asked for it, so that no class is too rare."""
ON_FOOT = ("person", "bicycle", "traffic light")
"""Classes that are wanted less where nobody lives."""


@dataclass(frozen=True)
class BlockSize:
    """Usual measures of a kind of building, metres: ranges of front and height, and the depth."""

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
