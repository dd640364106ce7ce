"""Fixtures of several files."""

from __future__ import annotations

import logging

import pytest
from ablation_files import ablation_file, fake_train  # noqa: F401
from reference_files import published, reference  # noqa: F401


@pytest.fixture(scope="module")
def tiny_sam():
    """The tiny SAM, with predicted IoUs that spread: each of its three masks is best somewhere."""
    from tiny_sam import build_tiny_sam

    return build_tiny_sam()


class EscapedRecord(logging.LogRecord):
    def getMessage(self) -> str:  # noqa: N802 - logging's name
        return super().getMessage().encode("utf-8", "backslashreplace").decode()


@pytest.fixture
def escaped_logs():
    """Names that are not UTF-8 are escaped in log records, since pytest-xdist cannot send them."""
    before = logging.getLogRecordFactory()
    logging.setLogRecordFactory(EscapedRecord)
    yield
    logging.setLogRecordFactory(before)
