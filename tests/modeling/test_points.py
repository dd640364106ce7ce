"""Sampling of points and of maps at points."""

from __future__ import annotations

import pytest
import torch

from clouds.modeling.points import (
    PointSampler,
    SampledPoints,
    _indices_of_smallest,
    gather_points,
    point_sample,
)


def test_point_sample_by_hand():
    """2 x 2 pixels: at their centers, between them, and half a pixel outside."""
    plane = torch.tensor([[[[0.0, 4.0], [8.0, 12.0]]]])
    points = torch.tensor([[[-0.5, -0.5], [0.5, -0.5], [0.0, 0.0], [-0.5, 0.0], [1.0, 0.5]]])
    assert point_sample(plane, points).tolist() == [[[0.0, 4.0, 6.0, 4.0, 6.0]]]
    assert point_sample(plane[:0], points[:0]).shape == (0, 1, 5)


def test_the_most_uncertain_candidates_are_selected():
    """Logits rise along x from -3.5 to 3.5 and are 0 in the middle."""
    plane = torch.arange(8).float().sub(3.5).expand(1, 1, 4, 8)
    x = torch.tensor([-0.8, -0.1, 0.8, 0.04, 0.4, 0.12, -0.4, -0.6])
    sampler = PointSampler(num_points=4, oversample_ratio=2.0, importance_sample_ratio=0.75)
    (sampled,) = sampler.sample(1, [1], [None], torch.device("cpu"))
    candidates = torch.stack((x, torch.zeros_like(x)), -1)[None, None]
    points = SampledPoints(sampled.matching, candidates, sampled.random)
    selected = sampler.select_uncertain(plane, points)
    assert selected.shape == (1, 4, 2)
    assert sorted(round(v, 2) for v in selected[0, :3, 0].tolist()) == [-0.1, 0.04, 0.12]
    assert torch.equal(selected[0, 3:], sampled.random[0, 0])


def test_number_and_range_of_sampled_points():
    sampler = PointSampler(num_points=10, oversample_ratio=2.5, importance_sample_ratio=0.75)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    images = sampler.sample(4, [2, 0, 1], generators, "cpu")
    for points, num_masks in zip(images, [2, 0, 1], strict=True):
        assert points.matching.shape == (4, 10, 2)
        assert points.candidates.shape == (4, num_masks, 25, 2)
        assert points.random.shape == (4, num_masks, 3, 2)  # 10 less 7 uncertain ones
        for p in (points.matching, points.candidates, points.random):
            assert p.numel() == 0 or (-1 <= p.min() < 0 < p.max() <= 1)
            assert len(p.unique()) == p.numel()


def test_points_are_on_the_given_device():
    sampler = PointSampler(num_points=4, oversample_ratio=2.0, importance_sample_ratio=0.75)
    (points,) = sampler.sample(2, [3], [None], torch.device("meta"))
    devices = {p.device.type for p in (points.matching, points.candidates, points.random)}
    assert devices == {"meta"}


def test_one_generator_for_each_image():
    sampler = PointSampler(num_points=4, oversample_ratio=2.0, importance_sample_ratio=0.75)
    with pytest.raises(ValueError, match="zip"):
        sampler.sample(1, [1, 1], [None], torch.device("cpu"))


@pytest.mark.parametrize(("num_weighted", "expected"), [(5, [0, 1, 2]), (2, [0, 1])])
def test_candidates_of_weight_0_are_selected_last(num_weighted, expected):
    """The candidates nearest to the outline are in the right half, where weights are 0.

    With only 2 candidates in the left half, a third one of weight 0 is selected.
    """
    plane = torch.arange(8).float().sub(5.5).expand(1, 1, 4, 8)
    x = torch.tensor([-0.2, -0.3, -0.4, -0.5, -0.6, 0.3, 0.4, 0.5])
    if num_weighted == 2:
        x[2:5] = torch.tensor([0.6, 0.7, 0.8])
    weights = torch.zeros(16, 32)
    weights[:, :16] = 0.25
    sampler = PointSampler(num_points=4, oversample_ratio=2.0, importance_sample_ratio=0.75)
    (sampled,) = sampler.sample(1, [1], [None], torch.device("cpu"))
    points = SampledPoints(
        sampled.matching, torch.stack((x, torch.zeros_like(x)), -1)[None, None], sampled.random
    )
    selected = sampler.select_uncertain(plane, points, weights)[0, :3, 0].tolist()
    assert set(x[expected].tolist()) <= set(selected)
    without = sampler.select_uncertain(plane, points)[0, :3, 0].tolist()
    assert not set(x[expected].tolist()) & set(without)


class LikeCuda(torch.Tensor):
    """A tensor on the CPU that the code takes for one on a GPU."""

    is_cuda, is_cpu = True, False


@pytest.mark.parametrize("kind", [torch.Tensor, LikeCuda])
@pytest.mark.parametrize("count", [0, 1, 5, 12])
def test_indices_of_the_smallest(count, kind):
    values = torch.randn(4, 12, generator=torch.Generator().manual_seed(count))
    values[1, 3:9] = 0.5  # ties
    values[2, :4] = torch.inf
    values[3, 2] = torch.nan
    indices = _indices_of_smallest(values.as_subclass(kind), count).as_subclass(torch.Tensor)
    smallest = values.gather(1, indices).sort(1).values
    torch.testing.assert_close(smallest, values.sort(1).values[:, :count], equal_nan=True)


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_gathered_points_are_those_of_grid_sample(padding):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, 5, 7, generator=generator, dtype=torch.float64)
    points = 3 * torch.rand(2, 40, 2, generator=generator, dtype=torch.float64) - 1.5
    points[0, 0] = torch.tensor([1.0, -1.0])  # a corner of the map
    gradient = torch.randn(2, 3, 40, generator=generator, dtype=torch.float64)
    results = []
    for sample in (point_sample, gather_points):
        leaf = maps.clone().requires_grad_()
        out = sample(leaf, points, padding)
        out.backward(gradient)
        results.append((out.detach(), leaf.grad))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
