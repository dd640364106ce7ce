"""Rein (Wei et al., CVPR 2024): learned tokens that refine the features after each block.

Names of parameters are those of published checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clouds.d2 import CfgNode
from clouds.modeling.backbone.adapters.base import ADAPTER_REGISTRY, AdaptedLayers, Adapter

PATCH_SIZE = 16
"""Side of a patch, pixels, in the formula of the tokens' initial range; in all published recipes
16."""

INITIAL_SCALE = 0.001

UNDECAYED = ("learnable_tokens", "learnable_tokens_a", "learnable_tokens_b", "scale")
"""Parameters without weight decay, as published."""


class ReinTokens(nn.Module):
    """Tokens of several layers of one width, and what computes a layer's refinement with them.

    Args:
        num_layers: layers that have tokens of their own; the linear layers are shared.
        width: channels C of the features.
        num_tokens: m of each layer.
        rank: r of the factors of the tokens, (m, r) and (r, C); 0: tokens without factors.
        softmax: of the similarities, which are then divided by sqrt(C).
        zero_start: the refinement is 0 at first, and has no learned scale.
    """

    scale: Tensor | float

    def __init__(
        self,
        num_layers: int,
        width: int,
        num_tokens: int,
        rank: int,
        softmax: bool = True,
        zero_start: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.softmax = width, softmax
        side = 3 * PATCH_SIZE**2
        if rank > 0:
            bound = math.sqrt(6 / (side + math.sqrt(width * rank)))
            a, b = torch.empty(num_layers, num_tokens, rank), torch.empty(num_layers, rank, width)
            self.learnable_tokens_a = nn.Parameter(nn.init.uniform_(a, -bound, bound))
            self.learnable_tokens_b = nn.Parameter(nn.init.uniform_(b, -bound, bound))
        else:
            bound = math.sqrt(6 / (side + width))
            tokens = torch.empty(num_layers, num_tokens, width)
            self.learnable_tokens = nn.Parameter(nn.init.uniform_(tokens, -bound, bound))
        self.mlp_token2feat = nn.Linear(width, width)
        self.mlp_delta_f = nn.Linear(width, width)
        if zero_start:
            nn.init.zeros_(self.mlp_delta_f.weight)
            nn.init.zeros_(self.mlp_delta_f.bias)
            self.scale = 1.0
        else:
            self.scale = nn.Parameter(torch.tensor(INITIAL_SCALE))

    def tokens(self, layers: slice | int = slice(None)) -> Tensor:
        """Tokens (m, C) of a layer, or (num_layers, m, C) of several."""
        if hasattr(self, "learnable_tokens"):
            return self.learnable_tokens[layers]
        return self.learnable_tokens_a[layers] @ self.learnable_tokens_b[layers]

    def refine(self, layer: int, features: Tensor) -> Tensor:
        """Features (N, L, C) after a layer -> refined ones.

        The first token takes part in the softmax alone: what it gets is dropped.
        """
        tokens = self.tokens(layer)
        similarity = features @ tokens.T
        if self.softmax:
            similarity = F.softmax(similarity / math.sqrt(self.width), dim=-1)
        delta = similarity[..., 1:] @ self.mlp_token2feat(tokens[1:])
        refined: Tensor = features + self.mlp_delta_f(delta + features) * self.scale
        return refined


def merge_queries(projected: Tensor, merge: nn.Linear) -> Tensor:
    """Object queries from the projected tokens of all layers: (num_layers, m, D) -> (m, D).

    `merge` reads maximum, mean and last layer of channel 0, then those of channel 1, and so on.
    """
    parts = (projected.amax(0), projected.mean(0), projected[-1])
    queries: Tensor = merge(torch.stack(parts, dim=-1).flatten(-2))
    return queries


class Rein(ReinTokens, Adapter):
    """Rein for the blocks of a transformer, with `ReinTokens`' arguments.

    Args:
        query_dim: channels D of the object queries; 0: the mask decoder has its own queries.
    """

    acts_on_tokens = True

    def __init__(
        self,
        num_layers: int,
        width: int,
        num_tokens: int,
        rank: int,
        query_dim: int = 0,
        softmax: bool = True,
        zero_start: bool = False,
    ) -> None:
        super().__init__(num_layers, width, num_tokens, rank, softmax, zero_start)
        self.query_dim = query_dim
        if query_dim > 0:
            self.transform = nn.Linear(width, query_dim)
            self.merge = nn.Linear(3 * query_dim, query_dim)

    def after_block(self, index: int, tokens: Tensor) -> Tensor:
        return self.refine(index, tokens)

    def object_queries(self) -> Tensor | None:
        if self.query_dim == 0:
            return None
        return merge_queries(self.transform(self.tokens()), self.merge)

    def param_group_options(self) -> Mapping[str, Mapping[str, float]]:
        return {f"adapter.{name}": {"weight_decay": 0.0} for name in UNDECAYED}


class ReinStages(Adapter):
    """Rein for the stages of a convolutional network: tokens of its own for each.

    Args:
        widths: channels after each stage.
        query_dim, options: as of `Rein`.
    """

    acts_on_tokens = True

    def __init__(self, widths: Sequence[int], query_dim: int, **options: int | bool) -> None:
        super().__init__()
        self.stages = nn.ModuleList(ReinTokens(1, w, **options) for w in widths)  # type: ignore[arg-type]
        self.query_dim = query_dim
        if query_dim > 0:
            self.transforms = nn.ModuleList(nn.Linear(width, query_dim) for width in widths)
            self.merge = nn.Linear(3 * query_dim, query_dim)

    def after_block(self, index: int, tokens: Tensor) -> Tensor:
        stage = self.stages[index]
        assert isinstance(stage, ReinTokens)
        return stage.refine(0, tokens)

    def object_queries(self) -> Tensor | None:
        if self.query_dim == 0:
            return None
        pairs = zip(self.transforms, self.stages, strict=True)
        projected = [transform(stage.tokens(0)) for transform, stage in pairs]  # type: ignore[operator]
        return merge_queries(torch.stack(projected), self.merge)

    def param_group_options(self) -> Mapping[str, Mapping[str, float]]:
        return {f"adapter.stages.*.{name}": {"weight_decay": 0.0} for name in UNDECAYED}


def rein(cfg: CfgNode, layers: AdaptedLayers) -> Adapter:
    """Rein after each block, or after each stage."""
    options = cfg.MODEL.BACKBONE.ADAPTER.REIN
    query_dim = cfg.MODEL.MASK_FORMER.HIDDEN_DIM if options.LINK_QUERIES else 0
    arguments = {
        "num_tokens": options.NUM_TOKENS,
        "rank": options.RANK,
        "softmax": options.SOFTMAX,
        "zero_start": options.ZERO_START,
    }
    if layers.is_transformer:
        return Rein(len(layers.blocks), layers.widths[0], query_dim=query_dim, **arguments)
    return ReinStages(layers.widths, query_dim, **arguments)


ADAPTER_REGISTRY.register(rein)
