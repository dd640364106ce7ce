"""Layers with low-rank updates of their frozen weights, W + s B A, and merging of the two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clouds.modeling.backbone.adapters.base import AdaptedLayers, Adapter
from clouds.modeling.backbone.pretrained import pretrained_weights_are_skipped

FUSED = "qkv"
"""Name of the layer whose rows are the query, key and value projections."""


class LowRankUpdate(nn.Module):
    """The factors of an update s B A of a weight (out, in), or of a kernel (out, in, k, k).

    A weight with several parts, equal blocks of rows such as those of query, key and value, has
    factors for each.

    Args:
        weight: what is updated; its shape, type and device are the factors'.
        rank: r of each part.
        scale: s.
        parts: number of parts P.

    Attributes:
        lora_A: (P r, in, …), the parts below each other; zeros at first.
        lora_B: (out, r); zeros at first. Both have the weight's type, float32 if that is smaller.

    Raises:
        ValueError: the rank is above those of the parts.
    """

    def __init__(self, weight: Tensor, rank: int, scale: float, parts: int = 1) -> None:
        super().__init__()
        largest = min(len(weight) // parts, weight[0].numel())
        if rank > largest:
            raise ValueError(
                f"an update of rank {rank} of a weight {tuple(weight.shape)}; allowed are ranks up "
                f"to {largest}. Set a lower rank (MODEL.BACKBONE.ADAPTER)."
            )
        self.rank, self.scale, self.parts = rank, scale, parts
        dtype = torch.promote_types(weight.dtype, torch.float32)
        shape = (parts * rank, *weight.shape[1:])
        self.lora_A = nn.Parameter(torch.zeros(shape, dtype=dtype, device=weight.device))
        self.lora_B = nn.Parameter(
            torch.zeros(len(weight), rank, dtype=dtype, device=weight.device)
        )

    def delta(self, dtype: torch.dtype) -> Tensor:
        """s B A, of the weight's shape, computed in `dtype`."""
        a, b = self.lora_A.to(dtype).flatten(1), self.lora_B.to(dtype)
        factors = zip(b.chunk(self.parts), a.chunk(self.parts), strict=True)
        product = torch.cat([part_b @ part_a for part_b, part_a in factors])
        return self.scale * product.view(-1, *self.lora_A.shape[1:])

    @torch.no_grad()
    def set_factors(self, factors: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Copy A (r, in) and B (out of the part, r) of each part."""
        a, b = zip(*factors, strict=True)
        self.lora_A.copy_(torch.cat(a))
        self.lora_B.copy_(torch.cat(b))

    def expand(self, z: Tensor) -> Tensor:
        """A x of all parts (…, P r) -> B A x (…, out), without s."""
        if self.parts == 1:
            return F.linear(z, self.lora_B)
        parts = zip(z.chunk(self.parts, dim=-1), self.lora_B.chunk(self.parts), strict=True)
        return torch.cat([F.linear(part, b) for part, b in parts], dim=-1)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, parts={self.parts}"


class AdaptedLinear(nn.Linear):
    """`nn.Linear` whose weight has low-rank updates; `updates` holds them by name."""

    updates: nn.ModuleDict

    def __init__(self, layer: nn.Linear, updates: Mapping[str, LowRankUpdate]) -> None:
        super().__init__(**_arguments_of(layer))
        self.weight, self.bias = layer.weight, layer.bias
        self.updates = nn.ModuleDict(updates)

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        for update in updates_of(self):
            out = torch.add(out, update.expand(F.linear(x, update.lora_A)), alpha=update.scale)
        return out


class AdaptedConv2d(nn.Conv2d):
    """`nn.Conv2d` without groups whose kernel has low-rank updates of one part."""

    updates: nn.ModuleDict

    def __init__(self, layer: nn.Conv2d, updates: Mapping[str, LowRankUpdate]) -> None:
        super().__init__(**_arguments_of(layer))
        self.weight, self.bias = layer.weight, layer.bias
        self.updates = nn.ModuleDict(updates)

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        for update in updates_of(self):
            z = self._conv_forward(x, update.lora_A, None)
            expanded = F.conv2d(z, update.lora_B[:, :, None, None])
            out = torch.add(out, expanded, alpha=update.scale)
        return out


Adapted = AdaptedLinear | AdaptedConv2d

MakeUpdates = Callable[[Tensor, int], Mapping[str, LowRankUpdate]]
"""Weight and its number of parts -> updates by name."""

Fit = Callable[[Adapted], None]
"""Sets the updates of a layer from the values of its weight, which it may change."""


class LowRankAdapter(Adapter):
    """An adapter all of whose parameters are in the adapted layers.

    Args:
        fit: None: the updates do not depend on the weights' values.
    """

    def __init__(self, fit: Fit | None = None) -> None:
        super().__init__()
        self._fit = fit

    @torch.no_grad()
    def fit(self, backbone: nn.Module) -> None:
        if self._fit is None:
            return
        for layer in adapted_layers(backbone).values():
            if has_values(layer.weight):
                self._fit(layer)


def has_values(weight: Tensor) -> bool:
    """Whether a weight has its values: not on the meta device, and not if a checkpoint follows."""
    return not (weight.is_meta or pretrained_weights_are_skipped())


@torch.no_grad()
def subtract_updates(layer: Adapted) -> None:
    """Subtract s B A of all updates from the weight: with them, the layer computes what it did."""
    deltas = [update.delta(torch.float64) for update in updates_of(layer)]
    layer.weight.copy_(layer.weight.double() - torch.stack(deltas).sum(0))


def updates_of(layer: Adapted) -> Iterator[LowRankUpdate]:
    """The updates of a layer."""
    for update in layer.updates.values():
        assert isinstance(update, LowRankUpdate)
        yield update


def add_updates(
    layers: AdaptedLayers, make: MakeUpdates, *, first_block: int = 0, key: str
) -> list[Adapted]:
    """Replace the linear layers, and convolutions without groups, of blocks by adapted ones.

    The layers' own weights and biases stay the same parameters under the same names.

    Args:
        layers: of the backbone.
        make: makes the updates of a weight.
        first_block: blocks before it are not adapted.
        key: the config key of `first_block`, for messages.

    Returns:
        The new layers.

    Raises:
        ValueError: there is no such block, or no such layer in a block.
    """
    if first_block >= len(layers.blocks):
        raise ValueError(
            f"{key} is {first_block}, and the backbone {layers.backbone} has blocks 0 to "
            f"{len(layers.blocks) - 1}. Set it to the first block that is to be adapted."
        )
    adapted: list[Adapted] = []
    for block in layers.blocks[first_block:]:
        found = [
            (module, name, child)
            for module in block.modules()
            for name, child in module.named_children()
            if isinstance(child, nn.Linear) or (isinstance(child, nn.Conv2d) and child.groups == 1)
        ]
        if not found or any(isinstance(module, nn.MultiheadAttention) for module, *_ in found):
            raise ValueError(
                f"{key.rsplit('.', 1)[0]}: the backbone {layers.backbone} cannot have this "
                "adapter: a block has no linear layers that are called by themselves. Use rein, "
                "full or none."
            )
        for module, name, child in found:
            new = _adapted(child, make(child.weight, 3 if name == FUSED else 1))
            setattr(module, name, new)
            adapted.append(new)
            _call_fused_layer(module)
    return adapted


def _adapted(layer: nn.Linear | nn.Conv2d, updates: Mapping[str, LowRankUpdate]) -> Adapted:
    if isinstance(layer, nn.Linear):
        return AdaptedLinear(layer, updates)
    return AdaptedConv2d(layer, updates)


def _call_fused_layer(attention: nn.Module) -> None:
    """Let timm's EVA attention call its `qkv` layer; else it uses the layer's weight alone."""
    if hasattr(attention, "qkv_bias_separate"):
        attention.qkv_bias_separate = True  # type: ignore[assignment]


def adapted_layers(module: nn.Module) -> dict[str, Adapted]:
    """The adapted layers of a module by their dotted names."""
    named = module.named_modules()
    return {n: m for n, m in named if isinstance(m, AdaptedLinear | AdaptedConv2d)}


@torch.no_grad()
def merge_updates(module: nn.Module) -> int:
    """Replace the adapted layers of a module by plain ones with the weights W + s B A, in place.

    Outputs stay the same up to rounding.

    Returns:
        The number of layers.
    """
    layers = adapted_layers(module)
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, _merged(layer))
    return len(layers)


def _merged(layer: Adapted) -> nn.Linear | nn.Conv2d:
    weight = layer.weight.double()
    for update in updates_of(layer):
        weight = weight + update.delta(torch.float64)
    layer.weight.copy_(weight)
    plain = nn.Linear if isinstance(layer, AdaptedLinear) else nn.Conv2d
    merged = plain(**_arguments_of(layer))
    merged.weight, merged.bias = layer.weight, layer.bias
    return merged.train(layer.training)


def _arguments_of(layer: nn.Linear | nn.Conv2d) -> dict[str, Any]:
    """Arguments that construct a layer of the same kind, without memory for its weights."""
    linear = ("in_features", "out_features")
    conv = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    names = linear if isinstance(layer, nn.Linear) else (*conv, "padding_mode")
    arguments = {name: getattr(layer, name) for name in names}
    return {**arguments, "bias": layer.bias is not None, "device": "meta"}
