"""The Triton kernels against float64 autograd through grid_sample.

With a GPU they run on it. Without one, `test_interpreted` runs this file in Triton's interpreter
on the CPU, in a subprocess, because Triton reads TRITON_INTERPRET at import. `test_compiles` checks
what the interpreter does not: types and shared memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clouds.ops.deformable_attention import (
    choose_implementation,
    deformable_attention,
    deformable_attention_torch,
)

triton = pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
SIZES = [(2, 3), (4, 5), (7, 9)]
no_device = pytest.mark.skipif(
    not INTERPRETED and DEVICE.type == "cpu", reason="no GPU; see test_interpreted"
)


def runs_kernels(test):
    """Needs a GPU or Triton's interpreter."""
    return pytest.mark.gpu(no_device(test))


def inputs(queries, heads, channels, points, sizes=SIZES, reach=1.6, seed=0):
    """Values, locations (some outside of the maps), weights, and a gradient, in float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, queries, heads, len(sizes), points)
    area = sum(h * w for h, w in sizes)
    value = torch.randn(2, area, heads, channels, generator=generator, dtype=torch.float64)
    locations = torch.rand(*shape, 2, generator=generator, dtype=torch.float64)
    weights = torch.rand(shape, generator=generator, dtype=torch.float64)
    gradient = torch.randn(2, queries, heads * channels, generator=generator, dtype=torch.float64)
    return (value, 0.5 + reach * (locations - 0.5), weights), gradient


def with_gradients(attend, tensors, gradient, sizes=SIZES):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = attend(leaves[0], sizes, *leaves[1:])
    out.backward(gradient.to(out))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def kernels(value, sizes, locations, weights):
    return deformable_attention(value, sizes, locations, weights, "triton")


def assert_alike(got, expected, tolerance):
    for ours, theirs in zip(got, expected, strict=True):
        scale = theirs.abs().max()
        assert scale > 0
        difference = (ours.cpu().double() - theirs).abs().max() / scale
        assert difference <= tolerance


# One block and several, whole and not; channels that are a power of two and others.
SHAPES = [(6, 3, 4, 2), (35, 1, 32, 1), (1, 1, 1, 1)]
SEVERAL = (50, 2, 20, 1)


@runs_kernels
@pytest.mark.parametrize(
    ("shape", "dtype", "tolerance"),
    [*((shape, torch.float32, 1e-5) for shape in SHAPES), (SEVERAL, torch.float64, 1e-12)],
)
def test_kernels(shape, dtype, tolerance):
    tensors, gradient = inputs(*shape)
    expected = with_gradients(deformable_attention_torch, tensors, gradient)
    got = with_gradients(kernels, [t.to(DEVICE, dtype) for t in tensors], gradient)
    assert_alike(got, expected, tolerance)


@runs_kernels
@pytest.mark.parametrize("reach", [1.0, 1e12])
@pytest.mark.parametrize("sizes", [[(1, 1)], [(3, 1), (1, 6)], SIZES[::-1]])
def test_kernels_on_odd_maps_and_far_outside(sizes, reach):
    tensors, gradient = inputs(5, 1, 8, 2, sizes, reach)
    expected = with_gradients(deformable_attention_torch, tensors, gradient, sizes)
    got = with_gradients(kernels, [t.to(DEVICE) for t in tensors], gradient, sizes)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs)


@runs_kernels
def test_an_empty_map_adds_nothing():
    tensors, gradient = inputs(5, 1, 8, 2, [(0, 4), (3, 2)])
    rest = [tensors[0], *(t[:, :, :, 1:] for t in tensors[1:])]
    expected = with_gradients(deformable_attention_torch, rest, gradient, [(3, 2)])
    got = with_gradients(kernels, [t.to(DEVICE) for t in tensors], gradient, [(0, 4), (3, 2)])
    assert all((t[:, :, :, 0] == 0).all() for t in got[2:])
    assert_alike([*got[:2], *(t[:, :, :, 1:] for t in got[2:])], expected, 1e-12)


@runs_kernels
def test_kernels_on_tensors_that_are_not_contiguous():
    tensors, gradient = inputs(7, 2, 6, 2)
    expected = with_gradients(deformable_attention_torch, tensors, gradient)
    strided = [t.to(DEVICE, torch.float32).transpose(0, 1).contiguous() for t in tensors]

    def attend(value, sizes, locations, weights):
        turned = [t.transpose(0, 1) for t in (value, locations, weights)]
        assert not any(t.is_contiguous() for t in turned)
        return kernels(turned[0], sizes, *turned[1:]).transpose(0, 1).contiguous().transpose(0, 1)

    got = with_gradients(attend, strided, gradient.transpose(0, 1).contiguous().transpose(0, 1))
    got = [got[0], *(g.transpose(0, 1) for g in got[1:])]
    assert_alike(got, expected, 1e-5)


@runs_kernels
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_values_are_summed_in_float32(dtype, tolerance):
    """The only difference is the rounding of results; that of inputs is in both."""
    (value, locations, weights), gradient = inputs(20, 1, 16, 2)
    value, weights, gradient = (t.to(dtype) for t in (value, weights, gradient))
    locations = locations.float()
    exact = [t.double() for t in (value, locations, weights)]
    expected = with_gradients(deformable_attention_torch, exact, gradient.double())
    tensors = [t.to(DEVICE) for t in (value, locations, weights)]
    got = with_gradients(kernels, tensors, gradient)
    assert [t.dtype for t in got] == [dtype, dtype, torch.float32, dtype]
    assert_alike(got, expected, tolerance)
    assert_alike(got[2:3], expected[2:3], 1e-5)


@runs_kernels
def test_deterministic_algorithms_repeat_bit_for_bit():
    tensors, gradient = inputs(9, 2, 8, 2)
    expected = with_gradients(deformable_attention_torch, tensors, gradient)
    single = [t.to(DEVICE, torch.float32) for t in tensors]
    torch.use_deterministic_algorithms(True)
    try:
        got, again = (with_gradients(kernels, single, gradient) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_alike(got, expected, 1e-5)
    assert all(torch.equal(one, other) for one, other in zip(got, again, strict=True))


@runs_kernels
def test_a_location_that_is_nan_gives_nan():
    (value, locations, weights), gradient = inputs(6, 1, 4, 2)
    locations[0, 2, 0, 0, 0, 0] = torch.nan
    tensors = [t.to(DEVICE, torch.float32) for t in (value, locations, weights)]
    out, *_ = with_gradients(kernels, tensors, gradient)
    assert out[0, 2].isnan().any()
    out[0, 2] = 0
    assert out.isfinite().all()


@runs_kernels
def test_triton_is_chosen_and_the_operator_passes_opcheck():
    assert choose_implementation("triton", DEVICE) == "triton"
    tensors, _ = inputs(3, 1, 4, 1)
    leaves = [t.to(DEVICE, torch.float32).requires_grad_() for t in tensors]
    sides = [side for size in SIZES for side in size]
    operator = torch.ops.clouds.deformable_attention_triton.default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, (leaves[0], sides, *leaves[1:]), test_utils=checks)


@pytest.mark.skipif(INTERPRETED, reason="this is the subprocess")
def test_interpreted():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        [*command, str(Path(__file__).resolve())],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert len(skipped) == 3, done.stdout  # this test, and the two below


@pytest.mark.skipif(INTERPRETED, reason="the interpreter needs no GPU")
def test_a_failed_trial_run_reports_its_error():
    from clouds.ops.deformable_attention_triton import trial_run_problem

    assert "a trial run of Triton failed (" in trial_run_problem(torch.device("cpu"))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("value", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles(value, capability):
    """Compiled for the named GPUs by Triton's compiler, which needs none of them."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("the compiler of Triton before 3.3 has another interface")
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from clouds.ops import deformable_attention_triton as module

    float32 = ("sampling_locations", "grad_locations", "grad_value")
    constants = {"L": 3, "P": 4, "BLOCK_D": 32, "DTYPE": tl.float32}
    for kernel, tile, extra in (
        (module._forward_kernel, module.FORWARD_TILE, {}),
        (module._backward_kernel, module.BACKWARD_TILE, {"SCATTER": True}),
    ):
        values = {**constants, "BLOCK_Q": tile // 32, **extra}
        types = {}
        for name in kernel.arg_names:
            if name in values:
                types[name] = "constexpr"
            elif name in ("num_values", "num_queries", "num_heads", "head_dim"):
                types[name] = "i32"
            elif name == "levels":
                types[name] = "*i32"
            else:
                types[name] = "*fp32" if name in float32 else f"*{value}"
        source = ASTSource(kernel, types, values)
        options = {"num_warps": module.WARPS}
        built = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert built.metadata.shared <= 48 * 1024
