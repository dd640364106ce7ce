"""Mutated prompt files, configs, overrides, and words of command lines."""

from __future__ import annotations

import contextlib
import io
import json

import yaml
from fuzzing import ACCEPTED, SCALARS, VALUES, fuzz, mutate, mutations
from hypothesis import strategies as st
from street_renderer import demo_data
from street_renderer.prompt_reader import named_classes, parse_scene

from clouds.cli import main as program
from clouds.cli.table import COMMANDS
from clouds.config import KEYS, load_config
from clouds.config.compat import COMPAT_KEYS
from clouds.generation.prompt_file import PromptFile
from clouds.generation.prompts import near_duplicates, read_prompts

PROMPTS = (
    b"a street in rain, two cars and no people\n# comment\n\na road at night\n",
    "\ufeffcafé street, 北京\r\nempty road\r\n".encode(),
    b"",
)


@fuzz("prompt file", 6000, drawn=mutations(len(PROMPTS)))
def test_prompts(attempt, tmp_path, drawn):
    path = tmp_path / "prompts.txt"
    path.write_bytes(mutate(PROMPTS[drawn[0]], drawn[1]))
    outcome, prompts = attempt(lambda: read_prompts(path), "prompts.txt")
    if outcome == ACCEPTED:
        assert prompts and all(prompt.strip() == prompt != "" for prompt in prompts)


@fuzz("text of a prompt", 3000, texts=st.lists(st.text(max_size=40), max_size=3))
def test_prompt_reader(attempt, tmp_path, texts):
    def read():
        near_duplicates(texts)
        return [(parse_scene(text), named_classes(text)) for text in texts]

    outcome, _ = attempt(read)
    assert outcome == ACCEPTED


SETTINGS = {"model": "m", "seed": 1}


@fuzz("output of write-prompts", 3000, drawn=mutations(1))
def test_prompt_file(attempt, tmp_path, drawn):
    path = tmp_path / "more.txt"
    path.write_text("old one\n", newline="")
    file = PromptFile(path, SETTINGS)
    file.append(["first", "second"], 1)
    path.write_bytes(mutate(path.read_bytes(), drawn[1]))

    def resume():
        again = PromptFile(path, SETTINGS)
        again.drop_incomplete_round()
        return again

    outcome, again = attempt(resume, "more.txt")
    if outcome == ACCEPTED:
        assert all(isinstance(line, str) for line in [*again.old, *again.new])
        assert PromptFile(path, SETTINGS).new == again.new


RECORD = b'{"gta5": {"seed": 1, "size": [64, 96], "count": 4, "painter": 1}}'


@fuzz("record of the demo's data", 2000, drawn=mutations(1))
def test_demo_record(attempt, tmp_path, drawn):
    (tmp_path / demo_data.RECORD).write_bytes(mutate(RECORD, drawn[1]))
    attempt(lambda: demo_data.read_record(tmp_path), demo_data.RECORD)


# ---------------------------------------------------------------------- configs
YAMLS = (
    b"MODEL:\n  WEIGHTS: a.pth\nSOLVER:\n  STEPS: [10, 20]\n  BASE_LR: 1e-4\nSEED: 3\n",
    b"DATASETS:\n  TRAIN: ('gta5',)\n  TEST: &x [camvid_val]\nINPUT: {CROP: {SIZE: [64, 96]}}\n",
    b"_BASE_: base.yaml\nMODEL:\n  MASK_FORMER: {NHEADS: 8, HIDDEN_DIM: 256}\n<<: {SEED: 1}\n",
    b"WANDB: {NAME: x}\nSOLVER: {AMP: {ENABLED: true, DTYPE: fp16}}\nMODEL.DEVICE: cpu\n",
)


def check_config(attempt, path, words, *names):
    outcome, cfg = attempt(lambda: load_config(path, words), *names)
    if outcome == ACCEPTED:
        assert cfg.is_frozen() and cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES > 0
        assert yaml.safe_load(cfg.dump())["SEED"] == cfg.SEED


@fuzz("config file, bytes", 4000, drawn=mutations(len(YAMLS)))
def test_config_bytes(attempt, tmp_path, drawn):
    (tmp_path / "base.yaml").write_text("SEED: 2\n")
    path = tmp_path / "changed.yaml"
    path.write_bytes(mutate(YAMLS[drawn[0]], drawn[1]))
    check_config(attempt, path, [], "changed.yaml", "base.yaml", *(key.name for key in KEYS))


NAMES = st.sampled_from([*(key.name for key in KEYS), *sorted(COMPAT_KEYS), "MODEL", "SEEED", ""])


@fuzz("config file, values", 4000, name=NAMES, value=VALUES)
def test_config_values(attempt, tmp_path, name, value):
    tree = value
    for part in reversed(name.split(".")):
        tree = {part: tree}
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    check_config(attempt, path, [], "changed.yaml", name)


WORDS = st.text(max_size=12) | SCALARS.map(str) | VALUES.map(repr) | VALUES.map(json.dumps)


@fuzz("KEY VALUE", 6000, name=NAMES | st.text(max_size=8), word=WORDS)
def test_overrides(attempt, tmp_path, name, word):
    check_config(attempt, None, [name, word], name, "override", *(key.name for key in KEYS))


# ---------------------------------------------------------------------- command lines
QUICK = ("check-data", "list-config", "convert", "check-prompts", "train", "predict", "baselines")
FLAGS = (
    *("--help", "--config-file", "--datasets", "--root", "--full", "--workers", "--overwrite"),
    *("--to", "--strict", "--similarity", "--at-least", "--weights", "--input", "--output", "--"),
    *("--resume", "--num-gpus", "--markdown", "--classes", "--batch-size", "--save", "--eval-only"),
)
ARGUMENTS = st.lists(
    st.sampled_from(FLAGS)
    | st.sampled_from(["no/such.yaml", ".", "a.pth", "/dev/null", "~nobody", "0", "-1", "SEED"])
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6),
    max_size=6,
)


@fuzz("words of a command line", 2000, name=st.sampled_from(QUICK), words=ARGUMENTS)
def test_command_line(attempt, tmp_path, name, words):
    assert name in COMMANDS

    def run():
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                return program.main([name, *words])
            except SystemExit as stop:
                if stop.code in (0, 1):
                    return stop.code
                raise

    attempt(run)
