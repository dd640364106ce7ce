"""Multi-scale deformable attention (Zhu et al., Deformable DETR, section 4.1).

`deformable_attention` calls the implementation that MODEL.SEM_SEG_HEAD.DEFORMABLE_ATTENTION names.
`deformable_attention_torch` is the plain form, which runs on any device that has `grid_sample`;
tests compare the kernels with it. `register_attention_op` makes an operator with a gradient out of
a kernel.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Size = tuple[int, int]
"""Height and width of a feature map."""

Forward = Callable[[Tensor, Sequence[Size], Tensor, Tensor], Tensor]
"""(value, spatial_shapes, sampling_locations, attention_weights) -> output, as
`deformable_attention`."""

Backward = Callable[[Tensor, Tensor, Sequence[Size], Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(grad_output, then the arguments of `Forward`) -> gradients of the three tensors."""

_SCHEMA = "Tensor value, int[] sides, Tensor sampling_locations, Tensor attention_weights"

PLAIN = "plain"
IMPLEMENTATIONS = ("auto", "torch", "triton", PLAIN)

logger = logging.getLogger(__name__)

# A plain dict: torch.compile reads it without a graph break once the choice is made.
_resolved: dict[tuple[str, str, int | None], tuple[str, Forward]] = {}


def deformable_attention(
    value: Tensor,
    spatial_shapes: Sequence[Size],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    implementation: str = "auto",
) -> Tensor:
    """Weighted sum of bilinear samples of several feature maps.

    All implementations compute in float32 at least and keep only the three tensors for the
    backward pass. They differ by rounding. Triton's adds up the gradient of `value` with atomic
    additions, so that its last bits vary from run to run, unless
    `torch.use_deterministic_algorithms` is on.

    Args:
        value: (N, S, M, D), the maps flattened one after another, M heads of D channels.
        spatial_shapes: (height, width) of each of the L maps; S is the sum of their areas.
        sampling_locations: (N, Q, M, L, P, 2) as (x, y), 0 the left or upper edge of a map and 1
            the opposite one; outside of it values are zero.
        attention_weights: (N, Q, M, L, P), of each sample.
        implementation: 'torch' (on a CPU its own kernel); 'triton', for tensors on CUDA; 'auto',
            which is Triton on CUDA where it works; or 'plain', torch's operators alone, for
            exported graphs.

    Returns:
        (N, Q, M * D), of the type of `value`.

    Raises:
        ValueError: unknown implementation, or 'triton' is not available.
    """
    _, kernel = _resolve(implementation, value.device)
    return kernel(value, spatial_shapes, sampling_locations, attention_weights)


def choose_implementation(implementation: str, device: torch.device) -> str:
    """'torch', 'triton' or 'plain', used for tensors on `device`; the choice is logged once.

    Raises:
        ValueError: unknown implementation, or 'triton' is not available.
    """
    return _resolve(implementation, device)[0]


def _resolve(implementation: str, device: torch.device) -> tuple[str, Forward]:
    key = (implementation, device.type, device.index)
    if key not in _resolved:
        name = _choose(implementation, device)
        _resolved[key] = name, _kernel(name, device)
    return _resolved[key]


def _choose(implementation: str, device: torch.device) -> str:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"deformable attention {implementation!r}: allowed is one of {IMPLEMENTATIONS}"
        )
    choice = implementation
    if implementation in ("auto", "triton"):
        problem = _triton_problem(device)
        if problem and implementation == "triton":
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.DEFORMABLE_ATTENTION is 'triton', but {problem}; "
                "set it to 'auto' or 'torch'"
            )
        choice = "torch" if problem else "triton"
        if problem and device.type == "cuda":
            logger.warning("Deformable attention runs without Triton, slowly: %s", problem)
    logger.info("Deformable attention on %s: %s", device, choice)
    return choice


def _kernel(name: str, device: torch.device) -> Forward:
    # The kernels import this module, and Triton is an optional package.
    if name == PLAIN:
        return deformable_attention_torch
    if name == "triton":
        from clouds.ops.deformable_attention_triton import deformable_attention_triton

        return deformable_attention_triton
    if device.type in ("cpu", "meta"):  # the meta device needs the shapes alone
        from clouds.ops.deformable_attention_cpu import deformable_attention_cpu

        return deformable_attention_cpu
    return deformable_attention_checkpointed


