"""Count the parameters that a config trains, without weights and without memory for them.

Shown are the numbers of trainable parameters by part of the model, and the parameter groups of the
optimizer: learning rate before any schedule, weight decay, tensors and numbers.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clouds.cli.command_line import given_overrides, new_parser, user_errors_in_one_line

if TYPE_CHECKING:
    from torch import nn

    from clouds.d2 import CfgNode

PARTS = {"sem_seg_head": "head"}
"""Names in the output of the model's parts; others keep theirs."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = new_parser("list-parameters", __doc__)
    parser.add_argument("--config-file", metavar="FILE", required=True, help="config of the model")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")
    args = parser.parse_intermixed_args(argv)
    args.opts = given_overrides(parser, args.opts)
    return args


def count(cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
    """Trainable parameters by part, of all parts the `total`, the number of `frozen` ones, and the
    optimizer's `groups`.
    """
    from clouds.engine.optimizer import parameter_groups

    trained: Counter[str] = Counter({"backbone": 0, "head": 0})
    frozen = 0
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        if parameter.requires_grad:
            trained[PARTS.get(part, part)] += parameter.numel()
        else:
            frozen += parameter.numel()
    groups = [
        {
            "name": group["name"],
            "lr": group["lr"],
            "weight_decay": group["weight_decay"],
            "tensors": len(group["params"]),
            "parameters": sum(p.numel() for p in group["params"]),
        }
        for group in parameter_groups(cfg, model)
    ]
    return {**trained, "total": sum(trained.values()), "frozen": frozen, "groups": groups}


def table(counts: dict[str, Any]) -> str:
    """The counts as text."""
    from tabulate import tabulate

    numbers = [(name, f"{n:,}") for name, n in counts.items() if name != "groups"]
    rows = [
        (g["name"], f"{g['lr']:g}", f"{g['weight_decay']:g}", g["tensors"], f"{g['parameters']:,}")
        for g in counts["groups"]
    ]
    headers = ("group", "lr", "weight decay", "tensors", "parameters")
    align = ("left", "right", "right", "right", "right")
    first = tabulate(numbers, ("trained in", "parameters"), colalign=("left", "right"))
    return f"{first}\n\n{tabulate(rows, headers, colalign=align, disable_numparse=True)}"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the counts."""
    args = parse(argv)
    with user_errors_in_one_line():
        import clouds.modeling  # noqa: F401 - registers what configs name
        from clouds.config import load_config
        from clouds.modeling.build import build_on_meta

        cfg = load_config(args.config_file, args.opts)
        counts = count(cfg, build_on_meta(cfg))
    print(json.dumps(counts, indent=1) if args.json else table(counts))
