"""Configs: the table of keys, YAML files, overrides, and everything that can be wrong with them."""

from __future__ import annotations

import ast
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from clouds.config import KEYS, ConfigError, get_cfg, load_config, problems
from clouds.config.check import CROSS_CHECKS
from clouds.config.config import get_value as get
from clouds.config.load import nearest
from clouds.config.values import coerce

ROOT = Path(__file__).resolve().parents[2]
NAMES = [key.name for key in KEYS]
KEY = {key.name: key for key in KEYS}


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def lines(error):
    return error.value.problems


# -------------------------------------------------------------------------------- the table
def test_every_key_stands_once_and_has_a_meaning():
    assert len(set(NAMES)) == len(NAMES)
    assert [key.name for key in KEYS if len(key.doc) < 5 or not key.doc.endswith(".")] == []


def test_no_key_is_a_section_of_another():
    assert [(a, b) for a in NAMES for b in NAMES if b.startswith(a + ".")] == []


def test_the_defaults_are_allowed_and_come_back_unchanged():
    assert problems(get_cfg()) == []
    cfg = load_config(None)
    assert {name: get(cfg, name) for name in NAMES} == {key.name: key.default for key in KEYS}
    assert cfg.is_frozen()


def test_every_rule_says_what_it_allows_and_forbids_something():
    # Values of the right type of which each rule that is not "anything" forbids at least one.
    tries = {
        bool: [True, False],
        int: [-1, 0, 10**6],
        float: [-1.0, 0.0, 10.0**6],
        str: ["", "nonsense"],
        list: [[], [1.0], [0.0, 0.0, 0.0]],
        tuple: [(), (0, 0), (1,)],
    }
    for key in KEYS:
        if key.rule.description:
            assert key.rule.holds(key.default), key.name
            allowed = [key.rule.holds(value) for value in tries[type(key.default)]]
            assert not all(allowed), key.name


# --------------------------------------------------------------------------- files and bases
def test_a_file_changes_what_it_names_and_nothing_else(tmp_path):
    path = write(tmp_path / "a.yaml", "SOLVER:\n  BASE_LR: 0.5\nSEED: 3\n")
    cfg = load_config(path)
    expected = {key.name: key.default for key in KEYS} | {"SOLVER.BASE_LR": 0.5, "SEED": 3}
    assert {name: get(cfg, name) for name in NAMES} == expected


def test_bases_are_found_beside_the_file_that_names_them(tmp_path, monkeypatch):
    write(tmp_path / "root.yaml", "SEED: 1\nSOLVER: {MAX_ITER: 10, GAMMA: 0.5}\n")
    write(tmp_path / "x/mid.yaml", "_BASE_: ../root.yaml\nSOLVER: {MAX_ITER: 20}\n")
    write(tmp_path / "x/y/leaf.yaml", "SOLVER: {BASE_LR: 1}\n_BASE_: ../mid.yaml\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for path in ("../x/y/leaf.yaml", tmp_path / "x/y/leaf.yaml"):
        cfg = load_config(path)
        solver = cfg.SOLVER
        assert (cfg.SEED, solver.MAX_ITER, solver.GAMMA, solver.BASE_LR) == (1, 20, 0.5, 1.0)


def test_several_bases_the_later_one_wins_and_overrides_win_over_all(tmp_path):
    write(tmp_path / "one.yaml", "SEED: 1\nLOG_PERIOD: 11\nCUDNN_BENCHMARK: true\n")
    write(tmp_path / "two.yaml", "LOG_PERIOD: 12\n")
    path = write(tmp_path / "leaf.yaml", f"_BASE_: [one.yaml, {tmp_path}/two.yaml]\nSEED: 5\n")
    cfg = load_config(path, ["SEED", "6", "SEED", "7"])
    assert (cfg.SEED, cfg.LOG_PERIOD, cfg.CUDNN_BENCHMARK) == (7, 12, True)


def test_the_files_are_the_same_to_fvcore(tmp_path):
    write(tmp_path / "base.yaml", "SOLVER: {BASE_LR: 3e-4, STEPS: '(2, 5)'}\nSEED: 4\n")
    text = "_BASE_: base.yaml\nDATASETS: {TRAIN: ['a', 'b']}\nSOLVER: {OPTIMIZER: SGD}\n"
    path = write(tmp_path / "leaf.yaml", text)
    merged = get_cfg()
    merged.merge_from_file(str(path))
    merged.merge_from_list(["TEST.SHORT_SIDE", "64"])
    assert load_config(path, ["TEST.SHORT_SIDE", "64"]) == merged


def test_a_dumped_config_loads_to_itself(tmp_path):
    cfg = load_config(None, ["SOLVER.STEPS", "(1, 2)", "MODEL.WEIGHTS", "a b.pth", "SEED", "9"])
    assert load_config(write(tmp_path / "dump.yaml", cfg.dump())) == cfg


def test_empty_files_and_sections_change_nothing(tmp_path):
    assert load_config(write(tmp_path / "empty.yaml", "# nothing\n")) == load_config(None)
    assert load_config(write(tmp_path / "section.yaml", "SOLVER:\n")) == load_config(None)


def test_anchors_and_merge_keys(tmp_path):
    text = "SOLVER: &a {MAX_ITER: 3}\nTEST: {SLIDE: {CROP_SIZE: &c 64}, SHORT_SIDE: *c}\n"
    cfg = load_config(write(tmp_path / "a.yaml", text))
    assert (cfg.SOLVER.MAX_ITER, cfg.TEST.SLIDE.CROP_SIZE, cfg.TEST.SHORT_SIDE) == (3, 64, 64)


SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=[str(p.relative_to(ROOT)) for p in SHIPPED])
def test_every_config_of_the_project_loads(path):
    load_config(path)


