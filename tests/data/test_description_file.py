"""Datasets that a user describes in a YAML file."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from dataset_files import random_image, save
from tiny_model import tiny_config

import clouds
from clouds.config import ConfigError, load_config
from clouds.config.config import resolve
from clouds.data.build import build_train_loader, check_training_data
from clouds.data.datasets import Datasets, forget_listings
from clouds.data.datasets.description_file import load_descriptions
from clouds.data.label_space import CITYSCAPES_19, LabelSpace
from clouds.data.structures import Domain
from clouds.data.yaml_section import DescriptionError
from clouds.engine.checkpoint import Checkpointer
from clouds.modeling.build import build_seeded

CAMPUS = """\
name: campus
splits:
  train: {images: train/images, labels: train/labels}
  val: {images: /elsewhere/images, labels: val/labels}
classes:
  - {name: road, ids: [0, 17], color: [1, 2, 3], words: [road, street]}
  - {name: Tree, ids: 3}
  - {name: tuk-tuk, ids: [5-7]}
ignore_ids: [255, 20-22]
"""


@pytest.fixture(autouse=True)
def fresh():
    forget_listings()


@pytest.fixture
def campus(tmp_path):
    path = tmp_path / "campus.yaml"
    path.write_text(CAMPUS)
    return path


def write_pair(folder, name, raw):
    save(folder / f"images/{name}.png", random_image(1, raw.shape[:2]))
    save(folder / f"labels/{name}.png", raw)


def datasets(path, train=("campus_train",), **keys):
    return Datasets.of(train, (str(path),), **keys)


def test_a_description_of_two_splits(campus, tmp_path):
    train, val = load_descriptions(str(campus))
    assert (train.name, val.name) == ("campus_train", "campus_val")
    assert (train.domain, val.domain) == (Domain.SOURCE, Domain.TARGET)
    assert train.label_space == LabelSpace(
        "campus", ("road", "Tree", "tuk-tuk"), (), (("road", "street"), ("Tree",), ("tuk-tuk",))
    )
    assert train.label_formats[0].channel == "index"
    assert train.label_space.colors[0] == (1, 2, 3) and len(set(train.label_space.colors)) == 3
    write_pair(tmp_path / "train", "a", np.array([[0, 17, 3], [5, 6, 7], [255, 20, 22]], np.uint8))
    dataset = datasets(campus).get("campus_train")
    (record,) = dataset.records()
    assert record.image == tmp_path / "train/images/a.png"
    assert dataset.read_label(record).tolist() == [[0, 0, 1], [2, 2, 2], [255, 255, 255]]
    assert datasets(campus).get("campus_val").listing().images.as_posix() == "/elsewhere/images"


def test_unknown_ids_name_the_description(campus, tmp_path):
    write_pair(tmp_path / "train", "a", np.array([[0, 4]], np.uint8))
    dataset = datasets(campus).get("campus_train")
    with pytest.raises(
        ValueError, match=r"a\.png: contains the ids 4, .*\(0, 3, 5-7, 17, 20-22, "
    ) as error:
        dataset.read_label(dataset.records()[0])
    assert f"Add them to the ids of a class or to ignore_ids: {campus}." in str(error.value)


def test_one_dataset_without_splits_in_classes_of_cityscapes(tmp_path):
    path = tmp_path / "lab.yaml"
    path.write_text(
        "name: lab\nimages: i\nlabels: l\nroot: data\nlabel_space: cityscapes_19\nids: train_ids\n"
    )
    (lab,) = load_descriptions(str(path))
    assert lab.name == "lab" and lab.label_space == CITYSCAPES_19 and lab.domain is Domain.SOURCE
    assert lab.label_formats[0].ids.raw_ids == {i: (i,) for i in range(19)}
    assert lab.described_root == tmp_path / "data"


def test_ids_of_a_label_space_that_the_file_only_names(tmp_path):
    """By Cityscapes' documentation 7 is road, 26 car, 4 static, which does not count."""
    path = tmp_path / "lab.yaml"
    path.write_text("name: lab\nimages: i\nlabels: l\nlabel_space: cityscapes_19\n")
    (lab,) = load_descriptions(str(path))
    ids = lab.label_formats[0].ids
    assert ids.apply(np.array([[7, 26, 4]], np.uint8)).tolist() == [[0, 13, 255]]
    assert ids.unknown_ids(np.array([[7, 4, 35]], np.uint8)) == (35,)


