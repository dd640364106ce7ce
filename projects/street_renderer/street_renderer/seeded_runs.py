"""Training runs of several settings with several seeds, for tables of means and deviations."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clouds.config import load_config
from clouds.evaluation.report import plain

THREADS = 1
"""Threads of a run. Another number changes the order of sums, and a seed's score by up to two
points of mIoU."""


def new_parser(description: str | None, output: str) -> argparse.ArgumentParser:
    """A parser with the flags that `SeededRuns` reads, but `opts`, the overrides of every run."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(output))
    add_run_flags(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser


def add_run_flags(parser: argparse.ArgumentParser, processes: int = 1) -> None:
    """Add the number of runs at a time."""
    parser.add_argument(
        "--processes", type=int, default=processes, help="runs at a time (default: %(default)s)"
    )


@dataclass(frozen=True)
class Setting:
    """One row of a table.

    Attributes:
        config: name of a config.
        overrides: KEY, VALUE, … that change it.
        start: name of the row whose final weights it starts from, with the same seed; empty: what
            the config says.
        train: False: these weights are only evaluated.
        folder: name of the folder of its runs; empty: the row's.
    """

    config: str
    overrides: Sequence[str] = ()
    start: str = ""
    train: bool = True
    folder: str = ""


@dataclass(frozen=True)
class SeededRuns:
    """The runs of a table, each on `THREADS` threads.

    Attributes:
        settings: by the name of the row.
        numbered: a run's folder has the seed in its name; False: for one seed.
        resume: runs with results are not repeated, interrupted ones are continued; False: all are
            done again.
        environment: environment variables of the runs, besides those of this process.
        announce: is told each command, and each score.
    """

    settings: Mapping[str, Setting]
    numbered: bool = True
    resume: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)
    announce: Callable[[str], None] = lambda _: None

    def results(
        self, args: argparse.Namespace, names: Sequence[str]
    ) -> dict[str, list[dict[str, Any]]]:
        """results.json of the rows `names` with each seed, `args.processes` runs at a time.

        Rows that others start from come first, also those that `names` does not have.
        """
        ordered = self._in_order(names)
        runs: dict[tuple[str, int], Future[dict[str, Any]]] = {}

        def train(name: str, seed: int) -> dict[str, Any]:
            if start := self.settings[name].start:
                runs[start, seed].result()  # submitted before, so it is done or has a worker
            return self.train(args, name, seed)

        with ThreadPoolExecutor(args.processes) as pool:
            for name, seed in [(name, seed) for name in ordered for seed in args.seeds]:
                runs[name, seed] = pool.submit(train, name, seed)
            try:
                for future in runs.values():
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return {name: [runs[name, seed].result() for seed in args.seeds] for name in names}

    def folder(self, args: argparse.Namespace, name: str, seed: int) -> Path:
        """OUTPUT_DIR of a run."""
        words = self.settings[name].folder or re.sub(r"[^A-Za-z0-9]+", "_", name)
        folder: Path = args.output / (f"{words}_{seed}" if self.numbered else words)
        return folder

    def command(self, args: argparse.Namespace, name: str, seed: int) -> list[str]:
        """The command of a run, as arguments of `clouds`."""
        setting = self.settings[name]
        how = "--resume" if self.resume else "--overwrite"
        words = ["train", "--config-file", setting.config, how if setting.train else "--eval-only"]
        words += ["OUTPUT_DIR", str(self.folder(args, name, seed)), "SEED", str(seed)]
        words += ["MODEL.DEVICE", "cpu"]
        if setting.start:
            start = self.folder(args, setting.start, seed) / "model_final.pth"
            words += ["MODEL.WEIGHTS", str(start)]
        return [*words, *setting.overrides, *args.opts]

    def train(self, args: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
        """Train with one setting and seed, unless that is done; returns its results.json.

        Raises:
            SystemExit: the run failed, or its folder has the results of another config.
        """
        command = self.command(args, name, seed)
        results = self.folder(args, name, seed) / "results.json"
        if not (self.resume and results.is_file()):
            self.announce(f"$ {shlex.join(['clouds', *command])}")
            done = subprocess.run(
                [sys.executable, "-m", "clouds", *command],
                env={**os.environ, **self.environment, "OMP_NUM_THREADS": str(THREADS)},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                reason = done.stderr[-2000:]
                sys.exit(f"{name}, seed {seed}: exit status {done.returncode}\n{reason}")
        content: dict[str, Any] = json.loads(results.read_text())
        check_config(content, command, results)
        self.announce(f"{name}, seed {seed}: mIoU {content['mean']['mIoU']:.1f}")
        return content

    def _in_order(self, names: Sequence[str]) -> list[str]:
        """The rows and those that they start from, these first."""

        def depth(name: str) -> int:
            start = self.settings[name].start
            return 1 + depth(start) if start else 0

        needed = list(names)
        for name in needed:  # grows while it is read
            if (start := self.settings[name].start) and start not in needed:
                needed.append(start)
        return sorted(needed, key=depth)


def check_config(content: Mapping[str, Any], command: Sequence[str], results: Path) -> None:
    """Exit if a run's results.json is of another config than the command's."""
    first = command.index("OUTPUT_DIR")
    wanted = load_config(command[command.index("--config-file") + 1], list(command[first:]))
    recorded = flat(content["config"])
    different = [
        f"{key} is {recorded.get(key)!r}, not {value!r}"
        for key, value in flat(plain(wanted)).items()
        if recorded.get(key) != value
    ]
    if different:
        sys.exit(
            f"{results} is of another run: {'; '.join(different[:5])}. Delete its folder, or name "
            "another --output."
        )


def flat(config: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """The values of nested sections by their full names."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{section}{key}.")
        else:
            values[section + key] = value
    return values


def summary(values: Sequence[float]) -> str:
    """Mean and standard deviation; '-' without values."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"
