"""Vision transformers of timm as backbones, with a feature pyramid of strides 4 to 32.

All have the modules of timm's `VisionTransformer` (DINOv2, CLIP, SigLIP), `Eva` (EVA02, DINOv3, PE;
rotary positions) or `VisionTransformerSAM` (SAM's encoder; windows). The blocks are run here, one
by one, because adapters act between them, and because positions are resized as published
segmentation networks do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from clouds.d2 import Backbone
from clouds.modeling.backbone.adapters import AdaptedLayers, Adapter, MakeAdapter
from clouds.modeling.backbone.vit_pyramid import STRIDES, build_pyramid
from clouds.modeling.backbone.vit_resize import resize_positions

STAGES = ("res2", "res3", "res4", "res5")


def proportional_blocks(depth: int) -> tuple[int, ...]:
    """Indices, from 0, of the blocks after which four maps are taken.

    Of 24 blocks those of published code, 7, 11, 15, 23; else a quarter apart, as 2, 5, 8, 11 of 12.
    """
    if depth == 24:
        return (7, 11, 15, 23)
    return tuple(-(-k * depth // 4) - 1 for k in (1, 2, 3, 4))


class ViTBackbone(Backbone):
    """A plain vision transformer with the features `res2` to `res5` (strides 4, 8, 16, 32).

    A frozen one stays in evaluation mode, so without drop path, and its weights get no gradient; a
    learned pyramid and an adapter train all the same. What the features do not need never trains:
    final norm, head, and the blocks after the last map.

    Args:
        transformer: timm's `VisionTransformer`, `Eva` or `VisionTransformerSAM`.
        pixel_mean, pixel_std: of the images that it was trained on, RGB, 0-255.
        out_blocks: four indices of blocks in rising order, see `proportional_blocks`, the default.
        pyramid: 'plain', 'learned' or 'neck', see `build_pyramid`.
        positions: how position embeddings are resized to the image, see `resize_positions`.
        frozen: whether the transformer's own weights do not train.
        activation_checkpointing: keep only the tokens between blocks for the backward pass, which
            computes the blocks again.
        make_adapter: makes the adapter; None: nothing trains but what `frozen` says.

    Attributes:
        adapter: acts on the patch tokens after each block, and may have changed the blocks.
    """

    transformer: Any

    def __init__(
        self,
        *,
        transformer: Any,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        out_blocks: Sequence[int] = (),
        pyramid: str = "plain",
        positions: str = "bicubic",
        frozen: bool = True,
        activation_checkpointing: bool = False,
        make_adapter: MakeAdapter | None = None,
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.transformer = transformer
        self.pixel_mean, self.pixel_std = tuple(pixel_mean), tuple(pixel_std)
        depth = len(transformer.blocks)
        self.out_blocks = tuple(out_blocks) or proportional_blocks(depth)
        _check_blocks(self.out_blocks, depth)
        self.patch_size = int(transformer.patch_embed.patch_size[0])
        channels = int(transformer.embed_dim)
        self.pyramid = build_pyramid(pyramid, channels, self.patch_size)
        self.positions = positions
        self._out_features = list(STAGES)
        self._out_feature_strides = dict(zip(STAGES, STRIDES, strict=True))
        self._out_feature_channels = dict.fromkeys(STAGES, channels)
        transformer.requires_grad_(False)
        self.adapter = Adapter() if make_adapter is None else make_adapter(self._adapted_layers())
        self.frozen = frozen and not self.adapter.trains_backbone
        if not self.frozen:
            for parameter in self.feature_parameters():
                parameter.requires_grad_(True)
        self.train(self.training)

    @property
    def num_prefix_tokens(self) -> int:
        """Class and register tokens, which come before the patch tokens."""
        return int(getattr(self.transformer, "num_prefix_tokens", 0))

    @property
    def size_divisibility(self) -> int:
        return STRIDES[-1]

    def _adapted_layers(self) -> AdaptedLayers:
        blocks = list(self.transformer.blocks[: self.out_blocks[-1] + 1])
        return AdaptedLayers(
            backbone=type(self.transformer).__name__,
            names=[f"transformer.blocks.{i}" for i in range(len(blocks))],
            blocks=blocks,
            widths=[int(self.transformer.embed_dim)] * len(blocks),
            root="transformer",
            is_transformer=True,
        )

    def param_group_options(self) -> Mapping[str, Mapping[str, float]]:
        """Those of the adapter, see `clouds.engine.optimizer.TrainableGroups`."""
        return self.adapter.param_group_options()

    def blocks(self) -> list[list[nn.Module]]:
        """See `HasBlocks`."""
        return [[block] for block in self.transformer.blocks]

    def feature_parameters(self) -> list[nn.Parameter]:
        """The transformer's parameters that the features depend on."""
        t = self.transformer
        tokens = (getattr(t, name, None) for name in ("cls_token", "reg_token", "pos_embed"))
        parts = (t.patch_embed, t.norm_pre, *t.blocks[: self.out_blocks[-1] + 1])
        return [token for token in tokens if token is not None] + [
            parameter for part in parts for parameter in part.parameters()
        ]

    def train(self, mode: bool = True) -> ViTBackbone:
        super().train(mode)
        if self.frozen:
            self.transformer.eval()
        return self

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """
        Args:
            x: normalized images (N, 3, H, W); sizes that are no multiple of the patch size are
                padded with zeros on the right and below.

        Returns:
            name -> (N, C, H / stride, W / stride), rounded down, of the padded H and W.
        """
        return dict(zip(STAGES, self.pyramid(self.maps(x)), strict=True))

    def maps(self, x: Tensor) -> list[Tensor]:
        """The patch tokens after `out_blocks`, as maps (N, C, H / patch size, W / patch size)."""
        tokens, grid = self.tokens_after(x, set(self.out_blocks))
        return [self.to_map(tokens[i], grid) for i in self.out_blocks]

    def tokens_after(
        self, x: Tensor, blocks: Collection[int]
    ) -> tuple[dict[int, Tensor], tuple[int, int]]:
        """All tokens, in the form of `embed`, after each of `blocks`; rows and columns of patches.

        Args:
            x: see `forward`.
            blocks: indices of blocks; the last one is the last that is computed.
        """
        # Without a parameter that trains nothing is recorded for images that require a gradient.
        parts = (self.transformer, self.adapter)
        trains = any(p.requires_grad for part in parts for p in part.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            tokens, grid = self.embed(pad_to_patches(x, self.patch_size))
            rope = self.rotary_positions(grid)
            after = {}
            for i in range(max(blocks) + 1):
                if self.activation_checkpointing and torch.is_grad_enabled():
                    tokens = checkpoint(self.run_block, i, tokens, rope, use_reentrant=False)
                else:
                    tokens = self.run_block(i, tokens, rope)
                if i in blocks:
                    after[i] = tokens
        return after, grid

    def to_map(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """The patch tokens among all tokens as a map (N, C, rows, columns)."""
        patches = self.patches(tokens)
        return patches.transpose(1, 2).reshape(tokens.shape[0], -1, *grid)

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens before the first block, and rows and columns of patches.

        Args:
            x: images (N, 3, H, W), H and W multiples of the patch size.

        Returns:
            (N, P + rows * columns, C), P of `num_prefix_tokens`; SAM's are (N, rows, columns, C).
        """
        t = self.transformer
        patches = t.patch_embed.proj(x)
        rows, columns = patches.shape[-2:]
        tokens = t.patch_embed.norm(patches.flatten(2).transpose(1, 2))
        positions = self.positions_for((rows, columns))
        if positions is not None and positions.shape[1] == tokens.shape[1]:
            tokens, positions = tokens + positions, None
        prefix = (getattr(t, name, None) for name in ("cls_token", "reg_token"))
        expanded = [token.expand(x.shape[0], -1, -1) for token in prefix if token is not None]
        tokens = torch.cat((*expanded, tokens), dim=1)
        if positions is not None:
            tokens = tokens + positions
        tokens = t.norm_pre(t.pos_drop(tokens))
        return (tokens.unflatten(1, (rows, columns)) if self._is_sam else tokens), (rows, columns)

    def positions_for(self, size: tuple[int, int]) -> Tensor | None:
        """Position embeddings (1, T, C) for rows and columns of patches; None: there are none.

        T counts the patches, and the class token (and registers) if these have positions as well.
        """
        table = self.transformer.pos_embed
        if table is None:
            return None
        grid = self.transformer.patch_embed.grid_size
        return resize_positions(table.flatten(1, -2), grid, size, self.positions)

    def rotary_positions(self, size: tuple[int, int]) -> Tensor | None:
        """Sines and cosines of rotary positions for all blocks, or for each; None: not used."""
        rope = getattr(self.transformer, "rope", None)
        return None if rope is None else rope.get_embed(shape=size)

    def run_block(
        self,
        index: int,
        tokens: Tensor,
        rope: Tensor | None,
        attn_mask: Tensor | None = None,
        num_queries: int = 0,
    ) -> Tensor:
        """Tokens after a block and the adapter behind it; in the form of `embed`.

        Args:
            index: of the block.
            tokens: those before it.
            rope: see `rotary_positions`.
            attn_mask: bool, which token attends to which; None: all to all.
            num_queries: number of tokens behind the patches, which the adapter does not see.
        """
        options: dict[str, Any] = {} if attn_mask is None else {"attn_mask": attn_mask}
        if rope is not None:
            per_block = getattr(self.transformer, "rope_mixed", False)
            options["rope"] = rope[index] if per_block else rope
        tokens = self.transformer.blocks[index](tokens, **options)
        if not self.adapter.acts_on_tokens or index > self.out_blocks[-1]:
            return tokens
        if self._is_sam:
            adapted = self.adapter.after_block(index, tokens.flatten(1, 2))
            return adapted.view_as(tokens)
        first, end = self.num_prefix_tokens, tokens.shape[1] - num_queries
        adapted = self.adapter.after_block(index, tokens[:, first:end])
        return torch.cat((tokens[:, :first], adapted, tokens[:, end:]), dim=1)

    def patches(self, tokens: Tensor) -> Tensor:
        """The patch tokens (N, L, C) among all tokens."""
        return tokens.flatten(1, 2) if self._is_sam else tokens[:, self.num_prefix_tokens :]

    @property
    def _is_sam(self) -> bool:
        return hasattr(self.transformer, "neck")


def _check_blocks(blocks: Sequence[int], depth: int) -> None:
    if len(blocks) == len(STAGES) and sorted(blocks) == list(blocks) and max(blocks) < depth:
        return
    raise ValueError(
        f"MODEL.BACKBONE.OUT_BLOCKS is {tuple(blocks)}; four indices of the transformer's {depth} "
        f"blocks are needed, from 0 to {depth - 1} in rising order, such as "
        f"{proportional_blocks(depth)}."
    )


def pad_to_patches(x: Tensor, patch_size: int) -> Tensor:
    """Images (N, 3, H, W), padded with zeros on the right and below to whole patches.

    They are at least as large as the largest stride of the pyramid.
    """
    # Not -(-side // patch_size): ONNX, into which this is exported, divides towards zero.
    height, width = (
        max(STRIDES[-1], (side + patch_size - 1) // patch_size * patch_size)
        for side in x.shape[-2:]
    )
    return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))