def test_label_formats_of_a_description(tmp_path):
    path = tmp_path / "lab.yaml"
    text = "name: lab\nimages: i\nlabels: l\nclasses: [{name: road}, {name: tree}]\n"
    path.write_text(
        f"{text}label_formats:\n"
        "  - {suffix: _id.png, stored_as: red, ids: {tree: [3-4], road: 9}, ignore_ids: 0}\n"
        "  - {ids: train_ids}\n"
    )
    (lab,) = load_descriptions(str(path))
    red, plain = lab.label_formats
    assert (red.suffix, red.channel, red.ids.raw_ids) == ("_id.png", "red", {0: (9,), 1: (3, 4)})
    assert (plain.suffix, plain.channel, plain.ids.raw_ids) == (".png", "index", {0: (0,), 1: (1,)})
    assert (red.ids.ignore_ids, plain.ids.ignore_ids) == ((0,), (255,))
    assert red.ids.name == "label ids of lab (0, 3-4, 9)"
    path.write_text(f"{text}ids: train_ids\nlabel_suffix: _id.png\n")
    assert load_descriptions(str(path))[0].label_formats[0].suffix == "_id.png"
    path.write_text(f"{text}ids: {{tree: 3, lawn: 4}}\n")
    with pytest.raises(
        DescriptionError, match=r"'ids' is .* names of classes: road, tree; 'lawn' is"
    ):
        load_descriptions(str(path))
    path.write_text(f"{text}label_formats:\n  - {{ids: train_ids, sufix: .png}}\n")
    with pytest.raises(DescriptionError, match="'sufix' is not known here; did you mean 'suffix'"):
        load_descriptions(str(path))


def test_the_palette_of_a_label_space(tmp_path):
    path = tmp_path / "lab.yaml"
    path.write_text(
        "name: lab\nimages: i\nlabels: l\nlabel_space: cityscapes_19\n"
        "ids: {road: 13, car: 55}\nignore_ids: 65\npalette: mapillary_65\n"
    )
    (lab,) = load_descriptions(str(path))
    published = {13: (128, 64, 128), 55: (0, 0, 142), 65: (0, 0, 0)}  # Mapillary's config file
    assert dict(lab.label_formats[0].colors) == published
    path.write_text(path.read_text().replace("mapillary_65", "coco"))
    with pytest.raises(DescriptionError, match="'palette' is 'coco'; allowed is "):
        load_descriptions(str(path))


COLORS = """\
name: drawn
images: images
labels: labels
stored_as: color
classes:
  - {name: road, color: [128, 0, 0]}
  - {name: tree, color: [0, 9, 0], label_colors: [[0, 99, 0], [0, 0, 77]]}
ignore_colors: [[255, 255, 255], [0, 0, 0]]
"""


def test_labels_of_colors(tmp_path):
    (tmp_path / "drawn.yaml").write_text(COLORS)
    colors = {"road": (128, 0, 0), "leaf": (0, 99, 0), "trunk": (0, 0, 77), "white": (255,) * 3}
    rows = [["road", "leaf", "trunk"], ["white", "road", "leaf"]]
    write_pair(tmp_path, "a", np.array([[colors[n] for n in row] for row in rows], np.uint8))
    dataset = datasets(tmp_path / "drawn.yaml", ("drawn",)).get("drawn")
    (record,) = dataset.records()
    assert dataset.read_label(record).tolist() == [[0, 1, 1], [255, 0, 1]]
    # the color in visualizations is none of the label files
    write_pair(tmp_path, "a", np.full((4, 5, 3), (0, 9, 0), np.uint8))
    with pytest.raises(ValueError, match=r"a\.png: 100 % of its pixels have the colors \(0, 9, 0"):
        dataset.read_label(record)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (", color: [128, 0, 0]", "", "no 'color' of road. With 'stored_as: color' each class"),
        ("[0, 0, 77]]", "[128, 0, 0]]", r"\[128, 0, 0\] is the color of road and of tree; a color"),
        ("[0, 0, 0]]", "[0, 99, 0]]", r"\[0, 99, 0\] is the color of tree and of ignored; a color"),
    ],
)
def test_labels_of_colors_that_are_not_described(tmp_path, old, new, words):
    path = tmp_path / "drawn.yaml"
    path.write_text(COLORS.replace(old, new, 1))
    with pytest.raises(DescriptionError, match=rf"drawn\.yaml: {words}"):
        load_descriptions(str(path))


