"""Render street scenes with exact labels, in the file layouts of the real datasets.

The same seed and size always give the same images. Existing images are kept, so an interrupted run
is resumed by the same command.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
from tqdm import tqdm

from clouds.cli.command_line import user_errors_in_one_line
from street_renderer import demo_data
from street_renderer.dataset_sheet import dataset_sheet
from street_renderer.dataset_writer import FAMILIES, RenderJob, folders, run

SHEET_COLUMNS = 6


def main(argv: Sequence[str] | None = None) -> int:
    """Render the datasets; returns the exit code."""
    args = parse(argv)
    with user_errors_in_one_line():
        counts = demo_data.image_counts(args.datasets, args.train, args.val)
        report(args, counts, make(args, counts))
    return 0


def make(args: argparse.Namespace, counts: dict[str, int]) -> int:
    """Render the missing images; returns their number."""
    try:
        jobs = demo_data.prepare(
            args.output, counts, args.seed, tuple(args.size), args.overwrite, args.show_unlabelled
        )
        render_all(jobs, args.workers)
        if args.contact_sheet is not None:
            write_sheet(args.contact_sheet, args.output, list(counts))
    except FileExistsError:
        raise
    except OSError as error:
        where = error.filename or args.output
        raise OSError(f"cannot write {where}: {error.strerror or error}") from error
    return len(jobs)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog=Path(sys.argv[0]).name,
        description=__doc__,
        epilog="example:\n  clouds make-demo-data --output datasets/demo --train 200 --val 40",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output", type=Path, default=Path("datasets/demo"), metavar="DIR",
        help="dataset root to write to (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(256, 512), metavar=("ROWS", "COLUMNS"),
        help="of an image, pixels (default: 256 512)",
    )  # fmt: skip
    parser.add_argument(
        "--train", type=int, default=200, help="images per training split (default: %(default)s)"
    )
    parser.add_argument(
        "--val", type=int, default=40, help="images per validation split (default: %(default)s)"
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
        help="delete and replace images with another seed, size or number",
    )  # fmt: skip
    parser.add_argument(
        "--show-unlabelled", action="store_true",
        help="also show objects of classes that a dataset does not label (synthia: terrain, truck, "
        "train); their pixels are unlabelled",
    )  # fmt: skip
    parser.add_argument(
        "--contact-sheet",
        type=Path,
        metavar="FILE.png",
        help="also write an overview of the first images of each dataset",
    )
    args = parser.parse_args(argv)
    args.output = args.output.expanduser()
    args.contact_sheet = args.contact_sheet and args.contact_sheet.expanduser()
    if args.workers < 1:
        parser.error("--workers must be at least 1")
    return args


def available_cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def render_all(jobs: Sequence[RenderJob], workers: int) -> None:
    """Run all jobs with a progress bar."""
    if not jobs:
        return
    start = time.perf_counter()
    cv2.setNumThreads(1)  # one process per core
    with tqdm(total=len(jobs), desc="rendering", unit="image") as bar:
        for job in run(jobs, workers):
            bar.set_postfix_str(job.recipe.name, refresh=False)
            bar.update()
    seconds = time.perf_counter() - start
    print(f"Rendered {len(jobs)} images in {seconds:.1f} s, {len(jobs) / seconds:.1f} per second.")


def write_sheet(path: Path, root: Path, names: Sequence[str]) -> None:
    """Write the contact sheet."""
    sheet = dataset_sheet(root, names, SHEET_COLUMNS)
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded, data = cv2.imencode(".png", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))
    assert encoded, "OpenCV cannot encode PNG"
    path.write_bytes(data.tobytes())
    print(f"Contact sheet: {path}")


def report(args: argparse.Namespace, counts: dict[str, int], rendered: int) -> None:
    """Print the folders and the next commands."""
    rows, columns = args.size
    root = args.output.absolute()
    if not rendered:
        print("Nothing to render: all images exist.")
    print(f"{root} (seed {args.seed}, {rows}x{columns}):")
    for name, count in counts.items():
        images, labels = folders(name)
        print(f"  {name:18} {count:5} images  {images}  {labels}")
    print("\nUse it:")
    print(f"  export DETECTRON2_DATASETS={shlex.quote(str(root))}")
    print(f"  clouds check-data --datasets {shlex.join(counts)}")
    print("  clouds train --config-file demo/warmup")
