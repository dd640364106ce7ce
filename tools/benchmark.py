#!/usr/bin/env python
"""Show how long each part of a training step and of an evaluation takes, and how much memory.

    python tools/benchmark.py --config-file configs/warmup/gta_convnext_large.yaml
    python tools/benchmark.py --config-file … --random-data --json a.json SOLVER.AMP.ENABLED True
    python tools/benchmark.py --config-file … --parts eval --eval-size 1024 2048

The datasets of the config are read; --random-data needs none, and where the config has generated
ones half of each batch is generated. What a refiner takes depends on the teacher's labels: name a
warm-up's checkpoint in MODEL.WEIGHTS, as a random teacher sees few components. Where the published
CLIP weights are not at hand, MODEL.CLOUDS.CLIP_PRETRAINED_WEIGHTS '' takes random ones, which
changes no duration. One process on one device. Nothing is written but the file of --json.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import refuse_late_flags, user_errors_in_one_line

if TYPE_CHECKING:
    import torch

    from clouds.d2 import CfgNode
    from clouds.engine.benchmark import Measurement, Timing

# Nothing heavy is imported up here: --help and a mistyped flag answer at once.

PARTS = ("train", "eval")
DEFAULT_EVAL_SIZE = (1024, 2048)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and tell; returns the exit code."""
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
        if args.json is not None:  # after each part: what was measured outlives an interruption
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
        help="steps and images measured, each twice: whole, and by parts (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--warmup", type=int, default=1, metavar="K",
        help="steps and images before them (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--random-data", action="store_true", help="random pictures from memory, no dataset"
    )
    parser.add_argument(
        "--eval-size", type=int, nargs=2, metavar=("H", "W"),
        help="evaluate a random picture of this size, pixels, in place of the test dataset's "
        "pictures (default with --random-data: {} {})".format(*DEFAULT_EVAL_SIZE),
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE",
        help="config overrides, after all flags: SOLVER.IMS_PER_BATCH 2 SOLVER.AMP.ENABLED True",
    )  # fmt: skip
    args = parser.parse_args(argv)
    refuse_late_flags(parser, args.opts)
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
            raise argparse.ArgumentTypeError(f"{part!r} is none of {', '.join(PARTS)}")
    return chosen


def check_data(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Raise, before anything is measured, if a dataset that will be read is not there."""
    from clouds.data.datasets import get_dataset

    names: list[str] = []
    if "train" in args.parts and not args.random_data:
        names += cfg.DATASETS.TRAIN
    if "eval" in args.parts and args.eval_size is None:
        if not cfg.DATASETS.TEST:
            raise ValueError(
                "DATASETS.TEST is empty: name a dataset, or a picture's size with --eval-size, or "
                "leave evaluation out with --parts train."
            )
        names.append(cfg.DATASETS.TEST[0])
    for name in names:
        try:
            get_dataset(name).records()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}\n--random-data measures without datasets.") from error


def check_writable(path: Path) -> None:
    """Raise, before minutes go into measuring, if the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise ValueError(f"--json {path} cannot be written: {error.strerror}.") from error


def show_progress(rounds: range, name: str) -> Iterable[int]:
    """A progress bar on a terminal."""
    from tqdm import tqdm

    return tqdm(rounds, desc=name, leave=False, disable=None)


def training(cfg: CfgNode, args: argparse.Namespace) -> Measurement:
    """Measure training steps."""
    from clouds.engine import Trainer, benchmark

    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TEST = ()  # the trainer must not look for what is not measured here
    with user_errors_in_one_line():
        loader = benchmark.random_batches(cfg) if args.random_data else None
        trainer = Trainer(cfg, loader=loader)
        trainer.prepare()
        make = None if args.random_data else benchmark.sample_maker(cfg)
    return benchmark.measure_training(trainer, args.iterations, args.warmup, make, show_progress)


def evaluation(cfg: CfgNode, args: argparse.Namespace) -> Measurement:
    """Measure the evaluation of images."""
    from clouds.engine import Checkpointer, benchmark
    from clouds.modeling.build import build_seeded

    with user_errors_in_one_line():
        model = build_seeded(cfg)
        if cfg.MODEL.WEIGHTS:
            partial = cfg.MODEL.WEIGHTS_PARTIAL
            Checkpointer(model, partial=partial).load_weights(cfg.MODEL.WEIGHTS)
        if args.eval_size is None:
            make = benchmark.dataset_images(cfg, cfg.DATASETS.TEST[0])
        else:
            make = benchmark.random_images(cfg, tuple(args.eval_size))
    return benchmark.measure_evaluation(
        cfg, model, make, args.iterations, args.warmup, show_progress
    )


def describe(cfg: CfgNode, args: argparse.Namespace, words: Sequence[str]) -> dict[str, Any]:
    """What was measured with what, as plain values."""
    import torch
    import yaml

    from clouds.device import resolve_device
    from clouds.environment import provenance

    test = "random picture" if args.eval_size else str(cfg.DATASETS.TEST[0])
    train = "random pictures" if args.random_data else ", ".join(cfg.DATASETS.TRAIN)
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
    """The hardware, and how busy it is."""
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
    """The processor's name, as far as the system tells it."""
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        for line in facts.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def heading(facts: dict[str, Any]) -> list[str]:
    """What is measured, where, and with what."""
    hardware, versions = facts["machine"], facts["versions"]
    busy = hardware["load_average"]
    return [
        facts["command"],
        f"{hardware['gpu'] or hardware['processor']}, device {hardware['device']}, "
        f"{hardware['cores']} cores, {facts['threads']} torch threads"
        + (f", load average {busy[0]:.1f} before" if busy else ""),
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
    """The parts, their sum and the whole."""
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
