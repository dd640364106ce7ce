"""A ConvNeXt block without gradient on a CPU, some pixels at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PIXELS_AT_ONCE = 1024
"""Their hidden values, 2 to 24 MiB, are used while a cache still holds most of them, and in the
same memory for the whole block: fresh memory for each step costs more than most steps' arithmetic.
"""


def stage(module: Any, x: Tensor) -> Tensor:
    """One of timm's ConvNeXt stages, in evaluation mode: its own forward pass, no gradient.

    The same is computed; a library may sum in another order where it gets fewer rows at a time.

    Args:
        module: a stage of timm's ConvNeXt.
        x: (N, C, H, W)
    """
    if not applies(module, x):
        plain: Tensor = module(x)
        return plain
    x = module.downsample(x)
    for block in module.blocks:
        x = _block(block, x)
    return x


def applies(module: Any, x: Tensor) -> bool:
    """Whether `stage` has a way of its own for this module and tensor."""
    return (
        x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not module.training
        and x.is_contiguous(memory_format=torch.channels_last)
        and all(_is_plain(block) for block in module.blocks)
        and not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    )


def _is_plain(block: Any) -> bool:
    """Convolution, LayerNorm, two linear layers with GELU between them, scale and sum."""
    act = getattr(block.mlp, "act", None)
    layers = (block.mlp.fc1, block.mlp.fc2)
    return (
        not block.use_conv_mlp
        and block.gamma is not None
        and isinstance(block.shortcut, nn.Identity)
        and isinstance(getattr(block.mlp, "norm", None), nn.Identity)
        and all(type(layer) is nn.Linear and layer.bias is not None for layer in layers)
        and type(act).__name__ == "GELU"  # torch's, or timm's of that name
        and getattr(act, "approximate", "none") == "none"
    )


def _block(block: Any, x: Tensor) -> Tensor:
    n, channels, height, width = x.shape
    before = _rows(x)
    mixed = _rows(block.conv_dw(x))
    first, second = block.mlp.fc1, block.mlp.fc2
    out = torch.empty_like(before)
    hidden = out.new_empty(min(PIXELS_AT_ONCE, len(out)), first.out_features)
    for start in range(0, len(out), PIXELS_AT_ONCE):
        pixels = slice(start, start + PIXELS_AT_ONCE)
        part, into = block.norm(mixed[pixels]), out[pixels]
        inner = hidden[: len(part)]
        torch.addmm(first.bias, part, first.weight.t(), out=inner)
        torch.ops.aten.gelu_(inner)
        torch.addmm(second.bias, inner, second.weight.t(), out=into)
        torch.addcmul(before[pixels], into, block.gamma, out=into)
    return out.view(n, height, width, channels).permute(0, 3, 1, 2)


def _rows(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N * H * W, C), a view where the channels come last in memory."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
