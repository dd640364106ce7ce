"""Compare runs that exist in a table: means over seeds, and paired differences to a baseline.

RUN is a folder with results.json, or such a file. Runs whose configs differ in the seed alone are
one row, named by what differs from the first run's config; --group names rows and their runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from clouds.cli.command_line import new_parser, path, user_errors_in_one_line


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = new_parser("compare", __doc__)
    parser.add_argument("runs", nargs="*", type=path, metavar="RUN", help="folder, or results.json")
    parser.add_argument(
        "--group", action="append", default=[], metavar="NAME=RUN,RUN", help="a row of the table"
    )
    parser.add_argument(
        "--baseline", metavar="NAME", help="row that others are compared with (default: the first)"
    )
    parser.add_argument(
        "--metrics", nargs="+", default=[], metavar="[COLUMN=]SCORE",
        help="columns, such as mean/mIoU 'poles=*/IoU-pole' (default: mIoU of all datasets)",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=("markdown", "latex", "csv"), default="markdown",
        help="of the printed table (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--save", nargs="+", type=path, default=[], metavar="FILE",
        help="files to write the table to: .md, .tex, .csv",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if not args.runs and not args.group:
        parser.error("runs are needed, such as output/a output/b")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Print and save the table."""
    args = parse(sys.argv[1:] if argv is None else argv)
    with user_errors_in_one_line():
        from clouds.ablation.existing import compare, parse_groups
        from clouds.ablation.scores import parse_metrics
        from clouds.ablation.table import check_extension

        for file in args.save:
            check_extension(file)
        groups = parse_groups(args.group)
        table = compare(args.runs, groups, parse_metrics(args.metrics), args.baseline)
        for file in args.save:
            table.write(file)
        print(table.formatted(args.format).rstrip("\n"))