BAD = [
    ("name: campus", "name: ../x", r"'name' is '\.\./x'; allowed is a name of letters"),
    ("name: campus", "nam: campus", "'name' is missing"),
    ("name: campus", "name: gta5\nimages: i", "'images' is not known here"),
    ("splits:", "split:", "'images' is missing"),
    ("classes:", "class:", "'classes' is missing"),
    ("{name: Tree, ids: 3}", "{name: Tree}", "no 'ids' of Tree. Give each class its ids"),
    ("{name: Tree, ids: 3}", "{ids: 3}", r"classes\[1\]: 'name' is missing; allowed is the name"),
    ("{name: Tree, ids: 3}", "{name: '', ids: 3}", r"classes\[1\]: 'name' is ''"),
    ("ids: 3", "ids: 17", "the id 17 belongs to road and to Tree"),
    ("ids: 3", "ids: -1", r"classes\[1\]: 'ids' is -1; allowed is a list of ids from 0 to 65535"),
    ("ids: 3", "ids: 3.5", "'ids' is 3.5"),
    ("ids: 3", "ids: 9-4", "'ids' is '9-4'"),
    ("ids: 3", "ids: 3, colour: [1, 2, 3]", "'colour' is not known here; did you mean 'color'"),
    ("name: Tree", "name: ROAD", "more than one class is named 'road'"),
    ("name: Tree", "name: 'a=b'", "a name without any of = ,"),
    ("[1, 2, 3]", "[1, 2, 300]", r"'color' is \[1, 2, 300\]; allowed is a color"),
    ("[road, street]", "[road, '']", "'words' is "),
    ("[road, street]", "[road, road]", "different texts"),
    ("train: {images: train/images", "train: {image: train/images", "train: 'images' is missing"),
    ("ignore_ids:", "stored_as: green\nignore_ids:", "'stored_as' is 'green'; allowed is index or"),
    ("ignore_ids:", "label_space: coco\nignore_ids:", "'label_space' is 'coco'"),
    ("ignore_ids:", "size_mismatch: 3\nignore_ids:", "'size_mismatch' is 3; allowed is error or"),
    ("ignore_ids:", "classes_present: [rode]\nignore_ids:", "'rode' is none"),
    ("ignore_ids:", "- x\nignore_ids:", "not valid YAML"),
    (CAMPUS, "3", "a mapping .* is expected, not 3"),
    (CAMPUS, "", "a mapping .* is expected, not None"),
]


@pytest.mark.parametrize(("old", "new", "words"), BAD)
def test_descriptions_that_are_not_valid(campus, old, new, words):
    assert old in CAMPUS
    campus.write_text(CAMPUS.replace(old, new, 1))
    with pytest.raises(DescriptionError, match=words) as error:
        load_descriptions(str(campus))
    assert str(campus) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=words):
        load_config(None, ["DATASETS.DESCRIPTIONS", f"('{campus}',)"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        (b"\xff\xfe", "not a YAML text file"),
        ("dir", "a YAML file is exp"),
    ],
)
def test_descriptions_that_cannot_be_read(tmp_path, content, words):
    path = tmp_path / "x.yaml"
    if content == "dir":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        load_config(None, ["DATASETS.DESCRIPTIONS", f"('{path}',)"])


def test_names_that_are_taken(campus, tmp_path):
    for name, words in (("gta5", "the name of a dataset of CLOUDS"), ("sd_x", "generated images")):
        path = tmp_path / f"{name}.yaml"
        text = CAMPUS.replace("name: campus", f"name: {name}").replace("splits:\n", "")
        text = text.replace("  train: {images: train/images, labels: train/labels}\n", "")
        text = text.replace("  val: {images: /elsewhere/images, labels: val/labels}\n", "")
        path.write_text(text + "images: i\nlabels: l\n")
        with pytest.raises(DescriptionError, match=words):
            datasets(path)
    with pytest.raises(DescriptionError, match="describes 'campus_train' more than once"):
        Datasets.of((), (str(campus), str(campus)))


