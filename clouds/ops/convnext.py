"""The stages of timm's ConvNeXt in inference on a CPU, in chunks of pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PIXELS_PER_CHUNK = 1024
"""Pixels whose hidden values (4 C channels, 2 to 24 MiB) exist at a time.

Most of them are still in the cache when the next layer reads them, and all chunks of a block share
the same memory: allocating new memory for each layer costs more than the arithmetic of most layers.
"""


def stage(module: Any, x: Tensor) -> Tensor:
    """`module(x)` for a stage of timm's ConvNeXt.

    Where `is_supported` says so it is computed in chunks of pixels. The result is the same up to
    rounding: a matrix product of fewer rows may be summed in another order.

    Args:
        module: a stage of timm's ConvNeXt.
        x: (N, C, H, W)
    """
    if not is_supported(module, x):
        plain: Tensor = module(x)
        return plain
    x = module.downsample(x)
    for block in module.blocks:
        x = _block(block, x)
    return x


def is_supported(module: Any, x: Tensor) -> bool:
    """Whether `stage` computes this module in chunks: in inference, float32, channels last, CPU."""
    return (
        x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not module.training
        and x.is_contiguous(memory_format=torch.channels_last)
        and all(_is_standard(block) for block in module.blocks)
        and not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    )


def _is_standard(block: Any) -> bool:
    """Whether it is a convolution, LayerNorm, two linear layers with GELU, LayerScale and a sum."""
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
    shortcut = _rows(x)
    convolved = _rows(block.conv_dw(x))
    fc1, fc2 = block.mlp.fc1, block.mlp.fc2
    out = torch.empty_like(shortcut)
    hidden = out.new_empty(min(PIXELS_PER_CHUNK, len(out)), fc1.out_features)
    for start in range(0, len(out), PIXELS_PER_CHUNK):
        pixels = slice(start, start + PIXELS_PER_CHUNK)
        normalized, chunk = block.norm(convolved[pixels]), out[pixels]
        inner = hidden[: len(normalized)]
        torch.addmm(fc1.bias, normalized, fc1.weight.t(), out=inner)
        torch.ops.aten.gelu_(inner)
        torch.addmm(fc2.bias, inner, fc2.weight.t(), out=chunk)
        torch.addcmul(shortcut[pixels], chunk, block.gamma, out=chunk)
    return out.view(n, height, width, channels).permute(0, 3, 1, 2)


def _rows(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N * H * W, C), a view if memory is channels last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
