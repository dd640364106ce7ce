"""Runs as jobs, by submitit's executors that need no SLURM."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time

import pytest

from clouds.ablation import cluster
from clouds.ablation.cluster import ClusterRunner, TrainJob, parse_options
from clouds.ablation.plan import read_ablation
from clouds.ablation.runs import unfinished


# submitit leaves log files open
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["debug", pytest.param("local", marks=pytest.mark.slow)])
def test_jobs(ablation_file, fake_train, monkeypatch, tmp_path, name):
    pytest.importorskip("submitit")
    monkeypatch.setenv("FAIL", "fast/seed_1")
    text = ablation_file.read_text()
    ablation_file.write_text(text.replace("slow: {", "slow: {start: fast, "))
    ablation = read_ablation(ablation_file)
    runs = ablation.runs if name == "debug" else ablation.runs[2:]
    failed = ClusterRunner(name, tmp_path / "jobs", {"timeout_min": 5}).run(runs)
    slow, fast = ablation.runs[2:]
    assert str(failed[fast]) == "exit status 2: error: no such data"
    assert failed[slow].message == "not started, since fast, seed 1 failed"
    assert unfinished(runs) == [slow, fast] and set(failed) == {slow, fast}
    assert not list(ablation.output.rglob("job.json"))


def test_options_that_submitit_does_not_know(ablation_file, tmp_path):
    pytest.importorskip("submitit")
    runner = ClusterRunner("local", tmp_path, {"timeout_mins": 5})
    with pytest.raises(ValueError, match=r"--cluster local with the options .*timeout_mins"):
        runner.run(read_ablation(ablation_file).runs)
    with pytest.raises(ValueError, match="--cluster slurm"):
        ClusterRunner("slurm", tmp_path, {"timeout_min": 5}).run([])


def test_options_of_the_command_line():
    words = ["timeout_min=90", "slurm_partition=gpu", "slurm_array_parallelism=4"]
    assert parse_options(words) == {
        "timeout_min": 90, "slurm_partition": "gpu", "slurm_array_parallelism": 4,
    }  # fmt: skip
    with pytest.raises(ValueError, match="expected is KEY=VALUE"):
        parse_options(["gpu"])
    with pytest.raises(ValueError, match="timeout_min=MINUTES is needed"):
        parse_options(["slurm_partition=gpu"])


def test_before_its_end_a_job_saves_and_is_submitted_again(tmp_path):
    """As submitit does: the method is called in a handler while the job waits for its process."""
    pytest.importorskip("submitit")
    program = (
        "import signal, sys, time, pathlib\n"
        "def save(*_):\n    pathlib.Path('saved').touch(); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "pathlib.Path('ready').touch(); time.sleep(60)\n"
    )
    script = tmp_path / "p.py"
    script.write_text(program.replace("Path('", f"Path('{tmp_path}/"))
    job = TrainJob([sys.executable, str(script)], tmp_path)
    again = []

    def on_signal(number, frame):
        again.append(job.checkpoint())

    before = signal.signal(signal.SIGUSR1, on_signal)
    main = threading.main_thread().ident

    def interrupt():
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        signal.pthread_kill(main, signal.SIGUSR1)

    threading.Thread(target=interrupt).start()
    try:
        assert job() == 143
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (tmp_path / "saved").exists()
    assert again[0].function.command == job.command


def test_a_job_that_is_still_queued_is_not_submitted_again(ablation_file, fake_train, monkeypatch):
    submitit = pytest.importorskip("submitit")
    run = read_ablation(ablation_file).runs[0]
    run.folder.mkdir(parents=True)
    (run.folder / "job.json").write_text('{"cluster": "slurm", "id": "77", "folder": "/jobs"}')
    polls = []

    class QueuedJob:
        state, job_id = "PENDING", "77"

        def __init__(self, folder, job_id):
            assert (str(folder), job_id) == ("/jobs", "77")

        def done(self, force_check=False):
            polls.append(1)
            if len(polls) == 3:
                TrainJob(run.command(), run.folder)()
            return len(polls) >= 3

    monkeypatch.setattr(submitit, "SlurmJob", QueuedJob)
    monkeypatch.setattr(ClusterRunner, "_executor", lambda self: None)  # submits nothing
    monkeypatch.setitem(cluster.POLL_SECONDS, "slurm", 0.0)
    assert ClusterRunner("slurm", run.folder, {}).run([run]) == {}
    assert unfinished([run]) == []


@pytest.mark.slow
def test_what_slurm_gets(ablation_file, monkeypatch, tmp_path):
    """With stand-ins for its programs: the header of the job, and a job that left no result."""
    pytest.importorskip("submitit")
    programs = tmp_path / "bin"
    programs.mkdir()
    state = "JobID|State|NodeList\\n12|FAILED|n1\\n12.0|FAILED|n1\\n"
    for name, script in {
        "srun": "",
        "sbatch": f'cp "$1" {tmp_path}/job.sh; echo Submitted batch job 12',
        "sacct": f"printf '{state}'",
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setitem(cluster.POLL_SECONDS, "slurm", 0.1)
    run = read_ablation(ablation_file).runs[0]
    words = ["timeout_min=90", "slurm_partition=big", "slurm_max_num_timeout=5"]
    options = {"name": "clouds-x", "gpus_per_node": 2, **parse_options(words)}
    failed = ClusterRunner("slurm", tmp_path / "jobs", options, gpus_per_run=2).run([run])
    assert str(failed[run]).startswith("exit status 1: job 12 (FAILED)")
    lines = (tmp_path / "job.sh").read_text().splitlines()
    header = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")}
    assert {"--partition=big", "--time=90", "--job-name=clouds-x", "--gpus-per-node=2"} <= header
    (pickled,) = (tmp_path / "jobs").glob("*submitted.pkl")
    job = pickle.loads(pickled.read_bytes())
    assert job.function.command == run.command(2) and job._timeout_countdown == 5
