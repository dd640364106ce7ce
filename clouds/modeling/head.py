"""The head, which is all that trains: pixel decoder and mask decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from clouds.d2 import SEM_SEG_HEADS_REGISTRY, CfgNode, ShapeSpec, configurable
from clouds.modeling.mask_decoder.class_heads import CLASS_HEADS, ClassHead
from clouds.modeling.mask_decoder.predictions import Predictions
from clouds.modeling.pixel_decoder.msdeform import MSDeformAttnPixelDecoder
from clouds.modeling.text.classifier import TextRows

ENCODER_POINTS = 4
"""Sampling points per query, head and level of the deformable-attention encoder (Mask2Former)."""


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
        cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec], embed_dim: int
    ) -> dict[str, Any]:
        head, former = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
        pixel_decoder = MSDeformAttnPixelDecoder(
            {name: input_shape[name] for name in head.IN_FEATURES},
            transformer_in_features=head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES,
            channels=head.CONVS_DIM,
            mask_dim=head.MASK_DIM,
            layers=head.TRANSFORMER_ENC_LAYERS,
            heads=former.NHEADS,
            points=ENCODER_POINTS,
            hidden=head.TRANSFORMER_ENC_DIM_FEEDFORWARD,
            dropout=former.DROPOUT,
            implementation=head.DEFORMABLE_ATTENTION,
        )
        predictor = CLASS_HEADS[former.TRANSFORMER_DECODER_NAME](
            in_channels=head.CONVS_DIM,
            channels=former.HIDDEN_DIM,
            mask_dim=head.MASK_DIM,
            classes=head.NUM_CLASSES,
            embed_dim=embed_dim,
            queries=former.NUM_OBJECT_QUERIES,
            layers=former.DEC_LAYERS - 1,
            heads=former.NHEADS,
            hidden=former.DIM_FEEDFORWARD,
            dropout=former.DROPOUT,
            levels=len(head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES),
        )
        return {"pixel_decoder": pixel_decoder, "predictor": predictor}

    @property
    def needs_text(self) -> bool:
        """Whether `forward` wants the text classifier."""
        return self.predictor.needs_text

    def forward(
        self,
        features: Mapping[str, Tensor],
        text: TextRows | None = None,
        final_only: bool = False,
    ) -> Predictions:
        """
        Args:
            features: name -> (N, C, H / stride, W / stride), from the backbone.
            text: the text classifier, where `needs_text`.
            final_only: give the last prediction alone.
        """
        mask_features, maps = self.pixel_decoder(features)
        predictions: Predictions = self.predictor(maps, mask_features, text, final_only)
        return predictions
