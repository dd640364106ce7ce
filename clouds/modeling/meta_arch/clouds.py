"""CLOUDS, the whole model: backbone, head, criterion, inference, self-training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
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
    ShapeSpec,
    configurable,
)
from clouds.data.datasets import known_label_space
from clouds.data.label_space import IGNORE, LabelSpace
from clouds.data.structures import Domain, Targets, masks_from_label
from clouds.modeling.backbone.base import masks_at
from clouds.modeling.backbone.clip import CLIP
from clouds.modeling.criterion import SetCriterion
from clouds.modeling.matcher import CostWeights
from clouds.modeling.pixel_decoder.msdeformattn import MSDeformAttnPixelDecoder
from clouds.modeling.points import PointSampler
from clouds.modeling.postprocessing import EnsembleOptions, SemanticMap, geometric_ensemble
from clouds.modeling.text_classifier import TextClassifier, TextRows
from clouds.modeling.transformer_decoder.decoder import CLASS_HEADS, ClassHead, Predictions
from clouds.self_training.ema import label_from_scores
from clouds.self_training.pseudo_labeler import SelfTraining
from clouds.self_training.refiners.base import PseudoLabel


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


Sample = Mapping[str, Any]
"""Detectron2's input: `image` uint8 (3, H, W) RGB, and what `clouds.data.structures` adds to it."""

Features = Mapping[str, Tensor]
"""Name -> (N, C, H / stride, W / stride), from the backbone."""


