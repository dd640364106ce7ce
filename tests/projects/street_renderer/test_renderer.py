"""The renderer: pinhole geometry, exact labels, requests, appearance, reproducibility."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from dataclasses import replace

import cv2
import numpy as np
import pytest
from street_renderer import STYLES, Contents, get_style, render, render_scene
from street_renderer.camera import Camera
from street_renderer.layout import Band, Barrier, Block, SceneLayout, Thing
from street_renderer.renderer import render_layout
from street_renderer.style import PLACES, Grade, Look

NAMES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
    "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train",
    "motorcycle", "bicycle",
)  # fmt: skip
ID = {name: number for number, name in enumerate(NAMES)}

FOCAL, EYE, HORIZON, CENTER = 400.0, 1.4, 110.0, 256.0
EDGE = 6.0


def look(**changes) -> Look:
    """A camera with round numbers, and light without effects."""
    style = replace(get_style("gta5"), texture=0.0, spread=0.0)
    grade = Grade(0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, (1.0, 1.0, 1.0), 100, False)
    camera = Camera(256, 512, FOCAL, EYE, HORIZON, CENTER, 0.0)
    plain = Look(style, "overcast", "day", camera, grade, (0.0, 1.0, 0.0), 0.0)
    return replace(plain, **changes)


PLAIN = look()


def layout(*things: Thing, **changes) -> SceneLayout:
    """A straight road, 12 m wide, between endless footpaths."""
    bands = (
        Band(-400, -EDGE, "sidewalk"),
        Band(-EDGE, EDGE, "road"),
        Band(EDGE, 400, "sidewalk"),
    )
    empty = SceneLayout(
        "street", 0.0, bands, (), None, None, (), (), (), tuple(things), "bare"
    )  # fmt: skip
    return replace(empty, **changes)


def draw(*things: Thing, seed: int = 0, look: Look = PLAIN, **changes):
    return render_layout(np.random.default_rng(seed), layout(*things, **changes), look)


def column(lateral: float, distance: float) -> float:
    return CENTER + FOCAL * lateral / distance


def row(height: float, distance: float) -> float:
    return HORIZON + FOCAL * (EYE - height) / distance


def box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """First and last row, first and last column of a mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return rows[0], rows[-1], columns[0], columns[-1]


# ---------------------------------------------------------------------- geometry
def test_ground_and_sky_are_at_the_rows_of_the_pinhole_formula():
    label = draw().label
    assert set(np.unique(label)) == {ID["road"], ID["sidewalk"], ID["sky"]}
    assert (label[: int(HORIZON)] == ID["sky"]).all()
    for r in range(int(HORIZON) + 4, 256, 7):
        distance = FOCAL * EYE / (r - HORIZON)
        left, right = column(-EDGE, distance), column(EDGE, distance)
        columns = np.arange(512)
        inside = (columns > left + 1.5) & (columns < right - 1.5)
        outside = (columns < left - 1.5) | (columns > right + 1.5)
        assert (label[r, inside] == ID["road"]).all()
        assert (label[r, outside] == ID["sidewalk"]).all()


def test_a_tilted_camera_rotates_the_horizon():
    tilted = look(camera=Camera(256, 512, FOCAL, EYE, HORIZON, CENTER, np.radians(5)))
    sky = draw(look=tilted).label == ID["sky"]
    left, right = sky[:, 0].sum(), sky[:, -1].sum()
    # The right end of the horizon sinks: tan(5 degrees) over 511 columns.
    assert right - left == pytest.approx(np.tan(np.radians(5)) * 511, abs=2)


def test_size_of_a_car_at_a_distance():
    distance = 12.0
    label = draw(Thing("car", 0.5, distance, variant=0)).label
    top, bottom, left, right = box(label == ID["car"])
    rear = distance - 2.3  # a sedan is 4.6 m long and 1.82 m wide
    assert right - left == pytest.approx(1.82 * FOCAL / rear, abs=3)
    assert 0.5 * (left + right) == pytest.approx(column(0.5, rear), abs=3)
    assert top == pytest.approx(row(1.45, distance - 1.0), abs=3)  # roof, a meter behind the middle
    rear_tires = distance - 1.41 - 0.3
    assert bottom == pytest.approx(row(0.0, rear_tires), abs=3)


