"""Published YAML files and configs of earlier versions load; keys without effect are reported."""

from __future__ import annotations

import ast
import json
import logging
import re
from pathlib import Path

import pytest
import yaml
from reference_files import REFERENCE

import clouds
from clouds.config import KEYS, ConfigError, load_config
from clouds.config.compat import (
    COMPAT_KEYS,
    FIXED,
    NO_EFFECT,
    OTHER_NETWORKS,
    RENAMED,
    TRANSLATED,
)
from clouds.config.config import get_value
from clouds.modeling import CLIP

FILE = REFERENCE / "published_configs.json"
FILES = json.loads(FILE.read_text()) if FILE.is_file() else {}
NAMES = sorted(FILES) or [
    pytest.param("", marks=pytest.mark.skip(reason=f"no published configs at {FILE}"))
]
OTHERS = ("segmentation/base_config.yaml", "segmentation/mask2former_config.yaml")
OURS = {key.name: key for key in KEYS}

needs_files = pytest.mark.skipif(not FILES, reason=f"no published configs at {FILE}")

# Keys of Mask2Former's, FC-CLIP's and CLOUDS' own config code that no published CLOUDS file sets.
ELSEWHERE = {
    *(
        f"MODEL.SWIN.{name}"
        for name in (
            "PRETRAIN_IMG_SIZE PATCH_SIZE EMBED_DIM DEPTHS NUM_HEADS WINDOW_SIZE MLP_RATIO "
            "QKV_BIAS QK_SCALE DROP_RATE ATTN_DROP_RATE DROP_PATH_RATE APE PATCH_NORM "
            "OUT_FEATURES USE_CHECKPOINT"
        ).split()
    ),
    *(
        f"MODEL.FC_CLIP.{name}"
        for name in (
            "CLIP_MODEL_NAME CLIP_PRETRAINED_WEIGHTS EMBED_DIM GEOMETRIC_ENSEMBLE_ALPHA "
            "GEOMETRIC_ENSEMBLE_BETA ENSEMBLE_ON_VALID_MASK"
        ).split()
    ),
    "MODEL.CLOUDS.SAM.MOBILE",
    "MODEL.CLOUDS.OVERWRITING",
    "INPUT.SIZE_DIVISIBILITY",
    "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA",
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS",
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS",
    "MODEL.MASK_FORMER.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE",
    "WANDB.NAME",
    "INPUT.RESIZE_HEIGHT",
    "INPUT.RESIZE_WIDTH",
    "INPUT.PL_THRESHOLD",
    "INPUT.RESIZE.SIZE_TRAIN",
    "MODEL.FLASH",
    "MODEL.SAVE_PSEUDO_LABELS",
}

# Keys of earlier versions of this project that the published code does not have.
EARLIER = {
    "MODEL.CLOUDS.PSEUDO_LABEL.VOID_WEIGHT",
    "MODEL.CLOUDS.SAM.CACHE_GIB",
    "MODEL.CLOUDS.SAM.COMPONENTS_AT_ONCE",
    "MODEL.CLOUDS.SUPERPIXEL.RULER",
    "MODEL.CLOUDS.TEXT_CACHE_DIR",
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_POINTS",
    "TEST.PICTURES",
}

