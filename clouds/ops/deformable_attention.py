"""Multi-scale deformable attention (Zhu et al., Deformable DETR, section 4.1)."""

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
Forward = Callable[[Tensor, Sequence[Size], Tensor, Tensor], Tensor]
Backward = Callable[[Tensor, Tensor, Sequence[Size], Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

INPUTS = "Tensor value, int[] sides, Tensor locations, Tensor weights"


def attention_op(name: str, forward: Forward, backward: Backward) -> Forward:
    """Join a forward and a backward pass, which nothing but the three tensors is kept for.

    Both get contiguous tensors and need no regard for autograd.

    Args:
        name: of the operator, after "clouds::".
        forward: (value, sizes, locations, weights) -> (N, Q, M * D)
        backward: (gradient of that, value, sizes, locations, weights) -> gradients by value,
            locations and weights, contiguous.
    """
    forward_op: Any = torch.library.custom_op(
        f"clouds::{name}",
        lambda value, sides, locations, weights: forward(
            value.contiguous(), _sizes(sides), locations.contiguous(), weights.contiguous()
        ),
        mutates_args=(),
        schema=f"({INPUTS}) -> Tensor",
    )
    backward_op: Any = torch.library.custom_op(
        f"clouds::{name}_backward",
        lambda gradient, value, sides, locations, weights: backward(
            gradient.contiguous(),
            value.contiguous(),
            _sizes(sides),
            locations.contiguous(),
            weights.contiguous(),
        ),
        mutates_args=(),
        schema=f"(Tensor gradient, {INPUTS}) -> (Tensor, Tensor, Tensor)",
    )

    def save(ctx: Any, inputs: tuple[Tensor, list[int], Tensor, Tensor], output: Tensor) -> None:
        value, ctx.sides, locations, weights = inputs
        ctx.save_for_backward(value, locations, weights)

    def differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        value, locations, weights = ctx.saved_tensors
        by_value, by_place, by_weight = backward_op(gradient, value, ctx.sides, locations, weights)
        return by_value, None, by_place, by_weight

    forward_op.register_fake(
        lambda value, sides, locations, weights: value.new_empty(
            (*locations.shape[:2], value.shape[2] * value.shape[3])
        )
    )
    backward_op.register_fake(
        lambda gradient, value, sides, locations, weights: tuple(
            tensor.new_empty(tensor.shape) for tensor in (value, locations, weights)
        )
    )
    forward_op.register_autograd(differentiate, setup_context=save)

    def call(value: Tensor, sizes: Sequence[Size], locations: Tensor, weights: Tensor) -> Tensor:
        sides = [side for size in sizes for side in size]
        return cast(Tensor, forward_op(value, sides, locations, weights))

    return call


def _sizes(sides: Sequence[int]) -> list[Size]:
    return list(zip(sides[::2], sides[1::2], strict=True))


IMPLEMENTATIONS = ("auto", "torch", "triton")

logger = logging.getLogger(__name__)


def deformable_attention(
    value: Tensor,
    sizes: Sequence[Size],
    locations: Tensor,
    weights: Tensor,
    implementation: str = "auto",
) -> Tensor:
    """Sum values sampled bilinearly at given places of several feature maps.

    All forms compute in float32 at least and keep nothing but the three tensors for the backward
    pass. They differ by rounding. Triton's adds up the gradient of `value` in no fixed order, so
    that its last bits vary, unless `torch.use_deterministic_algorithms` asks for one.

    Args:
        value: (N, S, M, D), the maps flattened one after another, M heads of D channels.
        sizes: (height, width) of each of the L maps; S is the sum of their areas.
        locations: (N, Q, M, L, P, 2) as (x, y), 0 the left or upper edge of a map and 1 the
            opposite one; outside of it values are zero.
        weights: (N, Q, M, L, P), the attention of each sample.
        implementation: 'torch'; 'triton', for tensors on CUDA; or 'auto', which is Triton on CUDA
            where it works.

    Returns:
        (N, Q, M * D), of the type of `value`.

    Raises:
        ValueError: 'triton' was asked for and cannot be had.
    """
    _, kernel = _resolve(implementation, value.device)
    return kernel(value, sizes, locations, weights)


def _recompute_samples(
    value: Tensor, sizes: Sequence[Size], locations: Tensor, weights: Tensor
) -> Tensor:
    """`sample_level_by_level` that samples again in the backward pass.

    Kept, the samples would be most of what the model keeps for it.
    """
    out: Tensor = checkpoint(
        sample_level_by_level,
        value,
        sizes,
        locations,
        weights,
        use_reentrant=False,
        preserve_rng_state=False,
    )
    return out


def sample_level_by_level(
    value: Tensor, sizes: Sequence[Size], locations: Tensor, weights: Tensor
) -> Tensor:
    """See `deformable_attention`; for any device that has `grid_sample`."""
    n, _, heads, channels = value.shape
    queries, dtype = locations.shape[1], compute_type(value, locations)
    grids = (2 * locations.to(dtype) - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)
    attention = weights.to(dtype).permute(3, 0, 2, 1, 4).flatten(1, 2)  # (L, NM, Q, P)
    levels = torch.split(value.to(dtype), [height * width for height, width in sizes], dim=1)
    out = value.new_zeros((n * heads, channels, queries), dtype=dtype)
    for level, size, grid, share in zip(levels, sizes, grids, attention, strict=True):
        maps = level.permute(0, 2, 3, 1).reshape(n * heads, channels, *size)
        samples = F.grid_sample(maps, grid, align_corners=False)  # (NM, D, Q, P)
        out = out + (samples * share[:, None]).sum(-1)
    return out.reshape(n, heads * channels, queries).transpose(1, 2).to(value.dtype)


def compute_type(value: Tensor, locations: Tensor) -> torch.dtype:
    """The type to compute in: float32 at least, since half precision cannot tell pixels apart."""
    return torch.promote_types(torch.promote_types(value.dtype, locations.dtype), torch.float32)


def choose(implementation: str, device: torch.device) -> str:
    """'torch' or 'triton', whichever is used for tensors on `device`; the choice is logged once.

    Raises:
        ValueError: 'triton' was asked for and is not available.
    """
    return _resolve(implementation, device)[0]


# A plain dict, as `torch.compile` reads it without leaving the graph once the choice is made.
_resolved: dict[tuple[str, str, int | None], tuple[str, Forward]] = {}


def _resolve(implementation: str, device: torch.device) -> tuple[str, Forward]:
    """Name and function of the implementation for tensors on `device`."""
    key = (implementation, device.type, device.index)
    if key not in _resolved:
        name = _decide(implementation, device)
        _resolved[key] = name, _kernel(name, device)
    return _resolved[key]


def _kernel(name: str, device: torch.device) -> Forward:
    # Imported where they are used: they import this module, and Triton may not be installed.
    if name == "triton":
        from clouds.ops.deformable_attention_triton import deformable_attention_triton

        return deformable_attention_triton
    if device.type == "cpu":
        from clouds.ops.deformable_attention_cpu import deformable_attention_cpu

        return deformable_attention_cpu
    return _recompute_samples


def _decide(implementation: str, device: torch.device) -> str:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"deformable attention {implementation!r}: allowed is one of {IMPLEMENTATIONS}"
        )
    choice = implementation
    if implementation != "torch":
        problem = _why_not_triton(device)
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


def _why_not_triton(device: torch.device) -> str:
    """Empty where the Triton kernels run on tensors of this device."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"the tensors are on {device.type}, and Triton's kernels need CUDA"
    from clouds.ops.deformable_attention_triton import try_out

    return try_out(device)
