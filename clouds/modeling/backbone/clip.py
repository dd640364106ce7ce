"""The CLIP image encoder as a backbone of dense features (paper section 3.1).

It also keeps CLIP's text encoder and projection, from which the text classifier and the zero-shot
class of a mask are made.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clouds.d2 import BACKBONE_REGISTRY, Backbone, CfgNode, ShapeSpec, configurable
from clouds.modeling.backbone.adapters import (
    AdaptedLayers,
    Adapter,
    MakeAdapter,
    build_adapter,
)
from clouds.modeling.backbone.base import binary_masks_at, pool_masks
from clouds.modeling.backbone.clip_text import CLIPText
from clouds.modeling.backbone.open_clip_models import PIXEL_MEAN, PIXEL_STD, create_clip
from clouds.ops import convnext

STAGES = ("res2", "res3", "res4", "res5")


@BACKBONE_REGISTRY.register()
class CLIP(CLIPText, Backbone):
    """CLIP ConvNeXt or ResNet from open_clip.

    Its features are `stem` (stride 4, ConvNeXt; 2, ResNet), `res2` to `res5` (strides 4 to 32) and
    `clip_vis_dense` (stride 32), the map that CLIP's own pooling reads.

    A frozen one stays in evaluation mode, and records a gradient for its adapter alone. With
    `frozen=False` the layers that make the features train (batch statistics of a ResNet stay as
    they are); the text encoder and the projections never do.
    """

    pixel_mean, pixel_std = PIXEL_MEAN, PIXEL_STD

    @configurable
    def __init__(
        self,
        *,
        clip_model: nn.Module,
        model_name: str,
        frozen: bool = True,
        make_adapter: MakeAdapter | None = None,
    ) -> None:
        super().__init__()
        self.model_name = model_name
        self.clip_model = clip_model
        visual = self.clip_model.visual
        self.is_convnext = hasattr(visual, "trunk") and hasattr(visual.trunk, "stages")
        if not self.is_convnext and not hasattr(visual, "layer4"):
            raise ValueError(
                f"CLIP {model_name} is neither a ConvNeXt nor a ResNet: it has no feature pyramid. "
                "For a vision transformer set MODEL.BACKBONE.NAME CLIPViT."
            )
        names = self._out_features = ["stem", *STAGES, "clip_vis_dense"]
        strides = (4 if self.is_convnext else 2, 4, 8, 16, 32, 32)
        self._out_feature_strides = dict(zip(names, strides, strict=True))
        self._out_feature_channels = dict(zip(names, self._widths(), strict=True))
        clip_model.requires_grad_(False)
        self.adapter = Adapter() if make_adapter is None else make_adapter(self._adapted_layers())
        self.frozen = frozen and not self.adapter.trains_backbone
        if (
            self.frozen
        ):  # pixels with all their channels, as its layers compute: nothing is turned round
            visual.to(memory_format=torch.channels_last)
        else:
            for layer in self._feature_layers():
                layer.requires_grad_(True)
        self.train(self.training)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> dict[str, Any]:
        name = cfg.MODEL.CLOUDS.CLIP_MODEL_NAME
        return {
            "clip_model": create_clip(name, cfg.MODEL.CLOUDS.CLIP_PRETRAINED_WEIGHTS),
            "model_name": name,
            "frozen": cfg.MODEL.BACKBONE.FREEZE,
            "make_adapter": functools.partial(build_adapter, cfg),
        }

    def blocks(self) -> list[list[nn.Module]]:
        """See `HasBlocks`; the text encoder is before the image encoder's stages."""
        return [*self.text_blocks(), *([stage] for stage in self._adapted_layers().blocks)]

    @property
    def size_divisibility(self) -> int:
        return 32

    def train(self, mode: bool = True) -> CLIP:
        super().train(mode and not self.frozen)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """
        Args:
            x: normalized images (N, 3, H, W), H and W multiples of 32.

        Returns:
            name -> (N, C, H / stride, W / stride), channels last in memory where it is frozen.
        """
        if self.frozen:
            x = x.contiguous(memory_format=torch.channels_last)
        # Not inference mode: its tensors may take no part in what the head records.
        trains = any(p.requires_grad for p in self.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            return self._convnext(x) if self.is_convnext else self._resnet(x)

    def embed_masks(
        self, features: Mapping[str, Tensor], mask_logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """CLIP's image embeddings of the regions of masks, see `TextEncoder`.

        A mask without a pixel at the stride of `clip_vis_dense` is embedded as zeros (ConvNeXt) or
        as the whole image (ResNet).
        """
        dense = features["clip_vis_dense"]
        masks = binary_masks_at(dense, mask_logits)
        if self.is_convnext:
            embeddings = self._project_convnext(pool_masks(dense, masks))
        else:
            embeddings = self._attention_pool(dense, masks)
        return embeddings, masks.flatten(2).any(-1)

    def _adapted_layers(self) -> AdaptedLayers:
        visual = self.clip_model.visual
        root = "clip_model.visual"
        if self.is_convnext:
            root += ".trunk"
            stages = list(visual.trunk.stages)
            names = [f"{root}.stages.{i}" for i in range(len(stages))]
        else:
            stages = self._resnet_layers()
            names = [f"{root}.layer{i + 1}" for i in range(len(stages))]
        widths = [self._out_feature_channels[name] for name in STAGES]
        return AdaptedLayers(f"CLIP {self.model_name}", names, stages, widths, root, False)

    def param_group_options(self) -> Mapping[str, Mapping[str, float]]:
        """Those of the adapter, see `clouds.engine.optimizer.TrainableGroups`."""
        return self.adapter.param_group_options()

    def _widths(self) -> tuple[int, ...]:
        visual = self.clip_model.visual
        if self.is_convnext:
            stages = [info["num_chs"] for info in visual.trunk.feature_info]
            return (stages[0], *stages, stages[-1])
        stages = [layer[-1].bn3.num_features for layer in self._resnet_layers()]
        return (visual.conv3.out_channels, *stages, stages[-1])

    def _resnet_layers(self) -> list[Any]:
        visual = self.clip_model.visual
        return [visual.layer1, visual.layer2, visual.layer3, visual.layer4]

    def _feature_layers(self) -> list[nn.Module]:
        visual = self.clip_model.visual
        if self.is_convnext:
            return [visual.trunk.stem, visual.trunk.stages]
        stem = ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3")
        return [getattr(visual, name) for name in stem] + self._resnet_layers()

    def _convnext(self, x: Tensor) -> dict[str, Tensor]:
        trunk = self.clip_model.visual.trunk
        x = trunk.stem(x)
        features = {"stem": x}
        for i, (name, stage) in enumerate(zip(STAGES, trunk.stages, strict=True)):
            x = features[name] = self.adapter.after_stage(i, convnext.stage(stage, x))
        features["clip_vis_dense"] = trunk.norm_pre(x)
        return features

    def _resnet(self, x: Tensor) -> dict[str, Tensor]:
        visual = self.clip_model.visual
        for i in "123":
            conv, norm, act = (getattr(visual, part + i) for part in ("conv", "bn", "act"))
            x = act(norm(conv(x)))
        features = {"stem": x}
        x = visual.avgpool(x)
        stages = zip(STAGES, self._resnet_layers(), strict=True)
        for number, (name, layer) in enumerate(stages):
            x = features[name] = self.adapter.after_stage(number, layer(x))
        features["clip_vis_dense"] = x
        return features

    def _project_convnext(self, pooled: Tensor) -> Tensor:
        """(N, Q, C) -> (N, Q, embed_dim), each row as a 1x1 map through CLIP's own head."""
        visual = self.clip_model.visual
        n, q, c = pooled.shape
        embedding: Tensor = visual.head(visual.trunk.head(pooled.reshape(n * q, c, 1, 1)))
        return embedding.view(n, q, -1)

    def _attention_pool(self, dense: Tensor, inside: Tensor) -> Tensor:
        """CLIP's attention pool with one query per mask that sees the mask's pixels alone."""
        pool = self.clip_model.visual.attnpool
        n, c, h, w = dense.shape
        q = inside.shape[1]
        grid = round((pool.positional_embedding.shape[0] - 1) ** 0.5)
        position = pool.positional_embedding[1:].T.reshape(1, c, grid, grid)
        position = F.interpolate(position, size=(h, w), mode="bilinear", align_corners=False)
        keys = (dense + position).flatten(2).transpose(1, 2)  # (N, HW, C)
        query = dense.mean((2, 3)) + pool.positional_embedding[0]
        queries = query[:, None].expand(n, q, c)
        allowed = inside.flatten(2)
        allowed = allowed | ~allowed.any(-1, keepdim=True)

        def heads(x: Tensor) -> Tensor:
            return x.view(n, -1, pool.num_heads, c // pool.num_heads).transpose(1, 2)

        out = F.scaled_dot_product_attention(
            heads(pool.q_proj(queries)),
            heads(pool.k_proj(keys)),
            heads(pool.v_proj(keys)),
            attn_mask=allowed[:, None],
        )
        embedding: Tensor = pool.c_proj(out.transpose(1, 2).flatten(2))
        return embedding