# ------------------------------------------------------------------------------- value types
@pytest.mark.parametrize(
    ("name", "written", "expected"),
    [
        ("SOLVER.BASE_LR", "1", 1.0),
        ("SOLVER.BASE_LR", "1e-4", 0.0001),
        ("SOLVER.BASE_LR", 1, 1.0),
        ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", "inf", math.inf),
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


def test_yaml_that_reads_a_number_as_text_is_a_number(tmp_path):
    # YAML 1.1 wants a dot in "1.0e-4"; without it, the value is a string.
    assert yaml.safe_load("1e-4") == "1e-4"
    path = write(tmp_path / "a.yaml", "SOLVER: {BASE_LR: 1e-4, WEIGHT_DECAY: 0}\n")
    cfg = load_config(path)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY) == (0.0001, 0.0)
    assert type(cfg.SOLVER.WEIGHT_DECAY) is float


# ------------------------------------------------------------------------------ what is wrong
def test_an_unknown_key_names_its_line_and_the_nearest_keys(tmp_path):
    base = write(tmp_path / "base.yaml", "SEED: 1\nSOLVER:\n  BASE_LRR: 0.5\n")
    path = write(tmp_path / "leaf.yaml", "_BASE_: base.yaml\n")
    with pytest.raises(ConfigError) as error:
        load_config(path, ["solver.max_iter", "3"])
    assert lines(error) == [
        f"SOLVER.BASE_LRR ({base}:3): no such key; did you mean SOLVER.BASE_LR?",
        "solver.max_iter (override): no such key; did you mean SOLVER.MAX_ITER?",
    ]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("SOLVER.LR", "SOLVER.BASE_LR"),
        ("MAX_ITER", "SOLVER.MAX_ITER"),
        ("MODEL.NHEADS", "MODEL.MASK_FORMER.NHEADS"),
        ("MODEL.MASK_FORMER.NUM_QUERIES", "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES"),
        ("DATASET.TRAIN", "DATASETS.TRAIN"),
        ("QWERTY", None),
    ],
)
def test_nearest_keys(name, meant):
    assert (nearest(name) or [None])[0] == meant


def test_an_unknown_key_like_no_other_says_where_keys_are_listed():
    with pytest.raises(ConfigError, match=r"QWERTY \(override\).*tools/list_config.py"):
        load_config(None, ["QWERTY", "1"])
    assert (ROOT / "tools/list_config.py").is_file()


def test_a_section_is_not_a_key():
    with pytest.raises(ConfigError, match=r"INPUT\.CROP .*is a section.*SIZE, POSITION"):
        load_config(None, ["INPUT.CROP", "768"])


def test_a_wrong_type_says_key_value_type_and_example(tmp_path):
    path = write(tmp_path / "a.yaml", "\nINPUT: {FLIP: often}\n")
    with pytest.raises(ConfigError) as error:
        load_config(path, ["SOLVER.MAX_ITER", "many", "DATASETS.TEST", "bdd_val"])
    assert lines(error) == [
        f"INPUT.FLIP = 'often' ({path}:2): True or False is expected, for example: INPUT.FLIP True",
        "SOLVER.MAX_ITER = 'many' (override): a whole number is expected, "
        "for example: SOLVER.MAX_ITER 40000",
        "DATASETS.TEST = 'bdd_val' (override): a list of texts is expected, for example: "
        "DATASETS.TEST '('\"'\"'mapillary_val'\"'\"', '\"'\"'bdd_val'\"'\"', "
        "'\"'\"'cityscapes_val'\"'\"')'",
    ]


