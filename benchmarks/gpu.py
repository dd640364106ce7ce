#!/usr/bin/env python
"""All figures of a GPU in one call: training, evaluation and their parts, against the ceilings.

    python benchmarks/gpu.py --out figures
    python benchmarks/gpu.py --out figures --device cpu --small

Measured are the rates of a copy and of matrix products, which are the ceilings; then, section after
section, deformable attention, steps of source pre-training and joint training at the published size
(ConvNeXt-L, 768x768, 4 + 4 images, SAM ViT-H), evaluation at 1024x2048, head, backbone, and these
two with torch.compile. Each compares the published code, composed of library calls in float32, with
ours. The operations of each are counted, so that the time at the ceilings, the floor, is known.

`gpu.json` and `gpu.md` are written after each section. A section that fails is reported with its
traceback, and the others are measured; the exit status is then 1. A section that takes longer than
--section-minutes, or is running after --minutes, is ended and reported as out of time, which is no
failure: on a loaded machine torch.compile takes minutes. `--small` measures small models and
images: it tests this script on any device, and its figures say nothing about the published sizes.
On a CPU durations are processor time of one thread.
"""

from __future__ import annotations

import datetime
import gc
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clouds.device import resolve_device
from clouds.environment import provenance

sys.path.insert(0, str(Path(__file__).parent))
import gpu_sections as sections
import gpu_steps
from gpu_common import OURS, OURS_BF16, SMALL_HEAD, Options
from gpu_figures import (
    FAILED,
    SKIPPED,
    TIMED_OUT,
    Ceilings,
    Goal,
    Report,
    Section,
    measure_ceilings,
)
from in_turns import parser_of, silence_all_but_peaks

GOALS = (
    Goal("training step", gpu_steps.REPEATED, OURS_BF16, 6),
    Goal("training step", gpu_steps.WARMUP, OURS_BF16, 2.5),
    Goal("head", "head, forward and backward", OURS, 2),
    Goal("deformable attention", "384x384, float32", OURS, 5),
    Goal("deformable attention", "768x768, float32", OURS, 5),
    Goal("evaluation", sections.EVALUATION, OURS, 2),
    Goal("evaluation", sections.EVALUATION, OURS, 2, "memory"),
    Goal("backbone", "backbone, forward", OURS_BF16, 0.4, "share"),
)


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    args = parse(words)
    started = time.monotonic()
    device = resolve_device(args.device, "--device")
    if device.type == "cpu":
        torch.set_num_threads(1)
    options = make_options(args, device)
    facts = machine(device, words)
    ceilings: Ceilings | None = None
    args.out.mkdir(parents=True, exist_ok=True)
    goals = () if args.small else GOALS
    done: list[Section] = []
    try:
        side, copied = (256, 0.01) if args.small else (8192, 2.0)
        ceilings = measure_ceilings(device, side, copied, 3 * args.repeats)
    except Exception:
        done.append(Section("ceilings", FAILED, problem=traceback.format_exc()))
    for name in args.only or sections.SECTIONS:
        passed = time.monotonic() - started
        left = 60 * args.minutes - passed
        if left <= 0:
            section = Section(name, SKIPPED, problem=f"{passed:.0f} s had passed, see --minutes")
        else:
            section = run(name, options, min(left, 60 * args.section_minutes))
        done.append(section)
        print(f"{name}: {section.status}, {section.wall_s:.0f} s", flush=True)
        Report(facts, done, goals, ceilings).write(args.out)
    print(Report(facts, done, goals, ceilings).to_markdown())
    return int(any(section.status == FAILED for section in done))


def parse(words: Sequence[str]) -> Any:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help="of gpu.json and gpu.md")
    add("--device", default="cuda", help="cuda, cuda:N or cpu")
    add("--small", action="store_true", help="small models and images")
    add("--minutes", type=float, default=9, help="after which no section runs")
    add("--section-minutes", type=float, default=4, help="after which a section is ended")
    add("--repeats", type=int, default=3, help="rounds of each measurement")
    add("--only", nargs="+", choices=list(sections.SECTIONS), metavar="SECTION", help="names")
    add("--source", type=int, default=4, help="source images of a joint step")
    add("--generated", type=int, default=4, help="generated images of a joint step")
    args = parser.parse_args(words)
    if min(args.repeats, args.source, args.generated) < 1:
        parser.error("--repeats, --source and --generated are at least 1")
    return args


def make_options(args: Any, device: torch.device) -> Options:
    """The published sizes, or small ones."""
    options = Options(
        device=device,
        repeats=args.repeats,
        clip="convnext_large_d_320",
        sam="vit_h",
        size=768,
        source=args.source,
        generated=args.generated,
        image=(1024, 2048),
        attention_sizes=(384, 768),
        settings=(),
        out=args.out,
    )
    if not args.small:
        return options
    return replace(
        options,
        clip="clouds_tiny",
        sam="tiny",
        size=96,
        source=1,
        generated=1,
        image=(128, 192),
        attention_sizes=(64,),
        settings=tuple(str(word) for pair in SMALL_HEAD.items() for word in pair),
    )


def machine(device: torch.device, words: Sequence[str]) -> dict[str, Any]:
    """Facts about hardware, software and the call."""
    facts: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/gpu.py", *words]),
        "date": datetime.date.today().isoformat(),
        "device": str(device),
        **provenance(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "card": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "memory, GiB": round(properties.total_memory / 2**30, 1),
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
        }
    else:
        facts["threads"] = torch.get_num_threads()
    return facts


class OutOfTime(BaseException):
    """The time of a section is over; no `Exception`, which compilers would take for their own."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` after a number of seconds, between two steps of Python code.

    Without effect outside of the main thread, and on Windows, which has no such signal.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def end(number: int, frame: object) -> None:
        raise OutOfTime

    previous = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def run(name: str, options: Options, limit: float) -> Section:
    """Measure a section for at most `limit` seconds; an error becomes its `problem`."""
    started = time.monotonic()
    try:
        with time_limit(limit):
            section = sections.SECTIONS[name](options)
    except OutOfTime:
        problem = f"ended after {limit:.0f} s, see --section-minutes and --minutes"
        section = Section(name, TIMED_OUT, problem=problem)
    except Exception:
        section = Section(name, FAILED, problem=traceback.format_exc())
    gc.collect()
    if options.device.type == "cuda":
        torch.cuda.empty_cache()
    return replace(section, wall_s=time.monotonic() - started)


if __name__ == "__main__":
    silence_all_but_peaks()
    sys.exit(main())
