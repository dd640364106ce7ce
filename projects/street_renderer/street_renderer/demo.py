"""The complete method on a small scale on a CPU, from prompts to scores on unseen domains.

Renders a labeled source and three unseen target domains, generates images from prompts, and trains
in two phases: source pre-training, then joint training on source and generated images. From the
same weights it also trains on the source alone, and on generated images without SAM, for as many
iterations. It runs the commands of a real experiment, prints each of them, and collects the results
in OUTPUT/index.html; OUTPUT/report.html compares the trainings. Nothing is downloaded.

A run is on one thread, so that its scores do not depend on the number of cores. `--full` trains
more rows with three seeds, each for twice as many iterations, and writes street_world.json and
street_world.md into the folder --results. It is resumed by the same command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from clouds.cli.command_line import add_overrides, given_overrides, path_or_name


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog=Path(sys.argv[0]).name,
        description=__doc__,
        epilog="example:\n  clouds demo --output output/demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=Path("datasets/demo"), help="dataset root")
    parser.add_argument("--output", type=Path, default=Path("output/demo"))
    parser.add_argument("--train", type=int, default=500, help="labeled training images")
    parser.add_argument("--val", type=int, default=40, help="images of each unseen domain")
    parser.add_argument("--generated", type=int, default=300, help="images generated from prompts")
    parser.add_argument(
        "--prompts", type=path_or_name, default="street_scenes", metavar="FILE",
        help="one per line, or the name of prompts of the package (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--full", action="store_true", help="the whole table, over several seeds")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="of the trainings (default: 0; with --full 0 1 2)"
    )
    parser.add_argument(
        "--results", type=Path, help="folder of the table of --full (default: that of --output)"
    )
    parser.add_argument(
        "--processes", type=int, default=2, help="trainings at a time (default: %(default)s)"
    )
    add_overrides(parser, "of all configs, SOLVER.MAX_ITER 100")
    args = parser.parse_args(argv)
    args.opts = given_overrides(parser, args.opts)
    if args.seeds is None:
        args.seeds = [0, 1, 2] if args.full else [0]
    if not args.full and (len(args.seeds) > 1 or args.results is not None):
        parser.error("several --seeds and --results are for --full")
    args.results = args.results or args.output
    for name in ("data", "output", "results"):
        setattr(args, name, getattr(args, name).expanduser())
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo."""
    args = parse(argv)
    from street_renderer.demo_run import run_demo  # torch: after --help and errors of usage

    run_demo(args, sys.argv[1:] if argv is None else argv)
