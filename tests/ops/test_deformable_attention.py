"""Deformable attention, its kernel for CPUs and the module, against other implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers_weights import mask2former, randomize

from clouds.config import get_cfg
from clouds.d2 import ShapeSpec
from clouds.modeling.meta_arch.clouds import CLOUDSHead
from clouds.modeling.pixel_decoder.msdeformattn import MSDeformAttn, pixel_centers
from clouds.ops import deformable_attention as module
from clouds.ops import deformable_attention_cpu as cpu
from clouds.ops.deformable_attention import (
    choose_implementation,
    deformable_attention,
    deformable_attention_torch,
)

SIZES = [(2, 3), (4, 5), (7, 9)]
AREA = sum(h * w for h, w in SIZES)
IMPLEMENTATIONS = (deformable_attention, deformable_attention_torch)


def inputs(n=2, queries=6, heads=3, channels=4, points=2, dtype=torch.float32, seed=0):
    """Values, sampling locations (some outside of the maps) and attention weights."""
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
                weight = (1 - abs(x - column)) * (1 - abs(y - row))
                total += weight * plane[row, column]
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


@pytest.mark.parametrize("attend", IMPLEMENTATIONS)
def test_against_brute_force(attend):
    value, locations, weights = inputs()
    outside = ((locations < 0) | (locations > 1)).float().mean()
    assert 0.2 < outside < 0.8
    out = attend(value, SIZES, locations, weights)
    value, locations, weights = (t.double().numpy() for t in (value, locations, weights))
    expected = brute_force(value, SIZES, locations, weights)
    assert out.shape == (2, 6, 12)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attend", IMPLEMENTATIONS)
def test_against_transformers(attend):
    value, locations, weights = inputs(queries=50, heads=8, channels=16, points=4)
    theirs = mask2former().multi_scale_deformable_attention(value, SIZES, locations, weights)
    ours = attend(value, SIZES, locations, weights)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_gradients_against_finite_differences():
    value, locations, weights = inputs(n=1, queries=2, heads=2, channels=2, dtype=torch.float64)
    # Away from pixel centers, where the derivative by the location is not continuous.
    scale = torch.tensor([[w, h] for h, w in SIZES], dtype=torch.float64)[:, None]
    pixels = locations * scale - 0.5
    pixels = pixels.floor() + 0.2 + 0.6 * (pixels - pixels.floor())
    locations = (pixels + 0.5) / scale
    leaves = tuple(t.requires_grad_() for t in (value, locations, weights))
    assert torch.autograd.gradcheck(lambda v, x, w: deformable_attention(v, SIZES, x, w), leaves)


def with_gradients(attend, sizes, tensors, gradient):
    """Output and gradients of values, locations and weights."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = attend(leaves[0], sizes, *leaves[1:])
    out.backward(gradient.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("sizes", [SIZES, SIZES[::-1], [(1, 1)], [(3, 1), (1, 6)]])
@pytest.mark.parametrize(("reach", "per_block"), [(1.0, 1024), (1.4, 4), (30.0, 3)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_cpu_kernel_against_the_plain_form(sizes, reach, per_block, dtype, tolerance, monkeypatch):
    """Against autograd through grid_sample in float64, which shares no code with the kernel."""
    monkeypatch.setattr(cpu, "QUERIES_PER_BLOCK", per_block)
    generator = torch.Generator().manual_seed(1)
    shape = (2, 10, 3, len(sizes), 2)
    area = sum(h * w for h, w in sizes)
    value = torch.randn(2, area, 3, 5, generator=generator, dtype=torch.float64)
    locations = 0.5 + reach * (
        torch.rand(*shape, 2, generator=generator, dtype=torch.float64) - 0.5
    )
    weights = torch.rand(shape, generator=generator, dtype=torch.float64)
    gradient = torch.randn(2, 10, 15, generator=generator, dtype=torch.float64)
    tensors = value, locations, weights
    expected = with_gradients(deformable_attention_torch, sizes, tensors, gradient)
    got = with_gradients(deformable_attention, sizes, [t.to(dtype) for t in tensors], gradient)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        scale = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours.double() / scale, theirs / scale, rtol=0, atol=tolerance)


def test_on_pixel_centers_and_edges():
    """At pixel centers, on the map's edge, half a pixel and one and a half pixels outside of it."""
    x = torch.tensor([0.0, 1.0, 2.0, -0.5, -1.0, -2.0, 2.5, 3.0, 4.0, 1e9, -1e9])
    locations = torch.stack(((x + 0.5) / 3, torch.full_like(x, 0.5)), -1).view(1, -1, 1, 1, 1, 2)
    value = torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1)
    out = deformable_attention(value, [(1, 3)], locations, torch.ones(1, len(x), 1, 1, 1))
    assert out.flatten().tolist() == pytest.approx([1, 2, 4, 0.5, 0, 0, 2, 0, 0, 0, 0], abs=1e-6)


def test_tensors_that_are_not_contiguous():
    value, locations, weights = inputs()
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (value, locations, weights)]
    assert not any(t.is_contiguous() for t in strided)
    gradient = torch.ones(2, 6, 12)
    expected = with_gradients(deformable_attention, SIZES, (value, locations, weights), gradient)
    leaves = [t.requires_grad_() for t in strided]
    out = deformable_attention(leaves[0], SIZES, *leaves[1:])
    out.sum().backward()
    for ours, theirs in zip([out, *(leaf.grad for leaf in leaves)], expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_location_that_is_nan_gives_nan_and_does_not_crash():
    value, locations, weights = (t.requires_grad_() for t in inputs())
    broken = locations.detach().clone()
    broken[0, 2, 1, 0, 0, 0] = math.nan
    broken.requires_grad_()
    out = deformable_attention(value, SIZES, broken, weights)
    assert out[0, 2, 4:8].isnan().all()
    assert out.isnan().sum() == 4
    out.sum().backward()
    assert weights.grad[0, 2, 1, 0, 0].isnan()
    assert weights.grad.isnan().sum() == 1


def test_an_infinite_gradient_does_not_reach_other_queries(monkeypatch):
    monkeypatch.setattr(cpu, "QUERIES_PER_BLOCK", 2)
    value, locations, weights = (t.requires_grad_() for t in inputs())
    gradient = torch.ones(2, 6, 12)
    gradient[0, 0, 0] = math.inf
    deformable_attention(value, SIZES, locations, weights).backward(gradient)
    assert not weights.grad[0, 0, 0].isfinite().all()
    assert weights.grad[0, 1:].isfinite().all() and weights.grad[1].isfinite().all()


def test_only_the_inputs_are_saved_for_the_backward_pass():
    tensors = [tensor.requires_grad_() for tensor in inputs(queries=40)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        deformable_attention(tensors[0], SIZES, *tensors[1:])
    assert {tensor.data_ptr() for tensor in saved} == {tensor.data_ptr() for tensor in tensors}


def test_scattering_rows_against_index_add():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 30, (50, 6), generator=generator, dtype=torch.int32)
    rows[rows == 7] = 8  # row 7 has no entry
    weights = torch.rand(50, 6, generator=generator)
    gradient = torch.randn(50, 4, generator=generator)
    expected = torch.zeros(30, 4)
    expected.index_add_(0, rows.flatten(), (weights[..., None] * gradient[:, None]).flatten(0, 1))
    for scatter in (cpu.scatter_rows, cpu.scatter_rows_deterministic):
        torch.testing.assert_close(scatter(rows, weights, gradient, 30), expected)


def test_the_deterministic_gradient_of_the_values():
    value, locations, weights = inputs(dtype=torch.float64)
    gradient = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(2)).double()
    _, expected, _, _ = with_gradients(
        deformable_attention_torch, SIZES, (value, locations, weights), gradient
    )
    got = cpu.value_gradient_deterministic(gradient, value, SIZES, locations, weights)
    torch.testing.assert_close(got, expected)


