"""Shared by the commands: parsers, types of flags, overrides, and input errors in one line."""

from __future__ import annotations

import argparse
import io
import logging
import math
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path

from clouds.cli.table import COMMANDS

logger = logging.getLogger("clouds.command_line")

USER_ERROR = 2
USER_ERRORS: tuple[type[Exception], ...] = (ValueError, KeyError, OSError, ImportError)
INTERRUPTED = 130
SCRIPTS = Path(__file__).resolve().parents[2] / "tools"
"""Scripts of the checkout; their errors are errors of this project."""

STARTED_AS = ("clouds", "python -m clouds")


def new_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser for the command `name` whose --help ends with its examples."""
    examples = [f"  {line}" for line in COMMANDS[name].examples]
    return argparse.ArgumentParser(
        prog=Path(sys.argv[0]).name,
        description=description,
        epilog="\n".join(["examples:" if len(examples) > 1 else "example:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """Add --weights and --config-file, a checkpoint as `clouds.load` takes it."""
    parser.add_argument("--weights", type=path, required=True, metavar="FILE", help="checkpoint")
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        help="its config; needed for checkpoints that do not carry it: published, converted",
    )


def add_overrides(parser: argparse.ArgumentParser, example: str) -> None:
    """Add the KEY VALUE words, `opts`, after all flags; `given_overrides` checks them."""
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help=f"config overrides, after all flags: {example}",
    )


def given_overrides(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """The KEY VALUE words without a `--` before them; a flag among them is a usage error."""
    overrides = list(words[1:] if words[:1] == ["--"] else words)
    flags = [word for word in overrides if word.startswith("--")]
    if flags:
        parser.error(f"{flags[0]} comes after KEY VALUE overrides; put all flags before them")
    return overrides


def shown_command(argv: Sequence[str]) -> str:
    """The command line of this process with these arguments, for logs."""
    program, _, name = sys.argv[0].rpartition(" ")
    first = [*program.split(), name] if program in STARTED_AS else [sys.argv[0]]
    return shlex.join([*first, *argv])


def path(text: str) -> Path:
    """Type of flags that are files or folders: a leading `~` is the home directory."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # the home directory of an unknown user
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


def finite_number(text: str) -> float:
    """Type of flags that are numbers: not infinite, not nan."""
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is given; expected is a finite number")
    return number


def path_or_name(text: str) -> str:
    """Type of flags that are names on a hub or local folders: as `path` if it begins with `~`."""
    return str(path(text)) if text.startswith("~") else text


@contextmanager
def user_errors_in_one_line(*also: type[Exception], stopped: str | None = None) -> Iterator[None]:
    """Print an error that this project raises about its input, and exit with status 2.

    A closed output is none.

    Errors of other packages and of other types are not input errors and keep their traceback. The
    log file, if there is one, gets the traceback in both cases.

    Args:
        also: further types of errors that are due to the input, or to the machine.
        stopped: message at Ctrl+C, after which the exit status is 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        if stopped is None:
            raise
        sys.stderr.write(f"\n{stopped}\n")
        raise SystemExit(INTERRUPTED) from None
    except USER_ERRORS + also as error:
        if isinstance(error, BrokenPipeError) or not raised_here(error):
            raise
        logger.debug("stopped by an error in the input", exc_info=True)
        sys.stderr.write(f"error: {message(error)}\n")
        raise SystemExit(USER_ERROR) from error


def escape_what_the_console_lacks() -> None:
    """Let characters that the encoding of the terminal lacks be printed as escapes (u2026).

    Otherwise they, and names of files that are not UTF-8, would end the command.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def raised_here(error: Exception) -> bool:
    """Whether an error was raised by this project, or by pathlib when this project called it."""
    modules = [frame.f_globals for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, OSError):
        while package(modules[-1]) == "pathlib":
            modules.pop()
    file = modules[-1].get("__file__")
    return package(modules[-1]) in own_packages() or (
        file is not None and Path(file).resolve().parent == SCRIPTS
    )


def own_packages() -> set[str]:
    """Top-level names of the library and of the packages that extend it."""
    groups = ("clouds.commands", "clouds.generators", "clouds.prompt_readers")
    plugins = [entry for group in groups for entry in entry_points(group=group)]
    return {"clouds", *(entry.module.split(".")[0] for entry in plugins)}


def package(module: dict[str, object]) -> str:
    """Top-level package of the module with these globals."""
    return str(module.get("__name__")).split(".")[0]


def message(error: Exception) -> str:
    """Message of an error for the user."""
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
