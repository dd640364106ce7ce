"""Vision transformers of CLIP as backbones, with CLIP's text encoder.

The image encoder is a transformer of timm, as in `ViTBackbone`, with the weights of open_clip's; so
adapters, position resizing and pyramids are the same as of other vision transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clouds.d2 import BACKBONE_REGISTRY, CfgNode, ShapeSpec, configurable
from clouds.modeling.backbone.adapters import build_adapter
from clouds.modeling.backbone.base import binary_masks_at
from clouds.modeling.backbone.clip_text import CLIPText
from clouds.modeling.backbone.open_clip_models import create_clip, pixel_statistics
from clouds.modeling.backbone.timm_backbones import create_transformer, vit_options
from clouds.modeling.backbone.timm_models import convert, load_converted
from clouds.modeling.backbone.vit import STAGES, ViTBackbone


@BACKBONE_REGISTRY.register()
class CLIPViT(CLIPText, ViTBackbone):
    """A CLIP vision transformer whose image embedding is that of the class token.

    Its features are those of `ViTBackbone`, and two of stride 16 that `embed_masks` reads: the
    patch tokens (`clip_vis_dense`) and the class token (`clip_vis_class`, one pixel) before the
    last quarter of the blocks.

    The text encoder and the projection of the image embedding never train.

    Args:
        clip_model: open_clip's model; its image encoder is not used.
        model_name: open_clip's name of it.
        transformer: timm's transformer, with CLIP's final norm and projection as its head.
        options: arguments of `ViTBackbone`.
    """

    @configurable
    def __init__(
        self, *, clip_model: nn.Module, model_name: str, transformer: Any, **options: Any
    ) -> None:
        super().__init__(transformer=transformer, **options)
        self.model_name = model_name
        clip_model.visual = nn.Identity()
        self.clip_model = clip_model.requires_grad_(False).eval()
        depth = len(transformer.blocks)
        self.first_mask_block = depth - max(1, depth // 4)
        if self.first_mask_block == 0:
            raise ValueError(f"CLIP {model_name} has {depth} block; two or more are needed")
        channels = self._out_feature_channels[STAGES[0]]
        for name in ("clip_vis_dense", "clip_vis_class"):
            self._out_features.append(name)
            self._out_feature_strides[name] = self.patch_size
            self._out_feature_channels[name] = channels
        self.train(self.training)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> dict[str, Any]:
        name, pretrained = (
            cfg.MODEL.CLOUDS.CLIP_MODEL_NAME,
            cfg.MODEL.CLOUDS.CLIP_PRETRAINED_WEIGHTS,
        )
        clip_model = create_clip(name, pretrained)
        mean, std = pixel_statistics(name, pretrained)
        return {
            "clip_model": clip_model,
            "model_name": name,
            "transformer": timm_tower(cfg, clip_model, name),
            "pixel_mean": mean,
            "pixel_std": std,
            "frozen": cfg.MODEL.BACKBONE.FREEZE,
            "make_adapter": partial(build_adapter, cfg),
            **vit_options(cfg),
        }

    def blocks(self) -> list[list[nn.Module]]:
        """See `HasBlocks`; the text encoder is before the image encoder's blocks."""
        return [*self.text_blocks(), *super().blocks()]

    def train(self, mode: bool = True) -> CLIPViT:
        super().train(mode)
        if hasattr(self, "clip_model"):  # not yet, while the base class is built
            self.clip_model.eval()
        return self

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """
        Args:
            x: see `ViTBackbone.forward`.

        Returns:
            name -> (N, C, H / stride, W / stride); of `clip_vis_class` (N, C, 1, 1).
        """
        before = self.first_mask_block - 1
        tokens, grid = self.tokens_after(x, {*self.out_blocks, before})
        features = self.pyramid([self.to_map(tokens[i], grid) for i in self.out_blocks])
        return {
            **dict(zip(STAGES, features, strict=True)),
            "clip_vis_dense": self.to_map(tokens[before], grid),
            "clip_vis_class": tokens[before][:, 0, :, None, None],
        }

    def embed_masks(
        self, features: Mapping[str, Tensor], mask_logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """CLIP's image embeddings of the regions of masks, see `TextEncoder`.

        For each mask a copy of the class token passes the last quarter of the blocks, in which it
        sees itself and the patches of the mask alone; the other tokens do not see it. So a mask of
        everything is embedded as the image is, and one without a patch by its copy alone.
        """
        dense = features["clip_vis_dense"]
        masks = binary_masks_at(dense, mask_logits)
        n, q = masks.shape[:2]
        class_token = features["clip_vis_class"].flatten(2).transpose(1, 2)  # (N, 1, C)
        tokens = torch.cat(
            (class_token, dense.flatten(2).transpose(1, 2), class_token.expand(n, q, -1)), dim=1
        )
        allowed = attention_of_masks(masks.flatten(2))
        rope = self.rotary_positions((dense.shape[-2], dense.shape[-1]))
        rope = None if rope is None else with_unrotated(rope, q)
        for i in range(self.first_mask_block, len(self.transformer.blocks)):
            tokens = self.run_block(i, tokens, rope, attn_mask=allowed, num_queries=q)
        t = self.transformer
        embeddings: Tensor = t.head(t.fc_norm(t.norm(tokens[:, -q:])))
        return embeddings, masks.flatten(2).any(-1)


def attention_of_masks(masks: Tensor) -> Tensor:
    """Who attends to whom among a class token, patches, and a query for each mask.

    Args:
        masks: bool (N, Q, L), the patches of each mask.

    Returns:
        bool (N, 1, 1 + L + Q, 1 + L + Q): rows attend to columns. Class token and patches attend
        to each other, queries to themselves and to the patches of their masks.
    """
    n, q, patches = masks.shape
    own = torch.eye(q, dtype=torch.bool, device=masks.device).expand(n, q, q)
    no_class = masks.new_zeros(n, q, 1)
    queries = torch.cat((no_class, masks, own), dim=-1)
    image = torch.cat(
        (masks.new_ones(n, 1 + patches, 1 + patches), masks.new_zeros(n, 1 + patches, q)), dim=-1
    )
    return torch.cat((image, queries), dim=1)[:, None]


def with_unrotated(rope: Tensor, count: int) -> Tensor:
    """Rotary positions (..., L, 2 D), sines and cosines, with `count` more that do not rotate."""
    shape = (*rope.shape[:-2], count, rope.shape[-1] // 2)
    return torch.cat((rope, torch.cat((rope.new_zeros(shape), rope.new_ones(shape)), -1)), dim=-2)


def timm_tower(cfg: CfgNode, clip_model: Any, model_name: str) -> nn.Module:
    """The image encoder of an open_clip model as a transformer of timm, with the same weights.

    Raises:
        ValueError: it is no vision transformer whose class token becomes the embedding.
    """
    visual = clip_model.visual
    if hasattr(visual, "trunk"):
        if len(visual.head) or not hasattr(visual.trunk, "blocks"):
            raise _not_supported(model_name)
        name = visual.trunk.pretrained_cfg["architecture"]
        if visual.trunk.global_pool != "token":
            raise _not_supported(model_name)
        head = {"num_classes": visual.trunk.num_classes, "global_pool": "token"}
        transformer = create_transformer(cfg, name, **head)
    else:
        transformer = _own_tower(cfg, visual, model_name)
    weights = {f"visual.{key}": value for key, value in visual.state_dict().items()}
    converted = convert(weights, transformer, cfg.MODEL.BACKBONE.RESIZE)
    load_converted(transformer, converted, f"the image encoder of CLIP {model_name}", unused=())
    return transformer


def _own_tower(cfg: CfgNode, visual: Any, model_name: str) -> nn.Module:
    """timm's form of open_clip's own vision transformer, with random weights."""
    from timm.models.vision_transformer import VisionTransformer

    standard = (
        getattr(visual, "pool_type", "") == "tok" and getattr(visual, "proj", None) is not None
    )
    if not standard or getattr(visual, "attn_pool", None) is not None:
        raise _not_supported(model_name)
    options = cfg.MODEL.BACKBONE
    block, width = visual.transformer.resblocks[0], visual.conv1.out_channels
    transformer: nn.Module = VisionTransformer(
        img_size=options.IMG_SIZE,
        patch_size=options.PATCH_SIZE,
        num_classes=visual.proj.shape[1],
        global_pool="token",
        embed_dim=width,
        depth=len(visual.transformer.resblocks),
        num_heads=block.attn.num_heads,
        mlp_ratio=block.mlp.c_fc.out_features / width,
        pre_norm=True,
        drop_path_rate=options.DROP_PATH,
        norm_layer=partial(nn.LayerNorm, eps=block.ln_1.eps),
        act_layer=type(block.mlp.gelu),
    )
    return transformer


def _not_supported(model_name: str) -> ValueError:
    return ValueError(
        f"MODEL.CLOUDS.CLIP_MODEL_NAME is {model_name!r}, and the backbone CLIPViT needs a vision "
        "transformer whose class token becomes the image embedding, such as ViT-B-16, ViT-L-14-336 "
        "or EVA02-L-14-336. ConvNeXt and ResNet models are the backbone CLIP; those with attention "
        "pooling, such as SigLIP's, are the backbone ViT, without a text encoder."
    )