def test_a_person_twice_as_far_is_half_as_large():
    heights = []
    for distance in (10.0, 20.0):
        label = draw(Thing("person", 1.0, distance, variant=3)).label
        top, bottom, *_ = box(label == ID["person"])
        assert bottom == pytest.approx(row(0.0, distance), abs=4)
        heights.append(bottom - top)
    assert heights[0] / heights[1] == pytest.approx(2.0, rel=0.1)
    assert heights[0] == pytest.approx(1.75 * FOCAL / 10, rel=0.1)


def test_a_building_covers_its_front_and_occludes_objects_behind():
    block = Block("tower", 10.0, 20.0, 40.0, 8.0, 15.0)
    label = draw(blocks=(block,)).label
    building = label == ID["building"]
    # Well inside the front: at 30 m, from the ground to 8 m up.
    middle = round(column(10.0, 30.0))
    assert building[round(row(7.0, 30.0)) : round(row(1.0, 30.0)), middle].all()
    assert not building[: round(row(8.6, 30.0)), middle].any()
    assert not building[:, : round(column(10.0, 41.0))].any()


def test_near_objects_occlude_far_ones_in_any_order_of_the_list():
    car, bus = Thing("car", 0.0, 10.0, variant=0), Thing("bus", 0.0, 25.0, variant=1)
    first, second = draw(car, bus), draw(bus, car)
    assert np.array_equal(first.label, second.label)
    center = round(row(0.8, 8.0)), round(CENTER)
    assert first.label[center] == ID["car"]
    assert (first.label == ID["bus"]).any()
    assert np.array_equal(first.label == ID["car"], draw(car).label == ID["car"])


# ---------------------------------------------------------------------- exact labels
KINDS = {
    "car": {"car"}, "van": {"car"}, "truck": {"truck"}, "bus": {"bus"}, "tram": {"train"},
    "railcar": {"train"}, "person": {"person"}, "bicycle": {"bicycle"},
    "cyclist": {"bicycle", "rider"}, "motorcycle": {"motorcycle"},
    "motorcyclist": {"motorcycle", "rider"}, "tree": {"vegetation"}, "bush": {"vegetation"},
    "lamp": {"pole"}, "pole": {"pole"}, "bollard": {"pole"}, "sign": {"pole", "traffic sign"},
    "light": {"pole", "traffic light"}, "light arm": {"pole", "traffic light"},
    "gantry": {"pole", "traffic sign"}, "bin": {None}, "cabinet": {None},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_an_object_changes_the_image_only_where_it_is_labeled(kind):
    distance = 30.0 if kind == "gantry" else 14.0  # its boards hang high
    thing = Thing(kind, 2.0, distance, 0.4, variant=7)
    without, rendered = draw(), draw(thing)
    changed = without.label != rendered.label
    names = {None if c == 255 else NAMES[c] for c in np.unique(rendered.label[changed])}
    assert names == KINDS[kind]
    changed_pixels = (without.image != rendered.image).any(axis=2)
    outside = changed_pixels & ~changed
    # Outside the mask only the shadow may change the image: near the foot, and never brighter.
    rows, columns = np.nonzero(outside)
    if len(rows):
        assert (rendered.image[outside] <= without.image[outside]).all()
        assert rows.min() > HORIZON
        foot = row(0.0, distance), column(2.0, distance)
        assert np.abs(rows - foot[0]).max() < 60
        assert np.abs(columns - foot[1]).max() < 7 * FOCAL / distance
    assert changed_pixels[changed].mean() > 0.6  # inside the mask the image changes


@pytest.mark.parametrize(
    ("kind", "name"), [("wall", "wall"), ("fence", "fence"), ("hedge", "vegetation")]
)
def test_see_through_barriers_are_labeled_as_a_whole(kind, name):
    barrier = Barrier(kind, 5.0, 10.0, 16.0, 1.5, 1)
    without, rendered = draw(), draw(barriers=(barrier,))
    changed = without.label != rendered.label
    assert set(np.unique(rendered.label[changed])) == {ID[name]}
    corners = [(column(5.0, z), row(y, z)) for z, y in ((10, 1.5), (16, 1.5), (16, 0), (10, 0))]
    expected = np.zeros((256, 512), np.uint8)
    cv2.fillConvexPoly(expected, np.round(corners).astype(np.int32), 1)
    agree = (expected > 0) & changed
    assert agree.sum() / ((expected > 0) | changed).sum() > 0.95
    assert ((without.image != rendered.image).any(axis=2) <= changed).all()


def test_instances_differ_between_objects():
    scene = draw(Thing("car", -3.0, 15.0), Thing("car", 3.0, 15.0, variant=1))
    numbers = np.unique(scene.instances[scene.label == ID["car"]])
    assert len(numbers) == 2
    assert 0 not in numbers
    assert (scene.instances[scene.label == ID["road"]] == 0).all()


def test_the_hood_has_no_label():
    grade = replace(look().grade, hood=True)
    label = draw(look=look(grade=grade)).label
    assert (label[-3:, 200:312] == 255).all()
    assert (label[:200] != 255).all()


# ---------------------------------------------------------------------- whole scenes
@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    """Labels of the source and the three targets, (104, 128, 256)."""
    styles = ("gta5", "cityscapes", "bdd100k", "mapillary_vistas")
    return np.stack(
        [
            render(np.random.default_rng((number, n)), STYLES[style], size=(128, 256))[1]
            for number, style in enumerate(styles)
            for n in range(26)
        ]
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_class_is_in_enough_images(labels, name):
    seen = (labels == ID[name]).sum(axis=(1, 2)) >= 8
    assert seen.mean() >= 0.08


def test_labels_have_only_train_ids(labels):
    assert set(np.unique(labels)) == {*range(19), 255}


def test_sky_is_above_the_road_in_every_image(labels):
    rows = np.arange(128)[:, None]
    for label in labels:
        sky, road = label == ID["sky"], label == ID["road"]
        assert road.mean() > 0.04
        if sky.sum() > 50:
            assert (rows * sky).sum() / sky.sum() < 70
            assert (rows * sky).sum() / sky.sum() + 20 < (rows * road).sum() / road.sum()
    assert (labels[:, -30:] == ID["sky"]).mean() < 0.002


def test_scenes_differ(labels):
    assert len({hashlib.sha256(label.tobytes()).digest() for label in labels}) == len(labels)


# ---------------------------------------------------------------------- requests
@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("road", "sky")])
def test_wanted_classes_are_visible_and_unwanted_ones_are_not(name):
    num_visible = 0
    for n, place in enumerate(PLACES):
        wanted, unwanted = Contents(place, wanted=(name,)), Contents(place, unwanted=(name,))
        _, label = render(np.random.default_rng(n), STYLES["gta5"], wanted, (128, 256))
        num_visible += (label == ID[name]).sum() >= 4
        _, label = render(np.random.default_rng(n), STYLES["synthia"], unwanted, (64, 128))
        assert not (label == ID[name]).any()
    assert num_visible >= 6  # of 7; nearer objects may occlude it


