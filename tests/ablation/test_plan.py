"""Ablation files: runs and their configs, and what is refused before the first run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from clouds.ablation.plan import read_ablation
from clouds.config import load_config
from clouds.config.check import ConfigError
from clouds.data.yaml_section import DescriptionError
from clouds.resources import ABLATIONS, short_names

ROOT = Path(__file__).resolve().parents[2]


def write(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    return path


def test_runs_seed_by_seed(ablation_file, tmp_path):
    ablation = read_ablation(ablation_file)
    assert [(run.setting, run.seed) for run in ablation.runs] == [
        ("slow", 0), ("fast", 0), ("slow", 1), ("fast", 1),
    ]  # fmt: skip
    assert ablation.baseline == "slow"
    run = ablation.runs[3]
    assert run.folder == tmp_path / "out/fast/seed_1"
    assert run.cfg.SOLVER.BASE_LR == 0.03


def test_the_command_gives_the_checked_config(tmp_path):
    text = """
config: demo/warmup
common: {DATASETS.TEST: [bdd_val], TEST.SHORT_SIDE: 64}
settings:
  a b: {DATASETS.TRAIN: [gta5, synthia], INPUT.CLASS_MIXING: False, SOLVER.BASE_LR: 1e-5}
  joint: {config: demo/joint, MODEL.WEIGHTS: "1"}
"""
    overrides = ["SOLVER.MAX_ITER", "7", "LOG_PERIOD", "2"]
    for run in read_ablation(write(tmp_path, text), overrides=overrides, seeds=[5]).runs:
        words = run.command()
        name, first = words[words.index("--config-file") + 1], words.index("--resume") + 1
        assert load_config(name, words[first:]).dump() == run.cfg.dump()
        assert (run.cfg.SEED, run.cfg.SOLVER.MAX_ITER) == (5, 7)
    assert run.config == "demo/joint" and run.cfg.MODEL.WEIGHTS == "1"
    assert run.command(4)[6:9] == ["--resume", "--num-gpus", "4"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["SEED", "4"], r"SEED \(override\) is set for each run .*--seeds"),
        (["OUTPUT_DIR", "x"], r"OUTPUT_DIR \(override\) is set for each run .*--output"),
        (["DATASETS.TEST", "()"], "DATASETS.TEST is empty in the setting 'slow'"),
    ],
)
def test_overrides_that_an_ablation_cannot_use(ablation_file, overrides, message):
    with pytest.raises(ValueError, match=message):
        read_ablation(ablation_file, overrides=overrides)


def test_some_settings_and_seeds(ablation_file, tmp_path):
    ablation = read_ablation(ablation_file, seeds=[9], only=["fast"], output=tmp_path / "x")
    assert [(run.setting, run.seed) for run in ablation.runs] == [("slow", 9), ("fast", 9)]
    assert ablation.runs[0].folder == tmp_path / "x/slow/seed_9"
    with pytest.raises(ValueError, match=r"--seeds is \[-3\]; expected are whole numbers from 0"):
        read_ablation(ablation_file, seeds=[-3])
    with pytest.raises(ValueError, match=r"no setting 'slo'; the file has 'slow', 'fast'"):
        read_ablation(ablation_file, only=["slo"])


STARTS = """
config: demo/joint
baseline: warmup
settings:
  joint: {start: warmup}
  none: {start: warmup, MODEL.CLOUDS.REFINER: none}
  warmup: {config: demo/warmup}
