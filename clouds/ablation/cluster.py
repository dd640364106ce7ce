"""Runs as jobs of SLURM, by submitit."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clouds.ablation.plan import Run
from clouds.ablation.runs import (
    CONSOLE,
    Outcome,
    fail_without_start,
    last_line,
    outcome_of,
    results_of,
    start_of,
)
from clouds.files import atomic_write
from clouds.messages import install_extra
from clouds.yaml_core import CoreLoader

logger = logging.getLogger(__name__)

JOB = "job.json"
"""File in the folder of a run: the job that it was submitted as."""

CONSTRUCTOR_OPTIONS = ("slurm_max_num_timeout", "slurm_python")
"""Options that submitit's AutoExecutor takes when it is made; it takes the others later."""

POLL_SECONDS = {"slurm": 20.0, "local": 0.5, "debug": 0.0}
"""submitit's name of a cluster -> seconds between polls of its jobs. `local` and `debug` run jobs
on this machine, to try the options."""


class TrainJob:
    """What a job does: train in a process of its own. Pickled by submitit.

    At the signal before the time limit, or at preemption, the process saves and ends, and the job
    is submitted once more, which resumes.

    Args:
        command: of the run.
        folder: OUTPUT_DIR.
    """

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self.command = list(command)
        self.folder = folder
        self._pid = 0

    def __call__(self) -> int:
        """Train; returns the exit status."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / CONSOLE).open("ab") as console:
            process = subprocess.Popen(
                self.command,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_ignore_submitit_signal,
            )
        self._pid = process.pid
        return process.wait()

    def checkpoint(self) -> Any:
        """Called by submitit before the job ends early: let the process save, then submit again."""
        import submitit

        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it has just ended
            os.kill(self._pid, signal.SIGTERM)
            # not Popen.wait: this runs in a signal handler, while __call__ waits
            os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(TrainJob(self.command, self.folder))


def _ignore_submitit_signal() -> None:
    """SLURM sends submitit's signal to all processes of a job; it would end the training."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """Options of submitit from KEY=VALUE, such as timeout_min=60.

    Raises:
        ValueError: a word of another form.
    """
    options = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(
                f"job option {word!r}: expected is KEY=VALUE, such as timeout_min=1440 or "
                "slurm_partition=gpu"
            )
        options[name] = yaml.load(text, CoreLoader)
    if "timeout_min" not in options:
        raise ValueError(
            "--job-options timeout_min=MINUTES is needed: the time after which a job is stopped, "
            "saved and submitted again"
        )
    return options


def import_submitit() -> Any:
    """The package submitit.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise ImportError(f"--cluster needs submitit: {install_extra('slurm')}") from error
    return submitit


@dataclass
class ClusterRunner:
    """Submits each run as a job and waits for all of them.

    Jobs that an earlier call submitted, and that have not ended, are waited for instead.

    Attributes:
        cluster: of POLL_SECONDS.
        folder: of submitit's files.
        options: of submitit, such as timeout_min, slurm_partition.
        gpus_per_run: processes of each run.
    """

    cluster: str
    folder: Path
    options: Mapping[str, Any]
    gpus_per_run: int = 1

    def run(self, runs: Sequence[Run]) -> dict[Run, Outcome]:
        """Submit and wait; returns how those runs ended that failed.

        Raises:
            ImportError: submitit is not installed.
            ValueError: submitit does not accept an option, or there is no SLURM here.
        """
        executor = self._executor()
        waiting, jobs, failed = list(runs), dict[Run, Any](), dict[Run, Outcome]()
        while waiting or jobs:
            fail_without_start(waiting, failed)
            for run in [r for r in waiting if start_of(r, [*waiting, *jobs]) is None]:
                waiting.remove(run)
                jobs[run] = self._earlier_job(run) or self._submit(executor, run)
            for run, job in list(jobs.items()):
                if job.done():
                    del jobs[run]
                    self._end(run, job, failed)
            if jobs:
                time.sleep(POLL_SECONDS[self.cluster])
        return failed

    def _end(self, run: Run, job: Any, failed: dict[Run, Outcome]) -> None:
        (run.folder / JOB).unlink(missing_ok=True)
        if results_of(run) is not None:
            logger.info("%s: ended", run.name)
            return
        failed[run] = _outcome(job, run)
        logger.error("%s: failed, %s", run.name, failed[run])

    def _executor(self) -> Any:
        submitit = import_submitit()
        at_start = {k: v for k, v in self.options.items() if k in CONSTRUCTOR_OPTIONS}
        later = {k: v for k, v in self.options.items() if k not in CONSTRUCTOR_OPTIONS}
        try:
            executor = submitit.AutoExecutor(self.folder, cluster=self.cluster, **at_start)
            executor.update_parameters(**later)
        except (NameError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"submitit cannot use --cluster {self.cluster} with the options "
                f"{dict(self.options)}: {error}. Options are those of its AutoExecutor, and of its "
                "SlurmExecutor with slurm_ before the name."
            ) from error
        return executor

    def _submit(self, executor: Any, run: Run) -> Any:
        job = executor.submit(TrainJob(run.command(self.gpus_per_run), run.folder.absolute()))
        with atomic_write(run.folder / JOB, "w") as file:
            json.dump({"cluster": self.cluster, "id": job.job_id, "folder": str(self.folder)}, file)
        logger.info("%s: job %s, in '%s'", run.name, job.job_id, run.folder)
        return job

    def _earlier_job(self, run: Run) -> Any:
        """The job of SLURM that an earlier call submitted for a run, if it has not ended."""
        path = run.folder / JOB
        if self.cluster != "slurm" or not path.is_file():
            return None
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["cluster"] != self.cluster:
            return None
        job = import_submitit().SlurmJob(folder=saved["folder"], job_id=saved["id"])
        if job.done(force_check=True):
            return None
        logger.info("%s: job %s was submitted earlier", run.name, job.job_id)
        return job


def _outcome(job: Any, run: Run) -> Outcome:
    """How the job of a run without results ended."""
    try:
        status = int(job.result())
    except Exception as error:  # any: what the job raised, or that it was cancelled
        lines = str(error).strip().splitlines()
        reason = lines[-1] if lines else type(error).__name__
        return Outcome(1, f"job {job.job_id} ({job.state}): {reason}")
    return outcome_of(run, status) or Outcome(status, last_line(run))
