from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers_weights import mask2former, randomize

from clouds.modeling.pixel_decoder.deformable_attention import MSDeformAttn, deformable_attention
from clouds.modeling.pixel_decoder.encoder import reference_points

SIZES = [(2, 3), (4, 5), (7, 9)]
AREA = sum(h * w for h, w in SIZES)


def inputs(n=2, queries=6, heads=3, channels=4, points=2, dtype=torch.float32, seed=0):
    """Values, places (some outside of the maps) and weights."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n, queries, heads, len(SIZES), points)
    value = torch.randn(n, AREA, heads, channels, generator=generator, dtype=dtype)
    locations = 1.4 * torch.rand(*shape, 2, generator=generator, dtype=dtype) - 0.2
    weights = torch.rand(*shape, generator=generator, dtype=dtype)
    return value, locations, weights


def bilinear(plane, x, y):
    """`plane` (H, W) at x, y in pixels, pixel centers at integers, zero outside."""
    height, width = plane.shape
    left, top = math.floor(x), math.floor(y)
    total = 0.0
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < height and 0 <= column < width:
                share = (1 - abs(x - column)) * (1 - abs(y - row))
                total += share * plane[row, column]
    return total


def brute_force(value, sizes, locations, weights):
    n, _, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    out = np.zeros((n, queries, heads, channels))
    start = 0
    for level, (h, w) in enumerate(sizes):
        maps = value[:, start : start + h * w].reshape(n, h, w, heads, channels)
        start += h * w
        for index in np.ndindex(n, queries, heads, points, channels):
            i, q, m, p, c = index
            x, y = locations[i, q, m, level, p] * (w, h) - 0.5
            out[i, q, m, c] += weights[i, q, m, level, p] * bilinear(maps[i, :, :, m, c], x, y)
    return out.reshape(n, queries, heads * channels)


def test_against_brute_force():
    value, locations, weights = inputs()
    outside = ((locations < 0) | (locations > 1)).float().mean()
    assert 0.2 < outside < 0.8
    out = deformable_attention(value, SIZES, locations, weights)
    value, locations, weights = (t.double().numpy() for t in (value, locations, weights))
    expected = brute_force(value, SIZES, locations, weights)
    assert out.shape == (2, 6, 12)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_against_transformers():
    value, locations, weights = inputs(queries=50, heads=8, channels=16, points=4)
    theirs = mask2former().multi_scale_deformable_attention(value, SIZES, locations, weights)
    ours = deformable_attention(value, SIZES, locations, weights)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_gradients_against_finite_differences():
    value, locations, weights = inputs(n=1, queries=2, heads=2, channels=2, dtype=torch.float64)
    # Away from pixel centers, where the derivative by the place jumps.
    scale = torch.tensor([[w, h] for h, w in SIZES], dtype=torch.float64)[:, None]
    pixels = locations * scale - 0.5
    pixels = pixels.floor() + 0.2 + 0.6 * (pixels - pixels.floor())
    locations = (pixels + 0.5) / scale
    leaves = tuple(t.requires_grad_() for t in (value, locations, weights))
    assert torch.autograd.gradcheck(lambda v, p, w: deformable_attention(v, SIZES, p, w), leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values_are_read_at_exact_places(dtype):
    """Columns of +1 and -1: a place that is off by a quarter of a pixel reads 0.5."""
    width = 256
    value = torch.tensor([1.0, -1.0]).repeat(width // 2).view(1, width, 1, 1)
    centers = (torch.arange(width) + 0.5) / width
    locations = torch.stack((centers, torch.full((width,), 0.5)), -1).view(1, width, 1, 1, 1, 2)
    weights = torch.ones(1, width, 1, 1, 1, dtype=dtype)
    out = deformable_attention(value.to(dtype), [(1, width)], locations, weights)
    torch.testing.assert_close(out.float(), value[..., 0], rtol=0, atol=0.01)


def test_module_against_transformers():
    mha = mask2former().Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention
    ours = randomize(MSDeformAttn(channels=32, levels=3, heads=4, points=2))
    theirs = mha(embed_dim=32, num_heads=4, n_levels=3, n_points=2)
    theirs.load_state_dict(ours.state_dict())
    query, value = torch.randn(2, 2, AREA, 32, generator=torch.Generator().manual_seed(1))
    reference = reference_points(SIZES, torch.device("cpu"))
    expected, _ = theirs(
        query,
        encoder_hidden_states=value,
        reference_points=reference[None, :, None].expand(2, -1, 3, -1),
        spatial_shapes_list=SIZES,
    )
    got = ours(query[:], reference, value, SIZES)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_under_autocast_a_place_is_as_exact_as_without():
    module = randomize(MSDeformAttn(channels=32, levels=3, heads=4, points=2))
    query, value = torch.randn(2, 1, AREA, 32, generator=torch.Generator().manual_seed(1))
    reference = reference_points(SIZES, torch.device("cpu"))
    exact = module(query, reference, value, SIZES)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = module(query, reference, value, SIZES)
    assert rounded.isfinite().all()
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()


def test_initial_offsets_by_hand():
    """Head h looks into direction h / 8 of a turn, as far as a square reaches, k pixels on."""
    module = MSDeformAttn(channels=64, levels=2, heads=8, points=3)
    offsets = module.sampling_offsets.bias.detach().view(8, 2, 3, 2)
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for head, (x, y) in enumerate(directions):
        for level in range(2):
            for k in range(3):
                found = offsets[head, level, k].tolist()
                assert found == pytest.approx([x * (k + 1), y * (k + 1)], abs=1e-5)
    assert not module.sampling_offsets.weight.any()
    assert not module.attention_weights.weight.any()


def test_reference_points_by_hand():
    points = reference_points([(1, 2), (2, 1)], torch.device("cpu"))
    assert points.tolist() == [[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75]]
