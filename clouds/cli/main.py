"""The command `clouds`: finds the command that is named and runs it."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clouds.cli.command_line import user_errors_in_one_line
from clouds.cli.table import COMMANDS

ENTRY_POINT_GROUP = "clouds.commands"
"""Commands of other packages: name = "module:function"; the function is a `main(argv)`."""

USAGE_ERROR = 2
EXAMPLE = "clouds train --config-file warmup/gta_convnext_large"


def main(argv: Sequence[str] | None = None) -> Any:
    """Run a command; returns its exit status, None for 0.

    Args:
        argv: the name of a command and its arguments; None: those of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(overview())
        return 0 if words else USAGE_ERROR
    if words[0] == "--version":
        from clouds.version import __version__

        sys.stdout.write(f"clouds {__version__}\n")
        return 0
    with user_errors_in_one_line():
        run = find(words[0])
    before = sys.argv[0]
    try:
        sys.argv[0] = f"{typed_program()} {words[0]}"  # what argparse shows as the program
        return run(words[1:])
    finally:
        sys.argv[0] = before


def find(name: str) -> Callable[[Sequence[str]], Any]:
    """The `main` of a command of the library or of an installed package.

    Raises:
        ValueError: there is no such command.
        ImportError: the package of the command cannot be imported.
    """
    run: Callable[[Sequence[str]], Any]
    if name in COMMANDS:
        run = importlib.import_module(COMMANDS[name].module).main
        return run
    from clouds.plugins import load, names

    plugins = names(ENTRY_POINT_GROUP)
    if name not in plugins:
        known = [*COMMANDS, *plugins]
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}."
        raise ValueError(
            f"clouds has no command {name!r}; {hint} `clouds --help` describes them. A command of "
            "another package is there when that package is installed."
        )
    run = load(ENTRY_POINT_GROUP, name, "command")
    return run


def typed_program() -> str:
    """How the user started this program: `clouds`, or `python -m clouds`."""
    return "python -m clouds" if Path(sys.argv[0]).name == "__main__.py" else "clouds"


def overview() -> str:
    """The --help of `clouds`."""
    from clouds.plugins import distribution, names

    rows = [(name, command.summary) for name, command in COMMANDS.items()]
    group = ENTRY_POINT_GROUP
    rows += [(name, f"from {distribution(group, name)}") for name in names(group)]
    width = max(len(name) for name, _ in rows)
    program = typed_program()
    lines = [
        f"usage: {program} COMMAND [ARGUMENTS]",
        "",
        "CLOUDS: domain-generalized semantic segmentation.",
        "",
        "commands:",
        *(f"  {name:{width}}  {summary}" for name, summary in rows),
        "",
        f"`{program} COMMAND --help` describes a command, `{program} --version` is the version.",
        "",
        "example:",
        f"  {EXAMPLE}",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
