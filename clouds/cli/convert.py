"""Convert a checkpoint to weights: safetensors, or a .pth that published code loads.

The output has the tensors of the model under their published names, which are also ours, without
optimizer, scheduler, teacher and SAM; with --to mmseg, those of Rein's and SoMA's code, whose
checkpoints are read as well. With --config-file, names and shapes must be exactly those of that
config's model; a frozen backbone may be left out. --merge-adapters folds low-rank adapters into the
weights: the output is a model without adapter.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clouds.cli.command_line import given_overrides, new_parser, path, user_errors_in_one_line

if TYPE_CHECKING:
    import torch

PARTS = ("backbone", "sem_seg_head", "criterion", "void_embedding")
"""First components of the names of tensors in a published checkpoint."""

SUFFIXES = {"clouds": ".safetensors", "published": ".pth", "mmseg": ".pth"}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = new_parser("convert", __doc__)
    parser.add_argument("input", type=path, metavar="IN", help="a .pth, .pkl or .safetensors file")
    parser.add_argument("output", type=path, metavar="OUT", help="a .safetensors or .pth file")
    parser.add_argument("--config-file", metavar="FILE", help="config of the model")
    parser.add_argument(
        "--to",
        choices=sorted(SUFFIXES),
        help="clouds: safetensors; published: {'model': weights} in a .pth; mmseg: {'state_dict': "
        "weights} in a .pth, with the names of mmsegmentation; default: by suffix",
    )
    parser.add_argument(
        "--merge-adapters",
        action="store_true",
        help="fold low-rank adapters into the weights; needs --config-file",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")
    args = parser.parse_intermixed_args(argv)
    if not (isinstance(args.input, Path) and isinstance(args.output, Path)):
        parser.error("the files IN and OUT are needed, before '--'")  # argparse sets [] there
    args.opts = given_overrides(parser, args.opts)
    if args.merge_adapters and args.config_file is None:
        parser.error("--merge-adapters needs --config-file, the config of the model")
    return args


def target(output: Path, to: str | None) -> str:
    """The output format, from --to and the suffix of OUT, which must agree."""
    for name, suffix in SUFFIXES.items():
        if output.suffix == suffix and to in (None, name):
            return name
    wanted = [SUFFIXES[to]] if to else list(SUFFIXES.values())
    raise ValueError(
        f"'{output}' must end in {' or '.join(wanted)}" + (f" for --to {to}" if to else "")
    )


def select(
    entries: Mapping[str, Any], config_file: str | None, opts: Sequence[str], merge: bool = False
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The model's tensors in a checkpoint, and the names of the others.

    Args:
        entries: of the checkpoint.
        config_file, opts: the config of the model, and its overrides.
        merge: fold low-rank adapters into the weights.

    Raises:
        ValueError: there are none, they are not those of the config's model, or not finite; there
            is nothing to merge.
    """
    from clouds.engine.mmseg_names import from_mmseg, is_mmseg
    from clouds.messages import format_examples
    from clouds.weights_io import nonfinite_tensors

    weights: Mapping[str, torch.Tensor] = entries["model"]
    if is_mmseg(weights):
        weights = from_mmseg(weights)
    if config_file is None:
        kept = {name: value for name, value in weights.items() if name.split(".")[0] in PARTS}
    else:
        weights, kept = of_model(weights, entries, config_file, opts, merge)
    if not kept:
        raise ValueError(f"no tensor of the input begins with {', '.join(PARTS)}")
    masks = {name for name in kept if name.endswith("attn_mask")}
    if broken := nonfinite_tensors(kept, buffers=masks):
        raise ValueError(
            f"the input has weights that are not finite: {format_examples(broken)}. Its training "
            "has diverged; convert an earlier checkpoint"
        )
    return kept, [name for name in weights if name not in kept]


