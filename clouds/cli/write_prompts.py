"""Write prompts of street scenes with an instruction-tuned language model.

The file is extended round by round. An interrupted run is resumed by the same command, with the
same prompts as without the interruption.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from clouds.cli.command_line import (
    finite_number,
    new_parser,
    path,
    path_or_name,
    user_errors_in_one_line,
)
from clouds.cli.prompt_reader import add_class_options, label_space_of, prompt_reader

if TYPE_CHECKING:
    from clouds.data.label_space import LabelSpace
    from clouds.generation.prompt_writing import WritingOptions

FAILED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Write prompts; returns the exit code."""
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    stopped = f"Stopped. The same command resumes {args.output}."
    with user_errors_in_one_line(MemoryError, stopped=stopped):
        return write(args)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = new_parser("write-prompts", __doc__)
    add = parser.add_argument
    add(
        "--model",
        type=path_or_name,
        required=True,
        metavar="MODEL",
        help="folder, or id on the Hugging Face hub",
    )
    add("--output", required=True, type=path, metavar="FILE", help="prompt file to write or extend")
    add("--count", type=int, default=200, metavar="N", help="new prompts (default: %(default)s)")
    add(
        "--quota",
        type=int,
        default=0,
        metavar="K",
        help="continue until K prompts of the file name each class (default: 0)",
    )
    add(
        "--dense",
        action="store_true",
        help="longer prompts, each with several classes, a place, a time and a weather",
    )
    add_class_options(parser)
    add(
        "--avoid",
        type=path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="prompt files whose prompts must not be repeated",
    )
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--temperature", type=finite_number, default=0.9, help="of sampling (default: %(default)s)")
    add("--batch-size", type=int, default=4, help="answers per batch (default: %(default)s)")
    add(
        "--similarity",
        type=finite_number,
        default=0.6,
        metavar="S",
        help="Jaccard index of words from which a prompt counts as repeated (default: %(default)s)",
    )
    add(
        "--patience",
        type=int,
        default=20,
        metavar="R",
        help="stop after R rounds without a valid prompt (default: %(default)s)",
    )
    add_model_options(parser)
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1:
        parser.error("--max-new-tokens must be at least 1")
    return args


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """How the language model is loaded, and the length of its answers."""
    add = parser.add_argument
    add(
        "--max-new-tokens",
        type=int,
        default=640,
        metavar="T",
        help="maximum length of an answer (default: %(default)s)",
    )
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<number>")
    add("--offline", action="store_true", help="use the local cache only")


def options_of(args: argparse.Namespace, label_space: LabelSpace | None) -> WritingOptions:
    """The options of the command line; ValueError if one is out of its range."""
    from clouds.generation.class_words import request_of
    from clouds.generation.prompt_writing import CLASS_DESCRIPTIONS, WritingOptions

    return WritingOptions(
        count=args.count,
        quota=args.quota,
        seed=args.seed,
        batch_size=args.batch_size,
        similarity=args.similarity,
        patience=args.patience,
        classes=CLASS_DESCRIPTIONS if label_space is None else request_of(label_space),
        dense=args.dense,
    )


def write(args: argparse.Namespace) -> int:
    """Load the model, write prompts, and print the number of dropped lines by reason."""
    from tqdm import tqdm

    from clouds.generation.language_model import load_language_model
    from clouds.generation.prompt_writing import NothingUsableError, Progress, write_prompts
    from clouds.generation.prompts import read_prompts

    label_space = label_space_of(args)
    named_classes = prompt_reader(label_space).named_classes
    options = options_of(args, label_space)
    avoid = [prompt.text for file in args.avoid for prompt in read_prompts(file)]
    model = load_language_model(
        args.model, args.dtype, args.device, args.offline, args.temperature, args.max_new_tokens
    )
    settings = {
        "model": args.model,
        "dtype": model.dtype,
        "temperature": args.temperature,
        "max_new_tokens": args.max_new_tokens,
    }
    bars: list[tqdm[NoReturn]] = []

    def show(progress: Progress) -> None:
        if not bars:  # prompts of an earlier run do not count for the speed
            bars.append(tqdm(total=args.count, initial=progress.written, unit="prompt"))
        bar = bars[0]
        bar.total = max(args.count, progress.written)
        bar.set_postfix(
            round=progress.rounds,
            dropped=progress.dropped.total(),
            lacking=len(progress.lacking),
            refresh=False,
        )
        bar.update(progress.written - bar.n)

    try:
        progress = write_prompts(model, args.output, options, settings, named_classes, avoid, show)
    except NothingUsableError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return FAILED
    finally:
        for bar in bars:
            bar.close()
    dropped = ", ".join(f"{count} {reason}" for reason, count in progress.dropped.most_common())
    print(f"{args.output}: {progress.written} prompts. Dropped: {dropped or 'nothing'}.")
    return 0
