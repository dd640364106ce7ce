#!/usr/bin/env python
"""Paint street scenes with exact labels, in the file layouts of the real datasets.

    python tools/make_demo_data.py --output datasets/demo --train 200 --val 40
    python tools/make_demo_data.py --datasets gta5 bdd_val --contact-sheet sheet.png

The same seed and size always give the same pictures. What is there already is kept; a run that was
stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from command_line import user_errors_in_one_line

with user_errors_in_one_line():
    import cv2
    from tqdm import tqdm

    from clouds.scenes import demo_data
    from clouds.scenes.writers import FAMILIES, folders

SHEET_COLUMNS = 6


def main(argv: Sequence[str] | None = None) -> int:
    """Paint; returns the exit code."""
    args = parse(argv)
    with user_errors_in_one_line():
        wanted = demo_data.counts(args.datasets, args.train, args.val)
        report(args, wanted, make(args, wanted))
    return 0


def make(args: argparse.Namespace, wanted: dict[str, int]) -> int:
    """Paint what is not there; returns how many pictures that were."""
    try:
        jobs = demo_data.plan(args.output, wanted, args.seed, tuple(args.size), args.overwrite)
        paint(jobs, args.workers)
        if args.contact_sheet is not None:
            write_sheet(args.contact_sheet, args.output, list(wanted))
    except FileExistsError:
        raise
    except OSError as error:
        where = error.filename or args.output
        raise OSError(f"cannot write {where}: {error.strerror or error}") from error
    return len(jobs)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("datasets/demo"), metavar="DIR",
        help="folder that becomes a dataset root (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(256, 512), metavar=("ROWS", "COLUMNS"),
        help="of a picture, pixels (default: 256 512)",
    )  # fmt: skip
    parser.add_argument(
        "--train", type=int, default=200, help="pictures per training split (default: %(default)s)"
    )
    parser.add_argument(
        "--val", type=int, default=40, help="pictures per validation split (default: %(default)s)"
    )
    parser.add_argument(
        "--datasets", nargs="+", default=(), metavar="NAME",
        help=f"of {', '.join(FAMILIES)}, or a split such as bdd_train (default: all of these)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=available_cores(),
        help="processes (default: one per core, %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true",
        help="delete and paint anew what was painted here with another seed, size or number",
    )  # fmt: skip
    parser.add_argument(
        "--contact-sheet",
        type=Path,
        metavar="FILE.png",
        help="also show the first pictures of each",
    )
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error("--workers must be at least 1")
    return args


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def paint(jobs: Sequence[demo_data.Job], workers: int) -> None:
    """Paint all jobs under a progress bar."""
    if not jobs:
        return
    start = time.perf_counter()
    # One process per core: threads inside one would only get in each other's way.
    cv2.setNumThreads(1)
    with tqdm(total=len(jobs), desc="painting", unit="picture") as bar:
        for job in demo_data.run(jobs, workers):
            bar.set_postfix_str(job.recipe.name, refresh=False)
            bar.update()
    seconds = time.perf_counter() - start
    print(f"Painted {len(jobs)} pictures in {seconds:.1f} s, {len(jobs) / seconds:.1f} a second.")


def write_sheet(path: Path, root: Path, names: Sequence[str]) -> None:
    """Write the contact sheet."""
    from clouds.scenes.contact_sheet import contact_sheet

    sheet = contact_sheet(root, names, SHEET_COLUMNS)
    path.parent.mkdir(parents=True, exist_ok=True)
    done, data = cv2.imencode(".png", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))
    assert done, "OpenCV cannot encode PNG"
    path.write_bytes(data.tobytes())
    print(f"Contact sheet: {path}")


def report(args: argparse.Namespace, wanted: dict[str, int], painted: int) -> None:
    """Say what lies where and what to do with it."""
    rows, columns = args.size
    root = args.output.absolute()
    if not painted:
        print("Nothing to paint: all of it was there.")
    print(f"{root} (seed {args.seed}, {rows}x{columns}):")
    for name, count in wanted.items():
        images, labels = folders(name)
        print(f"  {name:18} {count:5} pictures  {images}  {labels}")
    print("\nUse it:")
    print(f"  export DETECTRON2_DATASETS={root}")
    print(f"  python tools/check_datasets.py --datasets {' '.join(wanted)}")
    print("  python tools/train_net.py --config-file configs/demo/warmup.yaml")


if __name__ == "__main__":
    sys.exit(main())
