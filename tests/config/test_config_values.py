"""Values of configs: types, YAML 1.2, Python literals, paths."""

from __future__ import annotations

import math
import re
import shlex

import pytest

from clouds.config import KEYS, ConfigError, load_config
from clouds.config.config import get_value
from clouds.config.values import coerce

KEY = {key.name: key for key in KEYS}


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "written", "expected"),
    [
        ("SOLVER.BASE_LR", "1", 1.0),
        ("SOLVER.BASE_LR", "1e-4", 0.0001),
        ("SOLVER.BASE_LR", 1, 1.0),
        ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", "inf", math.inf),
        ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", ".inf", math.inf),
        ("SOLVER.BASE_LR", "inf", None),
        ("SOLVER.BASE_LR", "1e999", None),
        ("MODEL.PIXEL_MEAN", "[1, 2, .inf]", None),
        ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", ".inf", math.inf),
        ("SOLVER.MAX_ITER", "7", 7),
        ("SOLVER.MAX_ITER", "4e4", 40000),
        ("SOLVER.MAX_ITER", "40_000", 40000),
        ("SOLVER.MAX_ITER", 7.0, 7),
        ("SOLVER.MAX_ITER", "7.5", None),
        ("SOLVER.MAX_ITER", "many", None),
        ("SOLVER.MAX_ITER", "True", None),
        ("SOLVER.MAX_ITER", ".inf", None),
        ("SOLVER.BASE_LR", "fast", None),
        ("SOLVER.BASE_LR", ".nan", None),
        ("SOLVER.BASE_LR", None, None),
        ("INPUT.FLIP", "False", False),
        ("INPUT.FLIP", "false", False),
        ("INPUT.FLIP", True, True),
        ("INPUT.FLIP", "0", None),
        ("INPUT.FLIP", 1, None),
        ("MODEL.WEIGHTS", "", ""),
        ("MODEL.WEIGHTS", "''", ""),
        ("MODEL.WEIGHTS", "2024", "2024"),
        ("MODEL.WEIGHTS", "out/model_final.pth", "out/model_final.pth"),
        ("MODEL.WEIGHTS", "None", "None"),
        ("MODEL.WEIGHTS", 2024, None),
        ("MODEL.WEIGHTS", None, None),
        ("DATASETS.TRAIN", "('gta5',)", ("gta5",)),
        ("DATASETS.TRAIN", "('gta5', \"sd_a\",)", ("gta5", "sd_a")),
        ("DATASETS.TRAIN", "[gta5, sd_a]", ("gta5", "sd_a")),
        ("DATASETS.TRAIN", ["gta5"], ("gta5",)),
        ("DATASETS.TRAIN", "()", ()),
        ("DATASETS.TRAIN", "gta5", None),
        ("DATASETS.TRAIN", "('gta5')", None),
        ("DATASETS.TRAIN", [1], None),
        ("DATASETS.FACTORS", "(1, 2.5)", (1.0, 2.5)),
        ("DATASETS.FACTORS", [1, 2], (1.0, 2.0)),
        ("DATASETS.FACTORS", "2.5", None),
        ("DATASETS.FACTORS", ["much"], None),
        ("INPUT.INITIAL_SIZES", "((1052, 1914), (0, 0))", ((1052, 1914), (0, 0))),
        ("INPUT.INITIAL_SIZES", "[[1052, 1914.0], [0, 0]]", ((1052, 1914), (0, 0))),
        ("INPUT.INITIAL_SIZES", [[1052, 1914]], ((1052, 1914),)),
        ("INPUT.INITIAL_SIZES", "(1052, 1914)", None),
        ("INPUT.INITIAL_SIZES", [["a", "b"]], None),
        ("SOLVER.STEPS", "(100000,)", (100000,)),
        ("SOLVER.STEPS", [10, 20], (10, 20)),
        ("SOLVER.STEPS", [10.5], None),
        ("MODEL.PIXEL_MEAN", "(1, 2, 3.5)", [1.0, 2.0, 3.5]),
        ("MODEL.PIXEL_MEAN", "1 2 3", None),
        ("INPUT.CROP.SIZE", {"HEIGHT": 3}, None),
    ],
)
def test_values_become_the_type_of_the_key(name, written, expected):
    key = KEY[name]
    if expected is None:
        with pytest.raises(ValueError, match=rf"expected, for example: {re.escape(name)} "):
            coerce(key, written)
        return
    value = coerce(key, written)
    assert value == expected
    assert type(value) is type(key.default)
    if isinstance(value, (list, tuple)) and key.default:
        assert {type(v) for v in value} <= {type(key.default[0])}


