"""Training runs of several settings with several seeds, for tables of means and deviations."""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def new_parser(description: str | None, output: str) -> argparse.ArgumentParser:
    """A parser with the flags that `SeededRuns` reads, but `opts`, the overrides of every run."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(output))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    return parser


@dataclass(frozen=True)
class SeededRuns:
    """Settings of one config.

    Attributes:
        config: its name.
        settings: overrides of the config, by the name of the row.
    """

    config: str
    settings: Mapping[str, Sequence[str]]

    def results(
        self, args: argparse.Namespace, names: Sequence[str]
    ) -> dict[str, list[dict[str, Any]]]:
        """results.json of the settings `names` with each seed, `args.processes` runs at a time."""
        runs = [(name, seed) for seed in args.seeds for name in names]
        with ThreadPoolExecutor(args.processes) as pool:
            found = dict(zip(runs, pool.map(lambda run: self.train(args, *run), runs), strict=True))
        return {name: [found[name, seed] for seed in args.seeds] for name in names}

    def train(self, args: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
        """Train with one setting and seed, unless that is done; returns its results.json."""
        words = re.sub(r"[^A-Za-z0-9]+", "_", name)
        folder: Path = args.output / f"{words}_{seed}"
        results = folder / "results.json"
        if not results.is_file():
            command = [sys.executable, "-m", "clouds", "train", "--config-file", self.config]
            command += ["--resume", "OUTPUT_DIR", str(folder), "SEED", str(seed)]
            command += ["MODEL.DEVICE", "cpu", *self.settings[name], *args.opts]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                reason = done.stderr[-2000:]
                sys.exit(f"{name}, seed {seed}: exit status {done.returncode}\n{reason}")
        content: dict[str, Any] = json.loads(results.read_text())
        return content


def summary(values: Sequence[float]) -> str:
    """Mean and standard deviation; '-' without values."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"
