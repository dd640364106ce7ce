"""Painted street scenes with exact labels: training and test data that need no download.

    image, label = paint(np.random.default_rng(0), get_style("cityscapes").under("rain"),
                         Contents(place="downtown", wanted=("bus", "person")))

style, palette, domains     how a domain looks: colors, weather, time of day, camera, clutter
layout                      what is in a scene, in metres; `Contents` is a request for it
architect, traffic          draw up a layout (with plans and street_plan)
painter                     a layout in a style -> picture and label
writers, demo_data          pictures as files in the layouts of the real datasets
contact_sheet               what such files look like

camera, canvas, objects, meshes, figures, street, buildings, ground, shadows, sky, textures,
weather and lens are the painter's parts.
"""

from clouds.scenes.domains import STYLES, get_style
from clouds.scenes.layout import Contents
from clouds.scenes.painter import Painting, paint, paint_scene
from clouds.scenes.style import Style

__all__ = ["STYLES", "Contents", "Painting", "Style", "get_style", "paint", "paint_scene"]
