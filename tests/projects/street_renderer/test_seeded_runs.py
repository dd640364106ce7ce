"""Runs of several settings with several seeds: commands, order, and what is not repeated."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from street_renderer import seeded_runs
from street_renderer.seeded_runs import SeededRuns, Setting, summary

from clouds.config import load_config
from clouds.evaluation.report import plain

RUNS = SeededRuns(
    {
        "start": Setting("demo/warmup", folder="warmup"),
        "no refiner!": Setting("demo/joint", ("MODEL.CLOUDS.REFINER", "none"), "start"),
        "scored": Setting("demo/warmup", ("TEST.SHORT_SIDE", "96"), "start", train=False),
    }
)


@pytest.fixture
def commands(monkeypatch):
    """The commands that were run; each writes a results.json of its config, as training does."""
    called = []
    lock = threading.Lock()

    def run(command, env, **options):
        with lock:
            called.append(command)
        assert env["OMP_NUM_THREADS"] == "1"
        config = load_config(
            command[command.index("--config-file") + 1], command[command.index("OUTPUT_DIR") :]
        )
        assert not config.MODEL.WEIGHTS.startswith("/") or Path(config.MODEL.WEIGHTS).is_file()
        folder = Path(config.OUTPUT_DIR)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model_final.pth").write_bytes(b"")
        content = {"mean": {"mIoU": 10.0 + config.SEED}, "config": plain(config)}
        (folder / "results.json").write_text(json.dumps(content))
        return SimpleNamespace(returncode=int(config.SEED == 5), stderr="the reason")

    monkeypatch.setattr(seeded_runs.subprocess, "run", run)
    return called


def arguments(output, seeds=(3, 4), opts=(), processes=1):
    return SimpleNamespace(output=output, seeds=seeds, opts=list(opts), processes=processes)


@pytest.mark.parametrize("processes", [1, 3])
def test_rows_come_after_what_they_start_from(tmp_path, commands, processes):
    args = arguments(tmp_path, processes=processes)
    found = RUNS.results(args, ["no refiner!", "scored"])
    assert {name: [r["mean"]["mIoU"] for r in runs] for name, runs in found.items()} == {
        "no refiner!": [13.0, 14.0],
        "scored": [13.0, 14.0],
    }
    assert len(commands) == 6
    folders = {command[command.index("OUTPUT_DIR") + 1] for command in commands}
    names = [f"{name}_{seed}" for name in ("warmup", "no_refiner_", "scored") for seed in (3, 4)]
    assert folders == {str(tmp_path / name) for name in names}


def test_a_run_is_a_command_of_its_config(tmp_path, commands):
    RUNS.results(arguments(tmp_path, [3], ["SOLVER.MAX_ITER", "7"]), ["no refiner!", "scored"])
    first, second, third = commands
    assert first[2:7] == ["clouds", "train", "--config-file", "demo/warmup", "--resume"]
    config = load_config("demo/joint", second[second.index("OUTPUT_DIR") :])
    assert (config.SEED, config.SOLVER.MAX_ITER, config.MODEL.CLOUDS.REFINER) == (3, 7, "none")
    assert str(tmp_path / "warmup_3/model_final.pth") == config.MODEL.WEIGHTS
    assert "--eval-only" in third and "--resume" not in third


def test_a_run_with_results_is_not_repeated(tmp_path, commands):
    args = arguments(tmp_path)
    assert RUNS.results(args, ["start"]) == RUNS.results(args, ["start"])
    assert len(commands) == 2
    again = SeededRuns(RUNS.settings, numbered=False, resume=False)
    for _ in range(2):
        again.results(arguments(tmp_path, [3]), ["start"])
    assert [c[c.index("OUTPUT_DIR") + 1] for c in commands[2:]] == 2 * [str(tmp_path / "warmup")]
    assert all("--overwrite" in command for command in commands[2:])


def test_results_of_another_config_are_refused(tmp_path, commands):
    RUNS.results(arguments(tmp_path), ["start"])
    message = r"results\.json is of another run: SOLVER\.MAX_ITER is 900, not 7\. Delete its folder"
    with pytest.raises(SystemExit, match=message):
        RUNS.results(arguments(tmp_path, opts=["SOLVER.MAX_ITER", "7"]), ["start"])


def test_a_failed_run_is_named(tmp_path, commands):
    with pytest.raises(SystemExit, match=r"start, seed 5: exit status 1\nthe reason"):
        RUNS.train(arguments(tmp_path), "start", 5)
    with pytest.raises(SystemExit, match=r"start, seed 5: exit status 1\nthe reason"):
        RUNS.results(arguments(tmp_path / "b", [5]), ["scored"])


def test_means_and_deviations():
    assert summary([10.0, 14.0]) == "12.0 ± 2.8"
    assert (summary([1.26]), summary([])) == ("1.3", "-")
