"""SoMA (Yun et al., CVPR 2025): low-rank updates along the smallest singular values of a weight."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from clouds.d2 import CfgNode
from clouds.modeling.backbone.adapters.base import (
    ADAPTER_REGISTRY,
    AdaptedLayers,
    Adapter,
    require_transformer,
)
from clouds.modeling.backbone.adapters.low_rank import (
    Adapted,
    LowRankAdapter,
    LowRankUpdate,
    add_updates,
    has_values,
    subtract_updates,
    updates_of,
)

QKV_BIASES = ("q_bias", "v_bias")
"""Biases of a fused query, key and value projection that are no part of the layer, as in EVA."""

UPDATE_NAMES = {"paper": "soma", "published": "soma_added"}
"""Name of the update by MODEL.BACKBONE.ADAPTER.SOMA.START. The weight beside `soma` is what is left
of the pretrained one, that beside `soma_added` the pretrained one as a whole; with different names,
no checkpoint is read as the other kind."""


def minor_factors(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Factors whose product `scale` B A is the part of the `rank` smallest singular values.

    A (rank, in) and B (out, rank), falling singular values: A = sqrt(S / scale) Vᵀ and
    B = U sqrt(S / scale).
    """
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (s[-rank:] / scale).sqrt()
    return root[:, None] * vh[-rank:], u[:, -rank:] * root


def soma(cfg: CfgNode, layers: AdaptedLayers) -> Adapter:
    """Updates of the query, key and value projections each, and of the other linear layers.

    The biases of these layers train as well.
    """
    require_transformer("soma", layers)
    options = cfg.MODEL.BACKBONE.ADAPTER.SOMA
    scale = options.ALPHA / options.RANK

    def make(weight: Tensor, parts: int) -> Mapping[str, LowRankUpdate]:
        update = LowRankUpdate(weight, options.RANK, scale, parts)
        if options.START == "published":
            # The published code decomposes torch's initial matrix, and subtracts nothing.
            _set_minor_factors(update, _initial_matrix(weight, parts))
        return {UPDATE_NAMES[options.START]: update}

    key = "MODEL.BACKBONE.ADAPTER.SOMA.FIRST_BLOCK"
    for layer in add_updates(layers, make, first_block=options.FIRST_BLOCK, key=key):
        if layer.bias is not None:
            layer.bias.requires_grad_(True)
    for block in layers.blocks[options.FIRST_BLOCK :]:
        for name, parameter in block.named_parameters():
            if name.rpartition(".")[2] in QKV_BIASES:
                parameter.requires_grad_(True)
    adapter = LowRankAdapter(_fit if options.START == "paper" else None)
    for block in layers.blocks:
        adapter.fit(block)
    return adapter


def _fit(layer: Adapted) -> None:
    """Set the update to the minor part of the weight, and the weight to the rest."""
    for update in updates_of(layer):
        _set_minor_factors(update, layer.weight)
    subtract_updates(layer)


@torch.no_grad()
def _set_minor_factors(update: LowRankUpdate, matrix: Tensor) -> None:
    if has_values(matrix):
        parts = matrix.double().chunk(update.parts)
        update.set_factors(minor_factors(p, update.rank, update.scale) for p in parts)


def _initial_matrix(weight: Tensor, parts: int) -> Tensor:
    """Initial values of `nn.Linear` for each part of a weight of this shape."""
    matrix = torch.empty_like(weight)
    for part in matrix.chunk(parts):
        nn.init.kaiming_uniform_(part, a=math.sqrt(5))
    return matrix


ADAPTER_REGISTRY.register(soma)
