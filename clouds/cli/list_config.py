"""Print the config keys: default, meaning, allowed values.

With --config-file and overrides, the value of each key in that config is shown as well, and whether
it differs from the default.
"""

from __future__ import annotations

import argparse
import difflib
import shutil
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from clouds.cli.command_line import given_overrides, new_parser, user_errors_in_one_line

if TYPE_CHECKING:
    from clouds.config import Key
    from clouds.d2 import CfgNode

HEADERS = ("key", "default", "allowed", "meaning")
DIFFERS = "differs from the default"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = new_parser("list-config", __doc__)
    parser.add_argument("--config-file", metavar="FILE", help="show the values of this config")
    parser.add_argument("--markdown", action="store_true", help="as a Markdown table")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="PATTERN | KEY VALUE",
        help="only keys that contain PATTERN, ignoring case; after it, with --config-file, "
        "overrides of the config",
    )
    args = parser.parse_intermixed_args(argv)
    words = given_overrides(parser, args.words)
    has_pattern = len(words) % 2 == 1
    args.pattern = words[0] if has_pattern else ""
    args.opts = words[has_pattern:]
    if args.opts and args.config_file is None:
        parser.error(
            f"the overrides {' '.join(args.opts)} need a config: give --config-file, or one "
            "PATTERN alone"
        )
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Print the keys."""
    args = parse(argv)
    with user_errors_in_one_line():
        keys = matching(args.pattern)
        cfg = None
        if args.config_file is not None:
            from clouds.config import load_config

            cfg = load_config(args.config_file, args.opts)
    if args.markdown:
        print(markdown(keys, cfg))
        return
    width = max(shutil.get_terminal_size().columns, 40)
    for key in keys:
        print("\n".join(description(key, cfg, width)))


def matching(pattern: str) -> list[Key]:
    """The keys whose name contains `pattern`, ignoring case.

    Raises:
        ValueError: there is none; the message has similar names.
    """
    from clouds.config import KEYS
    from clouds.config.load import nearest

    found = [key for key in KEYS if pattern.lower() in key.name.lower()]
    if not found:
        leaves = {key.name.rpartition(".")[2]: key.name for key in KEYS}
        similar = difflib.get_close_matches(pattern.upper(), leaves, n=3, cutoff=0.5)
        close = nearest(pattern) or [leaves[leaf] for leaf in similar]
        hint = f"similar keys: {', '.join(close)}" if close else "no key is similar"
        raise ValueError(
            f"no config key contains {pattern!r}; {hint}. Without a pattern all keys are printed."
        )
    return found


def allowed_values(key: Key) -> str:
    """The rule of a key, or the type of its values."""
    from clouds.config.values import expected

    return key.rule.description or expected(key)


def value_in(cfg: CfgNode, key: Key) -> tuple[object, bool]:
    """The value of a key in a config, and whether it differs from the default."""
    from clouds.config.config import get_value

    value = get_value(cfg, key.name)
    return value, value != key.default


def description(key: Key, cfg: CfgNode | None, width: int) -> list[str]:
    """The lines about a key."""
    lines = [key.name]
    if cfg is not None:
        value, differs = value_in(cfg, key)
        lines.append(f"    value: {value!r}" + (f"    {DIFFERS}" if differs else ""))
    lines.append(f"    default: {key.default!r}    allowed: {allowed_values(key)}")
    lines.append(textwrap.fill(key.doc, width, initial_indent="    ", subsequent_indent="    "))
    return lines


def markdown(keys: Sequence[Key], cfg: CfgNode | None) -> str:
    """The keys as a Markdown table; values that differ from the default are bold."""
    from tabulate import tabulate

    rows = []
    for key in keys:
        row = [f"`{key.name}`", f"`{key.default!r}`", allowed_values(key), key.doc]
        if cfg is not None:
            value, differs = value_in(cfg, key)
            row.insert(1, f"**`{value!r}`**" if differs else f"`{value!r}`")
        rows.append([cell.replace("|", "\\|") for cell in row])
    headers = HEADERS if cfg is None else (HEADERS[0], "value", *HEADERS[1:])
    return tabulate(rows, headers, "github")
