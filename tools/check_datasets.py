#!/usr/bin/env python
"""Show which datasets are found, and whether they are complete and sound.

    python tools/check_datasets.py                         all datasets, a few files of each
    python tools/check_datasets.py --datasets gta5 bdd_val --full
    python tools/check_datasets.py --datasets sd_<folder>  a folder of generated images

The exit code is 1 when a dataset that was asked for by name is missing or broken.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from command_line import user_errors_in_one_line

with user_errors_in_one_line():
    from tabulate import tabulate
    from tqdm import tqdm

    from clouds.data.dataset_report import Health, check_dataset
    from clouds.data.datasets import ROOT_VARIABLE, dataset_names, dataset_root, get_dataset

SAMPLE = 5  # pairs opened of each dataset without --full


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    root = args.root if args.root is not None else dataset_root()
    print(f"Dataset root: {root.absolute()}")
    if not root.is_dir():
        print(f"This folder does not exist. Set {ROOT_VARIABLE}, or give --root.", file=sys.stderr)
        return 1
    try:
        datasets = [get_dataset(name, root) for name in args.datasets or dataset_names(root)]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1

    found = []
    for dataset in datasets:
        with tqdm(desc=dataset.name, unit="pair", leave=False, disable=None) as bar:

            def show(done: int, total: int, bar: tqdm = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            found.append(check_dataset(dataset, None if args.full else SAMPLE, args.workers, show))
    print(table(found))
    asked = bool(args.datasets)
    for health in found:
        if health.state == "broken" or (asked and health.state == "missing"):
            print(f"\n{health.dataset.name}: {health.state}")
            for problem in health.problems():
                print(f"  - {problem}")
            print(f"  {health.dataset.hint()}")
    if not args.full:
        print(f"\nOf each dataset up to {SAMPLE} pairs were opened; --full opens all.")
    return int(asked and any(health.state != "ok" for health in found))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--root", type=Path, help=f"dataset root (default: ${ROOT_VARIABLE}, else datasets)"
    )
    parser.add_argument(
        "--datasets", nargs="+", metavar="NAME", help="only these (default: all that are known)"
    )
    parser.add_argument(
        "--full", action="store_true", help="open every file; compare generated ones' hashes"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="threads (default: one per core)"
    )
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error("--workers must be at least 1")
    return args


def table(found: Sequence[Health]) -> str:
    """One line per dataset."""
    rows = []
    for health in found:
        listing = health.listing
        if health.state == "missing":
            rows.append([health.dataset.name, "missing"])
            continue
        rows.append(
            [
                health.dataset.name,
                health.state,
                len(listing.records),
                len(listing.images_without_label),
                len(listing.labels_without_image),
                len(listing.skipped),
                health.opened,
                len(health.broken_files),
                len(health.size_mismatches),
                len(health.unknown_ids),
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
    ]
    return tabulate(rows, headers=headers)


if __name__ == "__main__":
    sys.exit(main())
