"""Draws each `Thing` of a layout: shape, colors, surfaces."""

from __future__ import annotations

from collections.abc import Mapping
from math import cos, pi

import numpy as np

from clouds.data.label_space import IGNORE
from street_renderer.canvas import Canvas, Color, Glow, Surface
from street_renderer.figures import (
    Figure,
    Outfit,
    draw_bicycle,
    draw_cyclist,
    draw_motorcycle,
    draw_motorcyclist,
    draw_walker,
)
from street_renderer.layout import CLASSES, SceneLayout, Thing
from street_renderer.meshes import (
    CAR_SHAPES,
    Mesh,
    Point,
    bus_mesh,
    car_mesh,
    draw_mesh,
    tram_mesh,
    truck_mesh,
)
from street_renderer.shadows import FOOTPRINTS
from street_renderer.street_furniture import (
    draw_box,
    draw_gantry,
    draw_lamp,
    draw_plant,
    draw_post,
    draw_sign,
    draw_traffic_light,
)
from street_renderer.style import Look
from street_renderer.textures import Species

VEHICLES: Mapping[str, str] = {
    "car": "car", "van": "car", "truck": "truck", "bus": "bus", "tram": "train",
    "railcar": "train",
}  # fmt: skip
"""Types of object that are drawn as meshes, and their class."""
_FIGURES = ("person", "cyclist", "motorcyclist", "bicycle", "motorcycle")
_MIN_DISTANCE = 2.2
"""Minimum distance of the center of an object, meters; nearer ones are not drawn."""
_RESERVED, _RESERVED_BEHIND = 12, 110
"""Surface numbers that are reserved for later objects."""
_ID = {name: number for number, name in enumerate(CLASSES)}


def draw_thing(canvas: Canvas, rng: np.random.Generator, layout: SceneLayout, thing: Thing) -> None:
    """Draw one object if it may be visible."""
    lateral = thing.lateral + layout.bend_at(thing.distance)
    foot: Point = (lateral, 0.0, thing.distance)
    if thing.distance <= _MIN_DISTANCE or not _may_be_visible(canvas, foot, thing):
        return
    if canvas.free_surfaces < (_RESERVED_BEHIND if thing.behind else _RESERVED):
        return
    heading = thing.heading + layout.curve * min(thing.distance, 90.0)
    if thing.kind in VEHICLES:
        _draw_vehicle(canvas, rng, thing, foot, heading)
    elif thing.kind in _FIGURES:
        _draw_figure(canvas, rng, thing, foot, heading)
    elif thing.kind in ("tree", "bush"):
        _draw_tree(canvas, rng, thing, foot)
    else:
        _draw_furniture(canvas, rng, layout, thing, foot)


def _may_be_visible(canvas: Canvas, foot: Point, thing: Thing) -> bool:
    wide = thing.kind in VEHICLES or thing.kind in ("tree", "gantry", "light arm")
    reach = (18.0 if thing.kind == "gantry" else 8.0) if wide else 3.0
    unit = canvas.camera.pixels_per_meter(max(foot[2] - 0.6 * reach, 1.0))
    column = canvas.camera.center + foot[0] * unit
    margin = reach * unit
    return -margin < column < canvas.camera.columns + margin


# ---------------------------------------------------------------------- vehicles
def _mesh(thing: Thing) -> Mesh:
    if thing.kind == "car":
        return car_mesh(thing.variant % CAR_SHAPES)
    if thing.kind == "van":
        return car_mesh(CAR_SHAPES)
    if thing.kind == "truck":
        return truck_mesh(thing.variant % 3)
    if thing.kind == "bus":
        return bus_mesh(int(thing.variant % 4 == 0))
    return tram_mesh(0 if thing.kind == "tram" else 1 + thing.variant % 2)