SMALL = [
    *("MODEL.DEVICE", "cpu"),
    *("MODEL.CLOUDS.CLIP_PRETRAINED_WEIGHTS", ""),
    *("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "1"),
    *("MODEL.MASK_FORMER.DEC_LAYERS", "2"),
    *("MODEL.MASK_FORMER.DIM_FEEDFORWARD", "64"),
]


def nested(config):
    """From dotted names, as the recorded files have them, to sections, as YAML has them."""
    tree = {}
    for name, value in config.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def write(folder, name, **more):
    path = folder / "published.yaml"
    path.write_text(yaml.safe_dump(nested({**FILES[name], **more})))
    return path


def plain(value):
    """As Python has it: the files write tuples as text; lists and tuples are the same here."""
    if isinstance(value, str) and value[:1] in ("(", "["):
        value = ast.literal_eval(value)
    return tuple(value) if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("name", [n for n in NAMES if n not in OTHERS])
def test_a_published_file_loads_and_all_that_it_says_arrives(name, tmp_path):
    cfg = load_config(write(tmp_path, name))
    said = FILES[name]
    arrived = {key: plain(get_value(cfg, key)) for key in said if key in OURS}
    assert arrived == {key: plain(value) for key, value in said.items() if key in OURS}
    assert len(arrived) > 45
    for matters in (
        "SOLVER.BASE_LR",
        "SOLVER.MAX_ITER",
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE",
        "DATASETS.TRAIN",
        "DATASETS.TEST",
        "TEST.EVAL_PERIOD",
        "MODEL.CLOUDS.CLIP_MODEL_NAME",
        "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME",
        "MODEL.PIXEL_MEAN",
    ):
        assert matters in arrived
    # The rest of the recipe is fixed in the published code, not in its files.
    assert cfg.INPUT.CROP.SIZE == (768, 768)
    assert cfg.INPUT.SCALE_RANGE == (0.5, 2.0)
    assert (cfg.SOLVER.WEIGHT_DECAY_NORM, cfg.SOLVER.WEIGHT_DECAY_EMBED) == (0.0, 0.0)
    assert cfg.MODEL.BACKBONE.FREEZE


@pytest.mark.parametrize("name", NAMES)
def test_no_key_of_a_published_file_is_unknown(name):
    assert [key for key in FILES[name] if key not in OURS.keys() | COMPAT_KEYS] == []


@pytest.mark.parametrize("name", [n for n in NAMES if n not in OTHERS])
def test_one_warning_names_what_changes_nothing(name, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        load_config(write(tmp_path, name))
    (record,) = caplog.records
    text = record.getMessage()
    words = text.replace(",", " ").replace(":", " ").split()
    for key in FILES[name]:
        if key in COMPAT_KEYS:
            assert words.count(key) == int(key in NO_EFFECT), key


@needs_files
@pytest.mark.parametrize("name", OTHERS)
def test_files_of_another_network_say_which_base_to_take(name, tmp_path):
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, name))
    text = str(error.value)
    assert "MODEL.BACKBONE.NAME = 'build_resnet_backbone'" in text
    assert "segmentation/clouds_config.yaml" in text
    assert all(" = " in problem for problem in error.value.problems)  # values, no unknown key
    if "mask2former" in name:
        for key in (
            "MODEL.META_ARCHITECTURE = 'MaskFormer'",
            "MODEL.SEM_SEG_HEAD.NAME = 'MaskFormerHead'",
            "MODEL.MASK_FORMER.TEST.INSTANCE_ON = True",
            "MODEL.MASK_FORMER.TEST.PANOPTIC_ON = True",
        ):
            assert key in text


@needs_files
def test_what_a_base_says_of_another_network_may_be_replaced(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(nested(FILES[OTHERS[0]])))
    leaf = tmp_path / "leaf.yaml"
    leaf.write_text(
        "_BASE_: base.yaml\nMODEL: {BACKBONE: {NAME: CLIP}}\nDATASETS: {TRAIN: [gta5]}\n"
    )
    assert load_config(leaf).MODEL.BACKBONE.NAME == "CLIP"


@needs_files
def test_an_invented_key_is_an_error_beside_published_ones(tmp_path):
    path = write(tmp_path, "warmup/gta/train_gta.yaml", **{"WANDB.PROJECTS": "a", "INPUT.MAX": 1})
    with pytest.raises(ConfigError) as error:
        load_config(path, ["SOLVER.BASE_LRR", "1"])
    found = {line.split(" ")[0]: line for line in error.value.problems}
    assert set(found) == {"WANDB.PROJECTS", "INPUT.MAX", "SOLVER.BASE_LRR"}
    assert all("no such key" in line for line in found.values())
    assert found["SOLVER.BASE_LRR"].endswith("did you mean SOLVER.BASE_LR?")