def of_model(
    weights: Mapping[str, torch.Tensor],
    entries: Mapping[str, Any],
    config_file: str,
    opts: Sequence[str],
    merge: bool,
) -> tuple[Mapping[str, torch.Tensor], dict[str, torch.Tensor]]:
    """`weights` with the names of the config's model, and those that are of it; see `select`."""
    from clouds.config import load_config
    from clouds.engine.initial_weights import load_complete
    from clouds.engine.load_report import (
        DERIVED,
        compare_tensors,
        refuse_other_adapter,
        rename_older_tensors,
    )
    from clouds.modeling.backbone.adapters import merge_updates
    from clouds.modeling.build import build_seeded

    cfg = load_config(config_file, [*opts, "MODEL.DEVICE", "cpu"])
    model = build_seeded(cfg, skip_pretrained=True)
    weights = rename_older_tensors(weights, model)
    report = compare_tensors("the input", weights, model)
    if not report.complete:
        raise ValueError(f"these are not the weights of {config_file}.\n{report}")
    refuse_other_adapter(report)
    if not merge:
        state = model.state_dict()
        derived = {name: state[name] for name in DERIVED if name in state}
        return weights, {n: (weights | derived)[n] for n in state if n in weights | derived}
    load_complete(cfg, model, "the input", {**entries, "model": weights})
    if merge_updates(model) == 0:
        raise ValueError(
            f"the model of {config_file} has no adapter that can be merged: "
            f"MODEL.BACKBONE.ADAPTER.NAME is {cfg.MODEL.BACKBONE.ADAPTER.NAME}, and lora, soma and "
            "recycle are low-rank updates of weights. Leave --merge-adapters out"
        )
    return weights, dict(model.state_dict())


def write(weights: Mapping[str, torch.Tensor], output: Path, to: str) -> None:
    """Write the tensors to `output`."""
    import torch

    from clouds.files import atomic_write
    from clouds.weights_io import write_safetensors

    # Clones, because safetensors refuses tensors that share memory, and a .pth would contain the
    # whole storage of a view.
    clones = {name: value.detach().contiguous().clone() for name, value in weights.items()}
    with atomic_write(output) as file:
        if to == "clouds":
            write_safetensors(clones, file)
        else:
            torch.save({"state_dict" if to == "mmseg" else "model": clones}, file)


def by_part(names: Iterable[str]) -> str:
    """Number of names by first component, as text."""
    counts = Counter(name.split(".")[0] for name in names)
    return ", ".join(f"{part} ({count})" for part, count in counts.most_common(8))


def convert(args: argparse.Namespace) -> None:
    """Read, select, write, and print a summary."""
    from clouds.engine.mmseg_names import to_mmseg
    from clouds.weights_io import read_checkpoint

    to = target(args.output, args.to)
    if args.output.exists() and not args.overwrite:
        raise ValueError(f"'{args.output}' exists; --overwrite replaces it")
    entries = read_checkpoint(args.input)
    weights, others = select(entries, args.config_file, args.opts, args.merge_adapters)
    if to == "mmseg":
        weights = to_mmseg(weights)
    entries.pop("model")
    write(weights, args.output, to)

    values = sum(value.numel() for value in weights.values())
    size = args.output.stat().st_size / 2**20
    print(f"{args.output}: {len(weights)} tensors, {values / 1e6:.1f} M values, {size:.1f} MiB")
    print(f"  written: {by_part(weights)}")
    print(f"  left out, tensors: {by_part(others) or 'none'}")
    print(f"  left out, other entries: {', '.join(sorted(entries)) or 'none'}")
    if args.config_file is None:
        print("  not compared with a config; --config-file checks that it is complete")
    elif args.merge_adapters:
        print("  the adapter is merged: load it with MODEL.BACKBONE.ADAPTER.NAME none")
    else:
        print(f"  exactly the tensors of {args.config_file}, but for a frozen backbone left out")


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; returns the exit code."""
    args = parse(argv)
    with user_errors_in_one_line():
        convert(args)
    return 0
