"""Show which datasets exist, and whether they are complete and valid.

Without --datasets, all known datasets are checked, or those of --descriptions; sd_<folder> is a
folder of generated images. The exit code is 1 when a dataset that is named, or described, is
missing or broken. Below the table is what is
wrong with a dataset, and, marked by *, what may not be meant: files that are not used, files listed
twice, labels without a class.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from clouds.cli.command_line import new_parser, path, user_errors_in_one_line

if TYPE_CHECKING:
    from clouds.data.dataset_report import DatasetReport
    from clouds.data.datasets import DatasetSpec
    from clouds.data.label_statistics import LabelStatistics

SAMPLE = 5  # number of pairs opened per dataset without --full


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    with user_errors_in_one_line():
        from clouds.data.datasets import ROOT_VARIABLE, Datasets, dataset_names, dataset_root

        known = Datasets.of((), [str(file) for file in args.descriptions])
    root = args.root if args.root is not None else dataset_root()
    names = args.datasets or list(known.described)
    if not names or not set(names) <= known.described.keys():
        print(f"Dataset root: {root.absolute()}")
        if not root.is_dir():
            message = f"This folder does not exist. Set {ROOT_VARIABLE}, or give --root."
            print(message, file=sys.stderr)
            return 1
    try:
        datasets = [known.own(name, root) for name in names or dataset_names(root)]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1

    reports = [check(dataset, args) for dataset in datasets]
    print(table(reports))
    requested = bool(names)
    for report in reports:
        if report.state == "broken" or (requested and report.state == "missing"):
            print(f"\n{report.dataset.name}: {report.state}")
            for problem in report.problems():
                print(f"  - {problem}")
            print(f"  {report.dataset.hint()}")
        if report.state != "missing" and report.notes():
            print(f"\n{report.dataset.name}:")
            for note in report.notes():
                print(f"  * {note}")
        if args.classes and report.labels.num_labels:
            print(f"\n{report.dataset.name}, {report.labels.num_labels} labels:")
            print(class_table(report.labels))
    if not args.full:
        print(f"\nUp to {SAMPLE} pairs were opened per dataset; --full opens all.")
    return int(requested and any(report.state != "ok" for report in reports))


def check(dataset: DatasetSpec, args: argparse.Namespace) -> DatasetReport:
    """Check one dataset, with a progress bar."""
    from tqdm import tqdm

    from clouds.data.dataset_report import check_dataset

    with tqdm(desc=dataset.name, unit="pair", leave=False, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return check_dataset(dataset, None if args.full else SAMPLE, args.workers, show)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = new_parser("check-data", __doc__)
    parser.add_argument(
        "--root", type=path, help="dataset root (default: $DETECTRON2_DATASETS, else datasets)"
    )
    parser.add_argument(
        "--datasets", nargs="+", metavar="NAME", help="only these (default: all known datasets)"
    )
    parser.add_argument(
        "--descriptions",
        nargs="+",
        default=[],
        type=path,
        metavar="FILE",
        help="YAML files that describe datasets of one's own",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="open every file; compare the hashes of generated images with their manifest",
    )
    parser.add_argument(
        "--classes",
        action="store_true",
        help="show the share of each class in the pixels and in the images of the opened labels",
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="threads (default: one per core)"
    )
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error("--workers must be at least 1")
    return args


def table(reports: Sequence[DatasetReport]) -> str:
    """One line per dataset."""
    from tabulate import tabulate

    from clouds.data.dataset_report import OTHER_SIZE, UNKNOWN_IDS, UNREADABLE

    rows: list[list[str | int]] = []
    for report in reports:
        listing, labeled = report.listing, report.share_labeled()
        if report.state == "missing":
            rows.append([report.dataset.name, "missing"])
            continue
        rows.append(
            [
                report.dataset.name,
                report.state,
                len(listing.records),
                len(listing.images_without_label),
                len(listing.labels_without_image),
                len(listing.skipped),
                report.num_opened,
                *(len(report.defects[name]) for name in (UNREADABLE, OTHER_SIZE, UNKNOWN_IDS)),
                report.num_unused,
                "-" if labeled is None else f"{100 * labeled:.1f}%",
            ]
        )
    headers = [
        "dataset",
        "state",
        "usable",
        "no label",
        "no image",
        "skipped\n(sizes)",
        "opened",
        "un-\nreadable",
        "size\nmismatch",
        "unknown\nids",
        "not\nused",
        "pixels with\na class",
    ]
    return tabulate(rows, headers=headers, colalign=("left", "left", *["right"] * 10))


def class_table(labels: LabelStatistics) -> str:
    """One line per class: its shares of the pixels that have a class, and of the images."""
    from tabulate import tabulate

    total = max(1, int(labels.pixels.sum()))
    rows = [
        [name, f"{100 * int(pixels) / total:.3f}", f"{100 * int(images) / labels.num_labels:.1f}"]
        for name, pixels, images in zip(
            labels.label_space.names, labels.pixels, labels.images, strict=True
        )
    ]
    headers = ["class", "% of pixels", "% of images"]
    align = ("left", "right", "right")
    return tabulate(rows, headers=headers, colalign=align, disable_numparse=True)
