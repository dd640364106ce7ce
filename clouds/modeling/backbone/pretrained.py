"""Whether backbones load pretrained weights when they are built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_skipped = ContextVar("pretrained weights are skipped", default=False)


@contextmanager
def skip_pretrained_weights() -> Iterator[None]:
    """Within it, backbones are built with random weights: the caller loads a checkpoint's."""
    token = _skipped.set(True)
    try:
        yield
    finally:
        _skipped.reset(token)


def pretrained_weights_are_skipped() -> bool:
    """Whether `skip_pretrained_weights` is active."""
    return _skipped.get()