"""


def test_a_setting_starts_from_the_weights_of_another_one_with_the_same_seed(tmp_path):
    ablation = read_ablation(write(tmp_path, STARTS), seeds=[4], output=tmp_path / "x")
    joint, none, warmup = ablation.runs
    assert (joint.start, none.start, warmup.start) == ("warmup", "warmup", "")
    assert str(tmp_path / "x/warmup/seed_4/model_final.pth") == joint.cfg.MODEL.WEIGHTS
    words = none.command()
    expected = load_config("demo/joint", words[words.index("--resume") + 1 :])
    assert expected.dump() == none.cfg.dump()
    only = read_ablation(write(tmp_path, STARTS.replace("baseline: warmup", "")), only=["none"])
    assert only.settings == ("joint", "none", "warmup")


def test_weights_for_all_runs_and_a_start(tmp_path):
    with pytest.raises(ConfigError, match=r"'none': MODEL.WEIGHTS \(override\) follows from 'star"):
        read_ablation(write(tmp_path, STARTS), overrides=["MODEL.WEIGHTS", "x.pth"])


def test_problems_of_all_settings_are_told_with_their_lines(tmp_path):
    path = write(
        tmp_path,
        "config: demo/warmup\nsettings:\n  a: {}\n  b:\n    SOLVER.BASE_LRR: 1\n"
        "  c: {SOLVER.MAX_ITER: -3}\n  d: {SEED: 3}\n",
    )
    with pytest.raises(ConfigError) as error:
        read_ablation(path)
    first, second, third = error.value.problems
    assert f"setting 'b': SOLVER.BASE_LRR ({path}:5): no such key; did you mean" in first
    assert first.endswith("SOLVER.BASE_LR?")
    assert f"setting 'c': SOLVER.MAX_ITER = -3 ({path}:6): allowed is" in second
    assert "setting 'd': SEED" in third and "leave it out" in third


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "a mapping .* is expected"),
        ("settings: {a: }", "'config' is missing"),
        ("config: demo/warmup", "'settings' is missing"),
        ("config: demo/warmup\nsettings: [1]", "'settings' is of another form"),
        ("config: demo/warmup\nsettings: {a: {SEED}}", "SEED"),
        ("config: demo/warmup\nsettings: {a: , a: }", "a is set already in line 2"),
        ("config: demo/warmup\nsettings: {a: 3}", "KEY: VALUE pairs, not 3"),
        ("config: demo/warmup\nseed: [0]\nsettings: {a: }", "'seed' is not known.*'seeds'"),
        ("config: demo/warmup\nseeds: [0, 0]\nsettings: {a: }", "different numbers"),
        ("config: demo/warmup\nseeds: [-1]\nsettings: {a: }", "whole numbers from 0"),
        ("config: demo/warmup\nbaseline: b\nsettings: {a: }", "'baseline' is 'b'; allowed is .*a"),
        ("config: demo/warmup\nmetrics: mIoU\nsettings: {a: }", "metrics: a mapping"),
        ("config: demo/warmup\nsettings: {a b: , a_b: {LOG_PERIOD: 3}}", "'a_b', as 'a b' is"),
        ("config: demo/warmup\nsettings: {±: }", "letters and digits"),
        ("config: demo/warmup\nsettings: {a: , b: {SOLVER.BASE_LR: 3e-3}}", "same config"),
        (
            "config: demo/warmup\nsettings: {a: , b: {DATASETS.TEST: [bdd_val]}}",
            "DATASETS.TEST is .* not be comparable",
        ),
        ("config: demo/warmup\nsettings: {a: , b: {TEST.PROTOCOL: slide}}", "TEST.PROTOCOL is"),
        ("config: {", "not valid YAML"),
        ("config: demo/warmup\nsettings: {a: {start: b}}", "there is no such setting; .* 'a'"),
        ("config: demo/warmup\nsettings: {a: {start: a}}", "a setting without 'start' is expect"),
        (
            "config: demo/warmup\nsettings: {a: {start: b, MODEL.WEIGHTS: x}, b: }",
            "MODEL.WEIGHTS .* is set, too",
        ),
    ],
)
def test_invalid_files(tmp_path, text, message):
    with pytest.raises((DescriptionError, ConfigError, ValueError), match=message):
        read_ablation(write(tmp_path, text))


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nois does not exist.* noise"):
        read_ablation("nois")
    with pytest.raises(FileNotFoundError, match="demo/none"):
        read_ablation(write(tmp_path, "config: demo/none\nsettings: {a: }"))


def test_the_file_in_the_documents(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/ablations.md").read_text(), re.S)
    ablation = read_ablation(write(tmp_path, text))
    assert ablation.settings[-2:] == ("joint of each seed", "phase 1")
    assert ablation.runs[-2].start == "phase 1"
    assert ablation.metrics["thin"] == ("*/IoU-pole", "*/IoU-fence")


@pytest.mark.parametrize("name", short_names(ABLATIONS))
def test_shipped_ablations(name):
    ablation = read_ablation(name, seeds=[0])
    assert len(ablation.runs) == len(ablation.settings) > 1
    assert ablation.output == Path("output/ablations", name)