def test_several_wanted_classes_at_once():
    wanted = ("train", "bus", "truck", "rider", "person")
    visible = []
    for n in range(8):
        contents = Contents("downtown", wanted=wanted)
        _, label = render(np.random.default_rng(n), STYLES["cityscapes"], contents, (128, 256))
        visible.append(np.mean([(label == ID[name]).sum() >= 8 for name in wanted]))
    assert np.mean(visible) > 0.85


def test_density_zero_leaves_an_empty_street():
    for n in range(5):
        contents = Contents(density=0.0)
        _, label = render(np.random.default_rng(n), STYLES["gta5"], contents, (128, 256))
        things = [ID[name] for name in NAMES[11:]]
        assert not np.isin(label, things).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"place": "moon"}, "unknown place 'moon'; known: downtown, street"),
        ({"wanted": ("cars",)}, "unknown class 'cars'; known: road, sidewalk"),
        ({"wanted": ("bus",), "unwanted": ("bus",)}, "both wanted and unwanted: bus"),
        ({"density": -1.0}, "density is -1.0; allowed are 0 to 4"),
    ],
)
def test_invalid_contents_are_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        Contents(**arguments)


def test_names_of_styles_and_weather_are_checked():
    with pytest.raises(ValueError, match="unknown style 'kitti'; known: gta5, synthia"):
        get_style("kitti")
    with pytest.raises(ValueError, match="unknown weather 'hail'; known: clear, overcast"):
        get_style("gta5").under("hail")
    with pytest.raises(ValueError, match="unknown time of day 'noon'; known: day, dusk, night"):
        get_style("gta5").under(time="noon")


# ---------------------------------------------------------------------- appearance
def brightness(style, n: int) -> tuple[np.ndarray, np.ndarray]:
    image, label = render(np.random.default_rng(n), style, Contents("avenue"), (128, 256))
    return image.astype(float).mean(axis=2), label