def test_a_config_with_a_description_is_independent_of_the_file(campus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = ["DATASETS.TRAIN", "('campus_train',)", "DATASETS.TEST", "('campus_val',)"]
    cfg = load_config(None, ["DATASETS.DESCRIPTIONS", "('campus.yaml',)", *overrides])
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 3
    campus.unlink()
    monkeypatch.chdir("/")
    again = Datasets.from_config(cfg)
    assert again.label_space.names == ("road", "Tree", "tuk-tuk")
    assert again.get("campus_train").listing().images == tmp_path / "train/images"
    text = repr(tuple(cfg.DATASETS.DESCRIPTIONS))
    assert load_config(None, ["DATASETS.DESCRIPTIONS", text, *overrides]) == cfg


def test_the_label_space_is_named_or_that_of_all_sources(campus):
    both = ("campus_train", "gta5")
    with pytest.raises(ValueError, match=r"campus_train \(campus, 3 classes\), gta5 .*LABEL_SPACE"):
        datasets(campus, both).label_space  # noqa: B018
    assert datasets(campus, both, label_space="cityscapes_19").label_space == CITYSCAPES_19
    own = datasets(campus, both, label_space="campus")
    assert own.label_space.names == ("road", "Tree", "tuk-tuk")
    assert own.get("gta5").classes_present == (0,) and "car" in own.get("gta5").unmapped_classes
    with pytest.raises(ValueError, match=r"is 'coco'; allowed are cityscapes_19, .*, campus"):
        datasets(campus, both, label_space="coco").label_space  # noqa: B018


def test_a_label_space_that_does_not_exist_is_a_problem_of_the_config():
    for train in ("()", "('gta5',)", "('sd_x',)"):
        words = ["DATASETS.TRAIN", train, "DATASETS.LABEL_SPACE", "coco", "DATASETS.TEST", "()"]
        with pytest.raises(ConfigError, match="LABEL_SPACE is 'coco'; allowed are cityscapes_19"):
            load_config(None, words)


def test_classes_are_mapped_by_name_and_by_the_class_map(campus):
    """GTA's ids of road (7), vegetation (21) and car (26) in the classes of campus."""
    keys = {"label_space": "campus", "class_map": ("gta*: vegetation=tree, car=TUK-TUK",)}
    found = datasets(campus, ("campus_train", "gta5"), **keys)
    ids = found.get("gta5").label_formats[-1].ids
    assert ids.raw_ids == {0: (7,), 1: (21,), 2: (26,)}
    assert ids.apply(np.array([[7, 21, 26, 27, 0]], np.uint8)).tolist() == [[0, 1, 2, 255, 255]]
    assert ids.unknown_ids(np.array([[27, 0, 90]], np.uint8)) == (90,)
    assert found.get("campus_train").label_formats[0].ids.raw_ids[2] == (5, 6, 7)


def test_classes_are_merged_or_left_out_by_the_class_map(campus):
    """GTA's ids 7, 8 and 21 are road, sidewalk and vegetation."""
    keys = {"label_space": "campus", "class_map": ("gta5: sidewalk=road, vegetation=tree",)}
    gta = datasets(campus, ("campus_train", "gta5"), **keys).get("gta5")
    assert gta.label_formats[-1].ids.raw_ids == {0: (7, 8), 1: (21,)}
    assert gta.label_space.names == ("road", "Tree", "tuk-tuk")
    keys["class_map"] = ("gta5: road=, vegetation=tree",)
    gta = datasets(campus, ("campus_train", "gta5"), **keys).get("gta5")
    ids = gta.label_formats[-1].ids
    assert ids.raw_ids == {1: (21,)} and ids.unknown_ids(np.array([[7, 8]])) == ()
    assert gta.classes_present == (1,) and "road" in gta.unmapped_classes


def test_the_classes_of_a_described_label_set_in_another_label_space(campus):
    """Tuk-tuks have ids, but are not in the label set that a mean over classes is taken of."""
    campus.write_text(CAMPUS + "classes_present: [Tree, road]\n")
    keys = {
        "label_space": "cityscapes_19",
        "class_map": ("campus_*: tuk-tuk=car, tree=vegetation",),
    }
    dataset = datasets(campus, **keys).get("campus_train")
    assert dataset.label_formats[0].ids.classes == (0, 8, 13)
    assert dataset.classes_present == (0, 8)


def test_no_class_in_common(campus):
    """An error, but not of generated images, whose labels are optional: they have none then."""
    campus.write_text(CAMPUS.replace("name: road", "name: lane"))
    keys = {"label_space": "campus"}
    generated = datasets(campus, ("campus_train", "sd_x"), **keys).get("sd_x")
    assert generated.label_space.names == ("lane", "Tree", "tuk-tuk")
    assert generated.label_formats == () and generated.classes_present == ()
    words = (
        r"gta5: none of its classes \(road, .* space campus \(lane, Tree, .* \"\('gta5: road=lane"
    )
    with pytest.raises(ValueError, match=words):
        datasets(campus, ("campus_train", "gta5"), **keys).get("gta5")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("gta5", "allowed is '<dataset"),
        ("gta5: car", "allowed is '<dataset"),
        ("gta5: =road", "allowed is '<dataset"),
        ("gta5: boat=road", "'boat' is no class of cityscapes_19"),
        ("gta5: car=boat", "'boat' is no class of campus; these are road, Tree, tuk-tuk"),
        ("bdd_*: car=road", "is about no dataset of"),
    ],
)
def test_class_maps_that_are_not_valid(campus, entry, words):
    overrides = ["DATASETS.TRAIN", "('campus_train', 'gta5')", "DATASETS.LABEL_SPACE", "campus"]
    described = ["DATASETS.DESCRIPTIONS", f"('{campus}',)", "DATASETS.TEST", "('campus_val',)"]
    with pytest.raises(ConfigError, match=words):
        load_config(None, [*described, *overrides, "DATASETS.CLASS_MAP", repr((entry,))])


