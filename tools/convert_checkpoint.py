#!/usr/bin/env python
"""Turn a checkpoint into weights alone: safetensors, or a .pth that the published code loads.

    python tools/convert_checkpoint.py model_final.pth weights.safetensors
    python tools/convert_checkpoint.py weights.safetensors for_published_code.pth

Written are the tensors of the model under their published names, which are ours too; optimizer,
schedule, teacher and SAM stay behind. With --config-file the tensors must be exactly those of that
config's model, by name and shape.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from command_line import user_errors_in_one_line

if TYPE_CHECKING:
    import torch

PARTS = ("backbone", "sem_seg_head", "criterion", "void_embedding")
"""First words of the names of tensors in a published checkpoint."""

ENDINGS = {"clouds": ".safetensors", "published": ".pth"}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=Path, metavar="IN", help="a .pth, .pkl or .safetensors file")
    parser.add_argument("output", type=Path, metavar="OUT", help="a .safetensors or .pth file")
    parser.add_argument("--config-file", metavar="FILE", help="config of the model that it is of")
    parser.add_argument(
        "--to",
        choices=sorted(ENDINGS),
        help="clouds: safetensors; published: {'model': weights} in a .pth; else as OUT ends",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")
    return parser.parse_intermixed_args(argv)


def target(output: Path, to: str | None) -> str:
    """What to write, from --to and OUT's ending, which must agree."""
    for name, ending in ENDINGS.items():
        if output.suffix == ending and to in (None, name):
            return name
    wanted = [ENDINGS[to]] if to else list(ENDINGS.values())
    raise ValueError(
        f"'{output}' must end in {' or '.join(wanted)}" + (f" for --to {to}" if to else "")
    )


def select(
    weights: Mapping[str, torch.Tensor], config_file: str | None, opts: Sequence[str]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The model's tensors among `weights`, and the names of the others.

    Raises:
        ValueError: there are none, or they are not those of the config's model.
    """
    if config_file is None:
        kept = {name: value for name, value in weights.items() if name.split(".")[0] in PARTS}
    else:
        from clouds.config import load_config
        from clouds.engine.checkpoint import compare, with_present_names
        from clouds.modeling.build import build_seeded

        random_clip = ["MODEL.CLOUDS.CLIP_PRETRAINED_WEIGHTS", "", "MODEL.DEVICE", "cpu"]
        model = build_seeded(load_config(config_file, [*opts, *random_clip]))
        weights = with_present_names(weights, model)
        report = compare("the input", weights, model)
        if report.missing or report.mismatched:
            raise ValueError(f"these are not the weights of {config_file}.\n{report}")
        kept = {name: weights[name] for name in model.state_dict()}
    if not kept:
        raise ValueError(f"no tensor of the input begins with {', '.join(PARTS)}")
    return kept, [name for name in weights if name not in kept]


def write(weights: Mapping[str, torch.Tensor], output: Path, to: str) -> None:
    """Write them to `output`, which appears when it is whole."""
    import safetensors.torch
    import torch

    from clouds.files import written_whole

    # Clones: tensors that share memory are an error to safetensors, and parts of larger ones would
    # drag the rest of them into a .pth.
    alone = {name: value.detach().contiguous().clone() for name, value in weights.items()}
    with written_whole(output) as file:
        if to == "clouds":
            file.write(safetensors.torch.save(alone))
        else:
            torch.save({"model": alone}, file)


def by_part(names: Iterable[str]) -> str:
    """How many names begin with which word."""
    counts = Counter(name.split(".")[0] for name in names)
    return ", ".join(f"{part} ({count})" for part, count in counts.most_common(8))


def convert(args: argparse.Namespace) -> None:
    """Read, select, write, and say what was done."""
    from clouds.engine.checkpoint import read_checkpoint

    to = target(args.output, args.to)
    if args.output.exists() and not args.overwrite:
        raise ValueError(f"'{args.output}' exists; --overwrite replaces it")
    entries = read_checkpoint(args.input)
    weights, others = select(entries.pop("model"), args.config_file, args.opts)
    write(weights, args.output, to)

    values = sum(value.numel() for value in weights.values())
    size = args.output.stat().st_size / 2**20
    print(f"{args.output}: {len(weights)} tensors, {values / 1e6:.1f} M values, {size:.1f} MiB")
    print(f"  written: {by_part(weights)}")
    print(f"  left out, tensors: {by_part(others) or 'none'}")
    print(f"  left out, other entries: {', '.join(sorted(entries)) or 'none'}")
    if args.config_file is None:
        print("  not checked against a config: give --config-file to be sure that it is complete")
    else:
        print(f"  exactly the tensors of {args.config_file}")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    args = parse(argv)
    with user_errors_in_one_line():
        convert(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
