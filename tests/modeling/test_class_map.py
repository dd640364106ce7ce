from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clouds.modeling import postprocessing as module
from clouds.modeling.postprocessing import ClassMapBuilder, class_map


def plain(scores, size):
    return F.interpolate(scores.float()[None], size, mode="bilinear", align_corners=False)[0]


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
def test_equals_resizing_all_at_once(source, size, rows):
    scores = torch.randn(19, *source, generator=torch.Generator().manual_seed(rows))
    result = class_map(scores, size, stripe_elements=rows * 19 * max(size[1], source[1]))
    expected = plain(scores, size)
    assert result.dtype == torch.uint8 and result.shape == size
    # where the classes differ at all, the two best scores are a rounding error apart
    chosen = expected.gather(0, result.long()[None])[0]
    assert (expected.amax(0) - chosen).max() < 1e-5
    assert (result != expected.argmax(0)).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_computed_in_float32(dtype):
    scores = torch.randn(5, 12, 17, generator=torch.Generator().manual_seed(0)).to(dtype)
    chosen = plain(scores, (30, 40)).gather(0, class_map(scores, (30, 40)).long()[None])[0]
    assert (plain(scores, (30, 40)).amax(0) - chosen).max() < 1e-5


def test_never_holds_more_than_a_stripe(monkeypatch):
    held = []

    def watched(scores, *args, **kwargs):
        out = F.interpolate(scores, *args, **kwargs)
        held.append(out.numel())
        return out

    monkeypatch.setattr(module, "F", type("F", (), {"interpolate": staticmethod(watched)}))
    scores = torch.randn(19, 20, 30)
    class_map(scores, (200, 300), stripe_elements=19 * 300 * 12)
    assert max(held) == 19 * 300 * 12
    assert sum(held) == 19 * 300 * 200


@pytest.mark.parametrize("size", [(16, 24), (67, 101), (5, 24), (16, 31), (33, 24), (1, 1)])
@pytest.mark.parametrize("portions", [[1] * 16, [5, 1, 10], [15, 1], [16]])
def test_rows_may_come_in_portions(portions, size):
    scores = torch.randn(19, 16, 24, generator=torch.Generator().manual_seed(1))
    builder = ClassMapBuilder((16, 24), size, torch.device("cpu"))
    for rows in scores.split(portions, dim=1):
        # what was given may be written over afterwards
        given = rows.clone()
        builder.add(given)
        given.fill_(torch.nan)
    expected = plain(scores, size)
    chosen = expected.gather(0, builder.result.long()[None])[0]
    assert (expected.amax(0) - chosen).max() < 1e-5


def test_more_rows_than_there_are():
    builder = ClassMapBuilder((4, 5), (8, 5), torch.device("cpu"))
    builder.add(torch.zeros(3, 3, 5))
    with pytest.raises(AssertionError, match="6 rows of 4"):
        builder.add(torch.zeros(3, 3, 5))
