"""The command `clouds`: finds the command that is named and runs it."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clouds.cli.command_line import escape_what_the_console_lacks, user_errors_in_one_line
from clouds.cli.table import COMMANDS

ENTRY_POINT_GROUP = "clouds.commands"
"""Commands of other packages: name = "module:function"; the function is a `main(argv)`."""

USAGE_ERROR = 2
OUTPUT_ERROR = 2
OUTPUT_CLOSED = 141
"""Exit status when the reader of the output has ended, as of programs that SIGPIPE ends."""

EXAMPLE = "clouds train --config-file warmup/gta_convnext_large"


def main(argv: Sequence[str] | None = None) -> Any:
    """Run a command; returns its exit status, None for 0.

    If the output is closed, as by `clouds list-config | head`, the status is 141; if it cannot be
    written, as on a full disk, one line says so and the status is 2.

    Args:
        argv: the name of a command and its arguments; None: those of the process.
    """
    escape_what_the_console_lacks()
    try:
        try:
            return run(argv)
        finally:
            sys.stdout.flush()  # here, and not when Python ends
    except OSError as error:
        if output_works():
            raise
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # for what is in the buffer
        if isinstance(error, BrokenPipeError):
            return OUTPUT_CLOSED
        sys.stderr.write(f"error: the output cannot be written: {error.strerror}\n")
        return OUTPUT_ERROR


def output_works() -> bool:
    """Whether more can be written to the output, tried with a line break."""
    try:
        sys.stdout.flush()
        os.write(sys.stdout.fileno(), b"\n")  # a write that fails leaves nothing to flush
    except OSError:
        return False
    return True


def run(argv: Sequence[str] | None = None) -> Any:
    """Run a command; see `main`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(overview())
        return 0 if words else USAGE_ERROR
    if words[0] == "--version":
        from clouds.version import __version__

        sys.stdout.write(f"clouds {__version__}\n")
        return 0
    with user_errors_in_one_line():
        command = find(words[0])
    before = sys.argv[0]
    try:
        sys.argv[0] = f"{typed_program()} {words[0]}"  # what argparse shows as the program
        return command(words[1:])
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
