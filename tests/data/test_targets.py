"""Class masks of a label map."""

from __future__ import annotations

import pytest
import torch

from clouds.data.structures import masks_from_label


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_masks_of_a_label(dtype):
    label = torch.tensor([[3, 3, 255], [0, 18, 3]], dtype=dtype)
    targets = masks_from_label(label)
    assert targets.labels.tolist() == [0, 3, 18]
    assert targets.labels.dtype == torch.int64
    assert targets.masks.dtype == torch.bool
    assert targets.masks.int().tolist() == [
        [[0, 0, 0], [1, 0, 0]],
        [[1, 1, 0], [0, 0, 1]],
        [[0, 0, 0], [0, 1, 0]],
    ]


def test_masks_of_an_ignored_label():
    targets = masks_from_label(torch.full((5, 7), 255, dtype=torch.uint8))
    assert targets.labels.shape == (0,)
    assert targets.labels.dtype == torch.int64
    assert targets.masks.shape == (0, 5, 7)
    assert targets.masks.dtype == torch.bool


def test_another_ignore_value():
    assert masks_from_label(torch.tensor([[0, 1]]), ignore=0).labels.tolist() == [1]