def test_no_key_of_the_table_is_invented_or_one_of_ours():
    assert OURS.keys().isdisjoint(COMPAT_KEYS)
    if FILES:
        there = {key for config in FILES.values() for key in config}
        assert sorted(set(COMPAT_KEYS) - there - ELSEWHERE - EARLIER) == []
    assert len(RENAMED) + len(FIXED) + len(NO_EFFECT) == len(COMPAT_KEYS)
    assert set(RENAMED.values()) <= OURS.keys()
    assert {name for name, _ in OTHER_NETWORKS} <= OURS.keys()
    assert all(NO_EFFECT.values()) and all(hint for _, hint in FIXED.values())
    assert TRANSLATED.keys() <= RENAMED.keys() and all(TRANSLATED.values())


def test_names_of_fc_clip_are_ours(tmp_path):
    path = tmp_path / "fc_clip.yaml"
    path.write_text("MODEL: {FC_CLIP: {CLIP_MODEL_NAME: RN50, GEOMETRIC_ENSEMBLE_ALPHA: 0.3}}\n")
    options = load_config(path).MODEL.CLOUDS
    assert (options.CLIP_MODEL_NAME, options.GEOMETRIC_ENSEMBLE_ALPHA) == ("RN50", 0.3)
    # A later setting of the key's own name counts, as always.
    again = load_config(path, ["MODEL.CLOUDS.CLIP_MODEL_NAME", "RN101"])
    assert again.MODEL.CLOUDS.CLIP_MODEL_NAME == "RN101"


@pytest.mark.parametrize(("mobile", "ours"), [("True", "mobile"), ("False", "vit_h")])
def test_a_renamed_key_may_have_other_values_here(mobile, ours):
    assert ours == load_config(None, ["MODEL.CLOUDS.SAM.MOBILE", mobile]).MODEL.CLOUDS.SAM.MODEL


def test_a_wrong_value_of_a_renamed_key_is_an_error():
    with pytest.raises(ConfigError, match=r"SAM.MOBILE = 'vit_b' .*its name is now .*SAM.MODEL"):
        load_config(None, ["MODEL.CLOUDS.SAM.MOBILE", "vit_b"])


@pytest.mark.parametrize("name", FIXED)
def test_other_values_of_a_kept_key_are_errors(name):
    value, _ = FIXED[name]
    load_config(None, [name, str(value)])
    other = {bool: str(not value), int: "7", str: "other"}[type(value)]
    with pytest.raises(ConfigError, match=rf"{name} = '{other}' \(override\): allowed is "):
        load_config(None, [name, other])


def test_a_config_of_ours_warns_of_nothing(caplog):
    load_config(None, ["MODEL.CLOUDS.SAM.ENABLED", "False", "INPUT.FORMAT", "RGB"])
    assert caplog.records == []


@needs_files
@pytest.mark.parametrize(
    ("name", "clip"),
    [
        ("warmup/gta/train_gta.yaml", "clouds_tiny"),
        ("warmup/synthia/train_syn_r50.yaml", "clouds_tiny_resnet"),
        ("joint_training/cityscapes/train_jt_city_r101.yaml", "clouds_tiny_resnet"),
        ("segmentation/clouds_config.yaml", "clouds_tiny"),
    ],
)
def test_a_model_is_built_from_a_published_file(name, clip, tmp_path):
    path = write(tmp_path, name)
    model = clouds.build(path, [*SMALL, "MODEL.CLOUDS.CLIP_MODEL_NAME", clip], weights="")
    said = FILES[name]
    predictor = model.sem_seg_head.predictor
    assert predictor.query_feat.weight.shape == (
        said["MODEL.MASK_FORMER.NUM_OBJECT_QUERIES"],
        said["MODEL.MASK_FORMER.HIDDEN_DIM"],
    )
    assert predictor.class_embed.out_features == said["MODEL.SEM_SEG_HEAD.NUM_CLASSES"] + 1


@needs_files
@pytest.mark.parametrize("name", OTHERS)
def test_files_of_another_network_build_with_the_overrides_that_the_error_asks_for(name, tmp_path):
    overrides = [
        *("MODEL.META_ARCHITECTURE", "CLOUDS"),
        *("MODEL.BACKBONE.NAME", "CLIP"),
        *("MODEL.SEM_SEG_HEAD.NAME", "CLOUDSHead"),
        *("MODEL.CLOUDS.CLIP_MODEL_NAME", "clouds_tiny"),
        *("MODEL.MASK_FORMER.TEST.INSTANCE_ON", "False"),
        *("MODEL.MASK_FORMER.TEST.PANOPTIC_ON", "False"),
    ]
    classes = FILES[name].get("MODEL.SEM_SEG_HEAD.NUM_CLASSES")
    if classes is None:  # and the label space of COCO is not known
        with pytest.raises(ConfigError, match=r"unknown dataset 'coco_.*NUM_CLASSES"):
            load_config(write(tmp_path, name), overrides)
        classes = 54
        overrides += ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "54"]
    model = clouds.build(write(tmp_path, name), [*SMALL, *overrides], weights="")
    assert model.sem_seg_head.predictor.class_embed.out_features == classes + 1


