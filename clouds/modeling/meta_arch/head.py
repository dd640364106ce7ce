"""The head: pixel decoder and transformer decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from clouds.d2 import SEM_SEG_HEADS_REGISTRY, CfgNode, ShapeSpec, configurable
from clouds.modeling.backbone.adapters import Adapter
from clouds.modeling.backbone.base import TextEncoder
from clouds.modeling.pixel_decoder.msdeformattn import MSDeformAttnPixelDecoder
from clouds.modeling.text_classifier import TextEmbeddings
from clouds.modeling.transformer_decoder.decoder import CLASS_HEADS, ClassHead, Predictions

Features = Mapping[str, Tensor]
"""Name -> (N, C, H / stride, W / stride), from the backbone."""


@SEM_SEG_HEADS_REGISTRY.register()
class CLOUDSHead(nn.Module):
    """Mask2Former's head on CLIP features (paper section 3.1)."""

    @configurable
    def __init__(self, *, pixel_decoder: MSDeformAttnPixelDecoder, predictor: ClassHead) -> None:
        super().__init__()
        self.pixel_decoder = pixel_decoder
        self.predictor = predictor

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        input_shape: Mapping[str, ShapeSpec],
        text_encoder: TextEncoder | None = None,
        adapter: Adapter | None = None,
    ) -> dict[str, Any]:
        head, former = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
        pixel_decoder = MSDeformAttnPixelDecoder(
            {name: input_shape[name] for name in head.IN_FEATURES},
            transformer_in_features=head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES,
            conv_dim=head.CONVS_DIM,
            mask_dim=head.MASK_DIM,
            num_layers=head.TRANSFORMER_ENC_LAYERS,
            num_heads=former.NHEADS,
            dim_feedforward=head.TRANSFORMER_ENC_DIM_FEEDFORWARD,
            dropout=former.DROPOUT,
            implementation=head.DEFORMABLE_ATTENTION,
        )
        class_head = CLASS_HEADS[former.TRANSFORMER_DECODER_NAME]
        if class_head.needs_text and text_encoder is None:
            raise ValueError(
                f"MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME {former.TRANSFORMER_DECODER_NAME} "
                f"needs a text encoder, and MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} has "
                "none. Use the class head 'linear' or 'pooled', or the backbone CLIP or CLIPViT."
            )
        gives_queries = adapter is not None and adapter.object_queries() is not None
        predictor = class_head(
            in_channels=head.CONVS_DIM,
            hidden_dim=former.HIDDEN_DIM,
            mask_dim=head.MASK_DIM,
            num_classes=head.NUM_CLASSES,
            embed_dim=0 if text_encoder is None else text_encoder.embed_dim,
            num_queries=0 if gives_queries else former.NUM_OBJECT_QUERIES,
            num_layers=former.DEC_LAYERS - 1,
            num_heads=former.NHEADS,
            dim_feedforward=former.DIM_FEEDFORWARD,
            dropout=former.DROPOUT,
            num_levels=len(head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES),
        )
        return {"pixel_decoder": pixel_decoder, "predictor": predictor}

    def blocks(self) -> list[list[nn.Module]]:
        """See `HasBlocks`."""
        encoder, decoder = self.pixel_decoder.transformer.encoder["layers"], self.predictor
        layers = zip(
            decoder.transformer_cross_attention_layers,
            decoder.transformer_self_attention_layers,
            decoder.transformer_ffn_layers,
            strict=True,
        )
        return [*([layer] for layer in encoder.children()), *map(list, layers)]

    @property
    def needs_text(self) -> bool:
        """Whether `forward` needs text embeddings."""
        return self.predictor.needs_text

    def forward(
        self,
        features: Features,
        text: TextEmbeddings | None = None,
        final_only: bool = False,
        queries: Tensor | None = None,
    ) -> Predictions:
        """
        Args:
            text: text embeddings of the classes, where `needs_text`.
            final_only: return the last prediction alone.
            queries: object queries (Q, C) of the backbone's adapter, if it has some.
        """
        mask_features, maps = self.pixel_decoder(features)
        predictions: Predictions = self.predictor(maps, mask_features, text, final_only, queries)
        return predictions
