"""RecycleLoRA (Cho et al., CVPR 2026 Findings): updates from a pivoted QR decomposition."""

from __future__ import annotations

from collections.abc import Mapping

import scipy.linalg
import torch
from torch import Tensor

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
    subtract_updates,
)

MAIN, SUB = "recycle_main", "recycle_sub"
"""Names of the updates: of the minor and of the major directions."""


class Recycle(LowRankAdapter):
    """Its factors have no weight decay, and those of the sub updates a learning rate of their own.

    Args:
        sub_lr_factor: of that learning rate.
    """

    def __init__(self, sub_lr_factor: float) -> None:
        super().__init__(fit_recycle)
        self.sub_lr_factor = sub_lr_factor

    def param_group_options(self) -> Mapping[str, Mapping[str, float]]:
        return {
            f"*.updates.{MAIN}": {"weight_decay": 0.0},
            f"*.updates.{SUB}": {"weight_decay": 0.0, "lr_factor": self.sub_lr_factor},
        }


def fit_recycle(layer: Adapted) -> None:
    """Set the updates from W P = Q R with column pivoting, where |R_ii| falls; W becomes the rest.

    B (out, r) is the last (main) or the first (sub) r columns of Q, of which there are
    min(out, in); A (r, in) is 0 but for a 1 in each row, at the pivot of that column.
    """
    q, pivots = pivoted_qr(layer.weight.double())
    for name, update in layer.updates.items():
        assert isinstance(update, LowRankUpdate)
        first = q.shape[1] - update.rank if name == MAIN else 0
        chosen = slice(first, first + update.rank)
        a = torch.zeros(update.lora_A.shape, dtype=torch.float64)
        a[torch.arange(update.rank), pivots[chosen]] = 1
        update.set_factors([(a, q[:, chosen])])
    subtract_updates(layer)


def pivoted_qr(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Q (out, min(out, in)) and the pivots, int64 (in), of the QR decomposition with pivoting."""
    outer, r = None, weight
    if len(weight) > weight.shape[1]:
        # A decomposition without pivoting is fast, and leaves a smaller matrix of the same norms.
        outer, r = torch.linalg.qr(weight)
    inner, _, pivots = scipy.linalg.qr(r.cpu().numpy(), pivoting=True, mode="economic")
    q = torch.from_numpy(inner).to(weight)
    return q if outer is None else outer @ q, torch.from_numpy(pivots).long()


def recycle(cfg: CfgNode, layers: AdaptedLayers) -> Adapter:
    """A main update of minor directions and a sub update of major ones, of all linear layers."""
    require_transformer("recycle", layers)
    options = cfg.MODEL.BACKBONE.ADAPTER.RECYCLE
    ranks = {MAIN: options.RANK, SUB: options.SUB_RANK}
    scale = options.ALPHA / sum(ranks.values())

    def make(weight: Tensor, parts: int) -> Mapping[str, LowRankUpdate]:
        return {name: LowRankUpdate(weight, r, scale) for name, r in ranks.items() if r > 0}

    key = "MODEL.BACKBONE.ADAPTER.RECYCLE.FIRST_BLOCK"
    add_updates(layers, make, first_block=options.FIRST_BLOCK, key=key)
    adapter = Recycle(options.SUB_LR_FACTOR)
    for block in layers.blocks:
        adapter.fit(block)
    return adapter


ADAPTER_REGISTRY.register(recycle)