def test_weather_and_time_of_day_change_the_image_and_not_the_street():
    base = get_style("cityscapes")
    for n in range(4):
        day, label = brightness(base.under("overcast", "day"), n)
        night, at_night = brightness(base.under("clear", "night"), n)
        snow, _ = brightness(base.under("snow", "day"), n)
        _, in_fog = brightness(base.under("fog", "day"), n)
        assert np.array_equal(label, in_fog)
        assert np.array_equal(label, at_night)
        assert night.mean() < 0.5 * day.mean()
        ground = np.isin(label, (ID["terrain"], ID["sidewalk"]))
        if ground.sum() > 200:
            assert snow[ground].mean() > day[ground].mean() + 15


def test_fog_reduces_contrast_exponentially():
    def contrast(distance: float, weather: str) -> float:
        """How much a car stands out against the empty street."""
        seen = look(weather=weather)
        car = Thing("car", 0.0, distance, variant=0)
        without, rendered = draw(look=seen), draw(car, look=seen)
        mask = rendered.label == ID["car"]
        return np.abs(rendered.image[mask].astype(float) - without.image[mask]).mean()

    near = contrast(12.0, "fog") / contrast(12.0, "overcast")
    far = contrast(80.0, "fog") / contrast(80.0, "overcast")
    # Visibility is 31 to 72 m, so 68 m more leave exp(-68/31) to exp(-68/72) of the contrast; the
    # street behind the far car is fogged as well.
    assert 0.05 < far / near < 0.45


def test_the_game_is_more_saturated_than_the_target():
    def saturations(style: str) -> np.ndarray:
        colors: dict[str, list] = {"car": [], "vegetation": []}
        for n in range(12):
            image, label = render(
                np.random.default_rng(n), STYLES[style].under("clear", "day"), None, (96, 192)
            )
            saturation = np.ptp(image.astype(float), axis=2)
            for name, values in colors.items():
                values.append(saturation[label == ID[name]])
        return np.array([np.concatenate(values).mean() for values in colors.values()])

    game, target = saturations("gta5"), saturations("cityscapes")
    assert (game > 1.5 * target).all()


# ---------------------------------------------------------------------- repeatability, sizes, speed
def test_an_image_depends_only_on_its_seed():
    def image(n: int) -> bytes:
        image, label = render(
            np.random.default_rng((5, n)), STYLES["mapillary_vistas"], None, (96, 160)
        )
        return image.tobytes() + label.tobytes()

    forward = [image(n) for n in range(4)]
    backward = [image(n) for n in reversed(range(4))]
    assert forward == backward[::-1]
    assert len(set(forward)) == 4


def test_another_process_renders_the_same_image_without_torch():
    code = (
        "import sys, hashlib, numpy as np\n"
        "from street_renderer import STYLES, render\n"
        "image, label = render(np.random.default_rng((5, 2)), STYLES['bdd100k'], None, (96, 160))\n"
        "assert 'torch' not in sys.modules\n"
        "print(hashlib.sha256(image.tobytes() + label.tobytes()).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    image, label = render(np.random.default_rng((5, 2)), STYLES["bdd100k"], None, (96, 160))
    here = hashlib.sha256(image.tobytes() + label.tobytes()).hexdigest()
    assert done.stdout.strip() == here


@pytest.mark.parametrize("size", [(64, 64), (70, 300), (200, 90), (300, 1100)])
def test_any_size_can_be_rendered(size):
    scene = render_scene(np.random.default_rng(0), STYLES["bdd100k"], None, size)
    assert scene.image.shape == (*size, 3)
    assert scene.image.dtype == np.uint8
    assert scene.label.shape == scene.instances.shape == size
    assert scene.label.dtype == np.uint8


def test_a_too_small_image_is_an_error():
    with pytest.raises(ValueError, match=r"63x512 \(rows x columns\); both must be at least 64"):
        render(np.random.default_rng(0), STYLES["gta5"], None, (63, 512))


def test_a_crowded_scene_with_more_objects_than_surfaces():
    contents = Contents("downtown", density=4.0)
    for style in ("acdc_night", "mapillary_vistas"):
        scene = render_scene(np.random.default_rng(2), STYLES[style], contents, (128, 256))
        assert set(np.unique(scene.label)) <= {*range(19), 255}
        assert (scene.label == ID["car"]).any()


@pytest.mark.slow
def test_at_least_ten_images_a_second_even_on_a_busy_core():
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        for style in STYLES:  # fills the caches of noise and sprites
            render(np.random.default_rng(0), STYLES[style])
        start = time.process_time()
        for style in STYLES:
            for n in range(5):
                render(np.random.default_rng(n), STYLES[style])
        assert 5 * len(STYLES) / (time.process_time() - start) > 10
    finally:
        cv2.setNumThreads(threads)
