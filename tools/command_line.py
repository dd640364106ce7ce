"""Shared by the commands of this folder: types of flags, and input errors in one line.

It imports neither slow packages nor `clouds`, which may not be installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger("clouds.command_line")

USER_ERROR = 2
INTERRUPTED = 130
HERE = Path(__file__).resolve().parent
OWN_PACKAGES = ("clouds", "street_renderer")


def path(text: str) -> Path:
    """Type of flags that are files or folders: a leading `~` is the home directory."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # the home directory of an unknown user
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


def path_or_name(text: str) -> str:
    """Type of flags that are names on a hub or local folders: as `path` if it begins with `~`."""
    return str(path(text)) if text.startswith("~") else text


@contextmanager
def user_errors_in_one_line(*also: type[Exception], stopped: str | None = None) -> Iterator[None]:
    """Print an error that this project raises about its input, and exit with status 2.

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
    except (ValueError, KeyError, OSError, ImportError, *also) as error:
        if not raised_here(error):
            raise
        logger.debug("stopped by an error in the input", exc_info=True)
        sys.stderr.write(f"error: {message(error)}\n")
        raise SystemExit(USER_ERROR) from error


def raised_here(error: Exception) -> bool:
    """Whether an error was raised by this project, or by pathlib when this project called it."""
    modules = [frame.f_globals for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, OSError):
        while package(modules[-1]) == "pathlib":
            modules.pop()
    file = modules[-1].get("__file__")
    return package(modules[-1]) in OWN_PACKAGES or (
        file is not None and Path(file).resolve().parent == HERE
    )


def package(module: dict[str, object]) -> str:
    """Top-level package of the module with these globals."""
    return str(module.get("__name__")).split(".")[0]


def message(error: Exception) -> str:
    """Message of an error for the user."""
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, ModuleNotFoundError) and not all(
        map(importlib.util.find_spec, OWN_PACKAGES)
    ):
        return f"{error}. Install the project first: pip install -e {HERE.parent}"
    return str(error)


def refuse_late_flags(parser: argparse.ArgumentParser, overrides: list[str]) -> None:
    """Exit with a usage error if there is a flag among the KEY VALUE words."""
    flags = [word for word in overrides if word.startswith("--")]
    if flags:
        parser.error(f"{flags[0]} comes after KEY VALUE overrides; put all flags before them")