def test_the_operator_passes_torchs_opcheck():
    tensors = [tensor.requires_grad_() for tensor in inputs()]
    sides = [side for size in SIZES for side in size]
    operator = torch.ops.clouds.deformable_attention_cpu.default
    torch.library.opcheck(operator, (tensors[0], sides, *tensors[1:]))


def test_the_choice_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(module, "_resolved", {})
    with caplog.at_level("INFO", logger=module.__name__):
        for _ in range(3):
            assert choose_implementation("auto", torch.device("cpu")) == "torch"
    assert [record.getMessage() for record in caplog.records] == [
        "Deformable attention on cpu: torch"
    ]


def test_triton_on_a_cpu_raises(monkeypatch):
    monkeypatch.setattr(module, "_resolved", {})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"DEFORMABLE_ATTENTION is 'triton', but .*cpu|not inst"):
        deformable_attention(*inputs()[:1], SIZES, *inputs()[1:], "triton")
    with pytest.raises(ValueError, match="'cuda': allowed is one of"):
        choose_implementation("cuda", torch.device("cpu"))


def test_without_triton_a_gpu_falls_back_with_a_warning(caplog, monkeypatch):
    monkeypatch.setattr(module, "_resolved", {})
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with caplog.at_level("WARNING", logger=module.__name__):
        assert choose_implementation("auto", torch.device("cuda", 0)) == "torch"
    assert "triton is not installed" in caplog.text


STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


def pixel_decoder(implementation):
    """That of a config which names the implementation, and backbone features for it."""
    cfg = get_cfg()
    cfg.MODEL.SEM_SEG_HEAD.DEFORMABLE_ATTENTION = implementation
    shapes = {name: ShapeSpec(channels=8, stride=stride) for name, stride in STRIDES.items()}
    features = {name: torch.zeros(1, 8, 64 // s, 64 // s) for name, s in STRIDES.items()}
    return CLOUDSHead.from_config(cfg, shapes)["pixel_decoder"], features


def test_the_config_key_reaches_the_kernel(monkeypatch):
    """Stand-ins for the kernels, all available: the one named by the key is called."""
    calls = []

    def resolve(implementation, device):
        def kernel(value, spatial_shapes, sampling_locations, attention_weights):
            calls.append(implementation)
            return value.new_zeros(len(value), sampling_locations.shape[1], value[0, 0].numel())

        return implementation, kernel

    monkeypatch.setattr(module, "_resolve", resolve)
    for implementation in ("torch", "triton", "auto"):
        calls.clear()
        decoder, features = pixel_decoder(implementation)
        decoder(features)
        assert calls == [implementation] * get_cfg().MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS


def test_a_pixel_decoder_with_triton_raises_on_a_cpu(monkeypatch):
    monkeypatch.setattr(module, "_resolved", {})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    decoder, features = pixel_decoder("triton")
    with pytest.raises(ValueError, match=r"DEFORMABLE_ATTENTION is 'triton', but .*cpu|not inst"):
        decoder(features)


def test_the_default_is_auto():
    assert get_cfg().MODEL.SEM_SEG_HEAD.DEFORMABLE_ATTENTION == "auto"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values_are_sampled_at_exact_locations(dtype):
    """Columns of +1 and -1: a location that is off by a quarter of a pixel gives 0.5."""
    width = 256
    value = torch.tensor([1.0, -1.0]).repeat(width // 2).view(1, width, 1, 1)
    centers = (torch.arange(width) + 0.5) / width
    locations = torch.stack((centers, torch.full((width,), 0.5)), -1).view(1, width, 1, 1, 1, 2)
    weights = torch.ones(1, width, 1, 1, 1, dtype=dtype)
    out = deformable_attention(value.to(dtype), [(1, width)], locations, weights)
    torch.testing.assert_close(out.float(), value[..., 0], rtol=0, atol=0.01)


def test_module_against_transformers():
    mha = mask2former().Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention
    ours = randomize(MSDeformAttn(d_model=32, num_levels=3, num_heads=4, num_points=2))
    theirs = mha(embed_dim=32, num_heads=4, n_levels=3, n_points=2)
    theirs.load_state_dict(ours.state_dict())
    query, value = torch.randn(2, 2, AREA, 32, generator=torch.Generator().manual_seed(1))
    reference = pixel_centers(SIZES, torch.device("cpu"))
    expected, _ = theirs(
        query,
        encoder_hidden_states=value,
        reference_points=reference[None, :, None].expand(2, -1, 3, -1),
        spatial_shapes_list=SIZES,
    )
    got = ours(query[:], reference, value, SIZES)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_autocast_does_not_round_locations():
    module = randomize(MSDeformAttn(d_model=32, num_levels=3, num_heads=4, num_points=2))
    query, value = torch.randn(2, 1, AREA, 32, generator=torch.Generator().manual_seed(1))
    reference = pixel_centers(SIZES, torch.device("cpu"))
    exact = module(query, reference, value, SIZES)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = module(query, reference, value, SIZES)
    assert rounded.isfinite().all()
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()


def test_initial_offsets_by_hand():
    """Head h points into direction h / 8 of a turn, its k-th point on a square k pixels away."""
    module = MSDeformAttn(d_model=64, num_levels=2, num_heads=8, num_points=3)
    offsets = module.sampling_offsets.bias.detach().view(8, 2, 3, 2)
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for head, (x, y) in enumerate(directions):
        for level in range(2):
            for k in range(3):
                offset = offsets[head, level, k].tolist()
                assert offset == pytest.approx([x * (k + 1), y * (k + 1)], abs=1e-5)
    assert not module.sampling_offsets.weight.any()
    assert not module.attention_weights.weight.any()


def test_pixel_centers_by_hand():
    points = pixel_centers([(1, 2), (2, 1)], torch.device("cpu"))
    assert points.tolist() == [[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75]]
