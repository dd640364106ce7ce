"""Runs as processes: failures, interruptions, GPUs."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest

from clouds.ablation.local import LocalRunner, gpu_slots
from clouds.ablation.plan import Run, read_ablation
from clouds.ablation.runs import check_unchanged, results_of, table_of, unfinished


def starts(run):
    path = run.folder / "starts"
    return path.read_text().split() if path.exists() else []


def test_runs_that_ended_are_not_repeated(ablation_file, fake_train):
    ablation = read_ablation(ablation_file)
    assert LocalRunner([{}, {}]).run(unfinished(ablation.runs)) == {}
    assert unfinished(ablation.runs) == []
    table, missing = table_of(ablation)
    assert missing == []
    assert table.rows[1].values(["mean/mIoU"]) == {0: 30.0, 1: 31.0}
    assert table.difference(table.rows[1], "mIoU").mean == 10.0
    assert all(starts(run) == ["new"] for run in ablation.runs)


def test_others_go_on_after_a_failure(ablation_file, fake_train, monkeypatch):
    monkeypatch.setenv("FAIL", "slow/seed_0")
    ablation = read_ablation(ablation_file)
    failed = LocalRunner([{}]).run(ablation.runs)
    assert list(failed) == [ablation.runs[0]]
    assert str(failed[ablation.runs[0]]) == "exit status 2: error: no such data"
    table, missing = table_of(ablation, failed)
    assert missing == [ablation.runs[0]]
    assert "slow, seed 0: failed, exit status 2: error: no such data; log in" in table.markdown()
    assert len(table.rows[0].results) == 1


def test_a_run_that_ends_without_results_has_failed(ablation_file, monkeypatch):
    command = [sys.executable, "-c", "print('no test data')"]
    monkeypatch.setattr(Run, "command", lambda self, num_gpus: command)
    run = read_ablation(ablation_file).runs[0]
    failed = LocalRunner([{}]).run([run])
    assert str(failed[run]) == "exit status 0: no results.json of its last iteration. no test data"


def test_an_interrupted_ablation_goes_on(ablation_file, fake_train, monkeypatch):
    monkeypatch.setenv("WAIT", "slow/seed_0")
    ablation = read_ablation(ablation_file)
    first, others = ablation.runs[0], ablation.runs[1:]

    def interrupt():
        while not (first.folder / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=interrupt).start()
    runner = LocalRunner([{}])
    assert runner.run(ablation.runs) == {}
    assert runner.stopped_by == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert not any(starts(run) for run in others)
    assert LocalRunner([{}]).run(unfinished(ablation.runs)) == {}
    assert starts(first) == ["new", "resumed"]
    assert all(starts(run) == ["new"] for run in others)


def test_a_second_signal_kills(ablation_file, monkeypatch, tmp_path):
    program = (
        "import pathlib, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"pathlib.Path({str(tmp_path)!r}, 'ready').touch()\n"
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", program]
    monkeypatch.setattr(Run, "command", lambda self, num_gpus: command)

    def interrupt():
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    threading.Thread(target=interrupt).start()
    runner = LocalRunner([{}])
    started = time.monotonic()
    assert runner.run(read_ablation(ablation_file).runs) == {}
    assert runner.stopped_by == signal.SIGINT and time.monotonic() - started < 50


def test_results_of_an_evaluation_in_training_are_not_the_end(ablation_file, fake_train):
    run = read_ablation(ablation_file, overrides=["SOLVER.MAX_ITER", "50"]).runs[0]
    LocalRunner([{}]).run([run])
    assert results_of(run).iteration == 49
    longer = read_ablation(ablation_file, overrides=["SOLVER.MAX_ITER", "51"]).runs[0]
    assert results_of(longer) is None


def test_a_run_of_another_config_is_refused(ablation_file, fake_train):
    run = read_ablation(ablation_file).runs[0]
    LocalRunner([{}]).run([run])
    (run.folder / "config.yaml").write_text(run.cfg.dump())
    check_unchanged([run])
    harmless = ["DATALOADER.NUM_WORKERS", "3", "LOG_PERIOD", "7"]
    check_unchanged(read_ablation(ablation_file, overrides=harmless).runs)
    changed = read_ablation(ablation_file, overrides=["TEST.SHORT_SIDE", "96"]).runs
    with pytest.raises(ValueError, match=r"slow, seed 0 has now: TEST.SHORT_SIDE: 160 -> 96"):
        check_unchanged(changed)


def with_start(file):
    file.write_text(file.read_text().replace("slow: {", "slow: {start: fast, "))
    return read_ablation(file, seeds=[0])


def test_runs_wait_for_the_weights_that_they_start_from(ablation_file, fake_train):
    slow, fast = with_start(ablation_file).runs
    assert LocalRunner([{}, {}]).run([slow, fast]) == {}
    times = [(run.folder / "results.json").stat().st_mtime_ns for run in (fast, slow)]
    assert times[0] < (slow.folder / "starts").stat().st_mtime_ns < times[1]


def test_runs_that_start_from_a_failed_one_fail(ablation_file, fake_train, monkeypatch):
    monkeypatch.setenv("FAIL", "fast/seed_0")
    slow, fast = with_start(ablation_file).runs
    failed = LocalRunner([{}]).run([slow, fast])
    assert set(failed) == {slow, fast} and not starts(slow)
    assert failed[slow].message == "not started, since fast, seed 0 failed"


def test_each_run_has_a_gpu(monkeypatch, ablation_file, fake_train):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_slots(0, 1, None) == [{}]
    assert gpu_slots(0, 1, 3) == [{}, {}, {}]
    name = "CUDA_VISIBLE_DEVICES"
    assert gpu_slots(3, 1, None) == [{name: "0"}, {name: "1"}, {name: "2"}]
    assert gpu_slots(5, 2, None) == [{name: "0,1"}, {name: "2,3"}]
    assert gpu_slots(4, 1, 2) == [{name: "0"}, {name: "1"}]
    monkeypatch.setenv(name, "5, GPU-a")
    assert gpu_slots(2, 1, None) == [{name: "5"}, {name: "GPU-a"}]
    with pytest.raises(ValueError, match="--jobs 3 with --gpus-per-run 1 needs 3 GPUs"):
        gpu_slots(2, 1, 3)
    with pytest.raises(ValueError, match=r"--jobs 1 with --gpus-per-run 4 needs 4 GPUs.* has 2"):
        gpu_slots(2, 4, None)
    with pytest.raises(ValueError, match="at least 1"):
        gpu_slots(2, 0, None)
    runs = read_ablation(ablation_file).runs[:2]
    LocalRunner([{name: "5"}, {name: "GPU-a"}]).run(runs)
    found = {(run.folder / "console.txt").read_text().strip() for run in runs}
    assert found == {"gpus 5", "gpus GPU-a"}
