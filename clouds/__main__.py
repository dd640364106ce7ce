"""`python -m clouds` is the command `clouds`."""

from __future__ import annotations

import sys

from clouds.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