def _draw_vehicle(
    canvas: Canvas, rng: np.random.Generator, thing: Thing, foot: Point, heading: float
) -> None:
    look = canvas.look
    name = VEHICLES[thing.kind]
    if thing.distance - FOOTPRINTS[thing.kind][1] * abs(cos(heading)) < 1.0:
        return
    surfaces = canvas.add_object(_ID[name], thing.distance)
    # All cars of a train have the same colors, drawn from the variant.
    chooser = np.random.default_rng(thing.variant) if name == "train" else rng
    scale = thing.scale if name == "car" else 0.5 + 0.5 * thing.scale
    snow = 0.7 if look.weather == "snow" else 0.0
    colors = _vehicle_colors(chooser, look, name)
    draw_mesh(canvas, _mesh(thing), foot, heading, scale, colors, surfaces, snow)
    if look.time != "day":
        _add_vehicle_glows(canvas, foot, heading, FOOTPRINTS[thing.kind])


def _vehicle_colors(rng: np.random.Generator, look: Look, name: str) -> dict[str, Color]:
    paint = look.color(rng, name)
    glass = look.color(rng, "glass")
    dark = look.time != "day"
    cargo = look.color(rng, "truck") if rng.random() < 0.6 else (222.0, 222.0, 218.0)
    return {
        "paint": paint,
        "roof": (0.5 * paint[0] + 100, 0.5 * paint[1] + 100, 0.5 * paint[2] + 100),
        "glass": (0.75 * glass[0], 0.75 * glass[1], 0.75 * glass[2]),
        "door": (0.55 * glass[0], 0.55 * glass[1], 0.55 * glass[2]),
        "tire": (30, 30, 32), "hub": (140, 142, 146), "trim": (48, 48, 52), "under": (22, 22, 24),
        "grille": (42, 44, 48), "plate": (226, 226, 214), "load": (128, 108, 80),
        "stripe": look.color(rng, "shop"), "cargo": cargo,
        "tail": (255, 44, 36) if dark else (176, 26, 28),
        "head": (255, 250, 226) if dark else (228, 230, 226),
        "display": (255, 190, 70) if dark else (54, 44, 24),
    }  # fmt: skip


def _add_vehicle_glows(
    canvas: Canvas, foot: Point, heading: float, footprint: tuple[float, float, float]
) -> None:
    half, length, _ = footprint
    if abs(cos(heading)) < 0.5:
        return
    away = cos(heading) > 0
    unit = canvas.camera.pixels_per_meter(foot[2])
    strength = 0.8 if canvas.look.night else 0.3
    color: Color = (255, 40, 30) if away else (255, 246, 220)
    radius = (0.5 if away else 0.9) * unit
    for side in (-0.8, 0.8):
        spot = (foot[0] + side * half, 0.75, foot[2] - length)
        center = canvas.camera.project_point(spot)
        canvas.glows.append(Glow(center, (radius, radius), color, strength))


# ---------------------------------------------------------------------- people and two-wheelers
def _draw_figure(
    canvas: Canvas, rng: np.random.Generator, thing: Thing, foot: Point, heading: float
) -> None:
    look = canvas.look
    figure = Figure(canvas, foot, heading, thing.scale)
    if thing.kind == "person":
        surface, _ = canvas.add_object(_ID["person"], thing.distance)
        swing = float(rng.choice([0.0, 0.45, -0.45, 0.3])) + float(rng.normal(0, 0.08))
        draw_walker(figure, _outfit(rng, look, walking=True), swing, surface)
    elif thing.kind in ("cyclist", "bicycle"):
        surface, _ = canvas.add_object(_ID["bicycle"], thing.distance)
        draw_bicycle(figure, look.color(rng, "bike"), surface)
        if thing.kind == "cyclist":
            surface, _ = canvas.add_object(_ID["rider"], thing.distance)
            outfit = _outfit(rng, look, walking=False)
            draw_cyclist(figure, outfit, float(rng.uniform(0, pi)), surface)
    else:
        plain, lamp = canvas.add_object(_ID["motorcycle"], thing.distance)
        draw_motorcycle(figure, look.color(rng, "car"), plain, lamp)
        if thing.kind == "motorcyclist":
            surface, _ = canvas.add_object(_ID["rider"], thing.distance)
            helmet = look.color(rng, "car")
            draw_motorcyclist(figure, _outfit(rng, look, walking=False), helmet, surface)
    figure.draw()


