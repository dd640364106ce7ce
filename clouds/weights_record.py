"""Weights that come with installed packages, and records of how weights files were made.

A package offers its weights under a name, by an entry point of the group `clouds.weights` whose
object is the path of the file. Beside a file `NAME.safetensors` may be a record,
`NAME.record.json`, with the SHA-256 of the file and the command that makes it; a file that has one
must match it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clouds import plugins
from clouds.files import file_sha256

GROUP = "clouds.weights"


@dataclass(frozen=True)
class WeightsRecord:
    """How a weights file was made.

    Attributes:
        sha256: of the file, in hexadecimal.
        command: makes it.
        details: the whole record: seed, scores, ….
    """

    sha256: str
    command: str
    details: dict[str, Any]


def record_file(weights: Path) -> Path:
    """Where the record of a weights file is."""
    return weights.with_name(weights.stem + ".record.json")


def read_record(weights: Path) -> WeightsRecord | None:
    """The record of a weights file; None: it has none.

    Raises:
        ValueError: the record is not one.
    """
    file = record_file(weights)
    if not file.is_file():
        return None
    try:
        details = json.loads(file.read_text(encoding="utf-8"))
        record = WeightsRecord(details["sha256"], details["command"], details)
        if not isinstance(record.sha256, str) or not isinstance(record.command, str):
            raise TypeError
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{file} is not a record of weights: a JSON object with the texts "
            "sha256 and command is expected. Restore it from the repository."
        ) from error
    return record


def check_record(weights: Path) -> None:
    """Check a weights file against its record; one without a record passes.

    Raises:
        FileNotFoundError: the record is there, the file is not.
        ValueError: the file has other bytes than the record says, or the record is not one.
    """
    record = read_record(weights)
    if record is None:
        return
    remedy = (
        f"Restore it from the repository, or make it again: {record.command} (and delete "
        f"{record_file(weights).name}: another machine rounds otherwise)"
    )
    if not weights.is_file():
        raise FileNotFoundError(
            f"the weights {weights} are missing (SHA-256 {record.sha256}). {remedy}"
        )
    if (found := file_sha256(weights)) != record.sha256:
        raise ValueError(
            f"the weights {weights} are not those of {record_file(weights).name}: SHA-256 is "
            f"{found}, recorded is {record.sha256}. {remedy}"
        )


def find_weights(name: str) -> Path | None:
    """The checked file of weights: a path, or a name that an installed package offers.

    Returns:
        None: `name` is neither.

    Raises:
        FileNotFoundError: the file is missing, though it is recorded or a package offers it.
        ValueError: the file does not match its record.
        ImportError: the package that offers the name cannot be imported.
    """
    path = Path(name)
    if not path.is_file() and name in plugins.names(GROUP):
        path = Path(plugins.load(GROUP, name, "weights"))
        if not path.is_file() and not record_file(path).is_file():
            raise FileNotFoundError(
                f"the weights {name!r} of {plugins.distribution(GROUP, name)} are missing: {path}. "
                "Install it again from its repository."
            )
    check_record(path)
    return path if path.is_file() else None
