#!/usr/bin/env python
"""The command `clouds export` as a script."""

from __future__ import annotations

import sys

from installed import import_module

main = import_module("clouds.cli.export").main

if __name__ == "__main__":
    sys.exit(main())