# As of YAML 1.2.2, section 10.3.2; None: text, which is no value of the key.
CORE_SCHEMA = [
    ("SEED", "010", 10),
    ("SEED", "0", 0),
    ("SEED", "+7", 7),
    ("SEED", "0o10", 8),
    ("SEED", "0x1F", 31),
    ("SEED", "1:30", None),
    ("SEED", "1e3", 1000),
    ("SOLVER.STEPS", "[010, 020]", (10, 20)),
    ("SOLVER.STEPS", "[1:30]", None),
    ("SOLVER.BASE_LR", "1e-5", 1e-5),
    ("SOLVER.BASE_LR", "1E-5", 1e-5),
    ("SOLVER.BASE_LR", ".5", 0.5),
    ("SOLVER.BASE_LR", "5.", 5.0),
    ("SOLVER.BASE_LR", "1:30.5", None),
    ("SOLVER.AMP.ENABLED", "true", True),
    ("SOLVER.AMP.ENABLED", "FALSE", False),
    ("SOLVER.AMP.ENABLED", "yes", None),
    ("SOLVER.AMP.ENABLED", "no", None),
    ("SOLVER.AMP.ENABLED", "on", None),
    ("SOLVER.AMP.ENABLED", "Off", None),
    ("OUTPUT_DIR", "2024-05-01", "2024-05-01"),
    ("OUTPUT_DIR", "1e5", "1e5"),
    ("OUTPUT_DIR", "010", "010"),
    ("OUTPUT_DIR", "on", "on"),
    ("OUTPUT_DIR", "~", None),
]


@pytest.mark.parametrize(("name", "text", "value"), CORE_SCHEMA)
def test_files_are_yaml_1_2(tmp_path, name, text, value):
    path = write(tmp_path / "a.yaml", f"{name}: {text}\n")
    if value is None:
        with pytest.raises(ConfigError, match="expected, for example"):
            load_config(path)
        return
    loaded = get_value(load_config(path), name)
    assert (loaded, type(loaded)) == (value, type(value))


@pytest.mark.parametrize(("name", "text", "value"), CORE_SCHEMA[:-1])
def test_the_command_line_is_read_alike(name, text, value):
    if value is None:
        with pytest.raises(ConfigError, match="expected, for example"):
            load_config(None, [name, text])
        return
    loaded = get_value(load_config(None, [name, text]), name)
    assert (loaded, type(loaded)) == (value, type(value))


def test_yes_asks_for_true_or_false():
    with pytest.raises(ConfigError, match=r"ENABLED = 'yes' .*True or False is expected"):
        load_config(None, ["SOLVER.AMP.ENABLED", "yes"])


@pytest.mark.parametrize("folder", ["1e5", "010", "0o7", "yes", "1:30", "2024-05-01", "1.5", "a b"])
def test_a_dumped_text_stays_itself(tmp_path, folder):
    cfg = load_config(None, ["OUTPUT_DIR", folder])
    assert folder == cfg.OUTPUT_DIR
    assert load_config(write(tmp_path / "dump.yaml", cfg.dump())) == cfg


def test_a_merge_key_is_merged(tmp_path):
    text = "TEST: {<<: {SHORT_SIDE: 64, EVAL_PERIOD: 3}, EVAL_PERIOD: 5}\n"
    cfg = load_config(write(tmp_path / "a.yaml", text))
    assert (cfg.TEST.SHORT_SIDE, cfg.TEST.EVAL_PERIOD) == (64, 5)


PATHS = (
    "OUTPUT_DIR",
    "MODEL.WEIGHTS",
    "MODEL.BACKBONE.WEIGHTS",
    "MODEL.CLOUDS.CLIP_PRETRAINED_WEIGHTS",
    "MODEL.CLOUDS.SAM.WEIGHTS",
    "MODEL.CLOUDS.SAM.CACHE_DIR",
)


def test_the_table_knows_the_paths():
    assert [key.name for key in KEYS if key.is_path] == list(PATHS)


@pytest.mark.parametrize("name", PATHS)
def test_the_home_directory_replaces_a_tilde(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", "/home/somebody")
    path = write(tmp_path / "a.yaml", f"{name}: ~/a/b.pth\n")
    assert get_value(load_config(path), name) == "/home/somebody/a/b.pth"
    assert get_value(load_config(None, [name, "~/a/b.pth"]), name) == "/home/somebody/a/b.pth"
    for unchanged in ("./a/", "a~b", "detectron2://R-50.pkl", "laion2b_s29b_b131k_ft_soup"):
        assert get_value(load_config(None, [name, unchanged]), name) == unchanged


def test_files_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "base.yaml", "SEED: 5\n")
    write(tmp_path / "a.yaml", "_BASE_: ~/base.yaml\n")
    assert load_config("~/a.yaml").SEED == 5


def test_a_home_directory_that_is_not_known():
    with pytest.raises(ConfigError, match=r"WEIGHTS = '~nobody_here/a' .*home directory"):
        load_config(None, ["MODEL.WEIGHTS", "~nobody_here/a"])


def test_the_example_can_be_pasted_into_a_shell():
    for key in KEYS:
        with pytest.raises(ValueError) as error:
            coerce(key, None)
        name, value = shlex.split(str(error.value).partition("for example: ")[2])
        empty = isinstance(key.default, (list, tuple)) and not key.default
        expected = type(key.default)([key.element]) if empty else key.default
        assert (name, coerce(key, value)) == (key.name, expected)


@pytest.mark.parametrize("escape", [r"\0", r"\ud800"])
def test_text_that_no_file_name_can_have_is_refused(escape, tmp_path):
    path = write(tmp_path / "a.yaml", f'OUTPUT_DIR: "a{escape}b"\nMODEL: {{WEIGHTS: "{escape}"}}\n')
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert len(error.value.problems) == 2
    assert all(" is expected" in problem for problem in error.value.problems)


def test_text_of_bytes_that_are_not_utf8_is_kept():
    assert load_config(None, ["OUTPUT_DIR", "caf\udce9"]).OUTPUT_DIR == "caf\udce9"
