"""Configs and prompts that come with the package, and their short names.

They are beside the modules in an installed package, and in the top folder of a checkout.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path, PurePath

from clouds.files import expand_user

_PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Resources:
    """Files of one kind.

    Attributes:
        folder: name of the folder.
        suffix: of its files, with the dot.
        other: a folder in it whose files are of another kind; empty: none.
    """

    folder: str
    suffix: str
    other: str = ""


CONFIGS = Resources("configs", ".yaml", other="ablations")
ABLATIONS = Resources("configs/ablations", ".yaml")
PROMPTS = Resources("prompts", ".txt")


def folder_of(kind: Resources) -> Path:
    """The folder of these files.

    Raises:
        FileNotFoundError: the installation does not have it.
    """
    installed, checkout = _PACKAGE / kind.folder, _PACKAGE.parent / kind.folder
    if installed.is_dir():
        return installed
    if checkout.is_dir() and (_PACKAGE.parent / "pyproject.toml").is_file():
        return checkout
    raise FileNotFoundError(
        f"this installation of CLOUDS has no {kind.folder}: neither {installed} nor {checkout} "
        "is its folder. Install CLOUDS again."
    )


def short_names(kind: Resources) -> list[str]:
    """Names of all files, such as 'warmup/gta_rn50', sorted."""
    top = folder_of(kind)
    files = [path.relative_to(top).with_suffix("") for path in top.rglob(f"*{kind.suffix}")]
    return sorted(path.as_posix() for path in files if path.parts[0] != kind.other)


def find(kind: Resources, name: str | Path) -> Path:
    """The file with this name: that path if it is a file, else the one that comes with the package.

    Args:
        name: a path relative to the working directory, or a short name, also with the suffix, and
            with the folder before it: 'warmup/gta_rn50', 'configs/warmup/gta_rn50.yaml'.

    Returns:
        The path of an existing file, or `name` as a path if there is neither.
    """
    path = expand_user(name)
    if path.is_file() or path.is_absolute():
        return path
    short = _shortened(kind, path)
    return folder_of(kind) / f"{short}{kind.suffix}" if short in short_names(kind) else path


def near_names(kind: Resources, name: str | Path) -> list[str]:
    """At most five short names that are similar to `name`, the most similar first."""
    names = short_names(kind)
    short = _shortened(kind, Path(name))
    close = difflib.get_close_matches(short, names, n=5)
    leaf = short.rpartition("/")[2]
    leaves = {known.rpartition("/")[2] for known in names}
    for similar in difflib.get_close_matches(leaf, leaves, n=5):
        close += [known for known in names if known.rpartition("/")[2] == similar]
    return list(dict.fromkeys(close))[:5]


def _shortened(kind: Resources, path: PurePath) -> str:
    text = path.as_posix().removesuffix(kind.suffix)
    return text.removeprefix(f"{kind.folder}/")
