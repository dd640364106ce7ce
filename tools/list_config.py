"""Print every configuration key: default, meaning, allowed values."""

from __future__ import annotations

import argparse
import shutil
import textwrap

from command_line import user_errors_in_one_line

# Slow imports are inside the functions, so that --help and usage errors are fast.

HEADERS = ("key", "default", "allowed", "meaning")


def rows(pattern: str) -> list[tuple[str, str, str, str]]:
    """One row per key whose name contains `pattern`, ignoring case."""
    from clouds.config import KEYS
    from clouds.config.values import expected

    return [
        (key.name, repr(key.default), key.rule.description or expected(key), key.doc)
        for key in KEYS
        if pattern.lower() in key.name.lower()
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pattern", nargs="?", default="", help="only keys that contain this text")
    parser.add_argument("--markdown", action="store_true", help="as a Markdown table")
    args = parser.parse_args()
    with user_errors_in_one_line():
        table = rows(args.pattern)
    if args.markdown:
        from tabulate import tabulate

        table = [(f"`{name}`", f"`{default}`", *rest) for name, default, *rest in table]
        print(tabulate([[c.replace("|", "\\|") for c in r] for r in table], HEADERS, "github"))
        return
    width = shutil.get_terminal_size().columns
    for name, default, allowed, doc in table:
        print(f"{name}\n    default: {default}    allowed: {allowed}")
        print(textwrap.fill(doc, max(width, 40), initial_indent="    ", subsequent_indent="    "))


if __name__ == "__main__":
    main()
