"""CLOUDS, the whole model: backbone, head, criterion, and what becomes of their outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clouds.d2 import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    CfgNode,
    ImageList,
    configurable,
)
from clouds.data.label_space import CITYSCAPES_19
from clouds.data.targets import Targets, masks_from_label
from clouds.modeling.backbones.clip import CLIP
from clouds.modeling.criterion.matcher import CostWeights
from clouds.modeling.criterion.points import PointSampler
from clouds.modeling.criterion.set_criterion import SetCriterion
from clouds.modeling.head import CLOUDSHead
from clouds.modeling.inference.class_map import class_map
from clouds.modeling.inference.ensemble import EnsembleOptions, geometric_ensemble
from clouds.modeling.inference.semantic import semantic_scores
from clouds.modeling.mask_decoder.predictions import Predictions
from clouds.modeling.text.classifier import TextClassifier, TextRows

Sample = Mapping[str, Any]
"""Detectron2's input: `image` uint8 (3, H, W) RGB, and what `clouds.data.sample` adds to it."""


@META_ARCH_REGISTRY.register()
class CLOUDS(nn.Module):
    """A Mask2Former head on a frozen CLIP (paper section 3).

    Args:
        backbone: CLIP.
        sem_seg_head: what trains.
        criterion: its losses.
        pixel_mean, pixel_std: RGB, on the 0-255 scale.
        size_divisibility: images are padded to a multiple of it.
        ignore_value: label of pixels that are in no target.
        synonyms: per class, the words for the text classifier.
        masks_at_once: see `semantic_scores`.
        ensemble: how to average with CLIP's zero-shot classes when segmenting; None: not at all.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: CLIP,
        sem_seg_head: CLOUDSHead,
        criterion: SetCriterion,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        size_divisibility: int,
        ignore_value: int,
        synonyms: Sequence[Sequence[str]],
        masks_at_once: int,
        ensemble: EnsembleOptions | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self.criterion = criterion
        self.void_embedding = nn.Embedding(1, backbone.embed_dim)
        # Without a text classifier in training the void row gets no gradient.
        self.void_embedding.requires_grad_(sem_seg_head.needs_text)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.size_divisibility = size_divisibility
        self.ignore_value = ignore_value
        self.masks_at_once = masks_at_once
        self.ensemble = ensemble
        self.text_classifier = TextClassifier(synonyms)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        backbone = BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)(cfg, None)
        head = SEM_SEG_HEADS_REGISTRY.get(cfg.MODEL.SEM_SEG_HEAD.NAME)(
            cfg, backbone.output_shape(), backbone.embed_dim
        )
        return {
            "backbone": backbone,
            "sem_seg_head": head,
            "criterion": _criterion(cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "size_divisibility": cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY,
            "ignore_value": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            "synonyms": CITYSCAPES_19.synonyms,
            "masks_at_once": cfg.TEST.MASKS_AT_ONCE,
            "ensemble": EnsembleOptions.from_config(cfg),
        }

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of every module; the text features of the weights before are forgotten."""
        self.text_classifier.reset()
        return super().load_state_dict(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batch: Sequence[Sample]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """
        Args:
            batch: per image `image` uint8 (3, H, W) RGB; in training also `sem_seg` (H, W) train
                ids and, for points that do not depend on torch's global generator, `seed`; in
                evaluation `height` and `width` of the wanted output (the image's own, if left out).

        Returns:
            in training the weighted losses by name; in evaluation, per image, `sem_seg`: float32
            (C, height, width) scores, whose argmax is the class.
        """
        if not self.training:
            return [
                {"sem_seg": _resize(scores, _output_size(sample))}
                for scores, sample in self._scores(batch)
            ]
        images = self._images(batch)
        targets = [self._targets(sample, images) for sample in batch]
        seeds = [sample["seed"] for sample in batch] if "seed" in batch[0] else None
        predictions, _ = self.predict(images.tensor)
        losses: dict[str, Tensor] = self.criterion(predictions, targets, seeds)
        return losses

    def predict(self, images: Tensor) -> tuple[Predictions, Mapping[str, Tensor]]:
        """The head's predictions of normalized, padded images (N, 3, H, W), and the features."""
        features = self.backbone(images)
        text = self._text_rows() if self.sem_seg_head.needs_text else None
        return self.sem_seg_head(features, text), features

    @torch.no_grad()
    def segment(self, batch: Sequence[Sample]) -> list[Tensor]:
        """Class maps, uint8 (height, width) each, in memory bounded by TEST.MASKS_AT_ONCE.

        `batch` is that of `forward` in evaluation. The model should be in evaluation mode.
        """
        return [class_map(scores, _output_size(sample)) for scores, sample in self._scores(batch)]

    def _scores(self, batch: Sequence[Sample]) -> Iterator[tuple[Tensor, Sample]]:
        """Per image the scores (C, H, W) at its own size."""
        images = self._images(batch)
        predictions, features = self.predict(images.tensor)
        class_logits, mask_logits = predictions.final
        probabilities = self._probabilities(class_logits, mask_logits, features)
        padded = (images.tensor.shape[-2], images.tensor.shape[-1])
        for i, sample in enumerate(batch):
            scores = semantic_scores(
                probabilities[i, :, :-1],
                mask_logits[i],
                padded,
                images.image_sizes[i],
                self.masks_at_once,
            )
            yield scores, sample

    def _probabilities(
        self, class_logits: Tensor, mask_logits: Tensor, features: Mapping[str, Tensor]
    ) -> Tensor:
        """(N, Q, C + 1), void last."""
        if self.ensemble is None:
            return class_logits.float().softmax(-1)
        embeddings = self.backbone.embed_masks(features["clip_vis_dense"], mask_logits)
        zero_shot = self._text_rows().logits(embeddings, self.backbone.logit_scale)
        seen = torch.tensor(self.ensemble.seen, device=class_logits.device)
        return geometric_ensemble(
            class_logits.float(), zero_shot.float(), seen, self.ensemble.alpha, self.ensemble.beta
        )

    def _text_rows(self) -> TextRows:
        return self.text_classifier.rows(self.backbone, self.void_embedding.weight)

    def _images(self, batch: Sequence[Sample]) -> ImageList:
        images = [sample["image"].to(self.device, non_blocking=True) for sample in batch]
        normalized = [(image - self.pixel_mean) / self.pixel_std for image in images]
        return ImageList.from_tensors(normalized, self.size_divisibility)

    def _targets(self, sample: Sample, images: ImageList) -> Targets:
        """Targets on the padded image; the padding is in none of their masks."""
        label = sample["sem_seg"].to(self.device, non_blocking=True)
        if label.shape != sample["image"].shape[-2:]:
            raise ValueError(
                f"{sample.get('file_name', 'a sample')}: its label is {tuple(label.shape)}, its "
                f"image {tuple(sample['image'].shape[-2:])}; they must be of one size"
            )
        height, width = images.tensor.shape[-2:]
        padding = (0, width - label.shape[1], 0, height - label.shape[0])
        return masks_from_label(F.pad(label, padding, value=self.ignore_value), self.ignore_value)


def _criterion(cfg: CfgNode) -> SetCriterion:
    former = cfg.MODEL.MASK_FORMER
    return SetCriterion(
        classes=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        weights=CostWeights(former.CLASS_WEIGHT, former.MASK_WEIGHT, former.DICE_WEIGHT),
        no_object_weight=former.NO_OBJECT_WEIGHT,
        sampler=PointSampler(
            former.TRAIN_NUM_POINTS, former.OVERSAMPLE_RATIO, former.IMPORTANCE_SAMPLE_RATIO
        ),
        deep_supervision=former.DEEP_SUPERVISION,
        normalize_class_loss_over=former.CLASS_NORMALIZER,
    )


def _output_size(sample: Sample) -> tuple[int, int]:
    height, width = sample["image"].shape[-2:]
    return int(sample.get("height", height)), int(sample.get("width", width))


def _resize(scores: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0]
