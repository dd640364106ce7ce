"""What the commands of this folder share: what is wrong with the input is told in one line.

Nothing heavy is imported here, and nothing of `clouds`, which may not be installed.
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


@contextmanager
def user_errors_in_one_line(*also: type[Exception], stopped: str | None = None) -> Iterator[None]:
    """Turn an error that this project raises about its input into a message and exit status 2.

    What other packages raise, and other kinds of error, are not input errors and pass with their
    traceback. The log, where there is one, gets the traceback in either case.

    Args:
        also: further kinds of error that tell of the input, or of the machine.
        stopped: what to say at Ctrl+C, which then leaves with status 130.
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
    """Whether this project raised an error, or asked pathlib for what the system refused."""
    modules = [frame.f_globals for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, OSError):
        while package(modules[-1]) == "pathlib":
            modules.pop()
    file = modules[-1].get("__file__")
    return package(modules[-1]) in OWN_PACKAGES or (
        file is not None and Path(file).resolve().parent == HERE
    )


def package(module: dict[str, object]) -> str:
    """The package of a module, given by its names."""
    return str(module.get("__name__")).split(".")[0]


def message(error: Exception) -> str:
    """What an error says to whoever typed the command."""
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
    """Leave with an error if there is a flag among the KEY VALUE words, which take all the rest."""
    flags = [word for word in overrides if word.startswith("--")]
    if flags:
        parser.error(f"{flags[0]} comes after KEY VALUE overrides; put all flags before them")
