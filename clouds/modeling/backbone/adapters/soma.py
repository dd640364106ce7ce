"""SoMA (Yun et al., CVPR 2025): low-rank updates along the smallest singular values of a weight.

Along the largest, its ablation, they are those of PiSSA (Meng et al., NeurIPS 2024).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import scipy.linalg
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


def factors_of(
    weight: Tensor, rank: int, scale: float, largest: bool = False
) -> tuple[Tensor, Tensor]:
    """Factors whose product `scale` B A is the part of the `rank` smallest singular values.

    A (rank, in) and B (out, rank), falling singular values: A = sqrt(S / scale) Vᵀ and
    B = U sqrt(S / scale).

    Args:
        weight: (out, in), float64.
        rank: number of singular values.
        scale: s of the update.
        largest: of the largest singular values instead.
    """
    tall = weight if len(weight) >= weight.shape[1] else weight.T
    # A fifth of the time of a decomposition of the weight: the eigenvectors of these values alone,
    # then a decomposition of what the weight makes of them, since eigenvalues are squares.
    first = tall.shape[1] - rank if largest else 0
    gram = (tall.T @ tall).cpu().numpy()
    _, vectors = scipy.linalg.eigh(gram, subset_by_index=(first, first + rank - 1))
    v = torch.from_numpy(vectors).to(tall)
    u, s, rotation = torch.linalg.svd(tall @ v, full_matrices=False)
    root = (s / scale).sqrt()
    left, right = u * root, root[:, None] * (rotation @ v.T)
    return (right, left) if tall is weight else (left.T, right.T)


def soma(cfg: CfgNode, layers: AdaptedLayers) -> Adapter:
    """Updates of the query, key and value projections each, and of the other linear layers.

    The biases of these layers train as well.
    """
    require_transformer("soma", layers)
    options = cfg.MODEL.BACKBONE.ADAPTER.SOMA
    scale = options.ALPHA / options.RANK
    largest = options.COMPONENTS == "largest"

    def make(weight: Tensor, parts: int) -> Mapping[str, LowRankUpdate]:
        update = LowRankUpdate(weight, options.RANK, scale, parts)
        if options.START == "published":
            # The published code decomposes torch's initial matrix, and subtracts nothing.
            _set_factors(update, _initial_matrix(weight, parts), largest)
        return {UPDATE_NAMES[options.START]: update}

    key = "MODEL.BACKBONE.ADAPTER.SOMA.FIRST_BLOCK"
    for layer in add_updates(layers, make, first_block=options.FIRST_BLOCK, key=key):
        if layer.bias is not None:
            layer.bias.requires_grad_(True)
    for block in layers.blocks[options.FIRST_BLOCK :]:
        for name, parameter in block.named_parameters():
            if name.rpartition(".")[2] in QKV_BIASES:
                parameter.requires_grad_(True)
    adapter = LowRankAdapter(
        functools.partial(_fit, largest=largest) if options.START == "paper" else None
    )
    for block in layers.blocks:
        adapter.fit(block)
    return adapter


def _fit(layer: Adapted, largest: bool) -> None:
    """Set the update to its part of the weight, and the weight to the rest."""
    for update in updates_of(layer):
        _set_factors(update, layer.weight, largest)
    subtract_updates(layer)


@torch.no_grad()
def _set_factors(update: LowRankUpdate, matrix: Tensor, largest: bool) -> None:
    if has_values(matrix):
        parts = matrix.double().chunk(update.parts)
        update.set_factors(factors_of(p, update.rank, update.scale, largest) for p in parts)


def _initial_matrix(weight: Tensor, parts: int) -> Tensor:
    """Initial values of `nn.Linear` for each part of a weight of this shape."""
    matrix = torch.empty_like(weight)
    for part in matrix.chunk(parts):
        nn.init.kaiming_uniform_(part, a=math.sqrt(5))
    return matrix


ADAPTER_REGISTRY.register(soma)
