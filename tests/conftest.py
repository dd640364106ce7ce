"""Fixtures of several files."""

from __future__ import annotations

import pytest
from reference_files import published, reference  # noqa: F401


@pytest.fixture(scope="module")
def tiny_sam():
    """The tiny SAM, with predicted IoUs that spread: each of its three masks is best somewhere."""
    from tiny_sam import build_tiny_sam

    return build_tiny_sam()
