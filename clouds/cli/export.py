"""Export a checkpoint for other programs: a folder that is ready for the Hugging Face hub.

It has model.onnx and model.pt2 (ONNX and torch.export: images of any size to scores, compared with
the model when they are written), model.safetensors with config.json, which `clouds.load(FOLDER)`
and --weights FOLDER read, and README.md, a model card. Low-rank adapters are merged into the
weights. The extra `export` has the packages that ONNX needs.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from clouds.cli.command_line import (
    add_checkpoint_flags,
    add_overrides,
    given_overrides,
    new_parser,
    path,
    user_errors_in_one_line,
)

FORMATS = ("onnx", "torch", "safetensors")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = new_parser("export", __doc__)
    add_checkpoint_flags(parser)
    parser.add_argument("--output", type=path, required=True, metavar="FOLDER", help="created")
    parser.add_argument(
        "--format",
        nargs="+",
        choices=FORMATS,
        default=FORMATS,
        metavar="FORMAT",
        help=f"what is written: {', '.join(FORMATS)} (default: all)",
    )
    parser.add_argument(
        "--input-type",
        choices=("uint8", "float32"),
        default="uint8",
        help="type of the images that ONNX and torch.export take; 0 to 255 in both (default uint8)",
    )
    parser.add_argument("--name", default="", help="of the model (default: that of FOLDER)")
    parser.add_argument(
        "--licence", "--license", default="", metavar="ID", help="for the card, such as cc-by-4.0"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    add_overrides(parser, "--output exported TEST.SHORT_SIDE 512")
    args = parser.parse_args(argv)
    args.opts = given_overrides(parser, args.opts)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Export, and print what is in the folder."""
    args = parse(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("clouds").setLevel(logging.INFO)
    with user_errors_in_one_line():
        from clouds.export import export

        done = export(
            args.weights,
            args.output,
            list(dict.fromkeys(args.format)),
            config_file=args.config_file,
            overrides=args.opts,
            input_type=args.input_type,
            name=args.name,
            licence=args.licence,
            overwrite=args.overwrite,
        )
    print(f"{done.folder}:")
    for file in sorted(done.folder.iterdir()):
        print(f"  {file.name}, {file.stat().st_size / 2**20:.1f} MiB")
    if done.merged:
        print(f"{done.merged} low-rank updates are merged into the weights")
    if not done.scores:
        print("README.md has no scores: no results.json of the run is of exactly these weights")
    if not done.licence:
        print("README.md states no licence: give one with --licence before you publish the model")
