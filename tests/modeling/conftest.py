"""Fixtures of several files."""

from __future__ import annotations

import pytest

from clouds.modeling import criterion
from clouds.modeling.matcher import match


@pytest.fixture
def recorded_matches(monkeypatch):
    """The matches of each call of the criterion: per prediction (the last first), per image."""
    matches = []

    def record(*args):
        result = match(*args)
        matches.extend(result)
        return result

    monkeypatch.setattr(criterion, "match", record)
    return matches
