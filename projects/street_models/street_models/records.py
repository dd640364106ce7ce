"""Records of the weights in `weights/`, see `clouds.weights_record`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from street_renderer.pretraining_style import PRETRAINING_STYLE
from street_renderer.renderer import RENDERER_VERSION

from clouds.files import atomic_write, file_sha256
from clouds.weights_record import record_file


def write_record(weights: Path, command: str, evaluation: Mapping[str, object]) -> None:
    """Write the record of a weights file.

    Args:
        command: makes the weights.
        evaluation: what was measured, and how.
    """
    record = {
        "sha256": file_sha256(weights),
        "command": command,
        "renderer": RENDERER_VERSION,
        "scenes": PRETRAINING_STYLE,
        "evaluation": evaluation,
    }
    with atomic_write(record_file(weights)) as file:
        file.write((json.dumps(record, indent=2) + "\n").encode())


@contextmanager
def without_record(weights: Path) -> Iterator[None]:
    """Remove the record of weights that get a new one, since they need not match the old one.

    An error within the context restores it.
    """
    file = record_file(weights)
    before = file.read_bytes() if file.is_file() else None
    file.unlink(missing_ok=True)
    try:
        yield
    except BaseException:
        if before is not None:
            with atomic_write(file) as stream:
                stream.write(before)
        raise
