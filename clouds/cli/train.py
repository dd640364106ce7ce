"""Train a model and evaluate it, or with --eval-only evaluate a checkpoint.

The config is a YAML file, or the name of one that comes with the package.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clouds.cli.command_line import (
    add_overrides,
    given_overrides,
    new_parser,
    shown_command,
    user_errors_in_one_line,
)

if TYPE_CHECKING:
    from clouds.d2 import CfgNode

logger = logging.getLogger(__name__)

DIVERGED = 3
"""Exit status of a run whose loss was not finite."""


def parse(name: str, argv: Sequence[str]) -> argparse.Namespace:
    """The command line of `train` or `eval`, with Detectron2's flags."""
    parser = new_parser(name, __doc__)
    parser.add_argument("--config-file", default="", metavar="FILE", help="YAML config")
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument(
        "--resume",
        action="store_true",
        help="resume from the newest checkpoint in OUTPUT_DIR, if there is one",
    )
    earlier.add_argument(
        "--overwrite",
        action="store_true",
        help="if OUTPUT_DIR holds a run, first move its files to OUTPUT_DIR/earlier/<date>",
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS and stop")
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        metavar="N",
        help="GPUs on each machine; with `MODEL.DEVICE cpu`, CPU processes",
    )
    parser.add_argument("--num-machines", type=int, default=1, metavar="N", help="machines")
    parser.add_argument(
        "--machine-rank", type=int, default=0, metavar="I", help="number of this machine, from 0"
    )
    parser.add_argument(
        "--dist-url",
        default="auto",
        metavar="URL",
        help="tcp://HOST:PORT of machine 0, to which processes connect; auto: a free port here",
    )
    add_overrides(parser, "SOLVER.BASE_LR 1e-4 OUTPUT_DIR output/a")
    args = parser.parse_args(argv)
    args.opts = given_overrides(parser, args.opts)
    if not args.config_file:
        parser.error("--config-file is needed, e.g. demo/warmup")
    args.eval_only |= name == "eval"
    if args.eval_only and args.overwrite:
        parser.error(
            "--overwrite is for training; an evaluation sets earlier results aside by itself"
        )
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train and evaluate, or only evaluate."""
    run_command("train", sys.argv[1:] if argv is None else argv)


def run_command(name: str, argv: Sequence[str]) -> None:
    """Parse the command line of `train` or `eval`, read the config, start the processes."""
    args = parse(name, argv)
    with user_errors_in_one_line():
        from clouds.config import load_config
        from clouds.engine.launch import check_launch, launch

        cfg = load_config(args.config_file, args.opts)
        launch_options = {
            "num_gpus": args.num_gpus,
            "num_machines": args.num_machines,
            "machine_rank": args.machine_rank,
            "dist_url": args.dist_url,
            "device": cfg.MODEL.DEVICE,
        }
        check_launch(**launch_options)
    launch(
        run,
        (cfg, args, shown_command(argv)),
        timeout=cfg.DIST_TIMEOUT,
        **launch_options,
    )


def run(cfg: CfgNode, args: argparse.Namespace, command: str) -> None:
    """Train or evaluate in one process, in a folder that no other run uses."""
    from clouds import environment
    from clouds.engine.run_lock import locked

    with contextlib.ExitStack() as stack:
        with user_errors_in_one_line():
            weights = warning = ""
            if args.eval_only:
                weights, warning = weights_to_evaluate(cfg, args.resume)
                cfg = with_own_folder(cfg, weights)
            environment.check_writable(cfg.OUTPUT_DIR)
            stack.enter_context(locked(cfg.OUTPUT_DIR))
            setup(cfg, args, command)
            if warning:
                log_once(logging.WARNING, warning)
        if args.eval_only:
            evaluate(cfg, weights)
        else:
            train(cfg, args.resume)


def setup(cfg: CfgNode, args: argparse.Namespace, command: str) -> None:
    """Make OUTPUT_DIR ready, start the log there and, to train, write the config."""
    from clouds import comm, environment
    from clouds.device import resolve_device
    from clouds.engine.run_folder import prepare
    from clouds.engine.run_lock import on_main_process

    device = comm.device_of_process(resolve_device(cfg.MODEL.DEVICE))
    folder, weights = Path(cfg.OUTPUT_DIR), "" if args.eval_only else str(cfg.MODEL.WEIGHTS)
    overwrite = args.overwrite or args.eval_only  # earlier results of the same evaluation
    resume = args.resume and not args.eval_only
    aside = on_main_process(
        lambda: prepare(folder, resume=resume, overwrite=overwrite, weights=weights)
    )
    environment.setup_logging(cfg.OUTPUT_DIR, comm.get_rank())
    logger.info("%s", environment.banner(device, comm.get_world_size()))
    logger.info("%s", command)
    if aside is not None:
        logger.warning("the files of the earlier run are now in '%s'", aside)
    if comm.is_main_process() and not args.eval_only:
        environment.dump_config(cfg, Path(cfg.OUTPUT_DIR, "config.yaml"), command)


def train(cfg: CfgNode, resume: bool) -> None:
    """Train and evaluate; the exit status tells a signal (128 + its number) or divergence (3)."""
    from clouds.engine import Interrupted, NonFiniteLossError, Trainer

    with user_errors_in_one_line():
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume)
    try:
        with user_errors_in_one_line(stopped="stopped by a second Ctrl-C, without saving"):
            trainer.train()
    except Interrupted as request:
        log_once(logging.WARNING, str(request))
        raise SystemExit(128 + request.signal_number) from None
    except NonFiniteLossError as error:
        log_once(logging.ERROR, str(error))
        raise SystemExit(DIVERGED) from None


def weights_to_evaluate(cfg: CfgNode, resume: bool) -> tuple[str, str]:
    """The checkpoint, and a warning if it is not the expected one; both may be empty.

    It is MODEL.WEIGHTS, or with `resume` the newest whole checkpoint of OUTPUT_DIR, if there is
    one.
    """
    from clouds.engine.newest_checkpoint import read_newest

    weights = str(cfg.MODEL.WEIGHTS)
    if not resume:
        return weights, ""
    newest = read_newest(Path(cfg.OUTPUT_DIR), mmap=True)
    if newest is None:
        instead = f"MODEL.WEIGHTS '{weights}' is evaluated" if weights else "MODEL.WEIGHTS is empty"
        return weights, f"--resume: no checkpoint in '{cfg.OUTPUT_DIR}'; {instead}"
    return str(newest.path), newest.warning


def with_own_folder(cfg: CfgNode, weights: str) -> CfgNode:
    """A copy of the config whose OUTPUT_DIR is the folder of this evaluation in OUTPUT_DIR."""
    from clouds.config.config import with_value
    from clouds.engine.run_folder import evaluation_folder
    from clouds.evaluation.protocols import protocol_name

    folder = Path(cfg.OUTPUT_DIR)
    folder = evaluation_folder(folder, protocol_name(cfg), cfg.DATASETS.TEST, weights)
    return with_value(cfg, "OUTPUT_DIR", str(folder))


def evaluate(cfg: CfgNode, weights: str) -> None:
    """Evaluate the checkpoint `weights`; empty: random weights."""
    from clouds import comm
    from clouds.config.config import with_value
    from clouds.device import resolve_device
    from clouds.engine.initial_weights import build_and_load
    from clouds.evaluation import check_test_data
    from clouds.evaluation import evaluate as evaluate_model

    with user_errors_in_one_line():
        check_test_data(cfg, cfg.DATASETS.TEST)
        device = comm.device_of_process(resolve_device(cfg.MODEL.DEVICE))
        cfg = with_value(cfg, "MODEL.DEVICE", str(device))
        model = build_and_load(cfg, weights)
        if not weights:
            log_once(
                logging.WARNING,
                "MODEL.WEIGHTS is empty: RANDOM weights are evaluated. Set a checkpoint with "
                "MODEL.WEIGHTS <file>, or use --resume for the newest one of OUTPUT_DIR.",
            )
        evaluate_model(cfg, model, weights=weights)


def log_once(level: int, message: str) -> None:
    """Log a message of all processes on the main process only."""
    from clouds import comm

    if comm.is_main_process():
        logger.log(level, "%s", message)