def _outfit(rng: np.random.Generator, look: Look, walking: bool) -> Outfit:
    wet = look.weather in ("rain", "snow")
    umbrella = walking and wet and rng.random() < 0.4
    return Outfit(
        top=look.color(rng, "clothes"),
        bottom=look.color(rng, "clothes"),
        skin=look.color(rng, "skin"),
        hair=look.color(rng, "hair"),
        skirt=bool(walking and rng.random() < 0.2),
        bag=look.color(rng, "clothes") if rng.random() < 0.3 else None,
        umbrella=look.color(rng, "clothes") if umbrella else None,
    )


# ---------------------------------------------------------------------- plants and furniture
_TREES: Mapping[Species, tuple[float, float]] = {
    # width of the crown, height in meters
    "round": (5.6, 7.5), "tall": (4.0, 10.0), "conifer": (4.4, 9.0), "palm": (4.8, 9.5),
    "bare": (6.0, 7.0),
}  # fmt: skip
_SPECIES: tuple[Species, ...] = ("round", "round", "tall", "conifer")


def _draw_tree(canvas: Canvas, rng: np.random.Generator, thing: Thing, foot: Point) -> None:
    look = canvas.look
    leaves = look.color(rng, "autumn" if rng.random() < look.style.autumn else "leaves")
    winter = look.weather == "snow"
    species: Species = "bush"
    size = (2.2 * thing.scale, 1.3 * thing.scale)
    if thing.kind == "tree":
        species = _SPECIES[thing.variant % len(_SPECIES)]
        if rng.random() < look.style.palms and not winter:
            species = "palm"
        elif winter and species != "conifer" and rng.random() < 0.65:
            species = "bare"
        grown = thing.scale * (0.8 + 0.1 * (thing.variant // 4 % 5))
        wide, high = _TREES[species]
        size = (wide * grown, high * grown)
    surface = canvas.add_surface(Surface(_ID["vegetation"], thing.distance, 0.6))
    bark = look.color(rng, "trunk")
    snow = 0.75 if winter else 0.0
    draw_plant(canvas, foot, species, thing.variant, size, leaves, bark, surface, snow)


def _draw_furniture(
    canvas: Canvas, rng: np.random.Generator, layout: SceneLayout, thing: Thing, foot: Point
) -> None:
    look = canvas.look
    if thing.kind in ("bin", "cabinet"):
        surface, _ = canvas.add_object(IGNORE, thing.distance)
        size = (0.6, 1.0) if thing.kind == "bin" else (0.9, 1.25)
        draw_box(canvas, foot, size, look.color(rng, "fence"), surface)
        return
    post = look.color(rng, "pole")
    pole, shining = canvas.add_object(_ID["pole"], thing.distance)
    if thing.kind == "lamp":
        draw_lamp(canvas, foot, thing.variant, post, pole, shining)
    elif thing.kind == "bollard":
        draw_post(canvas, foot, 1.0, 0.14, post, pole)
    elif thing.kind == "pole":
        draw_post(canvas, foot, 3.0 + 0.5 * (thing.variant % 8), 0.14, post, pole)
    elif thing.kind in ("light", "light arm"):
        housing, shining = canvas.add_object(_ID["traffic light"], thing.distance)
        arm = min(0.8 * abs(foot[0]), 6.0) if thing.kind == "light arm" else 0.0
        draw_traffic_light(canvas, foot, thing.variant, post, (pole, housing, shining), arm)
    else:
        face, _ = canvas.add_object(_ID["traffic sign"], thing.distance)
        if thing.kind == "gantry":
            shift = layout.bend_at(thing.distance)
            left, right = (edge + shift for edge in layout.road)
            ends = (left - 0.8, 0.0, thing.distance), (right + 0.8, 0.0, thing.distance)
            draw_gantry(canvas, ends[0], ends[1], (post, (24, 104, 70)), pole, face)
        else:
            colors = (post, look.color(rng, "sign"))
            draw_sign(canvas, foot, thing.variant, colors, pole, face)
