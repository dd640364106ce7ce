"""Classes, palette and id mappings against the documentation of the datasets."""

from __future__ import annotations

import numpy as np
import pytest

from clouds.data.datasets.builtin import builtin_datasets
from clouds.data.label_space import CITYSCAPES_19, IGNORE

MAPPINGS = {
    key: builtin_datasets()[name].label_formats[-1].ids
    for key, name in {
        "cityscapes": "cityscapes_val",
        "gta": "gta5",
        "synthia": "synthia",
        "mapillary": "mapillary_val",
        "camvid": "camvid_val",
        "train ids": "bdd_val",
        "idd": "idd_val",
        "wilddash": "wilddash2",
    }.items()
}


def labels():
    return pytest.importorskip("cityscapesscripts.helpers.labels").labels


def test_names_and_palette_are_those_of_cityscapes_scripts():
    scored = {label.trainId: label for label in labels() if 0 <= label.trainId < 19}
    assert CITYSCAPES_19.num_classes == len(scored) == 19
    for train_id, label in scored.items():
        assert CITYSCAPES_19.names[train_id] == label.name
        assert CITYSCAPES_19.colors[train_id] == label.color


@pytest.mark.parametrize("which", ["cityscapes", "gta"])
def test_cityscapes_ids_are_those_of_cityscapes_scripts(which):
    raw = np.array([[label.id % 256 for label in labels()]], np.uint8)
    expected = [label.trainId if 0 <= label.trainId < 19 else 255 for label in labels()]
    assert MAPPINGS[which].apply(raw).tolist() == [expected]
    assert MAPPINGS[which].unknown_ids(raw) == ()


# names as the datasets document them: (raw id, name there, train id here)
SYNTHIA = [
    (0, "void", 255),
    (1, "sky", 10),
    (2, "building", 2),
    (3, "road", 0),
    (4, "sidewalk", 1),
    (5, "fence", 4),
    (6, "vegetation", 8),
    (7, "pole", 5),
    (8, "car", 13),
    (9, "traffic sign", 7),
    (10, "pedestrian", 11),
    (11, "bicycle", 18),
    (12, "motorcycle", 17),
    (13, "parking slot", 255),
    (14, "road work", 255),
    (15, "traffic light", 6),
    (16, "terrain", 9),
    (17, "rider", 12),
    (18, "truck", 14),
    (19, "bus", 15),
    (20, "train", 16),
    (21, "wall", 3),
    (22, "lane marking", 255),
]
MAPILLARY = [
    (0, "bird", 255),
    (2, "curb", 1),
    (3, "fence", 4),
    (6, "wall", 3),
    (12, "rail track", 255),
    (13, "road", 0),
    (15, "sidewalk", 1),
    (17, "building", 2),
    (19, "person", 11),
    (20, "bicyclist", 12),
    (21, "motorcyclist", 12),
    (22, "other rider", 12),
    (24, "lane marking", 0),
    (27, "sky", 10),
    (29, "terrain", 9),
    (30, "vegetation", 8),
    (41, "manhole", 0),
    (45, "pole", 5),
    (47, "utility pole", 5),
    (48, "traffic light", 6),
    (49, "traffic sign, back", 255),
    (50, "traffic sign, front", 7),
    (52, "bicycle", 18),
    (54, "bus", 15),
    (55, "car", 13),
    (57, "motorcycle", 17),
    (58, "on rails", 16),
    (61, "truck", 14),
    (65, "unlabelled", 255),
]
CAMVID = [
    (0, "sky", 10),
    (1, "building", 2),
    (2, "pole", 5),
    (3, "road", 0),
    (4, "pavement", 1),
    (5, "tree", 8),
    (6, "sign", 7),
    (7, "fence", 4),
    (8, "car", 13),
    (9, "pedestrian", 11),
    (10, "bicyclist", 12),
    (11, "void", 255),
]
# id, csTrainId of AutoNUE's labels: id -> name
IDD = [
    (0, "road", 0),
    (1, "parking", 255),
    (2, "drivable fallback", 255),
    (3, "sidewalk", 1),
    (4, "rail track", 255),
    (5, "non-drivable fallback", 9),
    (6, "person", 11),
    (7, "animal", 255),
    (8, "rider", 12),
    (9, "motorcycle", 17),
    (10, "bicycle", 18),
    (11, "autorickshaw", 255),
    (12, "car", 13),
    (13, "truck", 14),
    (14, "bus", 15),
    (15, "caravan", 255),
    (16, "trailer", 255),
    (17, "train", 16),
    (18, "vehicle fallback", 255),
    (19, "curb", 255),
    (20, "wall", 3),
    (21, "fence", 4),
    (22, "guard rail", 255),
    (23, "billboard", 255),
    (24, "traffic sign", 7),
    (25, "traffic light", 6),
    (26, "pole", 5),
    (27, "polegroup", 255),
    (28, "obstacle, structure, barrier fallback", 255),
    (29, "building", 2),
    (30, "bridge", 255),
    (31, "tunnel", 255),
    (32, "vegetation", 8),
    (33, "sky", 10),
    (34, "fallback background", 255),
    (35, "unlabeled", 255),
    (39, "license plate", 255),
]