def test_the_example_can_be_pasted_into_a_shell():
    for key in KEYS:
        with pytest.raises(ValueError) as error:
            coerce(key, None)
        name, value = shlex.split(str(error.value).partition("for example: ")[2])
        assert (name, coerce(key, value)) == (key.name, key.default)


def test_all_problems_are_reported_together(tmp_path):
    path = write(tmp_path / "a.yaml", "SOLVER: {OPTIMIZER: ADAM, MAX_ITER: -1}\nNOPE: 1\n")
    overrides = ["MODEL.MASK_FORMER.NHEADS", "7", "SEED", "x", "INPUT.INITIAL_WIDTH", "5"]
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    assert [line.split(" ")[0] for line in lines(error)] == [
        "NOPE",
        "SEED",
        "SOLVER.OPTIMIZER",
        "SOLVER.MAX_ITER",
        "MODEL.MASK_FORMER.HIDDEN_DIM",
        "MODEL.SEM_SEG_HEAD.CONVS_DIM",
        "INPUT.INITIAL_HEIGHT",
    ]
    text = str(error.value)
    assert text.startswith("7 problems in the configuration:\n  NOPE")
    assert f"SOLVER.OPTIMIZER = 'ADAM' ({path}:1): allowed is one of 'ADAMW', 'SGD'" in text
    assert f"SOLVER.MAX_ITER = -1 ({path}:1): allowed is at least 0" in text


def test_a_later_value_repairs_an_earlier_one(tmp_path):
    path = write(tmp_path / "a.yaml", "SOLVER: {OPTIMIZER: ADAM}\n")
    assert load_config(path, ["SOLVER.OPTIMIZER", "SGD"]).SOLVER.OPTIMIZER == "SGD"


def test_overrides_must_be_pairs():
    with pytest.raises(ConfigError, match=r"3 words: SEED 1 MODEL.WEIGHTS"):
        load_config(None, ["SEED", "1", "MODEL.WEIGHTS"])
    with pytest.raises(ConfigError, match="not KEY=VALUE"):
        load_config(None, ["SEED=1"])


def test_a_missing_file_says_where_it_was_looked_for(tmp_path, monkeypatch):
    write(tmp_path / "gta.yaml", "")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        load_config("gtaa.yaml")
    assert "Config file gtaa.yaml does not exist" in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "holds gta.yaml" in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"no/such\.yaml"):
        load_config("no/such.yaml")
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        load_config(tmp_path)


def test_a_missing_base_says_who_wants_it(tmp_path):
    path = write(tmp_path / "a.yaml", "_BASE_: b.yaml\n")
    with pytest.raises(FileNotFoundError) as error:
        load_config(path)
    assert f"{tmp_path / 'b.yaml'}, which is the _BASE_ of {path}, does not exist" in str(
        error.value
    )


