"""Samples layouts: lanes, footpaths, side streets, buildings, walls, then objects.

All parts draw from one random generator in a fixed order, so a layout is a function of its seed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from street_renderer.layout import (
    FAR,
    Band,
    Barrier,
    BarrierKind,
    Block,
    BlockKind,
    Contents,
    Ground,
    Horizon,
    LaneMark,
    SceneLayout,
)
from street_renderer.object_placer import ObjectPlacer
from street_renderer.place_presets import BLOCK_SIZES, EXTRAS, ON_FOOT, PLACE_PRESETS, PlacePreset
from street_renderer.street_plan import Lanes, Side, StreetPlan
from street_renderer.style import PLACES, Place

Interval = tuple[float, float]
_CURB = 0.16
_BEYOND = 400.0
"""Widths of the curb and of the outermost strip of ground, meters."""


def sample_layout(
    rng: np.random.Generator,
    contents: Contents | None = None,
    places: Mapping[Place, float] | None = None,
    clutter: float = 1.0,
) -> SceneLayout:
    """Sample a layout.

    Args:
        contents: requested and excluded contents; none by default.
        places: weights of the types of place, used if `contents` has no place.
        clutter: factor of the number of objects, multiplied by `contents.density`.
    """
    street = _sample_street(
        rng, contents or Contents(), places or dict.fromkeys(PLACES, 1.0), clutter
    )
    for side in street.sides:
        _add_buildings(rng, street, side)
    ObjectPlacer(rng, street).place_all()
    return SceneLayout(
        place=street.place,
        curve=float(rng.normal(0, street.preset.curve)),
        bands=_bands(rng, street),
        marks=_marks(rng, street),
        crossing=street.crossing,
        crosswalk=street.crosswalk,
        rails=tuple(street.rails),
        blocks=tuple(street.blocks),
        barriers=tuple(street.barriers),
        things=tuple(street.things),
        horizon=_horizon(rng, street),
    )


def _sample_street(
    rng: np.random.Generator, contents: Contents, places: Mapping[Place, float], clutter: float
) -> StreetPlan:
    names = list(places)
    weights = np.array([places[name] for name in names], dtype=np.float64)
    drawn = names[int(rng.choice(len(names), p=weights / weights.sum()))]
    place = contents.place or drawn
    preset = PLACE_PRESETS[place]
    wanted = _choose_wanted(rng, contents, place)
    lanes = _sample_lanes(rng, place, preset)
    sides = (
        _side(rng, -1, preset, lanes, contents, wanted),
        _side(rng, 1, preset, lanes, contents, wanted),
    )
    crossing, crosswalk = _sample_crossing(rng, preset, wanted)
    amount = clutter * contents.density
    return StreetPlan(place, preset, contents, wanted, amount, lanes, sides, crossing, crosswalk)


def _choose_wanted(rng: np.random.Generator, contents: Contents, place: Place) -> frozenset[str]:
    share = min(1.0, contents.density)
    lonely = place in ("highway", "rural")
    extras = set()
    for name, often in EXTRAS.items():
        if rng.random() < often * share * (0.4 if lonely and name in ON_FOOT else 1.0):
            extras.add(name)
    return frozenset((extras | set(contents.wanted)) - set(contents.unwanted))


def _sample_lanes(rng: np.random.Generator, place: Place, preset: PlacePreset) -> Lanes:
    width = float(rng.uniform(*preset.lane_width))
    low, high = preset.lanes_beside
    right = int(rng.integers(low, high + 1)) if rng.random() < 0.6 else 0
    left = int(rng.integers(low, high + 1)) if rng.random() < 0.6 else 0
    oncoming = int(rng.integers(max(1, low), max(1, high) + 1))
    median = 0.0
    if place == "highway":
        right = max(right, 1) if left == 0 else 1
        median = float(rng.uniform(0.8, 3.0))
    elif place == "avenue" and rng.random() < 0.3:
        median = float(rng.uniform(1.5, 4.0))
    return Lanes(width, left, right, oncoming, median)


def _side(
    rng: np.random.Generator, sign: int, preset: PlacePreset, lanes: Lanes, contents: Contents,
    wanted: frozenset[str],
) -> Side:  # fmt: skip
    parking = 2.2 if rng.random() < preset.parking else 0.0
    walk = 0.0 if preset.sidewalk is None else float(rng.uniform(*preset.sidewalk))
    verge = float(rng.uniform(*preset.verge))
    if "sidewalk" in contents.unwanted:
        walk = 0.0
    if sign > 0 and "sidewalk" in contents.wanted:
        walk = max(walk, 2.0)
    if sign > 0 and "terrain" in wanted:
        verge = max(verge, 2.0)
    return Side(sign, lanes.edge(sign), parking, walk, verge)


def _sample_crossing(
    rng: np.random.Generator, preset: PlacePreset, wanted: frozenset[str]
) -> tuple[Interval | None, Interval | None]:
    """Distance intervals of a side street and of a crosswalk, or None."""
    requested = "traffic light" in wanted and preset.crossing > 0.2
    if rng.random() < preset.crossing or (requested and rng.random() < 0.6):
        near = float(rng.uniform(16, 42))
        crossing = (near, near + float(rng.uniform(7, 13)))
        return crossing, (near - 5.0, near - 1.8) if rng.random() < 0.75 else None
    if preset.sidewalk is not None and rng.random() < 0.2:
        near = float(rng.uniform(9, 24))
        return None, (near, near + 3.0)
    return None, None


def _horizon(rng: np.random.Generator, street: StreetPlan) -> Horizon:
    options = street.preset.horizon
    drawn = options[int(rng.integers(len(options)))]
    if drawn == "city" and not street.allowed("building"):
        drawn = "trees"
    if not street.allowed("vegetation"):
        drawn = "bare"
    return drawn


# ---------------------------------------------------------------------- ground
def _bands(rng: np.random.Generator, street: StreetPlan) -> tuple[Band, ...]:
    left, right = street.sides
    lanes = street.lanes
    bands = [*_bands_beside(rng, street, left), *_bands_beside(rng, street, right)]
    if lanes.median:
        paved: Ground = "curb" if street.allowed("sidewalk") else "parking"
        strip: Ground = "terrain" if lanes.median > 1.4 and street.allowed("terrain") else paved
        bands.append(Band(-left.edge, lanes.middle - lanes.median, "road"))
        bands.append(Band(lanes.middle - lanes.median, lanes.middle, strip))
        bands.append(Band(lanes.middle, right.edge, "road"))
    else:
        bands.append(Band(-left.edge, right.edge, "road"))
    return tuple(sorted(bands, key=lambda band: band.start))


def _bands_beside(rng: np.random.Generator, street: StreetPlan, side: Side) -> list[Band]:
    """Strips of ground from the edge of the lanes outward."""
    green = _allowed_ground(street, ("terrain", "sidewalk"))
    paved = _allowed_ground(street, ("sidewalk", "terrain"))
    strips: list[tuple[float, Ground]] = [(side.parking, "parking")]
    grass: tuple[float, Ground] = (side.verge, green)
    if side.walk:
        # Along avenues the left footpath is behind the grass.
        behind = side.sign < 0 and street.place == "avenue"
        path: tuple[float, Ground] = (side.walk, paved)
        strips += [(_CURB, "curb"), *((grass, path) if behind else (path, grass))]
    else:
        strips.append(grass)
    urban = street.place in ("downtown", "street")
    soil = street.place in ("industrial", "rural") and rng.random() < 0.35 and green == "terrain"
    strips.append((_BEYOND, paved if urban else "soil" if soil else green))
    bands, position = [], side.edge
    for width, ground in strips:
        if width > 0:
            ends = sorted((side.sign * position, side.sign * (position + width)))
            bands.append(Band(ends[0], ends[1], ground))
            position += width
    return bands


def _allowed_ground(street: StreetPlan, choice: tuple[Ground, Ground]) -> Ground:
    """The first type of ground whose class is allowed; asphalt if none is."""
    return next((ground for ground in choice if street.allowed(ground)), "parking")


def _marks(rng: np.random.Generator, street: StreetPlan) -> tuple[LaneMark, ...]:
    lanes, place = street.lanes, street.place
    marks = [
        LaneMark((number + 0.5) * lanes.width, dashed=True)
        for number in range(-lanes.left, lanes.right)
    ]
    if place in ("downtown", "highway", "avenue") or rng.random() < 0.7:
        solid = place == "highway" or rng.random() < 0.4
        marks.append(LaneMark(lanes.middle, dashed=not solid, center=True))
        if solid and not lanes.median and rng.random() < 0.6:
            marks.append(LaneMark(lanes.middle - 0.28, dashed=False, center=True))
    other_side = lanes.middle - lanes.median
    for number in range(1, lanes.oncoming):
        marks.append(LaneMark(other_side - number * lanes.width, dashed=True))
    if place in ("highway", "rural") or rng.random() < 0.3:
        left, right = street.sides
        marks.append(LaneMark(right.edge - 0.25, dashed=False))
        marks.append(LaneMark(-left.edge + 0.25, dashed=False))
        if lanes.median:
            marks.append(LaneMark(other_side - 0.2, dashed=False))
    return tuple(marks)


# ---------------------------------------------------------------------- buildings and barriers
def _add_buildings(rng: np.random.Generator, street: StreetPlan, side: Side) -> None:
    """Add buildings, possibly with a barrier in front of them, along one side."""
    preset = street.preset
    setback = float(rng.uniform(*preset.setback))
    if rng.random() < preset.barrier or {"wall", "fence"} & street.wanted:
        _add_barriers(rng, street, side)
        setback += 1.5
    open_land = preset.gap[1] > 20 and rng.random() < 0.35 and "building" not in street.wanted
    if open_land or not street.allowed("building"):
        return
    kinds = list(preset.blocks)
    weights = np.array([preset.blocks[k] for k in kinds], dtype=np.float64)
    position = float(rng.uniform(-8, 4))
    while position < FAR:
        kind = kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]
        end = position + float(rng.uniform(*BLOCK_SIZES[kind].front))
        if street.in_crossing(position, end, 2.5):
            assert street.crossing is not None
            corner = street.crossing[0] - 2.5
            if corner - position > 5 and preset.gap[1] <= 6:
                lateral = side.sign * (side.line + preset.setback[0])
                street.blocks.append(_block(rng, kind, lateral, (position, corner), shops=True))
            position = street.crossing[1] + 2.5
            continue
        if end > 2:
            urban = street.place in ("downtown", "street")
            shops = kind in ("tower", "flats", "terrace") and rng.random() < (
                0.7 if urban else 0.25
            )
            offset = side.line + setback + float(rng.uniform(0, 0.4 + 0.15 * preset.gap[1]))
            street.blocks.append(
                _block(rng, kind, side.sign * offset, (position, end), bool(shops))
            )
        gap = float(rng.uniform(*preset.gap))
        alley = gap > 3 or (preset.gap[1] > 3 and rng.random() < 0.4)
        position = end + (gap if alley else 0.0)


def _block(
    rng: np.random.Generator, kind: BlockKind, lateral: float, span: Interval, shops: bool
) -> Block:
    size = BLOCK_SIZES[kind]
    height = float(rng.uniform(*size.height))
    return Block(kind, lateral, span[0], span[1], height, size.depth, shops)


def _add_barriers(rng: np.random.Generator, street: StreetPlan, side: Side) -> None:
    """Add walls, fences and hedges along the property line, in segments of 6 meters."""
    wanted: list[BarrierKind] = []
    allowed: list[BarrierKind] = ["hedge"] if street.allowed("vegetation") else []
    for kind in ("wall", "fence"):
        if kind in street.wanted:
            wanted.append(kind)
        if street.allowed(kind):
            allowed.append(kind)
    options = wanted or allowed
    if not options:
        return
    start = float(rng.uniform(0, 6))
    while start < 75:
        drawn = options[int(rng.integers(len(options)))]
        length = float(rng.uniform(12, 36))
        tall = street.place in ("highway", "industrial") and drawn != "hedge"
        height = float(rng.uniform(1.8, 3.2) if tall else rng.uniform(0.9, 1.9))
        variant = int(rng.integers(1 << 16))
        lateral = side.sign * (side.line + 0.15)
        for near in np.arange(start, start + length, 6.0).tolist():
            far = min(near + 6.0, start + length)
            if not street.in_crossing(near, far, 2.0) and far > 1:
                street.barriers.append(Barrier(drawn, lateral, near, far, height, variant))
        start += length + (float(rng.uniform(2, 7)) if rng.random() < 0.4 else 0.0)
