#!/usr/bin/env python
"""The command `clouds make-demo-data` as a script."""

from __future__ import annotations

import sys

from installed import import_module

main = import_module("street_renderer.make_demo_data").main

if __name__ == "__main__":
    sys.exit(main())
