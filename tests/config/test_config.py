"""Configs: the table of keys, YAML files, overrides, errors in them, `clouds list-config`."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from clouds.cli.table import COMMANDS
from clouds.config import KEYS, ConfigError, get_cfg, load_config, problems
from clouds.config.config import get_value
from clouds.config.load import nearest

ROOT = Path(__file__).resolve().parents[2]
NAMES = [key.name for key in KEYS]
NUM_CLASSES = "MODEL.SEM_SEG_HEAD.NUM_CLASSES"
# What a loaded config holds without any setting: 0 classes means those of gta5, 19.
LOADED = {key.name: key.default for key in KEYS} | {NUM_CLASSES: 19}


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def lines(error):
    return error.value.problems


# -------------------------------------------------------------------------------- the table
def test_every_key_is_unique_and_has_a_meaning():
    assert len(set(NAMES)) == len(NAMES)
    assert [key.name for key in KEYS if len(key.doc) < 5 or not key.doc.endswith(".")] == []


def test_no_key_is_a_section_of_another():
    assert [(a, b) for a in NAMES for b in NAMES if b.startswith(a + ".")] == []


def test_the_defaults_are_allowed_and_come_back_unchanged():
    assert problems(get_cfg()) == []
    cfg = load_config(None)
    assert {name: get_value(cfg, name) for name in NAMES} == LOADED
    assert cfg.is_frozen()
    assert get_cfg() == cfg


def test_every_rule_says_what_it_allows_and_forbids_something():
    # Values of the right type, of which each rule that is not `any_value` forbids at least one.
    tries = {
        bool: [True, False],
        int: [-1, 0, 10**6, 2**64],
        float: [-1.0, 0.0, 10.0**6],
        str: ["", "nonsense"],
        list: [[], [1.0], [0.0, 0.0, 0.0]],
        tuple: [(), (0, 0), (1,)],
    }
    for key in KEYS:
        if key.rule.description:
            assert key.rule.is_valid(key.default), key.name
            values = tries[type(key.default)]
            if isinstance(key.element, tuple):
                values = [(), ((0, 0),), ((0, 5),), ((1, 2, 3),)]
            allowed = [key.rule.is_valid(value) for value in values]
            assert not all(allowed), key.name


# --------------------------------------------------------------------------- files and bases
def test_a_file_changes_what_it_names_and_nothing_else(tmp_path):
    path = write(tmp_path / "a.yaml", "SOLVER:\n  BASE_LR: 0.5\nSEED: 3\n")
    cfg = load_config(path)
    expected = LOADED | {"SOLVER.BASE_LR": 0.5, "SEED": 3}
    assert {name: get_value(cfg, name) for name in NAMES} == expected


def test_bases_are_relative_to_the_file_that_names_them(tmp_path, monkeypatch):
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
    text = "_BASE_: base.yaml\nDATASETS: {TRAIN: ['gta5', 'synthia']}\nSOLVER: {OPTIMIZER: SGD}\n"
    path = write(tmp_path / "leaf.yaml", text)
    merged = get_cfg()
    merged.merge_from_file(str(path))
    merged.merge_from_list(["TEST.SHORT_SIDE", "64"])
    assert load_config(path, ["TEST.SHORT_SIDE", "64"]) == merged


def test_a_dumped_config_loads_to_itself(tmp_path):
    words = "SOLVER.STEPS (1,2) SEED 9 INPUT.INITIAL_SIZES ((4,6),) DATASETS.FACTORS (0.5,)"
    cfg = load_config(None, [*words.split(), "MODEL.WEIGHTS", "a b.pth"])
    assert (cfg.INPUT.INITIAL_SIZES, cfg.DATASETS.FACTORS) == (((4, 6),), (0.5,))
    assert load_config(write(tmp_path / "dump.yaml", cfg.dump())) == cfg


def test_empty_files_and_sections_change_nothing(tmp_path):
    assert load_config(write(tmp_path / "empty.yaml", "# nothing\n")) == load_config(None)
    assert load_config(write(tmp_path / "section.yaml", "SOLVER:\n")) == load_config(None)


def test_anchors_and_merge_keys(tmp_path):
    text = "SOLVER: &a {MAX_ITER: 3}\nTEST: {SLIDE: {CROP_SIZE: &c 64}, SHORT_SIDE: *c}\n"
    cfg = load_config(write(tmp_path / "a.yaml", text))
    assert (cfg.SOLVER.MAX_ITER, cfg.TEST.SLIDE.CROP_SIZE, cfg.TEST.SHORT_SIDE) == (3, 64, 64)


def doubling(levels):
    """a0 holds 10 values; each further list is ten times the one before."""
    text = "a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]\n"
    for i in range(1, levels):
        text += f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n"
    return text


MERGING = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 10)
)
CHAIN = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 200))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # a0 has 11 nodes, a(i) 1 + 10 a(i - 1): 11, 111, 1111, ...; a4 is the first above 100,000
        pytest.param(doubling(10), r":5: .*111111 values with aliases.*100000", id="aliases"),
        pytest.param(MERGING, "values with aliases expanded", id="merge keys"),
        pytest.param("a: " + "[" * 100_000, ":1: .*more than 50 levels", id="brackets"),
        pytest.param(CHAIN, ":5[0-9]: .*more than 50 levels", id="chain of aliases"),
        pytest.param("SOLVER: &a\n  STEPS: [*a]\n", r":2: .*\*a is within", id="circle"),
        pytest.param("SEED: [" + "1," * 200_000 + "]", "100001 values", id="long list"),
        pytest.param("SEED: " + "1" * 5000, ":1: .*5000 digits", id="digits"),
    ],
)
def test_documents_that_grow_without_bound_are_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path / "a.yaml", text))


def test_aliases_of_a_usual_size(tmp_path):
    text = "DATASETS:\n  TRAIN: &names [gta5]\n  TEST: *names\n"
    assert load_config(write(tmp_path / "a.yaml", text)).DATASETS.TEST == ("gta5",)


SHIPPED = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name != "ablations")


@pytest.mark.parametrize("path", SHIPPED, ids=[str(p.relative_to(ROOT)) for p in SHIPPED])
def test_every_config_of_the_project_loads(path):
    load_config(path)


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
    with pytest.raises(ConfigError, match=r"QWERTY \(override\).*`clouds list-config`"):
        load_config(None, ["QWERTY", "1"])
    assert "list-config" in COMMANDS


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
        "INPUT.INITIAL_HEIGHT",
        "MODEL.MASK_FORMER.HIDDEN_DIM",
        "MODEL.SEM_SEG_HEAD.CONVS_DIM",
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


def test_a_missing_file_names_the_folder_and_similar_files(tmp_path, monkeypatch):
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


def test_a_missing_base_names_the_file_that_names_it(tmp_path):
    path = write(tmp_path / "a.yaml", "_BASE_: b.yaml\n")
    with pytest.raises(FileNotFoundError) as error:
        load_config(path)
    assert f"{tmp_path / 'b.yaml'}, which is the _BASE_ of {path}, does not exist" in str(
        error.value
    )


def test_circular_bases(tmp_path):
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
        ("SEED: 1\nLOG_PERIOD: 2\nSEED: 3\n", 3, "SEED is set already in line 1"),
        ("SOLVER:\n  GAMMA: 1\n  GAMMA: 0.5\n", 3, "GAMMA is set already in line 2"),
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


# ------------------------------------------------------------------------------ list_config
def list_config(*arguments):
    environment = {"PYTHONPATH": str(ROOT), "CLOUDS_D2": "embedded", "COLUMNS": "80"}
    command = [sys.executable, "-m", "clouds", "list-config", *arguments]
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
