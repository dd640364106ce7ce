#!/usr/bin/env python
"""Render demo datasets; see `street_renderer.make_demo_data`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from command_line import user_errors_in_one_line

with user_errors_in_one_line():
    from street_renderer import make_demo_data


def main(argv: Sequence[str] | None = None) -> int:
    """Render the datasets; returns the exit code."""
    with user_errors_in_one_line():
        return make_demo_data.main(argv)


if __name__ == "__main__":
    sys.exit(main())
