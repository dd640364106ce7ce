"""Train named settings of a config with several seeds, and compare their scores in a table.

FILE is a YAML file, or the name of one that comes with the package. It names a config, overrides of
each setting, and seeds. All configs are checked before the first run starts. A run that has ended
is not repeated, and one that was interrupted is resumed, so the same command goes on where an
earlier one stopped. The table has means and standard deviations, and paired differences to the
baseline with their confidence intervals; it is written to the output folder as Markdown, LaTeX and
CSV.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clouds.cli.command_line import (
    given_overrides,
    new_parser,
    path,
    shown_command,
    user_errors_in_one_line,
)

if TYPE_CHECKING:
    from clouds.ablation.plan import Ablation, Run
    from clouds.ablation.runs import Outcome

FAILED = 1
"""Exit status if a run failed."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = new_parser("ablate", __doc__)
    parser.add_argument("file", metavar="FILE", help="YAML file of the ablation, or its name")
    parser.add_argument(
        "--output", type=path, metavar="FOLDER", help="folder of the runs, instead of the file's"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[], metavar="N", help="instead of the file's"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="these settings and the baseline"
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N",
        help="runs at a time (default: as many as there are GPUs for, one on a CPU)",
    )  # fmt: skip
    parser.add_argument(
        "--gpus-per-run", type=int, default=1, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--cluster",
        choices=("slurm", "local", "debug"),
        help="submit each run as a job by submitit; local, debug: on this machine, to try it",
    )
    parser.add_argument(
        "--job-options", nargs="+", default=[], metavar="KEY=VALUE",
        help="of submitit: timeout_min=1440 slurm_partition=gpu cpus_per_task=8",
    )  # fmt: skip
    parser.add_argument(
        "--table", action="store_true", help="start nothing; the table of the runs that have ended"
    )
    parser.add_argument("--dry-run", action="store_true", help="show the commands of all runs")
    parser.add_argument(
        "opts",
        nargs="*",
        default=[],
        metavar="KEY VALUE",
        help="config overrides of every run, after FILE: SOLVER.MAX_ITER 1000",
    )
    args = parser.parse_intermixed_args(argv)
    args.opts = given_overrides(parser, args.opts)
    if args.job_options and not args.cluster:
        parser.error("--job-options is for --cluster")
    if args.cluster and args.jobs:
        parser.error("--jobs is for runs on this machine; the cluster decides how many jobs run")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not done, write and print the table; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    args = parse(words)
    with user_errors_in_one_line():
        from clouds.ablation.plan import read_ablation
        from clouds.ablation.runs import check_unchanged

        ablation = read_ablation(
            args.file, overrides=args.opts, seeds=args.seeds, only=args.only, output=args.output
        )
        check_unchanged(ablation.runs)
        if args.dry_run:
            print("\n".join(plan_lines(ablation)))
            return 0
        if args.table:
            show_table(ablation)
            return 0
        runner = build_runner(args, ablation)
    stopped = "stopped; jobs that were submitted go on" if args.cluster else None
    with user_errors_in_one_line(stopped=stopped):
        failed = run(ablation, runner, shown_command(words))
        show_table(ablation, failed)
    if getattr(runner, "stopped_by", 0):
        print("stopped; the same command goes on")
        return 128 + int(runner.stopped_by)
    return FAILED if failed else 0


def plan_lines(ablation: Ablation) -> list[str]:
    """State and command of each run."""
    from clouds.ablation.runs import results_of

    return [
        f"# {run.name}: {'to do' if results_of(run) is None else 'has ended'}\n"
        f"{run.shown_command()}"
        for run in ablation.runs
    ]


def build_runner(args: argparse.Namespace, ablation: Ablation) -> Any:
    """What starts the runs: processes of this machine, or jobs.

    Raises:
        ValueError: numbers of GPUs do not fit, or options are not those of submitit.
        ImportError: submitit is not installed.
    """
    import torch

    from clouds.ablation.local import LocalRunner, gpu_slots

    devices = {str(run.cfg.MODEL.DEVICE) for run in ablation.runs}
    on_gpu = devices != {"cpu"}
    if args.cluster:
        from clouds.ablation.cluster import ClusterRunner, import_submitit, parse_options

        import_submitit()
        options = {"name": f"clouds-{ablation.output.name}"[:60]}
        options |= {"gpus_per_node": args.gpus_per_run} if on_gpu else {}
        options |= parse_options(args.job_options)
        folder = (ablation.output / "jobs").absolute()
        return ClusterRunner(args.cluster, folder, options, args.gpus_per_run)
    numbered = sorted(device for device in devices if ":" in device)
    if numbered:
        raise ValueError(
            f"MODEL.DEVICE is {numbered[0]!r}; an ablation chooses the GPU of each run. Use 'cuda' "
            "or 'auto', and the variable CUDA_VISIBLE_DEVICES for some of the GPUs."
        )
    slots = gpu_slots(torch.cuda.device_count() if on_gpu else 0, args.gpus_per_run, args.jobs)
    return LocalRunner(slots, args.gpus_per_run)


def run(ablation: Ablation, runner: Any, command: str) -> dict[Run, Outcome]:
    """Start the runs that have not ended; returns how those ended that failed."""
    import logging

    from clouds import environment
    from clouds.ablation.runs import unfinished
    from clouds.engine.run_lock import locked

    environment.check_writable(str(ablation.output))
    with locked(str(ablation.output)):
        environment.setup_logging(str(ablation.output), 0)
        todo = unfinished(ablation.runs)
        logger = logging.getLogger(__name__)
        logger.info("%s", command)
        logger.info("%d of %d runs are to do", len(todo), len(ablation.runs))
        failed: dict[Run, Outcome] = runner.run(todo)
    return failed


def show_table(ablation: Ablation, failed: dict[Run, Outcome] | None = None) -> None:
    """Print the table, and write it to the folder of the ablation."""
    from clouds.ablation.runs import table_of
    from clouds.ablation.table import FORMATS

    table, _ = table_of(ablation, failed)
    for extension in FORMATS:
        table.write(ablation.output / f"table{extension}")
    print(f"\n{table.markdown()}\n\ntables in '{ablation.output}': table{', table'.join(FORMATS)}")
