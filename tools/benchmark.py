#!/usr/bin/env python
"""Profile a training step and an evaluation: duration of each part, and peak memory.

    python tools/benchmark.py --config-file configs/warmup/gta_convnext_large.yaml
    python tools/benchmark.py --config-file … --random-data --json a.json SOLVER.AMP.ENABLED True
    python tools/benchmark.py --config-file … --parts eval --eval-size 1024 2048

The datasets of the config are read; --random-data needs none, and if the config has generated
datasets, half of each batch is generated. The duration of a refiner depends on the teacher's
labels: set MODEL.WEIGHTS to a checkpoint of source pre-training, since the labels of a random
teacher have few components. MODEL.CLOUDS.CLIP_PRETRAINED_WEIGHTS '' replaces the published CLIP
weights by random ones, which does not change durations. One process on one device; the only output
file is that of --json.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from installed import import_module

if TYPE_CHECKING:
    import torch
    from profiler import Measurement, Timing

    from clouds.d2 import CfgNode

# Slow imports are inside the functions, so that --help and usage errors are fast.

command_line = import_module("clouds.cli.command_line")
user_errors_in_one_line = command_line.user_errors_in_one_line

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
"""Folder of the profiler."""
PARTS = ("train", "eval")
DEFAULT_EVAL_SIZE = (1024, 2048)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    words = sys.argv[1:] if argv is None else [str(word) for word in argv]
    args = parse(words)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with user_errors_in_one_line():
        from clouds.config import load_config

        cfg = load_config(args.config_file, args.opts)
        check_data(cfg, args)
        if args.json is not None:
            check_writable(args.json)
    facts = describe(cfg, args, words)
    print("\n".join(heading(facts)), flush=True)
    jobs = {"train": training, "eval": evaluation}
    for part in args.parts:
        measurement = jobs[part](cfg, args)
        print("\n" + report(measurement, facts["data"][part]), flush=True)
        facts[part] = measurement.to_dict()
        if args.json is not None:  # after each part, so that an interruption does not lose it
            args.json.write_text(json.dumps(facts, indent=2) + "\n")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML config")
    parser.add_argument(
        "--parts", type=choice_of_parts, default=PARTS, metavar="train,eval",
        help="what to measure (default: both)",
    )  # fmt: skip
    parser.add_argument(
        "--iterations", type=int, default=5, metavar="N",
        help="measured steps and images, each twice: whole, and by parts (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--warmup", type=int, default=1, metavar="K",
        help="steps and images before them (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--random-data", action="store_true", help="random images from memory instead of datasets"
    )
    parser.add_argument(
        "--eval-size", type=int, nargs=2, metavar=("H", "W"),
        help="evaluate a random image of this size, pixels, instead of the images of the test "
        "dataset (default with --random-data: {} {})".format(*DEFAULT_EVAL_SIZE),
    )  # fmt: skip
    parser.add_argument(
        "--json", type=command_line.path, metavar="FILE", help="write the numbers to it, too"
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE",
        help="config overrides, after all flags: SOLVER.IMS_PER_BATCH 2 SOLVER.AMP.ENABLED True",
    )  # fmt: skip
    args = parser.parse_args(argv)
    args.opts = command_line.given_overrides(parser, args.opts)
    if args.iterations < 1:
        parser.error(f"--iterations is {args.iterations}; it must be at least 1")
    if args.warmup < 0:
        parser.error(f"--warmup is {args.warmup}; it must be at least 0")
    if args.eval_size is not None and min(args.eval_size) < 1:
        parser.error("--eval-size {} {}: both must be at least 1".format(*args.eval_size))
    if args.eval_size is None and args.random_data:
        args.eval_size = DEFAULT_EVAL_SIZE
    return args


def choice_of_parts(text: str) -> tuple[str, ...]:
    """'train,eval', or one of the two."""
    chosen = tuple(dict.fromkeys(text.split(",")))
    for part in chosen:
        if part not in PARTS:
            raise argparse.ArgumentTypeError(f"{part!r} is not one of {', '.join(PARTS)}")
    return chosen


def check_data(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Raise before the measurements if a dataset that they need does not exist."""
    from clouds.data.datasets import Datasets

    names: list[str] = []
    if "train" in args.parts and not args.random_data:
        names += cfg.DATASETS.TRAIN
    if "eval" in args.parts and args.eval_size is None:
        if not cfg.DATASETS.TEST:
            raise ValueError(
                "DATASETS.TEST is empty: set a dataset, or the size of a random image with "
                "--eval-size, or skip evaluation with --parts train."
            )
        names.append(cfg.DATASETS.TEST[0])
    datasets = Datasets.from_config(cfg)
    for name in names:
        try:
            datasets.get(name).records()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}\n--random-data needs no datasets.") from error


