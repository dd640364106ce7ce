"""Fixtures of several files."""

from reference_files import published, reference  # noqa: F401