@pytest.mark.parametrize(
    "which,rows", [("synthia", SYNTHIA), ("mapillary", MAPILLARY), ("camvid", CAMVID), ("idd", IDD)]
)
def test_ids_by_their_documented_names(which, rows):
    raw = np.array([[row[0] for row in rows]], np.uint8)
    assert MAPPINGS[which].apply(raw)[0].tolist() == [row[2] for row in rows]
    assert MAPPINGS[which].unknown_ids(raw) == ()


@pytest.mark.parametrize(
    "which,scored,known",
    [
        ("cityscapes", 19, 35),
        ("gta", 19, 36),
        ("synthia", 19, 23),
        ("mapillary", 25, 66),  # 19 classes, of which four collect 3 + 2 + 2 + 3 ids
        ("camvid", 11, 12),
        ("train ids", 19, 20),
        ("idd", 19, 41),
        # Cityscapes' 19; 10 more of road, 4 of sidewalk, 3 of rider, 2 of pole, 5 single ones
        ("wilddash", 19 + 10 + 4 + 3 + 2 + 5, 82),
    ],
)
def test_number_of_scored_and_of_known_ids(which, scored, known):
    every = np.arange(256, dtype=np.uint8)[None]
    assert (MAPPINGS[which].apply(every) != IGNORE).sum() == scored
    assert len(MAPPINGS[which].unknown_ids(every)) == 256 - known


def test_wilddash_ids():
    """Cityscapes' ids, and the further ones of WildDash 2 by train id."""
    further = {
        0: [38, 41, 43, 61, 64, 70, 74, 75, 76, 79],
        1: [52, 65, 77, 80],
        3: [56],
        5: [45, 46],
        9: [78],
        12: [47, 48, 49],
        13: [35],
        14: [34],
        17: [58],
    }
    expected = {raw: train_id for train_id, ids in further.items() for raw in ids}
    every = np.arange(256, dtype=np.uint8)[None]
    city = MAPPINGS["cityscapes"].apply(every)[0]
    found = MAPPINGS["wilddash"].apply(every)[0]
    assert found.tolist() == [expected.get(raw, city[raw]) for raw in range(256)]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_unknown_ids_are_reported_and_ignored_in_any_type(dtype):
    raw = np.array([[7, 11, 200], [60, 33, 0]]).astype(dtype)
    assert MAPPINGS["cityscapes"].unknown_ids(raw) == (60, 200)
    assert MAPPINGS["cityscapes"].apply(raw).tolist() == [[0, 2, 255], [255, 18, 255]]


def test_ids_outside_of_a_byte():
    raw = np.array([[-1, 7, 263]])  # 263 % 256 == 7
    assert MAPPINGS["cityscapes"].unknown_ids(raw) == (-1, 263)
    assert MAPPINGS["cityscapes"].apply(raw).tolist() == [[255, 0, 255]]


@pytest.mark.parametrize(
    ("raw", "train_ids", "unknown"),
    [
        ([0, 18, 255, 256], [0, 18, 255, 255], (256,)),
        ([256], [255], (256,)),
        ([-1, 7], [255, 7], (-1,)),
        ([7, 263], [7, 255], (263,)),
        ([0, -256, 1 << 40], [0, 255, 255], (-256, 1 << 40)),
        ([], [], ()),
    ],
)
def test_ids_at_the_borders_of_a_byte(raw, train_ids, unknown):
    array = np.array([raw], np.int64)
    assert MAPPINGS["train ids"].apply(array).tolist() == [train_ids]
    assert MAPPINGS["train ids"].unknown_ids(array) == unknown


def test_strided_views_give_the_same_ids():
    raw = np.random.default_rng(0).integers(0, 40, (10, 14), dtype=np.uint8)
    for view in (raw[:, ::-1], raw.T, raw[::2, 1::3]):
        mapping = MAPPINGS["cityscapes"]
        assert np.array_equal(mapping.apply(view), mapping.apply(view.astype(np.int64)))
        assert mapping.unknown_ids(view) == mapping.unknown_ids(view.astype(np.int64))


@pytest.mark.parametrize("which", MAPPINGS)
def test_inverse_gives_one_raw_id_per_class_and_one_to_ignore(which):
    mapping = MAPPINGS[which]
    inverse = mapping.inverse()
    assert sorted(inverse) == [*mapping.classes, IGNORE]
    for train_id, raw_id in inverse.items():
        assert mapping.apply(np.array([[raw_id]], np.uint8)).item() == train_id


def test_inverse_uses_the_typical_id():
    inverse = MAPPINGS["mapillary"].inverse()
    assert (inverse[0], inverse[1], inverse[5]) == (13, 15, 45)  # road, sidewalk, pole


def test_synonyms_are_those_of_the_published_prompts():
    # 14 templates make 840 prompts of them
    assert sum(len(words) for words in CITYSCAPES_19.synonyms) == 840 // 14
    assert len(CITYSCAPES_19.synonyms) == 19
    assert CITYSCAPES_19.synonyms[11] == ("person",)
    assert CITYSCAPES_19.synonyms[8] == ("vegetation", "tree", "trees", "palm tree", "bushes")
    assert all(word == word.strip() != "" for words in CITYSCAPES_19.synonyms for word in words)


def test_colorize():
    label = np.array([[0, 13], [255, 18]], np.uint8)
    colors = CITYSCAPES_19.colorize(label)
    assert colors.dtype == np.uint8
    assert colors.tolist() == [[[128, 64, 128], [0, 0, 142]], [[0, 0, 0], [119, 11, 32]]]
