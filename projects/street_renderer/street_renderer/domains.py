"""The styles of the domains that the demo data imitates.

The source, `gta5`, is a game: saturated, sharp, sunny, with little texture. The targets differ from
it, and from each other, in palette, texture, weather, camera and clutter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from street_renderer.style import PLACES, Lens, Place, Style

# fmt: off
_CITY: Mapping[Place, float] = {
    "downtown": 3, "street": 3, "residential": 2, "avenue": 2, "highway": 0.5, "rural": 0.5,
    "industrial": 1,
}

GTA5 = Style(
    name="gta5",
    palette={
        "zenith": ((58, 124, 222), (72, 140, 232)),
        "horizon": ((182, 214, 240), (236, 214, 178)),
        "cloud": ((252, 252, 252),),
        "asphalt": ((90, 91, 96), (100, 101, 106), (78, 79, 85)),
        "marking": ((236, 236, 236),),
        "center": ((240, 190, 40),),
        "sidewalk": ((190, 182, 168), (176, 170, 160)),
        "curb": ((208, 204, 194),),
        "terrain": ((96, 158, 52), (128, 158, 56), (170, 150, 92)),
        "leaves": ((44, 122, 40), (66, 140, 44), (36, 100, 44)),
        "trunk": ((112, 76, 48),),
        "facade": (
            (226, 208, 168), (208, 150, 112), (236, 232, 222), (176, 84, 64), (120, 140, 168),
            (222, 184, 112), (160, 172, 186), (196, 112, 92), (150, 150, 156),
        ),
        "glass": ((62, 108, 152), (76, 130, 170), (40, 74, 112)),
        "car": (
            (214, 28, 32), (24, 72, 176), (236, 196, 30), (238, 240, 242), (30, 32, 38),
            (38, 140, 72), (226, 112, 24), (168, 172, 180), (110, 40, 130),
        ),
        "clothes": (
            (220, 48, 48), (48, 98, 208), (240, 240, 236), (44, 46, 56), (240, 196, 52),
            (60, 150, 82), (160, 70, 160), (90, 110, 150),
        ),
        "bus": ((240, 194, 30), (226, 60, 40), (40, 120, 208), (236, 238, 240)),
    },
    conditions={
        ("clear", "day"): 0.62, ("overcast", "day"): 0.16, ("clear", "dusk"): 0.12,
        ("rain", "day"): 0.05, ("clear", "night"): 0.05,
    },
    places={
        "downtown": 3, "street": 1, "residential": 2, "avenue": 1.5, "highway": 2, "rural": 1,
        "industrial": 1.5,
    },
    clutter=0.85,
    texture=0.3,
    spread=7,
    sunlight=0.85,
    autumn=0.0,
    palms=0.35,
    lens=Lens(
        eye=(1.3, 1.7), horizon=(0.42, 0.52), view=(62, 76), blur=(0.40, 0.45), noise=(0, 0.6),
        saturation=(1.15, 1.35), contrast=(1.05, 1.15), hood=0.25,
    ),
)

SYNTHIA = Style(
    name="synthia",
    palette={
        "zenith": ((96, 150, 214), (120, 168, 216)),
        "horizon": ((206, 220, 232), (226, 222, 210)),
        "asphalt": ((116, 112, 108), (102, 98, 96), (126, 122, 118)),
        "center": ((232, 232, 226),),
        "sidewalk": ((178, 150, 128), (166, 158, 152), (150, 112, 96)),
        "curb": ((186, 182, 176),),
        "terrain": ((86, 140, 66), (110, 148, 70)),
        "leaves": ((60, 112, 50), (92, 130, 56), (52, 92, 52)),
        "facade": (
            (206, 150, 108), (230, 214, 176), (166, 74, 58), (190, 192, 194), (220, 176, 128),
            (142, 96, 76), (208, 206, 196),
        ),
        "car": (
            (200, 36, 36), (34, 82, 160), (220, 222, 222), (40, 42, 46), (70, 130, 76),
            (200, 170, 60), (140, 144, 150),
        ),
    },
    conditions={
        ("clear", "day"): 0.45, ("overcast", "day"): 0.2, ("clear", "dusk"): 0.1,
        ("snow", "day"): 0.07, ("rain", "day"): 0.08, ("fog", "day"): 0.04,
        ("clear", "night"): 0.06,
    },
    places=_CITY,
    clutter=1.1,
    texture=0.25,
    spread=6,
    sunlight=0.7,
    autumn=0.15,
    lens=Lens(
        eye=(1.4, 2.6), horizon=(0.36, 0.50), view=(75, 95), tilt=(-1.0, 1.0), blur=(0.40, 0.45),
        saturation=(1.05, 1.2), gamma=(0.9, 1.0),
    ),
)

CITYSCAPES = Style(
    name="cityscapes",
    palette={
        "zenith": ((206, 214, 218), (190, 204, 214)),
        "horizon": ((232, 234, 230), (222, 226, 224)),
        "cloud": ((238, 240, 238),),
        "asphalt": ((104, 106, 100), (92, 94, 90), (118, 116, 110)),
        "sidewalk": ((138, 132, 124), (126, 124, 118), (146, 128, 118)),
        "curb": ((150, 148, 142),),
        "terrain": ((92, 106, 66), (108, 112, 78), (126, 116, 92)),
        "leaves": ((56, 76, 46), (70, 88, 54), (46, 64, 44), (86, 96, 60)),
        "trunk": ((68, 62, 56), (84, 80, 74)),
        "facade": (
            (196, 188, 166), (170, 160, 144), (204, 202, 194), (140, 104, 88), (176, 172, 158),
            (150, 142, 130), (198, 184, 140), (128, 124, 120), (164, 128, 110),
        ),
        "roof": ((122, 72, 58), (98, 76, 68), (82, 82, 86)),
        "car": (
            (170, 174, 176), (204, 208, 208), (36, 38, 42), (70, 74, 80), (112, 116, 122),
            (46, 58, 82), (112, 40, 42), (88, 96, 90),
        ),
        "clothes": (
            (36, 38, 44), (56, 62, 78), (86, 84, 82), (112, 50, 50), (140, 138, 132),
            (60, 74, 66), (150, 132, 104),
        ),
        "bus": ((206, 178, 66), (176, 58, 50), (206, 210, 208), (88, 118, 150)),
    },
    conditions={
        ("overcast", "day"): 0.62, ("clear", "day"): 0.33, ("clear", "dusk"): 0.05,
    },
    places={
        "downtown": 2, "street": 4, "residential": 1.5, "avenue": 2, "highway": 0.2, "rural": 0.3,
        "industrial": 0.8,
    },
    clutter=1.5,
    texture=0.85,
    spread=10,
    sunlight=0.5,
    lens=Lens(
        eye=(1.15, 1.3), horizon=(0.38, 0.44), view=(48, 56), blur=(0.45, 0.65), noise=(1.5, 3.0),
        vignette=(0.05, 0.18), saturation=(0.62, 0.8), contrast=(0.85, 0.98),
        exposure=(0.95, 1.15), tint=(0.97, 1.03, 0.98), cast=0.02, hood=0.9,
    ),
)

BDD100K = Style(
    name="bdd100k",
    palette={
        "zenith": ((126, 158, 196), (176, 188, 200), (104, 142, 190)),
        "horizon": ((214, 218, 220), (228, 222, 210)),
        "asphalt": ((122, 118, 116), (104, 100, 100), (136, 130, 124)),
        "center": ((214, 168, 60),),
        "sidewalk": ((176, 170, 162), (160, 154, 148)),
        "terrain": ((118, 120, 66), (146, 130, 84), (98, 112, 60)),
        "leaves": ((64, 84, 44), (82, 94, 48), (52, 68, 42), (104, 104, 58)),
        "facade": (
            (178, 124, 100), (150, 88, 72), (200, 190, 176), (140, 134, 132), (168, 156, 140),
            (116, 106, 102), (210, 204, 196), (104, 118, 132),
        ),
        "car": (
            (222, 224, 226), (188, 190, 192), (34, 34, 38), (88, 90, 94), (140, 34, 36),
            (50, 70, 110), (130, 122, 108), (236, 196, 40),
        ),
    },
    conditions={
        ("clear", "day"): 0.34, ("overcast", "day"): 0.22, ("clear", "dusk"): 0.12,
        ("rain", "day"): 0.08, ("clear", "night"): 0.18, ("snow", "day"): 0.04,
        ("rain", "night"): 0.02,
    },
    places={
        "downtown": 2.5, "street": 1.5, "residential": 2, "avenue": 1.5, "highway": 2.5,
        "rural": 0.7, "industrial": 1.2,
    },
    clutter=1.15,
    texture=0.75,
    spread=14,
    sunlight=0.65,
    autumn=0.15,
    palms=0.06,
    lens=Lens(
        eye=(1.2, 1.6), horizon=(0.44, 0.56), view=(58, 72), aim=(0.40, 0.60), tilt=(-1.5, 1.5),
        blur=(0.55, 1.0), noise=(2.0, 5.0), vignette=(0.15, 0.4), saturation=(0.75, 1.0),
        contrast=(0.95, 1.2), exposure=(0.9, 1.2), gamma=(0.85, 1.15), tint=(1.04, 1.0, 0.95),
        cast=0.05, softness=(55, 85), hood=0.7,
    ),
)

MAPILLARY = Style(
    name="mapillary_vistas",
    palette={
        "zenith": ((84, 138, 210), (150, 176, 204), (200, 206, 212), (60, 116, 196)),
        "horizon": ((196, 212, 226), (226, 228, 228), (216, 208, 194)),
        "asphalt": ((110, 110, 112), (134, 128, 120), (88, 86, 86), (148, 142, 134)),
        "center": ((222, 222, 218), (222, 180, 70)),
        "sidewalk": ((170, 150, 130), (150, 146, 142), (188, 180, 170), (140, 104, 90)),
        "terrain": ((98, 130, 58), (150, 132, 82), (120, 140, 72), (164, 126, 84)),
        "leaves": ((54, 92, 40), (88, 116, 50), (44, 74, 44), (112, 124, 62), (70, 100, 70)),
        "facade": (
            (222, 206, 176), (196, 120, 92), (168, 188, 196), (230, 226, 216), (140, 84, 70),
            (206, 176, 96), (150, 164, 140), (180, 160, 150), (120, 116, 116), (214, 150, 130),
        ),
    },
    conditions={
        ("clear", "day"): 0.5, ("overcast", "day"): 0.28, ("clear", "dusk"): 0.06,
        ("rain", "day"): 0.05, ("snow", "day"): 0.05, ("fog", "day"): 0.03,
        ("clear", "night"): 0.03,
    },
    places=dict.fromkeys(PLACES, 1.0) | {"residential": 1.8, "rural": 1.6},
    clutter=1.35,
    texture=1.0,
    spread=18,
    sunlight=0.75,
    autumn=0.12,
    palms=0.12,
    lens=Lens(
        eye=(1.3, 2.2), horizon=(0.38, 0.60), view=(60, 95), aim=(0.34, 0.66), tilt=(-2.5, 2.5),
        blur=(0.45, 0.8), noise=(1.0, 4.0), vignette=(0.0, 0.25), saturation=(0.8, 1.15),
        contrast=(0.9, 1.2), exposure=(0.85, 1.15), gamma=(0.85, 1.2), cast=0.05,
        softness=(70, 92), hood=0.35,
    ),
)

_ACDC = replace(
    CITYSCAPES,
    name="acdc",
    places=_CITY,
    clutter=1.1,
    texture=0.85,
    lens=replace(
        CITYSCAPES.lens, horizon=(0.42, 0.50), view=(56, 66), hood=0.0, blur=(0.5, 0.8),
        noise=(1.5, 4.0), saturation=(0.7, 0.95), tint=(0.99, 1.0, 1.02),
    ),
)
# fmt: on

STYLES: dict[str, Style] = {
    "gta5": GTA5,
    "synthia": SYNTHIA,
    "cityscapes": CITYSCAPES,
    "bdd100k": BDD100K,
    "mapillary_vistas": MAPILLARY,
    "acdc_fog": replace(_ACDC, name="acdc_fog").under("fog", "day"),
    "acdc_night": replace(_ACDC, name="acdc_night", clutter=1.2).under("clear", "night"),
    "acdc_rain": replace(_ACDC, name="acdc_rain").under("rain", "day"),
    "acdc_snow": replace(_ACDC, name="acdc_snow", autumn=0.0).under("snow", "day"),
}
"""Style of each dataset of `clouds make-demo-data`."""


def get_style(name: str) -> Style:
    """The style with a name.

    Raises:
        ValueError: unknown name.
    """
    if name not in STYLES:
        raise ValueError(f"unknown style {name!r}; known: {', '.join(STYLES)}")
    return STYLES[name]