@needs_files
@pytest.mark.parametrize("name", [n for n in NAMES if str(n).startswith("joint_training")])
def test_joint_training_files_have_a_teacher(name, tmp_path):
    overrides = [*SMALL, "MODEL.CLOUDS.CLIP_MODEL_NAME", "clouds_tiny"]
    model = clouds.build(write(tmp_path, name), overrides, weights="")
    teacher = model.pseudo_labeler.teacher
    assert (teacher.momentum, teacher.interval) == (0.999, 100)
    warmup = write(tmp_path, name.replace("joint_training", "warmup").replace("_jt", ""))
    assert set(model.state_dict()) == set(clouds.build(warmup, overrides, weights="").state_dict())


# The dump of a config without settings, by the version that had the keys in EARLIER.
DUMP = Path(__file__).with_name("earlier_version.yaml")


def test_a_dumped_config_of_an_earlier_version_loads(caplog):
    """Its pixel statistics are written out, and are those of CLIP."""
    statistics = [
        *("MODEL.PIXEL_MEAN", list(CLIP.pixel_mean)),
        *("MODEL.PIXEL_STD", list(CLIP.pixel_std)),
    ]
    assert load_config(DUMP) == load_config(None, statistics)
    (record,) = caplog.records
    keys = re.findall(r"MODEL[.\w]+(?=[,:])", record.getMessage())
    assert sorted(keys) == [
        "MODEL.CLOUDS.SAM.CACHE_GIB",
        "MODEL.CLOUDS.SAM.COMPONENTS_AT_ONCE",
        "MODEL.CLOUDS.TEXT_CACHE_DIR",
    ]


def test_no_key_of_an_earlier_version_is_unknown():
    def names(tree, prefix=""):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from names(value, f"{prefix}{key}.")
            else:
                yield prefix + key

    earlier = set(names(yaml.safe_load(DUMP.read_text())))
    assert len(earlier) == 122
    assert earlier <= OURS.keys() | COMPAT_KEYS
    assert earlier >= EARLIER


def test_other_values_of_earlier_keys(caplog):
    overrides = [
        *("MODEL.CLOUDS.SUPERPIXEL.RULER", "5"),
        *("MODEL.CLOUDS.PSEUDO_LABEL.VOID_WEIGHT", "0.25"),
        *("MODEL.CLOUDS.SAM.CACHE_GIB", "7.5"),
        *("MODEL.CLOUDS.SAM.COMPONENTS_AT_ONCE", "8"),
        *("MODEL.CLOUDS.TEXT_CACHE_DIR", ""),
        *("TEST.PICTURES", "7"),
    ]
    cfg = load_config(None, overrides)
    options = cfg.MODEL.CLOUDS
    assert cfg.TEST.VISUALIZED_IMAGES == 7
    assert options.SUPERPIXEL.COMPACTNESS == 5.0
    assert options.PSEUDO_LABEL.NO_OBJECT_WEIGHT == 0.25
    assert len(caplog.records) == 1
    for key, value in (
        ("MODEL.SEM_SEG_HEAD.IGNORE_VALUE", "254"),
        ("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_POINTS", "8"),
        ("MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "BasePixelDecoder"),
    ):
        with pytest.raises(ConfigError, match=f"{key} = '{value}' .*allowed is .*leave it out"):
            load_config(None, [key, value])
    with pytest.raises(ConfigError, match=r"NO_OBJECT_WEIGHT = 2.0 .*between 0 and 1"):
        load_config(None, ["MODEL.CLOUDS.PSEUDO_LABEL.VOID_WEIGHT", "2"])
