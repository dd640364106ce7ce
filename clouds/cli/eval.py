"""Evaluate a checkpoint on the test datasets of a config, as `clouds train --eval-only`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from clouds.cli import train


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate; the flags are those of `clouds train`."""
    train.run_command("eval", sys.argv[1:] if argv is None else argv)
