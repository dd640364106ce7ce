"""Places vehicles, people, plants and street furniture in a street."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import pi

import numpy as np

from street_renderer.layout import Thing
from street_renderer.street_plan import Side, StreetPlan

_LENGTHS: Mapping[str, float] = {
    "car": 4.4, "van": 5.2, "truck": 8.6, "bus": 11.5, "tram": 13.0, "motorcyclist": 2.2,
    "motorcycle": 2.2, "cyclist": 1.9,
}  # fmt: skip


_CLASSES_OF: Mapping[str, tuple[str, ...]] = {
    "van": ("car",), "motorcyclist": ("motorcycle", "rider"), "cyclist": ("bicycle", "rider"),
    "sign": ("traffic sign", "pole"), "gantry": ("traffic sign", "pole"),
    "light": ("traffic light", "pole"), "light arm": ("traffic light", "pole"),
    "lamp": ("pole",), "bollard": ("pole",), "tree": ("vegetation",), "bush": ("vegetation",),
    "bin": (), "cabinet": (),
}  # fmt: skip
"""Classes of a type of object, if they differ from its name."""
_CAR = _LENGTHS["tram"] + 0.2
"""Length of one car of a train with its coupling, meters."""
_TRAM_PLACES = ("downtown", "street", "avenue", "residential")


@dataclass
class ObjectPlacer:
    """Places objects in a street: first the wanted ones, near the camera, then all others.

    Attributes:
        occupied: occupied intervals (near, far) of each lane, by its lateral position.
    """

    rng: np.random.Generator
    street: StreetPlan
    occupied: dict[float, list[tuple[float, float]]] = field(default_factory=dict)

    def place_all(self) -> None:
        """Place all objects in `street.things`."""
        self._place_wanted()
        self._fill_lanes()
        for side in self.street.sides:
            self._place_parked_cars(side)
            self._place_furniture(side)
            self._place_pedestrians(side)
            self._place_plants(side)

    def _add(
        self, kind: str, lateral: float, distance: float, heading: float = 0.0,
        spread: float = 0.06, behind: bool = False,
    ) -> None:  # fmt: skip
        scale = float(np.clip(self.rng.normal(1, spread), 0.75, 1.3))
        variant = int(self.rng.integers(1 << 16))
        if not all(self.street.allowed(name) for name in _CLASSES_OF.get(kind, (kind,))):
            return
        self.street.things.append(Thing(kind, lateral, distance, heading, scale, variant, behind))

    def _claim(self, lane: float, middle: float, length: float, gap: float = 2.0) -> bool:
        """Occupy an interval of a lane; False if it is occupied already."""
        intervals = self.occupied.setdefault(round(lane, 1), [])
        near, far = middle - length / 2 - gap, middle + length / 2 + gap
        if any(near < other_far and far > other_near for other_near, other_far in intervals):
            return False
        intervals.append((near, far))
        return True

    def _place_wanted(self) -> None:
        """Place the wanted objects where they are clearly visible, before all others."""
        lanes = self.street.lanes.all()
        placers: dict[str, Callable[[], None]] = {
            "train": self._place_train,
            "bus": lambda: self._drive("bus", lanes),
            "truck": lambda: self._drive("truck", lanes),
            "motorcycle": self._place_motorcycle,
            "rider": lambda: self._ride(6, 15),
            "bicycle": self._place_bicycle,
            "car": lambda: self._drive("car", lanes),
            "person": self._place_person,
            "traffic light": self._place_lights,
            "traffic sign": self._place_sign,
            "pole": lambda: self._beside("lamp", 9, 24),
            "vegetation": lambda: self._place_tree(10, 30),
        }
        for name, place in placers.items():
            if name in self.street.wanted:
                place()

    def _drive(self, kind: str, lanes: list[tuple[float, float]]) -> None:
        """Place a vehicle in a random lane, near enough to be clearly visible."""
        length = _LENGTHS[kind]
        farthest = 12.0 if length < 3 else 20.0
        for _ in range(12):
            lane, heading = lanes[int(self.rng.integers(len(lanes)))]
            nearest = 8.0 if lane == 0 and length > 3 else 5.0
            near = float(self.rng.uniform(nearest, farthest))
            if self._claim(lane, near + length / 2, length):
                lateral = lane + float(self.rng.normal(0, 0.15))
                self._add(kind, lateral, near + length / 2, heading)
                return
            farthest += 2.0

    def _place_train(self) -> None:
        """Place a tram in the street, a train that crosses it, or one beside it."""
        draw = self.rng.random()
        if self.street.place in _TRAM_PLACES and draw < 0.75:
            self._place_tram()
        elif self.street.crossing is None and draw < 0.5:
            self._place_crossing_train()
        else:
            self._place_train_beside()

    def _add_train(
        self, kind: str, lateral: float, distance: float, step: tuple[float, float], cars: int,
        heading: float, behind: bool = False,
    ) -> None:  # fmt: skip
        """Add train cars in a row; the same variant gives all of them the same colors."""
        variant = int(self.rng.integers(1 << 16))
        for number in range(cars):
            x, z = lateral + number * step[0], distance + number * step[1]
            self.street.things.append(Thing(kind, x, z, heading, 1.0, variant, behind))

    def _place_tram(self) -> None:
        lanes = self.street.lanes.all()
        lane, heading = lanes[-1] if self.rng.random() < 0.7 else lanes[0]
        start = float(self.rng.uniform(7, 18) if lane else self.rng.uniform(10, 18))
        cars = int(self.rng.integers(1, 4))
        self._claim(lane, start + cars * _CAR / 2, cars * _CAR)
        self.street.rails.append(lane)
        self._add_train("tram", lane, start + _CAR / 2, (0.0, _CAR), cars, heading)

    def _place_crossing_train(self) -> None:
        street = self.street
        distance = float(self.rng.uniform(26, 40))
        street.crossing, street.crosswalk = (distance - 2.5, distance + 2.5), None
        street.blocks = [b for b in street.blocks if not street.in_crossing(b.near, b.far, 1.0)]
        street.barriers = [b for b in street.barriers if not street.in_crossing(b.near, b.far, 1.0)]
        self._add_train(
            "railcar", float(self.rng.uniform(-20, -4)), distance, (_CAR, 0.0), 3, pi / 2
        )
        for lane, _ in street.lanes.all():  # no vehicles on the track
            self._claim(lane, distance, 8.0)

    def _place_train_beside(self) -> None:
        street = self.street
        side = street.sides[int(self.rng.integers(2))]
        lateral = side.sign * (side.line + float(self.rng.uniform(3.0, 6.0)))
        street.blocks = [b for b in street.blocks if b.lateral * side.sign < 0]
        street.barriers = [b for b in street.barriers if b.lateral * side.sign < 0]
        start, cars = float(self.rng.uniform(12, 22)), int(self.rng.integers(2, 5))
        self._add_train("railcar", lateral, start, (0.0, _CAR), cars, 0.0, behind=True)

    def _place_motorcycle(self) -> None:
        if self.rng.random() < 0.6 and self.street.allowed("rider"):
            self._drive("motorcyclist", self.street.lanes.all())
        else:
            side = self.street.sides[int(self.rng.integers(2))]
            lateral = side.sign * (side.curb - (1.0 if side.parking else -0.7))
            distance = self._in_view(lateral, 7, 16)
            self._keep_line_of_sight(lateral, distance)
            self._claim(self._parking_key(side), distance, 2.2)
            self._add("motorcycle", lateral, distance, float(self.rng.normal(0.3, 0.5)))

    def _place_bicycle(self) -> None:
        if self.rng.random() < 0.4 and self.street.allowed("rider"):
            self._ride(6, 14)
        else:
            self._park_bicycles(self.street.sides[int(self.rng.integers(2))], 7, 15)

    def _ride(self, nearest: float, farthest: float) -> None:
        """Place a cyclist at the edge of the road or on the crosswalk."""
        side = self.street.sides[1 if self.rng.random() < 0.7 else 0]
        lateral = side.sign * (side.edge - 0.7)
        heading = 0.0 if side.sign > 0 else pi
        distance = self._in_view(lateral, nearest, farthest)
        if self.rng.random() < 0.25 and self.street.crosswalk is not None:
            distance = float(np.mean(self.street.crosswalk))
            heading, lateral = pi / 2, float(self.rng.uniform(-4, 4))
        self._keep_line_of_sight(lateral, distance)
        kind = "cyclist" if self.street.allowed("bicycle") else "motorcyclist"
        self._add(kind, lateral, distance, heading + float(self.rng.normal(0, 0.12)))

    def _in_view(self, lateral: float, nearest: float, farthest: float) -> float:
        """A distance at which a lateral position is inside a narrow field of view."""
        return max(float(self.rng.uniform(nearest, farthest)), 2.1 * abs(lateral))

    def _keep_line_of_sight(self, lateral: float, distance: float) -> None:
        """Keep lanes and parking free where a vehicle would occlude a position."""
        rows = [(lane, lane) for lane, _ in self.street.lanes.all()]
        rows += [
            (side.sign * (side.edge + 1.0), self._parking_key(side)) for side in self.street.sides
        ]
        for position, key in rows:
            if 0 < position * lateral <= 1.1 * lateral * lateral:
                self._claim(key, distance * position / lateral, 3.0)

    def _park_bicycles(self, side: Side, nearest: float, farthest: float) -> None:
        lateral = side.curb + (0.7 if side.walk else -0.5)
        distance = self._in_view(lateral, nearest, farthest)
        self._keep_line_of_sight(side.sign * lateral, distance + 1.0)
        for _ in range(int(self.rng.integers(1, 5))):
            heading = float(self.rng.normal(pi / 2 if self.rng.random() < 0.4 else 0.3, 0.3))
            self._add("bicycle", side.sign * lateral, distance, heading)
            distance += float(self.rng.uniform(0.9, 1.7))

    def _place_person(self) -> None:
        if self.street.crosswalk is not None and self.rng.random() < 0.4:
            distance = float(np.mean(self.street.crosswalk))
            for _ in range(int(self.rng.integers(1, 4))):
                heading = pi / 2 if self.rng.random() < 0.5 else -pi / 2
                lateral = float(self.rng.uniform(-6, 6))
                self._add("person", lateral, distance + float(self.rng.normal(0, 0.7)), heading)
            return
        side = self.street.sides[int(self.rng.integers(2))]
        lateral = side.curb + max(0.8, self.rng.uniform(0.3, 0.9) * side.walk)
        distance = self._in_view(lateral, 7, 16)
        self._keep_line_of_sight(side.sign * lateral, distance)
        self._add("person", side.sign * lateral, distance, self._walk())

    def _walk(self) -> float:
        return float(self.rng.choice([0.0, pi]) + self.rng.normal(0, 0.3))

    def _place_lights(self) -> None:
        crossing = self.street.crossing
        distance = crossing[0] - 1.0 if crossing else float(self.rng.uniform(12, 24))
        if self.street.crosswalk is not None:
            distance = self.street.crosswalk[0] - 0.6
        right, left = self.street.sides[1], self.street.sides[0]
        arm = self.rng.random() < 0.45
        self._add("light arm" if arm else "light", right.curb + 0.6, distance)
        if self.rng.random() < 0.7:
            self._add("light", -(left.curb + 0.6), distance + float(self.rng.uniform(0, 1)))
        if crossing is not None and self.rng.random() < 0.6:
            self._add("light", right.curb + 0.7, crossing[1] + 1.0)

    def _place_sign(self) -> None:
        if self.street.place == "highway" and self.rng.random() < 0.6:
            self._add("gantry", 0.0, float(self.rng.uniform(16, 40)))
        else:
            self._beside("sign", 8, 24)

    def _beside(self, kind: str, nearest: float, farthest: float) -> None:
        side = self.street.sides[1 if self.rng.random() < 0.65 else 0]
        lateral = side.sign * (side.curb + 0.55)
        self._add(kind, lateral, float(self.rng.uniform(nearest, farthest)))

    def _place_tree(self, nearest: float, farthest: float) -> None:
        side = self.street.sides[int(self.rng.integers(2))]
        lateral = side.sign * (side.curb + (0.9 if side.walk else 3.0))
        self._add("tree", lateral, float(self.rng.uniform(nearest, farthest)), spread=0.2)

    # ------------------------------------------------------------------ remaining objects
    def _fill_lanes(self) -> None:
        rng = self.rng
        for lane, heading in self.street.lanes.all():
            distance = float(rng.uniform(9, 26) if lane == 0 else rng.uniform(6, 26))
            while distance < 95 and self.street.amount > 0:
                kind = self._traffic_kind()
                length = _LENGTHS[kind]
                free = self._claim(lane, distance + length / 2, length)
                if free:
                    lateral = lane + float(rng.normal(0, 0.18))
                    self._add(kind, lateral, distance + length / 2, heading)
                busy = self.street.preset.traffic * self.street.amount
                distance += length + 4 + float(rng.exponential(22 / max(busy, 0.1)))

    def _traffic_kind(self) -> str:
        kinds = ("car", "van", "truck", "bus", "motorcyclist", "cyclist")
        weights = {"highway": (76, 8, 11, 3, 2, 0), "industrial": (74, 10, 10, 3, 2, 1)}
        share = np.array(weights.get(self.street.place, (84, 8, 2, 1.5, 2.5, 2)), dtype=np.float64)
        return kinds[int(self.rng.choice(len(kinds), p=share / share.sum()))]

    def _parking_key(self, side: Side) -> float:
        return 1000.0 * side.sign

    def _place_parked_cars(self, side: Side) -> None:
        if not side.parking or self.street.amount == 0:
            return
        rng = self.rng
        distance = float(rng.uniform(4, 8))
        full = min(0.92, 0.62 * self.street.amount)
        while distance < 75:
            free = not self.street.in_crossing(distance - 3, distance + 3, 3.0) and (
                self.street.crosswalk is None
                or not self.street.crosswalk[0] - 5 < distance < self.street.crosswalk[1] + 4
            )
            if free and rng.random() < full and self._claim(self._parking_key(side), distance, 4.4):
                kind = "car" if rng.random() < 0.9 else "van"
                heading = 0.0 if side.sign > 0 else pi
                lateral = side.sign * (side.edge + 1.05 + float(rng.normal(0, 0.08)))
                self._add(kind, lateral, distance, heading + float(rng.normal(0, 0.02)))
            distance += float(rng.uniform(5.0, 6.4))

    def _place_furniture(self, side: Side) -> None:
        """Lamps, signs, bins, bollards and parked bicycles along the curb."""
        rng = self.rng
        lateral = side.sign * (side.curb + (0.55 if side.walk else 1.2))
        busy = self.street.amount
        if rng.random() < 0.75 and busy > 0:
            step = float(rng.uniform(18, 30))
            for distance in np.arange(float(rng.uniform(4, step)), 90, step):
                if not self.street.in_crossing(float(distance), float(distance)):
                    self._add("lamp", lateral, float(distance), spread=0.1)
        for kind, often, farthest in (
            ("sign", 1.1, 50), ("bin", 0.5, 30), ("pole", 0.6, 45), ("bicycle", 0.35, 30),
            ("cabinet", 0.25, 35),
        ):  # fmt: skip
            for _ in range(int(rng.poisson(often * busy * (0.5 if not side.walk else 1.0)))):
                distance = float(rng.uniform(8, farthest))
                if kind == "bicycle":
                    self._park_bicycles(side, 8, farthest)
                elif not self.street.in_crossing(distance, distance):
                    self._add(kind, lateral, distance)
        if side.walk and rng.random() < 0.12 * busy:
            for distance in np.arange(float(rng.uniform(6, 14)), float(rng.uniform(16, 30)), 1.8):
                self._add("bollard", side.sign * (side.curb + 0.35), float(distance))

    def _place_pedestrians(self, side: Side) -> None:
        rng = self.rng
        for _ in range(int(rng.poisson(3.0 * self.street.preset.people * self.street.amount))):
            distance = 7 + float(rng.exponential(18))
            if distance > 70:
                continue
            inner = max(side.walk, 1.2)
            lateral = side.curb + float(rng.uniform(0.25, 0.9)) * inner
            heading = self._walk()
            for number in range(int(rng.choice([1, 2, 3], p=[0.65, 0.25, 0.10]))):
                beside = lateral + 0.62 * number
                self._add("person", side.sign * beside, distance, heading, spread=0.08)

    def _place_plants(self, side: Side) -> None:
        """Place street trees in a row, and trees and bushes behind the property line."""
        if self.street.amount == 0:
            return
        rng, preset = self.rng, self.street.preset
        if rng.random() < 0.55 * preset.trees:
            step = float(rng.uniform(7, 13))
            lateral = side.curb + (0.9 if side.verge < 1.5 else side.walk + 0.5 * side.verge)
            for distance in np.arange(float(rng.uniform(5, 5 + step)), 100, step):
                if not self.street.in_crossing(float(distance), float(distance), 2.0):
                    shift = float(rng.normal(0, 0.2))
                    self._add("tree", side.sign * (lateral + shift), float(distance), spread=0.12)
        for _ in range(int(rng.poisson(7 * preset.trees))):
            distance = float(rng.uniform(7, 110))
            lateral = side.line + float(rng.uniform(1.0, 16.0))
            if self.street.in_crossing(distance, distance, 3.0) or self._is_built_up(
                side, distance, lateral
            ):
                continue
            kind = "tree" if rng.random() < 0.65 else "bush"
            self._add(kind, side.sign * lateral, distance, spread=0.25, behind=True)

    def _is_built_up(self, side: Side, distance: float, lateral: float) -> bool:
        """Whether a building is at or in front of this position."""
        return any(
            block.lateral * side.sign > 0
            and block.near - 2 < distance < block.far + 2
            and abs(block.lateral) < lateral + 2.5
            for block in self.street.blocks
        )