def _triton_problem(device: torch.device) -> str:
    """Why the Triton kernels do not run on tensors of this device; empty if they do."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"the tensors are on {device.type}, and Triton's kernels need CUDA"
    from clouds.ops.deformable_attention_triton import trial_run_problem

    return trial_run_problem(device)


def deformable_attention_torch(
    value: Tensor,
    spatial_shapes: Sequence[Size],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sum the samples of one map after another, see `deformable_attention`."""
    n, _, num_heads, head_dim = value.shape
    num_queries, dtype = sampling_locations.shape[1], compute_dtype(value, sampling_locations)
    grids = (2 * sampling_locations.to(dtype) - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)
    weights = attention_weights.to(dtype).permute(3, 0, 2, 1, 4).flatten(1, 2)  # (L, NM, Q, P)
    levels = torch.split(value.to(dtype), [h * w for h, w in spatial_shapes], dim=1)
    out = value.new_zeros((n * num_heads, head_dim, num_queries), dtype=dtype)
    for level, size, grid, weight in zip(levels, spatial_shapes, grids, weights, strict=True):
        maps = level.permute(0, 2, 3, 1).reshape(n * num_heads, head_dim, *size)
        samples = F.grid_sample(maps, grid, align_corners=False)  # (NM, D, Q, P)
        out = out + (samples * weight[:, None]).sum(-1)
    return out.reshape(n, num_heads * head_dim, num_queries).transpose(1, 2).to(value.dtype)


def deformable_attention_checkpointed(*args: Tensor | Sequence[Size]) -> Tensor:
    """`deformable_attention_torch` with activation checkpointing.

    The samples are computed again in the backward pass. Kept, they would be most of the memory
    that the model keeps for it.
    """
    out: Tensor = checkpoint(
        deformable_attention_torch, *args, use_reentrant=False, preserve_rng_state=False
    )
    return out


def compute_dtype(value: Tensor, sampling_locations: Tensor) -> torch.dtype:
    """The type to compute in: at least float32.

    The resolution of half precision is coarser than a pixel.
    """
    inputs = torch.promote_types(value.dtype, sampling_locations.dtype)
    return torch.promote_types(inputs, torch.float32)


def register_attention_op(name: str, forward: Forward, backward: Backward) -> Forward:
    """Register a kernel with torch as `clouds::<name>`, differentiable and known to torch.compile.

    Nothing but the three input tensors is kept for the backward pass.

    Args:
        name: of the operator; that of its backward pass is `<name>_backward`.
        forward: gets contiguous tensors; autograd does not record it.
        backward: the same; returns contiguous tensors.
    """
    forward_op: Any = torch.library.custom_op(
        f"clouds::{name}",
        lambda *args: forward(*_kernel_arguments(args)),
        mutates_args=(),
        schema=f"({_SCHEMA}) -> Tensor",
    )
    backward_op: Any = torch.library.custom_op(
        f"clouds::{name}_backward",
        lambda *args: backward(*_kernel_arguments(args)),
        mutates_args=(),
        schema=f"(Tensor grad_output, {_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    )
    _register_shapes(forward_op, backward_op)
    _register_autograd(forward_op, backward_op)

    def call(
        value: Tensor,
        spatial_shapes: Sequence[Size],
        sampling_locations: Tensor,
        attention_weights: Tensor,
    ) -> Tensor:
        sides = [side for size in spatial_shapes for side in size]
        return cast(Tensor, forward_op(value, sides, sampling_locations, attention_weights))

    return call


def _register_shapes(forward_op: Any, backward_op: Any) -> None:
    """Tell torch.compile the shapes of the outputs."""
    forward_op.register_fake(
        lambda value, sides, sampling_locations, attention_weights: value.new_empty(
            (*sampling_locations.shape[:2], value.shape[2] * value.shape[3])
        )
    )
    backward_op.register_fake(
        lambda grad_output, value, sides, sampling_locations, attention_weights: tuple(
            tensor.new_empty(tensor.shape)
            for tensor in (value, sampling_locations, attention_weights)
        )
    )


def _register_autograd(forward_op: Any, backward_op: Any) -> None:
    def save(ctx: Any, inputs: tuple[Tensor, list[int], Tensor, Tensor], output: Tensor) -> None:
        value, ctx.sides, sampling_locations, attention_weights = inputs
        ctx.save_for_backward(value, sampling_locations, attention_weights)

    def differentiate(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        value, locations, weights = ctx.saved_tensors
        gradients = backward_op(grad_output, value, ctx.sides, locations, weights)
        grad_value, grad_locations, grad_weights = gradients
        return grad_value, None, grad_locations, grad_weights

    forward_op.register_autograd(differentiate, setup_context=save)


def _kernel_arguments(args: Sequence[Any]) -> list[Any]:
    """Contiguous tensors; heights and widths in turn as the (height, width) of each map."""
    return [
        x.contiguous() if isinstance(x, Tensor) else list(zip(x[::2], x[1::2], strict=True))
        for x in args
    ]