@META_ARCH_REGISTRY.register()
class CLOUDS(nn.Module):
    """A Mask2Former head on a frozen CLIP (paper section 3).

    Args:
        backbone: CLIP.
        sem_seg_head: what trains.
        criterion: its losses.
        pixel_mean, pixel_std: RGB, on the 0-255 scale.
        size_divisibility: images are padded to a multiple of it.
        label_space: that of the training data, with the words of the text classifier; None: not
            known, and there is no text classifier.
        masks_at_once: see `SemanticMap`.
        ensemble: how to average with CLIP's zero-shot classes when segmenting; None: not at all.
        self_training: teacher and refiner, which label generated images; None: source alone.
        teacher_ensemble: as `ensemble`, for the teacher.
        compiled: what torch.compile is for: 'backbone', 'head', 'all' or 'none'.

    Attributes:
        self_training: as above. It is no module: nothing of it is in the state dict.
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
        label_space: LabelSpace | None,
        masks_at_once: int,
        ensemble: EnsembleOptions | None = None,
        self_training: SelfTraining | None = None,
        teacher_ensemble: EnsembleOptions | None = None,
        compiled: str = "none",
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
        self.masks_at_once = masks_at_once
        self.ensemble = ensemble
        self.self_training = self_training
        self.teacher_ensemble = teacher_ensemble
        self.label_space = label_space
        self.text_classifier = TextClassifier(label_space.synonyms if label_space else ())
        # In place, or around the call: so names in the state dict stay as they are.
        if compiled in ("backbone", "all"):
            backbone.compile()
        self._call_head = torch.compile(_call) if compiled in ("head", "all") else _call

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        backbone = BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)(cfg, None)
        head = SEM_SEG_HEADS_REGISTRY.get(cfg.MODEL.SEM_SEG_HEAD.NAME)(
            cfg, backbone.output_shape(), backbone.embed_dim
        )
        clouds = cfg.MODEL.CLOUDS
        return {
            "backbone": backbone,
            "sem_seg_head": head,
            "criterion": _criterion(cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "size_divisibility": cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY,
            "label_space": known_label_space(cfg.DATASETS.TRAIN),
            "masks_at_once": cfg.TEST.MASKS_AT_ONCE,
            "ensemble": EnsembleOptions.from_config(cfg) if clouds.GEOMETRIC_ENSEMBLE else None,
            "self_training": SelfTraining.from_config(cfg, head),
            "teacher_ensemble": (
                EnsembleOptions.from_config(cfg) if clouds.GEOMETRIC_ENSEMBLE_EMA else None
            ),
            "compiled": cfg.MODEL.COMPILE,
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
            batch: per image `image` uint8 (3, H, W) RGB. In training also `sem_seg` (H, W) train
                ids, or for a generated image (`domain` GENERATED) `clean_image`, the same picture
                without color jitter; and, for points that do not depend on torch's global
                generator, `seed`. In evaluation `height` and `width` of the wanted output (the
                image's own, if left out).

        Returns:
            in training the weighted losses by name; in evaluation, per image, `sem_seg`: float32
            (C, height, width) scores, whose argmax is the class.
        """
        if not self.training:
            return [
                {"sem_seg": _resize(found.scores(), _output_size(sample))}
                for found, sample in self._semantic_maps_of(batch)
            ]
        views = self._images([sample["image"] for sample in batch])
        painted = [sample for sample in batch if sample.get("domain") == Domain.GENERATED]
        clean = self._images([sample["clean_image"] for sample in painted]) if painted else None
        features, clean_features = self._features_of(views, clean)
        pseudo_targets = iter(self._pseudo_targets(painted, clean, clean_features))
        targets = [
            _padded(
                next(pseudo_targets)
                if sample.get("domain") == Domain.GENERATED
                else self._targets(sample),
                views,
            )
            for sample in batch
        ]
        seeds = [sample["seed"] for sample in batch] if "seed" in batch[0] else None
        losses: dict[str, Tensor] = self.criterion(
            self._head_on(self.sem_seg_head, features), targets, seeds
        )
        return losses

    def predict(self, images: Tensor) -> tuple[Predictions, Features]:
        """The last prediction of normalized, padded images (N, 3, H, W), and the features."""
        features = self.backbone(images)
        return self._head_on(self.sem_seg_head, features, final_only=True), features

    @torch.no_grad()
    def segment(self, batch: Sequence[Sample]) -> list[Tensor]:
        """Class maps, uint8 (height, width) each, in memory bounded by TEST.MASKS_AT_ONCE.

        `batch` is that of `forward` in evaluation. The model should be in evaluation mode.
        """
        return [
            found.classes(_output_size(sample)) for found, sample in self._semantic_maps_of(batch)
        ]

    @torch.no_grad()
    def teach(self, images: Sequence[Tensor]) -> list[PseudoLabel]:
        """The teacher's labels of clean images, uint8 (3, H, W) RGB each, at their size.

        Raises:
            ValueError: the config has no generated dataset, so there is no teacher.
        """
        padded = self._images(images)
        return self._teacher_labels(self.backbone(padded.tensor), padded)

    def _features_of(
        self, views: ImageList, clean: ImageList | None
    ) -> tuple[Features, Features | None]:
        """Features of the student's views and of the clean ones, in one pass where one will do."""
        if clean is None:
            return self.backbone(views.tensor), None
        if not self.backbone.frozen or views.tensor.shape[1:] != clean.tensor.shape[1:]:
            with torch.no_grad():
                clean_features = self.backbone(clean.tensor)
            return self.backbone(views.tensor), clean_features
        both = self.backbone(torch.cat((views.tensor, clean.tensor)))
        count = len(views.tensor)
        return {k: v[:count] for k, v in both.items()}, {k: v[count:] for k, v in both.items()}

    @torch.no_grad()
    def _pseudo_targets(
        self, painted: Sequence[Sample], clean: ImageList | None, features: Features | None
    ) -> list[Targets]:
        """What teacher and refiner make of the clean views of generated images."""
        if clean is None or features is None:
            return []
        labels = self._teacher_labels(features, clean)
        images = [sample["clean_image"] for sample in painted]
        seeds = [int(sample.get("seed", 0)) for sample in painted]
        return self._teaching().targets(images, labels, seeds)

    def _teaching(self) -> SelfTraining:
        if self.self_training is None:
            raise ValueError(
                "a generated image needs a teacher to label it, and this model has none: name the "
                "generated dataset (sd_<folder>) in DATASETS.TRAIN"
            )
        return self.self_training

    def _teacher_labels(self, features: Features, images: ImageList) -> list[PseudoLabel]:
        predictions = self._head_on(self._teaching().teacher.head, features, final_only=True)
        maps = self._semantic_maps(predictions, features, images, self.teacher_ensemble)
        return [label_from_scores(one.scores()) for one in maps]

    def _head_on(
        self, head: nn.Module, features: Features, final_only: bool = False
    ) -> Predictions:
        text = self._text_rows() if self.sem_seg_head.needs_text else None
        return self._call_head(head, features, text, final_only)

    def _semantic_maps_of(self, batch: Sequence[Sample]) -> Iterator[tuple[SemanticMap, Sample]]:
        images = self._images([sample["image"] for sample in batch])
        predictions, features = self.predict(images.tensor)
        maps = self._semantic_maps(predictions, features, images, self.ensemble)
        return zip(maps, batch, strict=True)

    def _semantic_maps(
        self,
        predictions: Predictions,
        features: Features,
        images: ImageList,
        ensemble: EnsembleOptions | None,
    ) -> Iterator[SemanticMap]:
        """Per image, at its own size."""
        class_logits, mask_logits = predictions.final
        probabilities = self._probabilities(class_logits, mask_logits, features, ensemble)
        padded = (images.tensor.shape[-2], images.tensor.shape[-1])
        for i, size in enumerate(images.image_sizes):
            yield SemanticMap(
                probabilities[i, :, :-1], mask_logits[i], padded, size, self.masks_at_once
            )

    def _probabilities(
        self,
        class_logits: Tensor,
        mask_logits: Tensor,
        features: Features,
        ensemble: EnsembleOptions | None,
    ) -> Tensor:
        """(N, Q, C + 1), void last."""
        if ensemble is None:
            return class_logits.float().softmax(-1)
        dense = features["clip_vis_dense"]
        embeddings = self.backbone.embed_masks(dense, mask_logits)
        zero_shot = self._text_rows().logits(embeddings, self.backbone.logit_scale)
        seen = torch.tensor(ensemble.seen, device=class_logits.device)
        inside = masks_at(dense, mask_logits)
        valid = inside.flatten(2).any(-1) if ensemble.valid_masks_only else None
        return geometric_ensemble(
            class_logits.float(), zero_shot.float(), seen, ensemble.alpha, ensemble.beta, valid
        )

    def _text_rows(self) -> TextRows:
        return self.text_classifier.rows(self.backbone, self.void_embedding.weight)

    def _images(self, images: Sequence[Tensor]) -> ImageList:
        on_device = [image.to(self.device, non_blocking=True) for image in images]
        normalized = [(image - self.pixel_mean) / self.pixel_std for image in on_device]
        return ImageList.from_tensors(normalized, self.size_divisibility)

    def _targets(self, sample: Sample) -> Targets:
        """The targets of a labelled image."""
        label = sample["sem_seg"]
        if label.shape != sample["image"].shape[-2:]:
            raise ValueError(
                f"{sample.get('file_name', 'a sample')}: its label is {tuple(label.shape)}, its "
                f"image {tuple(sample['image'].shape[-2:])}; they must be of one size"
            )
        return masks_from_label(label, IGNORE, self.device)


def _call(
    head: nn.Module, features: Features, text: TextRows | None, final_only: bool
) -> Predictions:
    """The student's head or the teacher's."""
    predictions: Predictions = head(features, text, final_only=final_only)
    return predictions


def _padded(targets: Targets, images: ImageList) -> Targets:
    """Targets on the padded image; the padding is in none of their masks."""
    height, width = images.tensor.shape[-2:]
    padding = (0, width - targets.masks.shape[-1], 0, height - targets.masks.shape[-2])
    if not any(padding):
        return targets
    weights = targets.weights
    return replace(
        targets,
        masks=F.pad(targets.masks, padding),
        weights=None if weights is None else F.pad(weights, padding, value=1.0),
    )


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
