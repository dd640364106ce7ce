#!/usr/bin/env python
"""Run the demo; see `street_renderer.demo`."""

from __future__ import annotations

from pathlib import Path

from command_line import user_errors_in_one_line

with user_errors_in_one_line():
    from street_renderer import demo

if __name__ == "__main__":
    demo.main(tools=Path(__file__).resolve().parent)