def check_writable(file: Path) -> None:
    """Raise before the measurements if the file cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a").close()
    except OSError as error:
        raise ValueError(f"--json {file} cannot be written: {error.strerror}.") from error


def show_progress(rounds: range, name: str) -> Iterable[int]:
    """Show a progress bar on a terminal."""
    from tqdm import tqdm

    return tqdm(rounds, desc=name, leave=False, disable=None)


def import_profiler() -> None:
    """Make the modules of benchmarks/ importable."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))


def training(cfg: CfgNode, args: argparse.Namespace) -> Measurement:
    """Measure training steps."""
    import_profiler()
    from profiler import measure_training
    from profiler_data import random_batches, sample_maker

    from clouds.engine import Trainer

    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TEST = ()  # not needed, so they may be missing
    with tempfile.TemporaryDirectory() as folder:
        cfg.OUTPUT_DIR = folder  # the trainer creates it, and writes nothing
        with user_errors_in_one_line():
            loader = random_batches(cfg) if args.random_data else None
            trainer = Trainer(cfg, loader=loader)
            trainer.resume_or_load(resume=False)
            make_sample = None if args.random_data else sample_maker(cfg)
        return measure_training(trainer, args.iterations, args.warmup, make_sample, show_progress)


def evaluation(cfg: CfgNode, args: argparse.Namespace) -> Measurement:
    """Measure the evaluation of images."""
    import_profiler()
    from profiler import measure_evaluation
    from profiler_data import dataset_images, random_images

    from clouds.engine import Checkpointer
    from clouds.modeling.build import build_seeded

    with user_errors_in_one_line():
        model = build_seeded(cfg)
        if cfg.MODEL.WEIGHTS:
            partial = cfg.MODEL.WEIGHTS_PARTIAL
            Checkpointer(model, partial=partial).load_weights(cfg.MODEL.WEIGHTS)
        if args.eval_size is None:
            make = dataset_images(cfg, cfg.DATASETS.TEST[0])
        else:
            make = random_images(cfg, tuple(args.eval_size))
    return measure_evaluation(cfg, model, make, args.iterations, args.warmup, show_progress)


def describe(cfg: CfgNode, args: argparse.Namespace, words: Sequence[str]) -> dict[str, Any]:
    """Description of the measurement as plain values."""
    import torch
    import yaml

    from clouds.device import resolve_device
    from clouds.environment import provenance

    test = "random image" if args.eval_size else str(cfg.DATASETS.TEST[0])
    train = "random images" if args.random_data else ", ".join(cfg.DATASETS.TRAIN)
    return {
        "command": shlex.join(["python", "tools/benchmark.py", *words]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "config_file": args.config_file,
        "overrides": args.opts,
        "data": {"train": train, "eval": test},
        "iterations": args.iterations,
        "warmup": args.warmup,
        "machine": machine(resolve_device(cfg.MODEL.DEVICE)),
        "threads": torch.get_num_threads(),
        "versions": provenance(),
        "config": yaml.safe_load(cfg.dump()),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware and load average."""
    import torch

    on_gpu = device.type == "cuda"
    return {
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "system": platform.platform(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def processor() -> str:
    """Name of the processor, if the system has it."""
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        for line in facts.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def heading(facts: dict[str, Any]) -> list[str]:
    """Lines about command, hardware and versions."""
    hardware, versions = facts["machine"], facts["versions"]
    load = hardware["load_average"]
    return [
        facts["command"],
        f"{hardware['gpu'] or hardware['processor']}, device {hardware['device']}, "
        f"{hardware['cores']} cores, {facts['threads']} torch threads"
        + (f", load average {load[0]:.1f} before" if load else ""),
        f"clouds {versions['version']} (commit {versions['commit'] or 'unknown'}), "
        f"torch {versions['torch']}, Python {versions['python']}",
    ]


def report(measurement: Measurement, data: str) -> str:
    """One measurement as text."""
    memory = "allocated on the GPU" if measurement.on_gpu else "resident, of the process"
    return "\n".join(
        [
            f"{measurement.name}: {measurement.subject}; data: {data}",
            table(measurement),
            f"sum / whole {measurement.total.median / measurement.whole.median:.3f}, "
            f"{measurement.images_per_second:.4g} images/s, "
            f"peak memory {measurement.peak_gib:.2f} GiB ({memory})",
        ]
    )


def table(measurement: Measurement) -> str:
    """Table of the parts, their sum and the whole."""
    from tabulate import tabulate

    total = measurement.total

    def row(timing: Timing) -> list[Any]:
        share = f"{100 * timing.median / total.median:.1f} %"
        return [timing.name, timing.median, min(timing.seconds), max(timing.seconds), share]

    rows = [row(part) for part in (*measurement.parts, total, measurement.whole)]
    rows += [[*row(timing)[:-1], ""] for timing in measurement.besides]
    headers = ["", "median, s", "min", "max", "of the sum"]
    align = ("left", *["decimal"] * 3, "right")
    return tabulate(rows, headers, floatfmt=".4f", colalign=align)


if __name__ == "__main__":
    sys.exit(main())
