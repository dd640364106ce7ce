"""Which side of the seam is in use: the installed Detectron2 or the embedded nouns."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping

from clouds.version import __version__

VARIABLE = "CLOUDS_D2"
ALLOWED = ("auto", "detectron2", "embedded")
INSTALL = "pip install git+https://github.com/facebookresearch/detectron2"


def choose(environment: Mapping[str, str]) -> str:
    """The side that `environment` asks for, "detectron2" or "embedded".

    An installed Detectron2 that fails to import is an error, also with `auto`: results must not
    depend on a silent switch.

    Raises:
        ValueError: CLOUDS_D2 is none of the allowed values.
        ModuleNotFoundError: CLOUDS_D2 is `detectron2` and there is none.
        ImportError: Detectron2 is there and cannot be imported.
    """
    wanted = environment.get(VARIABLE) or "auto"
    if wanted not in ALLOWED:
        raise ValueError(f"{VARIABLE}={wanted!r} is not allowed; use one of {', '.join(ALLOWED)}.")
    if wanted == "embedded":
        return "embedded"
    try:
        importlib.import_module("detectron2")
    except ModuleNotFoundError as error:
        if error.name != "detectron2":
            raise ImportError(broken(error)) from error
        if wanted == "auto":
            return "embedded"
        raise ModuleNotFoundError(
            f"{VARIABLE}=detectron2, but Detectron2 is not installed. Install it ({INSTALL}), "
            f"or set {VARIABLE}=embedded.",
            name="detectron2",
        ) from error
    except ImportError as error:
        raise ImportError(broken(error)) from error
    return "detectron2"


def broken(error: ImportError) -> str:
    """Message for a Detectron2 that is installed but fails to import with `error`."""
    return (
        f"Detectron2 is installed but cannot be imported: {error}. Repair it ({INSTALL}), "
        f"or set {VARIABLE}=embedded to work without it."
    )


BACKEND = choose(os.environ)
"""Side in use in this process, "detectron2" or "embedded"."""


def backend_version() -> str:
    """Version of Detectron2 when that is in use, else of CLOUDS, which the nouns are part of."""
    if BACKEND == "detectron2":
        return str(importlib.import_module("detectron2").__version__)
    return __version__
