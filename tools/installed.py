"""Import of the installed package, for the scripts of this folder."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

OWN_PACKAGES = ("clouds", "street_renderer")
REPOSITORY = Path(__file__).resolve().parents[1]
NOT_INSTALLED = 2


def import_module(name: str) -> ModuleType:
    """Import a module of this project; exits with one line if the project is not installed.

    As in `clouds`, characters that the console lacks are printed as escapes.
    """
    try:
        importlib.import_module("clouds.cli.command_line").escape_what_the_console_lacks()
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in OWN_PACKAGES:
            raise
        sys.stderr.write(
            f"error: {error}. Install the project first: pip install -e {REPOSITORY}\n"
        )
        raise SystemExit(NOT_INSTALLED) from error
