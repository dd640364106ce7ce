"""Class maps computed in stripes against resizing all scores at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clouds.modeling import postprocessing as module
from clouds.modeling.postprocessing import ClassMapBuilder, class_map


def resize(scores, size):
    return F.interpolate(scores.float()[None], size, mode="bilinear", align_corners=False)[0]


def set_stripe_elements(monkeypatch, elements):
    monkeypatch.setattr(module, "STRIPE_ELEMENTS", elements)
    monkeypatch.setattr(module, "CLASS_MAP_CACHE_ELEMENTS", elements)


@pytest.mark.parametrize(
    ("source", "size"),
    [
        ((16, 24), (16, 24)),
        ((16, 24), (67, 101)),
        ((64, 96), (25, 31)),
        ((40, 20), (40, 77)),
        ((40, 20), (133, 20)),
        ((50, 10), (11, 90)),
        ((1, 1), (5, 7)),
        ((2, 3), (1, 1)),
    ],
)
@pytest.mark.parametrize("rows", [1, 7, 10_000])
def test_against_resizing_all_at_once(monkeypatch, source, size, rows):
    scores = torch.randn(19, *source, generator=torch.Generator().manual_seed(rows))
    set_stripe_elements(monkeypatch, rows * 19 * max(size[1], source[1]))
    result = class_map(scores, size)
    expected = resize(scores, size)
    assert result.dtype == torch.uint8 and result.shape == size
    # where the classes differ, their scores differ by a rounding error
    at_result = expected.gather(0, result.long()[None])[0]
    assert (expected.amax(0) - at_result).max() < 1e-5
    assert (result != expected.argmax(0)).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_computed_in_float32(dtype):
    scores = torch.randn(5, 12, 17, generator=torch.Generator().manual_seed(0)).to(dtype)
    at_result = resize(scores, (30, 40)).gather(0, class_map(scores, (30, 40)).long()[None])[0]
    assert (resize(scores, (30, 40)).amax(0) - at_result).max() < 1e-5


def test_never_resizes_more_than_a_stripe(monkeypatch):
    sizes = []

    def interpolate(scores, *args, **kwargs):
        out = F.interpolate(scores, *args, **kwargs)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(module, "F", type("F", (), {"interpolate": staticmethod(interpolate)}))
    scores = torch.randn(19, 20, 30)
    set_stripe_elements(monkeypatch, 19 * 300 * 12)
    class_map(scores, (200, 300))
    assert max(sizes) == 19 * 300 * 12
    assert sum(sizes) == 19 * 300 * 200


@pytest.mark.parametrize("size", [(16, 24), (67, 101), (5, 24), (16, 31), (33, 24), (1, 1)])
@pytest.mark.parametrize("chunks", [[1] * 16, [5, 1, 10], [15, 1], [16]])
def test_rows_added_in_chunks(chunks, size):
    scores = torch.randn(19, 16, 24, generator=torch.Generator().manual_seed(1))
    builder = ClassMapBuilder((16, 24), size, torch.device("cpu"))
    for rows in scores.split(chunks, dim=1):
        # the builder keeps no reference to the rows
        chunk = rows.clone()
        builder.add(chunk)
        chunk.fill_(torch.nan)
    expected = resize(scores, size)
    at_result = expected.gather(0, builder.result.long()[None])[0]
    assert (expected.amax(0) - at_result).max() < 1e-5


def test_too_many_rows():
    builder = ClassMapBuilder((4, 5), (8, 5), torch.device("cpu"))
    builder.add(torch.zeros(3, 3, 5))
    with pytest.raises(AssertionError, match="6 rows of 4"):
        builder.add(torch.zeros(3, 3, 5))
