"""The whole prediction as one module that takes a batch of images of any size."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clouds.modeling.meta_arch.clouds import CLOUDS
from clouds.modeling.pixel_decoder.msdeformattn import MSDeformAttn
from clouds.ops.deformable_attention import PLAIN

INPUT_TYPES = {"uint8": torch.uint8, "float32": torch.float32}
"""Types of an exported graph's images; their values are 0 to 255 in both."""

MIN_SIDE = 33
"""Pixels; smaller images are one pixel wide at stride 32, which torch.export would make another
graph of."""


class SemanticNetwork(nn.Module):
    """From images to semantic scores: normalization, padding, network, masks times classes.

    Computed in float32 by torch's own operators, so that it can be exported. The model is copied,
    without the text encoder, whose embeddings of the classes become constants.

    Args:
        model: in evaluation mode, on the CPU.
    """

    def __init__(self, model: CLOUDS) -> None:
        super().__init__()
        self.divisor = max(1, model.size_divisibility)
        if model.sem_seg_head.needs_text or model.ensemble is not None:
            with torch.no_grad():
                model.text_classifier.synonym_embeddings(model.backbone)  # type: ignore[arg-type]
        labeler, model.pseudo_labeler = model.pseudo_labeler, None  # it has teacher and SAM
        try:
            self.model = copy.deepcopy(model).eval().requires_grad_(False)
        finally:
            model.pseudo_labeler = labeler
        for module in self.model.modules():
            if isinstance(module, MSDeformAttn):
                module.implementation = PLAIN

    def forward(self, images: Tensor) -> Tensor:
        """
        Args:
            images: (N, 3, H, W) RGB, 0 to 255, uint8 or floating point; H and W at least MIN_SIDE.

        Returns:
            float32 (N, C, H, W): the scores of `clouds.load(…)(image).scores` for an image of the
            model's input size.
        """
        model = self.model
        height, width = images.shape[-2:]
        # Not -(-n // d): ONNX divides negative numbers towards zero.
        padded = tuple(
            (n + self.divisor - 1) // self.divisor * self.divisor for n in images.shape[-2:]
        )
        x = (images.float() - model.pixel_mean) / model.pixel_std
        x = F.pad(x, (0, padded[1] - width, 0, padded[0] - height))
        predictions, features = model.predict(x)
        classes = (model.network, predictions, features, model.ensemble)
        probabilities = model.class_probabilities(*classes)[..., :-1]
        masks = predictions.final[1].float()
        masks = F.interpolate(masks, padded, mode="bilinear", align_corners=False).sigmoid()
        scores = torch.einsum("nqc,nqhw->nchw", probabilities.float(), masks)
        # A slice would be a view whose layout depends on whether there is padding.
        rows, columns = (torch.arange(n, device=images.device) for n in (height, width))
        return scores.index_select(2, rows).index_select(3, columns)
