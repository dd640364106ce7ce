"""Rendered street scenes with exact labels: training and test data without a download.

    image, label = render(np.random.default_rng(0), get_style("cityscapes").under("rain"),
                          Contents(place="downtown", wanted=("bus", "person")))

style, palette, domains        appearance of a domain: colors, weather, time of day, camera, clutter
layout                         objects of a scene and their positions; `Contents` is a request
layout_sampler, object_placer  draw a random layout (with place_presets and street_plan)
renderer                       layout and style -> image and label
pretraining_style              scenes for pre-training, away from the looks of the demo
dataset_writer, demo_data      images as files in the layouts of the real datasets
dataset_sheet                  overview image of such files
prompt_reader, prompt_lexicon  prompt -> classes, weather, time of day, place, ...
generator                      the image generator `procedural` of clouds.generation
make_demo_data, demo           the commands `clouds make-demo-data` and `clouds demo`

camera, canvas, objects, meshes, figures, street_furniture, buildings, ground, shadows, sky,
textures, weather and lens are parts of the renderer.
"""

from street_renderer.domains import STYLES, get_style
from street_renderer.layout import Contents
from street_renderer.renderer import RenderedScene, render, render_scene
from street_renderer.style import Style

__all__ = [
    "STYLES",
    "Contents",
    "RenderedScene",
    "Style",
    "get_style",
    "render",
    "render_scene",
]
