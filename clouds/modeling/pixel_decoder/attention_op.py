"""A form of deformable attention as an operator that autograd and `torch.compile` know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

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