def test_bases_in_a_circle(tmp_path):
    write(tmp_path / "a.yaml", "_BASE_: b.yaml\n")
    write(tmp_path / "b.yaml", "_BASE_: ./a.yaml\n")
    with pytest.raises(ConfigError, match=r"a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("SEED: 1\nSOLVER: [1, 2\n", 3, "not valid YAML"),
        ("SEED: 1\n\tLOG_PERIOD: 2\n", 2, "not valid YAML"),
        ("SEED: 1\nOUTPUT_DIR: !!python/object/apply:os.getcwd []\n", 2, "not valid YAML"),
        ("SEED: 1\nSOLVER: *nowhere\n", 2, "not valid YAML"),
        ("SEED: 1\nLOG_PERIOD: 2\nSEED: 3\n", 3, "SEED stands already in line 1"),
        ("SOLVER:\n  GAMMA: 1\n  GAMMA: 0.5\n", 3, "GAMMA stands already in line 2"),
        ("\n- SEED\n- 1\n", 2, "KEY: VALUE"),
        ("just text\n", 1, "KEY: VALUE"),
        ("_BASE_: 3\n", 1, "a file is expected"),
    ],
)
def test_bad_yaml_names_file_and_line(tmp_path, text, line, words):
    path = write(tmp_path / "bad.yaml", text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert f"{path}:{line}" in str(error.value)
    assert words in str(error.value)


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(b"PK\x03\x04\x00\xff\xfe\x80")
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        load_config(path)


# ----------------------------------------------------------------------- keys that must agree
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
    ["INPUT.SCALE_RANGE", "(1, 1)"],
    ["SOLVER.STEPS", "(100000,)"],
    ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "133"],
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
    (["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "11"], "at least 19"),
    (
        [
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
            "20",
            "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME",
            "text",
        ],
        "must be 19",
    ),
    (
        ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "20", "MODEL.CLOUDS.GEOMETRIC_ENSEMBLE", "True"],
        "must be 19",
    ),
    (["MODEL.SEM_SEG_HEAD.IGNORE_VALUE", "18"], "at least MODEL.SEM_SEG_HEAD.NUM_CLASSES, 19"),
    (["MODEL.SEM_SEG_HEAD.IGNORE_VALUE", "256"], "at most 255"),
    (["INPUT.INITIAL_HEIGHT", "720"], "INPUT.INITIAL_WIDTH is 0"),
    (["INPUT.INITIAL_WIDTH", "720"], "INPUT.INITIAL_WIDTH is 720"),
    (["INPUT.SCALE_RANGE", "(2, 0.5)"], "must not exceed"),
    (["SOLVER.STEPS", "(5, 5)"], "increasing"),
    (["SOLVER.STEPS", "(0, 5)"], "above 0"),
    (["MODEL.DEVICE", "gpu"], "'auto', 'cpu'"),
    (["MODEL.DEVICE", "cuda:99"], "usable CUDA GPUs"),
    (
        ["SOLVER.AMP.DTYPE", "fp16", "SOLVER.AMP.ENABLED", "True", "MODEL.DEVICE", "cpu"],
        "needs CUDA.*'bf16'",
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


def test_fp16_is_allowed_where_auto_finds_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    load_config(None, ["SOLVER.AMP.DTYPE", "fp16", "SOLVER.AMP.ENABLED", "True"])


def test_checks_read_keys_of_the_table_and_cover_a_wrong_type():
    assert {name for cross in CROSS_CHECKS for name in cross.keys} <= set(NAMES)
    cfg = get_cfg()
    cfg.SOLVER.STEPS = "soon"
    assert [line.split(" ")[0] for line in problems(cfg)] == ["SOLVER.STEPS"]


# ------------------------------------------------------------------------------ list_config
def list_config(*arguments):
    environment = {"PYTHONPATH": str(ROOT), "CLOUDS_D2": "embedded", "COLUMNS": "80"}
    command = [sys.executable, "tools/list_config.py", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_list_config_prints_every_key():
    text = list_config()
    for key in KEYS:
        assert f"\n{key.name}\n    default: {key.default!r}    allowed: " in f"\n{text}"


def test_list_config_as_markdown():
    rows = list_config("--markdown", "solver.clip").splitlines()
    assert rows[0].split() == ["|", "key", "|", "default", "|", "allowed", "|", "meaning", "|"]
    wanted = [key for key in KEYS if key.name.startswith("SOLVER.CLIP")]
    assert len(rows) == 2 + len(wanted)
    for row, key in zip(rows[2:], wanted, strict=True):
        assert row.startswith(f"| `{key.name}`")


# ------------------------------------------------------------------------- every key is used
def attribute_reads():
    """Every chain of attributes in clouds/ outside of clouds/config, with short names resolved.

    `head = cfg.MODEL.SEM_SEG_HEAD` makes a later `head.MASK_DIM` a read of the key.
    """

    def chain(node):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        return (node.id if isinstance(node, ast.Name) else None), parts[::-1]

    def upper(parts):
        return [p for p in parts if p.isupper() or p in ("VERSION",)]

    def bind(target, value, names):
        if isinstance(target, (ast.Tuple, ast.List)) and isinstance(value, ast.Tuple):
            for t, v in zip(target.elts, value.elts, strict=False):
                bind(t, v, names)
        elif isinstance(target, ast.Name):
            root, parts = chain(value)
            prefix = names.get(root, [])
            if upper(parts):
                names[target.id] = prefix + upper(parts)

    reads = set()
    files = [p for p in (ROOT / "clouds").rglob("*.py") if ROOT / "clouds/config" not in p.parents]
    files += list((ROOT / "tools").glob("*.py"))
    for path in files:
        tree = ast.parse(path.read_text())
        scopes = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.Module))]
        for scope in scopes:
            names = {}
            for node in ast.walk(scope):
                if isinstance(node, ast.Assign):
                    for target in node.targets:
                        bind(target, node.value, names)
            for node in ast.walk(scope):
                if isinstance(node, ast.Attribute):
                    root, parts = chain(node)
                    reads.add(".".join(names.get(root, []) + upper(parts)))
    return reads


def test_every_key_is_read_by_the_library():
    reads = attribute_reads()
    # VERSION is there for Detectron2's own loader, which demands it.
    unread = [n for n in NAMES if n != "VERSION" and not any(r.endswith(n) for r in reads)]
    assert unread == []
