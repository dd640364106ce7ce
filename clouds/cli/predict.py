"""Predict the classes of the pixels of images and videos with a checkpoint.

For each image, <name>_color.png, <name>_overlay.png (with a legend), <name>_labels.png (train ids)
and <name>_confidence.png (16-bit, 65535 for confidence 1) are written; for a video,
<name>_color.mp4 and <name>_overlay.mp4. The name is that of the input, with a number if two inputs
have the same. Inputs that cannot be read are skipped, and the exit status is then 1.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from clouds.cli.command_line import (
    add_checkpoint_flags,
    add_overrides,
    given_overrides,
    new_parser,
    path,
    user_errors_in_one_line,
)
from clouds.messages import format_examples

KINDS = ("color", "overlay", "labels", "confidence")

SOME_UNREADABLE = 1
"""Exit status if some inputs could not be read."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = new_parser("predict", __doc__)
    add_checkpoint_flags(parser)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="image files, folders (their image files, no subfolders), patterns such as "
        "'frames/**/*.png', video files, or the number of a camera",
    )
    parser.add_argument("--output", type=path, required=True, metavar="FOLDER", help="created")
    parser.add_argument(
        "--classes",
        metavar="NAMES",
        help="classes to predict, separated by commas, with a text class head: 'road, tuk-tuk'",
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=1,
        metavar="N",
        help="images of the same size that are predicted together (default 1)",
    )
    parser.add_argument(
        "--save",
        nargs="+",
        choices=KINDS,
        default=KINDS,
        metavar="KIND",
        help=f"what is written: {', '.join(KINDS)} (default: all)",
    )
    parser.add_argument(
        "--bravo",
        action="store_true",
        help="--input is a folder; write NAME_pred.png (train ids) and NAME_conf.png (16-bit "
        "confidence) of all images below it, in the same subfolders",
    )
    parser.add_argument(
        "--max-frames", type=positive, metavar="N", help="frames of a video; needed for a camera"
    )
    parser.add_argument("--device", metavar="D", help="auto, cpu, cuda or cuda:N")
    add_overrides(parser, "--output predictions TEST.SHORT_SIDE 512")
    args = parser.parse_args(argv)
    args.opts = given_overrides(parser, args.opts)
    if args.bravo and (len(args.input) > 1 or tuple(args.save) != KINDS):
        parser.error("--bravo needs one folder as --input, and goes without --save")
    return args


def positive(text: str) -> int:
    """Type of flags that are counts."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Predict and write; exit status 1: some inputs, 2: no input could be read."""
    args = parse(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("clouds").setLevel(logging.INFO)
    with user_errors_in_one_line(stopped="stopped; images written before are complete"):
        num_unreadable = run(args)
    if num_unreadable:
        raise SystemExit(SOME_UNREADABLE)


def run(args: argparse.Namespace) -> int:
    """Predict all inputs; returns the number of those that could not be read."""
    from clouds.inference.inputs import check_outputs, find_inputs, find_tree
    from clouds.inference.segmentation import BRAVO_KINDS

    inputs = find_tree(path(args.input[0])) if args.bravo else find_inputs(args.input)
    kinds = list(BRAVO_KINDS) if args.bravo else list(dict.fromkeys(args.save))
    cameras = [item.source for item in inputs if isinstance(item.source, int)]
    if cameras and args.max_frames is None:
        raise ValueError(f"camera {cameras[0]} has no end: give the number of --max-frames.")
    check_outputs(inputs, args.output, kinds)
    args.output.mkdir(parents=True, exist_ok=True)

    from clouds.inference.job import predict_files
    from clouds.inference.load import load

    segmenter = load(
        args.weights,
        args.config_file,
        device=args.device,
        classes=args.classes,
        overrides=args.opts,
    )
    totals = predict_files(
        segmenter,
        inputs,
        args.output,
        kinds,
        batch_size=args.batch_size,
        max_frames=args.max_frames,
    )
    unreadable = totals.unreadable
    if not totals.images:
        raise ValueError(f"none of the {len(inputs)} inputs can be read.")
    rate = totals.images / totals.seconds
    sys.stdout.write(
        f"{totals.images} images in {totals.seconds:.1f} s, {rate:.2f} images/s, written to "
        f"{args.output}\n"
    )
    if unreadable:
        names = format_examples(unreadable)
        sys.stdout.write(f"{len(unreadable)} of {len(inputs)} inputs could not be read: {names}\n")
    return len(unreadable)
