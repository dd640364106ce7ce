"""Resized patch kernels and position embeddings, by hand and against timm."""

from __future__ import annotations

import pytest
import torch
from timm.layers import resample_abs_pos_embed

from clouds.modeling.backbone.vit_resize import (
    _resize_by_matrices,
    grid_of,
    resize_kernel,
    resize_positions,
)


def table(rows, columns, prefix=1, channels=3):
    shape = (1, prefix + rows * columns, channels)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def keys_cubic(x, a=-0.75):
    """The weight of a pixel at distance x in bicubic interpolation."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def resampled(values, size, scale):
    """One row of pixels, resampled bicubically at (i + 0.5) / scale - 0.5."""
    result = []
    for i in range(size):
        at = (i + 0.5) / scale - 0.5
        first = int(at // 1) - 1
        pairs = ((values[min(max(j, 0), len(values) - 1)], j) for j in range(first, first + 4))
        result.append(sum(v * keys_cubic(at - j) for v, j in pairs))
    return result


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(("method", "offset"), [("bicubic", 0.0), ("dinov2", 0.1)])
def test_positions_are_resampled_bicubically(method, offset, prefix):
    positions = table(4, 4, prefix)
    result = resize_positions(positions, (4, 4), (4, 6), method)
    assert torch.equal(result[:, :prefix], positions[:, :prefix])
    grid = positions[0, prefix:].view(4, 4, 3)
    for channel in range(3):
        # rows by the factor (4 + offset) / 4, columns by (6 + offset) / 4
        rows = [resampled(grid[:, c, channel].tolist(), 4, (4 + offset) / 4) for c in range(4)]
        for r in range(4):
            expected = resampled([column[r] for column in rows], 6, (6 + offset) / 4)
            found = result[0, prefix:].view(4, 6, 3)[r, :, channel].tolist()
            assert found == pytest.approx(expected, abs=1e-5)


def test_timms_way():
    positions = table(6, 6)
    expected = resample_abs_pos_embed(positions, [3, 4], [6, 6], 1)
    assert torch.equal(resize_positions(positions, (6, 6), (3, 4), "timm"), expected)
    ours = resize_positions(positions, (6, 6), (3, 4), "bicubic")
    assert (ours - expected).abs().max() > 0.1


def test_bilinear():
    positions = torch.tensor([9.0, 0.0, 2.0, 4.0, 6.0]).view(1, 5, 1)
    result = resize_positions(positions, (2, 2), (1, 1), "bilinear")
    assert result.flatten().tolist() == [9.0, 3.0]  # the mean of the four


@pytest.mark.parametrize("method", ["bicubic", "bilinear", "timm", "dinov2"])
def test_the_same_size_is_left_as_it_is(method):
    positions = table(4, 4)
    assert resize_positions(positions, (4, 4), (4, 4), method) is positions


def test_gradients_reach_the_table():
    positions = table(4, 4).requires_grad_()
    resize_positions(positions, (4, 4), (6, 8), "dinov2").sum().backward()
    assert (positions.grad.abs().sum(-1) > 0).all()


def test_a_kernel_keeps_its_outputs_on_a_plain_image():
    kernel = torch.full((1, 3, 14, 14), 0.25)
    resized = resize_kernel(kernel, 16)
    torch.testing.assert_close(resized, torch.full((1, 3, 16, 16), 0.25))
    assert resize_kernel(kernel, 14) is kernel


def test_grids_of_tables():
    assert grid_of(torch.zeros(1, 1370, 8)) == (1, 37)
    assert grid_of(torch.zeros(1, 1369, 8)) == (0, 37)
    assert grid_of(torch.zeros(1, 1374, 8)) == (5, 37)
    with pytest.raises(ValueError, match="48 tokens"):
        grid_of(torch.zeros(1, 48, 8))


@pytest.mark.parametrize("method", ["bicubic", "bilinear", "timm", "dinov2"])
@pytest.mark.parametrize("size", [(5, 5), (7, 9), (3, 4), (11, 2), (5, 8)])
def test_matrices_of_exported_graphs_compute_the_same(method, size):
    positions = table(5, 5)
    expected = resize_positions(positions, (5, 5), size, method)[0, 1:]
    found = _resize_by_matrices(positions[0, 1:].unflatten(0, (5, 5)), size, method)
    assert found.shape == (*size, 3)
    assert torch.allclose(found.flatten(0, 1), expected, atol=1e-5)
