"""`in_cache`: the function of the whole batch, on a CPU one item at a time."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from clouds.ops.in_cache import in_cache


def recorded(sizes):
    def function(x, y):
        sizes.append((len(x), len(y)))
        return F.conv2d(x, torch.full((1, 2, 3, 3), 0.5), padding=1) * y[:, None]

    return function


@pytest.mark.parametrize("count", [1, 5])
def test_inference_takes_one_item_at_a_time(count):
    x, y = torch.rand(count, 2, 6, 7), torch.rand(count, 1, 7)
    sizes = []
    expected = recorded([])(x, y)
    with torch.no_grad():
        torch.testing.assert_close(in_cache(recorded(sizes), x, y), expected)
    assert sizes == count * [(1, 1)]


def test_training_takes_the_batch():
    x, y = torch.rand(3, 2, 4, 4, requires_grad=True), torch.rand(3, 1, 4)
    sizes = []
    in_cache(recorded(sizes), x, y).sum().backward()
    assert sizes == [(3, 3)]
    assert x.grad is not None


def test_batches_of_different_lengths_are_refused():
    with torch.no_grad(), pytest.raises(ValueError, match="shorter"):
        in_cache(recorded([]), torch.rand(3, 2, 4, 4), torch.rand(2, 1, 4))
