"""Check a prompt file: classes and topics it covers, near-duplicates, prompts too long for CLIP.

The classes are the 19 of Cityscapes, or those that --label-space or --descriptions names.

The exit code is 0; with --strict it is 1 if a class is named in too few prompts, or a prompt is
repeated, nearly repeated, too long, or names no class. It is 2 for a file that cannot be read.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from clouds.cli.command_line import finite_number, new_parser, path, user_errors_in_one_line
from clouds.cli.prompt_reader import add_class_options, label_space_of, prompt_reader

if TYPE_CHECKING:
    from clouds.cli.prompt_reader import PromptReader
    from clouds.generation.prompts import Prompt


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; returns the exit code."""
    args = parse(argv)
    with user_errors_in_one_line():
        from clouds.generation.prompts import read_prompts

        prompts = read_prompts(args.file)
        reader = prompt_reader(label_space_of(args))
    counts = reader.coverage(prompts)
    print(f"{args.file}: {len(prompts)} prompts\n")
    print(class_table(counts["class"], len(prompts)))
    for topic, values in counts.items():
        if topic != "class":
            frequencies = ", ".join(f"{value} {count}" for value, count in values.items())
            print(f"\n{topic}: {frequencies}", end="")
    print("\n")
    found = problems(prompts, reader, counts["class"], args)
    for line in found:
        print(line)
    if not found:
        print(
            f"No near-duplicate (similarity {args.similarity} or more), none too long for CLIP, "
            f"every class in at least {args.at_least}."
        )
    return int(args.strict and bool(found))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = new_parser("check-prompts", __doc__)
    parser.add_argument(
        "file",
        type=path,
        metavar="FILE",
        help="one prompt per line, or the name of prompts of the package",
    )
    add_class_options(parser)
    parser.add_argument("--strict", action="store_true", help="exit with 1 if there is a problem")
    parser.add_argument(
        "--similarity",
        type=finite_number,
        default=0.5,
        metavar="S",
        help="Jaccard index of words from which two prompts are near-duplicates (default: 0.5)",
    )
    parser.add_argument(
        "--at-least",
        type=int,
        default=1,
        metavar="K",
        help="minimum number of prompts that name each class (default: 1)",
    )
    args = parser.parse_args(argv)
    if not 0 < args.similarity <= 1:
        parser.error("--similarity must be above 0 and at most 1")
    if args.at_least < 0:
        parser.error("--at-least must not be negative")
    return args


def class_table(counts: Mapping[str, int], total: int) -> str:
    """Table of the number of prompts that name each class."""
    from tabulate import tabulate

    rows = [[name, count, f"{100 * count / total:.0f} %"] for name, count in counts.items()]
    return tabulate(rows, headers=["class", "prompts", "share"])


def problems(
    prompts: Sequence[Prompt],
    reader: PromptReader,
    classes: Mapping[str, int],
    args: argparse.Namespace,
) -> list[str]:
    """Problems of the prompts, one line each."""
    from clouds.generation.prompts import near_duplicates, over_long

    found = [
        f"class {name}: {count} of at least {args.at_least} prompts name it"
        for name, count in classes.items()
        if count < args.at_least
    ]
    for first, second, similarity in near_duplicates(prompts, args.similarity):
        one, other = prompts[first], prompts[second]
        how = "equal" if one == other else f"nearly equal ({similarity:.2f})"
        found.append(f"lines {one.line} and {other.line} are {how}:\n  {one}\n  {other}")
    found += over_long(prompts)
    found += [
        f"line {prompt.line} names no class: {prompt.text!r}"
        for prompt in prompts
        if not reader.named_classes(prompt)
    ]
    return found
