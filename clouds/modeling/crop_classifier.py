"""CLIP's zero-shot classes of crops of an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as V

from clouds.d2 import CfgNode
from clouds.data.datasets import Datasets
from clouds.modeling.backbone.clip_text import CLIPText
from clouds.modeling.backbone.open_clip_models import PIXEL_MEAN, PIXEL_STD, create_clip
from clouds.modeling.text_classifier import TextClassifier
from clouds.self_training.refiners.crop_classes import Box

CROPS_AT_ONCE = 64
"""Bounds the memory of the image encoder."""


class CropClassifier(CLIPText):
    """CLIP's zero-shot classes of crops of an image.

    Args:
        clip_model: open_clip's model, frozen, in evaluation mode.
        model_name: its name.
        synonyms: names of each class.
    """

    def __init__(
        self, clip_model: nn.Module, model_name: str, synonyms: Sequence[Sequence[str]]
    ) -> None:
        self.clip_model = clip_model.eval().requires_grad_(False)
        self.model_name = model_name
        size = self.clip_model.visual.image_size
        self.size: tuple[int, int] = size if isinstance(size, tuple) else (size, size)
        self._texts = TextClassifier(synonyms)

    @torch.no_grad()
    def __call__(self, image: Tensor, boxes: Sequence[Box]) -> Tensor:
        """Log-probabilities float32 (M, C) of the classes of M >= 1 squares of an image.

        Args:
            image: uint8 (3, H, W) RGB.
        """
        image = image.to(self.logit_scale.device)
        return self.classify(torch.stack([self._crop(image, box) for box in boxes]))

    @torch.no_grad()
    def classify(self, crops: Tensor) -> Tensor:
        """Log-probabilities float32 (M, C) of normalized crops, float32 (M, 3, *self.size)."""
        texts = self._texts.embeddings(self, crops.new_zeros(1, self.embed_dim))
        with torch.autocast(crops.device.type, enabled=False):
            chunks = torch.split(crops, CROPS_AT_ONCE)
            embeddings = torch.cat([self.clip_model.encode_image(chunk) for chunk in chunks])
        logits = texts.logits(embeddings[None], self.logit_scale)[0, :, :-1]
        log_probabilities: Tensor = logits.log_softmax(-1)
        return log_probabilities

    def _crop(self, image: Tensor, box: Box) -> Tensor:
        """Normalized float32 (3, *self.size)."""
        top, left, side = box
        crop = image[:, top : top + side, left : left + side].float()
        mean, std = (crop.new_tensor(each)[:, None, None] for each in (PIXEL_MEAN, PIXEL_STD))
        resized: Tensor = V.resize(crop, list(self.size), antialias=True)
        return (resized - mean) / std


def build_crop_classifier(cfg: CfgNode, device: torch.device) -> CropClassifier:
    """The CLIP of MODEL.CLOUDS with the class names of the training datasets.

    Raises:
        ValueError, FileNotFoundError: see `create_clip`.
    """
    name = cfg.MODEL.CLOUDS.CLIP_MODEL_NAME
    model = create_clip(name, cfg.MODEL.CLOUDS.CLIP_PRETRAINED_WEIGHTS).to(device)
    return CropClassifier(model, name, Datasets.from_config(cfg).label_space.synonyms)
