"""Write one HTML file about a run, or about several side by side.

It has loss and score curves, the IoU of each class, confusion matrices, times, pseudo-labels, the
best and worst images with the predictions of the runs' checkpoints, and differences of configs.
Differences are to the first run. The file needs no network and no other file. A run is the
OUTPUT_DIR of a training, or a folder that `clouds eval` writes.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from clouds.cli.command_line import new_parser, path, user_errors_in_one_line

IMAGES = 2


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = new_parser("report", __doc__)
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--output", type=path, metavar="FILE", help="default: report.html in the first run's folder"
    )
    images = parser.add_mutually_exclusive_group()
    images.add_argument(
        "--images",
        type=count,
        default=IMAGES,
        metavar="N",
        help="best images, worst images, and with several runs largest gains and losses, of each "
        f"dataset; they are predicted again (default {IMAGES})",
    )
    images.add_argument(
        "--no-images",
        dest="images",
        action="store_const",
        const=0,
        help="predict none, which needs neither checkpoints nor datasets",
    )
    parser.add_argument("--device", metavar="D", help="auto, cpu, cuda or cuda:N")
    return parser.parse_args(argv)


def count(text: str) -> int:
    """Type of flags that are numbers of images."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 0")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report."""
    args = parse(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("clouds").setLevel(logging.INFO)
    with user_errors_in_one_line(stopped="stopped; no report is written"):
        from clouds.report import write_report

        file = write_report(args.runs, args.output, images=args.images, device=args.device)
        sys.stdout.write(f"{file} ({file.stat().st_size / 2**20:.1f} MiB)\n")