def test_training_tells_what_does_not_count(campus, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_pair(tmp_path / "train", "a", np.kron([[3, 0]], np.ones((64, 32))).astype(np.uint8))
    write_pair(tmp_path / "gta5", "b", np.full((64, 64), 7, np.uint8))
    cfg = tiny_config()
    cfg.DATASETS.TRAIN = ("campus_train", "gta5")
    cfg.DATASETS.DESCRIPTIONS = (str(campus),)
    cfg.DATASETS.LABEL_SPACE = "cityscapes_19"
    cfg.DATALOADER.NUM_WORKERS = 0
    check_training_data(cfg)
    with caplog.at_level(logging.WARNING, "clouds"):
        batch = next(iter(build_train_loader(cfg)))
    assert "campus_train: pixels of the classes Tree, tuk-tuk do not count" in caplog.text
    values = {name: set() for name in cfg.DATASETS.TRAIN}
    for sample in batch:
        values[sample["dataset"]] |= set(sample["sem_seg"].unique().tolist())
    assert values["campus_train"] == {0, 255} and values["gta5"] == {0, 255}


def test_a_checkpoint_keeps_the_classes(campus, tmp_path):
    """It is loaded on a machine without the description, for prediction."""
    cfg = tiny_config(
        DATASETS__DESCRIPTIONS=(str(campus),),
        DATASETS__TRAIN=("campus_train",),
        DATASETS__TEST=("campus_val",),
        MODEL__SEM_SEG_HEAD__NUM_CLASSES=0,
    )
    resolve(cfg)
    provenance = {"config": cfg.dump()}
    Checkpointer(build_seeded(cfg), str(tmp_path), provenance=provenance).save("a", iteration=1)
    campus.unlink()
    segmenter = clouds.load(tmp_path / "a.pth")
    result = segmenter(random_image(3, (64, 64)))
    assert result.label_space.names == ("road", "Tree", "tuk-tuk")
    assert result.label_space.colors[0] == (1, 2, 3)
