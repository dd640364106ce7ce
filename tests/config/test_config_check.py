"""Validation of configs: values that depend on each other, on the data and on the machine."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from clouds.config import KEYS, ConfigError, get_cfg, load_config, problems, resolve
from clouds.config.cross_checks import CROSS_CHECKS
from clouds.data.datasets import Datasets, builtin
from clouds.data.label_space import CITYSCAPES_19, LabelSpace
from clouds.device import resolve_device

NAMES = [key.name for key in KEYS]
NUM_CLASSES = "MODEL.SEM_SEG_HEAD.NUM_CLASSES"


def lines(error):
    return error.value.problems


GOOD_TOGETHER = [
    ["MODEL.MASK_FORMER.NHEADS", "4", "MODEL.MASK_FORMER.HIDDEN_DIM", "36"],
    ["MODEL.SEM_SEG_HEAD.CONVS_DIM", "96"],
    [
        "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES",
        "['res4', 'res5']",
    ],
    [
        "MODEL.SEM_SEG_HEAD.IN_FEATURES",
        "[a, b]",
        "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES",
        "[b]",
        "MODEL.BACKBONE.NAME",
        "Other",
    ],
    ["INPUT.INITIAL_HEIGHT", "1052", "INPUT.INITIAL_WIDTH", "1914"],
    ["INPUT.INITIAL_SIZES", "((1052, 1914),)", "DATASETS.FACTORS", "(0.5,)"],
    [
        *("DATASETS.TRAIN", "('gta5', 'synthia', 'sd_x')", "DATASETS.FACTORS", "(1, 2.5, 0.7)"),
        *("INPUT.INITIAL_SIZES", "((1052, 1914), (0, 0), (0, 0))"),
    ],
    ["INPUT.SCALE_RANGE", "(1, 1)"],
    ["MODEL.BACKBONE.OUT_BLOCKS", "(0, 0, 1, 2)"],
    ["MODEL.PIXEL_MEAN", "[]", "MODEL.PIXEL_STD", "[1, 2, 3]"],
    ["SOLVER.STEPS", "(100000,)"],
    [NUM_CLASSES, "0"],
    [NUM_CLASSES, "19"],
    [NUM_CLASSES, "19", "DATASETS.TRAIN", "('gta5', 'sd_x', 'synthia')"],
    [NUM_CLASSES, "133", "DATASETS.TRAIN", "('coco_2017_train_panoptic',)"],
    [NUM_CLASSES, "19", "DATASETS.TRAIN", "('sd_x',)"],
    [NUM_CLASSES, "7", "DATASETS.TRAIN", "()"],
    ["SOLVER.AMP.DTYPE", "fp16", "MODEL.DEVICE", "cpu"],
    ["SOLVER.AMP.ENABLED", "True", "MODEL.DEVICE", "cpu"],
]
BAD_TOGETHER = [
    (["MODEL.MASK_FORMER.HIDDEN_DIM", "252"], "multiple of MODEL.MASK_FORMER.NHEADS, 8"),
    (
        ["MODEL.MASK_FORMER.HIDDEN_DIM", "250", "MODEL.MASK_FORMER.NHEADS", "1"],
        "multiple of 4",
    ),
    (["MODEL.SEM_SEG_HEAD.CONVS_DIM", "48"], "multiple of 32"),
    (
        ["MODEL.SEM_SEG_HEAD.CONVS_DIM", "32", "MODEL.MASK_FORMER.NHEADS", "64"],
        "CONVS_DIM = 32.*multiple of MODEL.MASK_FORMER.NHEADS, 64",
    ),
    (
        ["MODEL.SEM_SEG_HEAD.IN_FEATURES", "[res2, res3, res4, res5, stem]"],
        "res2, res3, res4, res5",
    ),
    (
        [
            *("MODEL.SEM_SEG_HEAD.IN_FEATURES", "[res2, res3, res4, res5, stem]"),
            *("MODEL.BACKBONE.NAME", "ViT"),
        ],
        "features of the backbone ViT are res2, res3, res4, res5",
    ),
    (["MODEL.BACKBONE.IMG_SIZE", "500"], "multiple of MODEL.BACKBONE.PATCH_SIZE, 16"),
    (
        ["MODEL.BACKBONE.PYRAMID", "learned", "MODEL.BACKBONE.PATCH_SIZE", "8"],
        "needs MODEL.BACKBONE.PATCH_SIZE 16, which is 8",
    ),
    (["MODEL.BACKBONE.OUT_BLOCKS", "(3, 2, 1, 0)"], "empty, or four indices in rising order"),
    (["MODEL.PIXEL_MEAN", "[1, 2]"], "empty, or three numbers, red green blue"),
    (["MODEL.PIXEL_STD", "[1, 2, 0]"], "empty, or three numbers greater than 0"),
    (["MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res3','res4','res5']"], r"finer.*\['res2'\].*\[\]"),
    (["MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res2','res2','res3','res4','res5']"], "twice"),
    (
        ["MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES", "['res5','res5']"],
        "twice",
    ),
    (
        ["MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES", "['res1']"],
        "must be among",
    ),
    (
        ["MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES", "['res3','res5']"],
        r"finer.*\['res2'\].*\['res2', 'res4'\]",
    ),
    (["MODEL.MASK_FORMER.SIZE_DIVISIBILITY", "40"], "multiple of 32"),
    ([NUM_CLASSES, "11"], "NUM_CLASSES = 11 .*must be 19, the number of classes of gta5 in"),
    ([NUM_CLASSES, "20"], "must be 19"),
    (
        [NUM_CLASSES, "18", "DATASETS.TRAIN", "('synthia', 'sd_x', 'gta5')"],
        "must be 19, the number of classes of synthia, gta5 in DATASETS.TRAIN",
    ),
    ([NUM_CLASSES, "256"], "between 0 and 255"),
    (["DATASETS.TRAIN", "('gta5', 'gta6')"], "unknown dataset 'gta6'.*NUM_CLASSES"),
    (["DATASETS.TRAIN", "()"], "no dataset is named.*NUM_CLASSES"),
    (["DATASETS.TRAIN", "('sd_x',)"], "no labelled dataset.*NUM_CLASSES"),
    *(
        ([NUM_CLASSES, "133", "DATASETS.TRAIN", "('coco',)", *text], "'coco'.*class names")
        for text in (
            ("MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", "text"),
            ("MODEL.CLOUDS.GEOMETRIC_ENSEMBLE", "True"),
            ("MODEL.CLOUDS.GEOMETRIC_ENSEMBLE_EMA", "True"),
        )
    ),
    (["MODEL.SEM_SEG_HEAD.IGNORE_VALUE", "200"], "IGNORE_VALUE = '200' .*allowed is 255"),
    (["OUTPUT_DIR", ""], "not empty"),
    (["SEED", str(2**63)], "between 0 and 9223372036854775807"),
    (["INPUT.INITIAL_HEIGHT", "720"], "INPUT.INITIAL_WIDTH is 0"),
    (["INPUT.INITIAL_WIDTH", "720"], "INPUT.INITIAL_WIDTH is 720"),
    *(
        (
            [name, text, "DATASETS.TRAIN", "('gta5', 'synthia', 'sd_x')"],
            rf"{name} = .* has 2 of 3 values: DATASETS.TRAIN names gta5, synthia, sd_x\. Give one",
        )
        for name, text in (
            ("DATASETS.FACTORS", "(1, 2)"),
            ("INPUT.INITIAL_SIZES", "((4, 4), (4, 4))"),
        )
    ),
    (["DATASETS.FACTORS", "(0,)"], "greater than 0"),
    (["INPUT.INITIAL_SIZES", "((1052, 0),)"], "pairs of height and width, both 0 or both above 0"),
    (["INPUT.INITIAL_SIZES", "((1052, 1914, 3),)"], "pairs of height and width"),
    (
        ["INPUT.INITIAL_SIZES", "((4, 4), (4, 4))", "DATASETS.TRAIN", "('gta5', 'gta5')"],
        "names a dataset twice: gta5, gta5",
    ),
    (
        ["INPUT.INITIAL_SIZES", "((4, 4), (4, 4))", "DATASETS.TRAIN", "('gta5', 'sd_x')"],
        r"generated images are not resized; write \(0, 0\) for sd_x",
    ),
    (["INPUT.SCALE_RANGE", "(2, 0.5)"], "must not exceed"),
    (["TEST.LONG_SIDE_MAX", "1023"], "SHORT_SIDE is 1024 .*allowed are 0.* from 1024"),
    (["TEST.SLIDE.SHORT_SIDE", "9000"], "SLIDE.SHORT_SIDE 9000; .* from 9000"),
    (["SOLVER.STEPS", "(5, 5)"], "increasing"),
    (["SOLVER.STEPS", "(0, 5)"], "above 0"),
    *(
        (["MODEL.DEVICE", name], "'auto', 'cpu', 'cuda' and 'cuda:N'")
        for name in ("gpu", "mps", "meta", "xpu", "cpu:0", "cuda:", "cuda:-1", "cuda:01", "")
    ),
    (["MODEL.DEVICE", "cuda:99"], "usable CUDA GPUs"),
    (
        ["SOLVER.AMP.DTYPE", "fp16", "SOLVER.AMP.ENABLED", "True", "MODEL.DEVICE", "cpu"],
        "needs CUDA.*'bf16'",
    ),
    (
        ["MODEL.SEM_SEG_HEAD.DEFORMABLE_ATTENTION", "triton", "MODEL.DEVICE", "cpu"],
        "needs CUDA.*'torch'",
    ),
]


@pytest.mark.parametrize("overrides", GOOD_TOGETHER)
def test_values_that_agree(overrides):
    load_config(None, overrides)


@pytest.mark.parametrize(("overrides", "words"), BAD_TOGETHER)
def test_values_that_do_not_agree(overrides, words):
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides)
    assert len(lines(error)) == 1
    assert re.search(words, lines(error)[0])
    # It names the place of the value that it is about, where somebody has set it.
    name = lines(error)[0].split(" ")[0]
    assert ("(override)" in lines(error)[0]) == (name in overrides)


def test_fp16_and_triton_are_allowed_where_auto_is_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    load_config(None, ["SOLVER.AMP.DTYPE", "fp16", "SOLVER.AMP.ENABLED", "True"])
    load_config(None, ["MODEL.SEM_SEG_HEAD.DEFORMABLE_ATTENTION", "triton"])


def test_checks_read_keys_of_the_table_and_cover_a_wrong_type():
    assert {name for names, _ in CROSS_CHECKS for name in names} <= set(NAMES)
    cfg = get_cfg()
    cfg.SOLVER.STEPS = "soon"
    assert [line.split(" ")[0] for line in problems(cfg)] == ["SOLVER.STEPS"]


def test_num_classes_follow_from_the_label_space(monkeypatch):
    """With another label space of a dataset, as nothing in the config says 19."""
    space = LabelSpace("two", ("a", "b"), ((0, 0, 0), (1, 1, 1)), (("a",), ("b",)))
    for name in ("camvid_train", "camvid_val"):
        description = replace(builtin.builtin_datasets()[name], label_space=space)
        monkeypatch.setitem(builtin.builtin_datasets(), name, description)
    camvid = ["DATASETS.TRAIN", "('camvid_train',)", "DATASETS.TEST", "('camvid_val',)"]
    assert load_config(None, camvid).MODEL.SEM_SEG_HEAD.NUM_CLASSES == 2
    assert load_config(None, [*camvid, NUM_CLASSES, "2"]).MODEL.SEM_SEG_HEAD.NUM_CLASSES == 2
    assert load_config(None).MODEL.SEM_SEG_HEAD.NUM_CLASSES == 19
    with pytest.raises(ConfigError, match=r"NUM_CLASSES = 19 .*must be 2, .*camvid_train"):
        load_config(None, [*camvid, NUM_CLASSES, "19"])
    with pytest.raises(ConfigError, match=r"DATASETS\.TEST .*mapillary_val: none of its classes"):
        load_config(None, camvid[:2])
    mixed = ["DATASETS.TRAIN", "('gta5', 'camvid_train')"]
    for number in ([], [NUM_CLASSES, "19"]):
        with pytest.raises(ConfigError) as error:
            load_config(None, [*mixed, *number])
        (line,) = lines(error)
        assert "gta5 (cityscapes_19, 19 classes), camvid_train (two, 2 classes)" in line
    # without load_config
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = ("camvid_train",), 0
    resolve(cfg)
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 2
    resolve(cfg)
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 2


def test_the_label_space_of_training_data():
    assert Datasets(("gta5", "sd_x", "synthia")).label_space == CITYSCAPES_19
    with pytest.raises(ValueError, match="unknown dataset 'gta6'"):
        Datasets(("gta5", "gta6")).label_space  # noqa: B018
    for names in ((), ("sd_x",)):
        with pytest.raises(ValueError, match="no labelled dataset"):
            Datasets(names).label_space  # noqa: B018


UNSUPPORTED = ["mps", "meta", "xpu", "cuda:", "cuda:x", "cuda:00", "CPU", "cpu "]


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_devices_that_are_not_supported(name):
    with pytest.raises(ValueError, match=r"--device is .*'auto', 'cpu', 'cuda' and 'cuda:N'"):
        resolve_device(name, "--device")


def test_devices_of_this_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(resolve_device(name)) for name in ("auto", "cpu", "cuda", "cuda:0", "cuda:1")] == [
        *("cuda", "cpu", "cuda", "cuda:0", "cuda:1")
    ]
    for name in ("cuda:2", "cuda:10", f"cuda:{2**40}"):
        with pytest.raises(ValueError, match="this machine has 2 usable"):
            resolve_device(name)
