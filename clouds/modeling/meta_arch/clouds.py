"""CLOUDS, the whole model: backbone, head, criterion, inference, self-training."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clouds.d2 import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    Backbone,
    CfgNode,
    ImageList,
    configurable,
)
from clouds.data.class_mixing import mix_targets
from clouds.data.dataset_mapper import padded_crop_size
from clouds.data.datasets import Datasets
from clouds.data.label_space import LabelSpace
from clouds.data.structures import (
    Sample,
    Targets,
    check_image,
    is_generated,
    labelled_targets,
    needs_teacher,
    output_size,
    pad_to,
    seeds_of,
)
from clouds.modeling.backbone.adapters import adapter_of
from clouds.modeling.backbone.base import TextEncoder, pixel_statistics
from clouds.modeling.criterion import BatchPart, SetCriterion
from clouds.modeling.crop_classifier import build_crop_classifier
from clouds.modeling.flip_averaging import flip_averaged, mirror_images
from clouds.modeling.meta_arch.accumulation import prepare_parts
from clouds.modeling.meta_arch.head import CLOUDSHead, Features
from clouds.modeling.postprocessing import EnsembleOptions, SemanticMap, ensemble_probabilities
from clouds.modeling.text_classifier import TextClassifier, TextEmbeddings
from clouds.modeling.transformer_decoder.decoder import Predictions
from clouds.ops.color_jitter import jittered
from clouds.self_training.masked_consistency import BlockMasking, hide_blocks
from clouds.self_training.pseudo_labeler import PseudoLabeler
from clouds.self_training.refiners.base import PseudoLabel, TeacherPrediction

Network = Mapping[str, nn.Module]
"""The parts `backbone`, `sem_seg_head`, `void_embedding`: the student's or the teacher's."""


@META_ARCH_REGISTRY.register()
class CLOUDS(nn.Module):
    """A Mask2Former head on a foundation model (paper section 3).

    Args:
        backbone: Detectron2's; for a text class head or the geometric ensemble also a
            `TextEncoder`.
        sem_seg_head: pixel decoder and transformer decoder.
        criterion: the losses.
        pixel_mean, pixel_std: RGB, on the 0-255 scale.
        size_divisibility: images are padded to a multiple of it, pixels.
        min_training_size: size to which smaller training images are padded.
        label_space: that of the training data, with the class names of the text classifier; None:
            not known, and there is no text classifier.
        masks_at_once: see `SemanticMap`.
        ensemble: how class probabilities are averaged with zero-shot ones in inference; None: not.
        teacher_ensemble: the same for the teacher.
        pseudo_labeler_config: config of teacher and refiner; None: training on labelled images
            alone.
        unlabeled_classes: 'ignore': unmatched queries on ignored pixels of a partly labelled image
            are not trained as no object; 'absent': they are.
        compiled: what torch.compile is applied to: 'backbone', 'head', 'all' or 'none'.
        block_masking: hides blocks of the student's views of generated images; None: none.
        teacher_flip: average the teacher's scores over an image and its mirror image.

    Attributes:
        pseudo_labeler: labels generated images in joint training; None without generated data. It
            is no module: nothing of it is in the state dict.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: CLOUDSHead,
        criterion: SetCriterion,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        size_divisibility: int,
        min_training_size: tuple[int, int] = (0, 0),
        label_space: LabelSpace | None,
        masks_at_once: int,
        ensemble: EnsembleOptions | None = None,
        teacher_ensemble: EnsembleOptions | None = None,
        pseudo_labeler_config: CfgNode | None = None,
        unlabeled_classes: str = "ignore",
        compiled: str = "none",
        block_masking: BlockMasking | None = None,
        teacher_flip: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self.criterion = criterion
        self.network: Network = {"backbone": backbone, "sem_seg_head": sem_seg_head}
        if isinstance(backbone, TextEncoder):
            # The row of the text classifier for no object, under its published name.
            self.void_embedding = nn.Embedding(1, backbone.embed_dim)
            # Without a text classifier in training it gets no gradient.
            self.void_embedding.requires_grad_(sem_seg_head.needs_text)
            self.network = {**self.network, "void_embedding": self.void_embedding}
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.size_divisibility, self.min_training_size = size_divisibility, min_training_size
        self.masks_at_once = masks_at_once
        self.ensemble, self.teacher_ensemble = ensemble, teacher_ensemble
        self.block_masking, self.teacher_flip = block_masking, teacher_flip
        self.label_space, self.unlabeled_classes = label_space, unlabeled_classes
        self.text_classifier = TextClassifier(label_space.synonyms if label_space else ())
        self.pseudo_labeler: PseudoLabeler | None = None
        if (cfg := pseudo_labeler_config) is not None:
            classifier = functools.partial(build_crop_classifier, cfg)
            self.pseudo_labeler = PseudoLabeler.from_config(cfg, self.network, classifier)
        # In place, or around the call, so that names in the state dict do not change.
        if compiled in ("backbone", "all"):
            backbone.compile()
        self._call_head = torch.compile(_call) if compiled in ("head", "all") else _call

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        backbone = BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)(cfg, None)
        text_encoder = backbone if isinstance(backbone, TextEncoder) else None
        head = SEM_SEG_HEADS_REGISTRY.get(cfg.MODEL.SEM_SEG_HEAD.NAME)(
            cfg, backbone.output_shape(), text_encoder, adapter_of(backbone)
        )
        clouds = cfg.MODEL.CLOUDS
        ensembles = clouds.GEOMETRIC_ENSEMBLE, clouds.GEOMETRIC_ENSEMBLE_EMA
        if text_encoder is None and any(ensembles):
            raise ValueError(
                "MODEL.CLOUDS.GEOMETRIC_ENSEMBLE needs a text encoder, and MODEL.BACKBONE.NAME "
                f"{cfg.MODEL.BACKBONE.NAME} has none. Set it to False, or use the backbone CLIP or "
                "CLIPViT."
            )
        options = EnsembleOptions.from_config(cfg) if any(ensembles) else None
        pixel_mean, pixel_std = pixel_statistics(cfg, backbone)
        return {
            "backbone": backbone,
            "sem_seg_head": head,
            "criterion": SetCriterion.from_config(cfg),
            "pixel_mean": pixel_mean,
            "pixel_std": pixel_std,
            "size_divisibility": cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY,
            "min_training_size": padded_crop_size(cfg),
            "label_space": Datasets.from_config(cfg).known_label_space,
            "masks_at_once": cfg.TEST.MASKS_AT_ONCE,
            "ensemble": options if clouds.GEOMETRIC_ENSEMBLE else None,
            "teacher_ensemble": options if clouds.GEOMETRIC_ENSEMBLE_EMA else None,
            "pseudo_labeler_config": cfg,
            "unlabeled_classes": cfg.MODEL.MASK_FORMER.UNLABELED_CLASSES,
            "compiled": cfg.MODEL.COMPILE,
            "block_masking": BlockMasking.from_config(cfg),
            "teacher_flip": clouds.TEACHER_FLIP,
        }

    def forward(
        self, batch: Sequence[Sample], part: BatchPart | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """
        Args:
            batch: per image `image` uint8 (3, H, W) RGB (see `check_image`). In training also
                `sem_seg` (H, W) train ids, or for a generated image (`domain` GENERATED) without
                them `clean_image`, the same image without color augmentation; and, for random
                points that do not depend on torch's global generator, `seed`. In inference
                `height` and `width` of the output (default: the image's own).
            part: in training on a part of a batch: of `prepare_parts`.

        Returns:
            in training the weighted losses by name; in inference, per image, `sem_seg`: float32
            (C, height, width) scores, whose argmax is the class.
        """
        if not self.training:
            return [
                {"sem_seg": semantic_map.resized_scores(output_size(sample))}
                for semantic_map, sample in zip(self.semantic_maps(batch), batch, strict=True)
            ]
        images = self._student_images(batch)
        if part is None:
            clean = self._clean_images(batch)
            features, clean_features = self._extract_features(images, clean)
            targets, normalizers = self.targets(batch, clean, clean_features), None
        else:
            features = self.backbone(images.tensor)
            targets, normalizers = list(part.targets), part.normalizers
        predictions = self._predict(self.network, features)
        self._observe_class_losses(batch, predictions, features, images)
        padded = [target.padded(*images.tensor.shape[-2:]) for target in targets]
        losses: dict[str, Tensor] = self.criterion(
            predictions, padded, seeds_of(batch), normalizers
        )
        return losses

    def prepare_parts(self, parts: Sequence[Sequence[Sample]]) -> list[BatchPart]:
        """What `forward` needs of a batch for the losses of its parts, whose sum is the batch's.

        Images are padded to the size of the largest of their part. A collective operation.
        """
        return prepare_parts(self, parts)

    @torch.no_grad()
    def segment(self, batch: Sequence[Sample]) -> list[Tensor]:
        """Class maps, uint8 (height, width) each, in memory bounded by TEST.MASKS_AT_ONCE.

        `batch` is that of `forward` in inference. The model should be in evaluation mode.
        """
        return [
            semantic_map.classes(output_size(sample))
            for semantic_map, sample in zip(self.semantic_maps(batch), batch, strict=True)
        ]

    def semantic_maps(self, batch: Sequence[Sample]) -> Iterator[SemanticMap]:
        """Per image of `batch` its prediction at the size of `image`, scores not yet computed.

        Raises:
            ValueError: scores are not finite; the message names the image.
        """
        images = self._preprocess([sample["image"] for sample in batch])
        predictions, features = self.predict(images.tensor)
        maps = self._semantic_maps(self.network, predictions, features, images, self.ensemble)
        for sample, semantic_map in zip(batch, maps, strict=True):
            semantic_map.check_finite(str(sample.get("file_name", "an image")))
            yield semantic_map

    @torch.no_grad()
    def predict_pseudo_labels(self, images: Sequence[Tensor]) -> list[PseudoLabel]:
        """The teacher's labels of clean images, uint8 (3, H, W) RGB each, at their size.

        Raises:
            ValueError: the config has no generated dataset, so there is no teacher.
        """
        labeler = self._require_pseudo_labeler()
        padded = self._preprocess(images)
        features = labeler.teacher_parts["backbone"](padded.tensor)
        return labeler.labels(self._teacher_predictions(features, padded))

    def predict(self, images: Tensor) -> tuple[Predictions, Features]:
        """The last prediction of normalized, padded images (N, 3, H, W), and the features."""
        features = self.backbone(images)
        return self._predict(self.network, features, final_only=True), features

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of every module; text embeddings of the weights before are forgotten."""
        self.text_classifier.reset()
        return super().load_state_dict(*args, **kwargs)

    @property
    def _label_options(self) -> tuple[str, torch.device]:
        return self.unlabeled_classes, self.device

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def _preprocess(
        self, images: Sequence[Tensor], min_size: tuple[int, int] = (0, 0)
    ) -> ImageList:
        """Check images (3, H, W), normalize them on the model's device, pad and batch them."""
        for image in images:
            check_image(image)
        on_device = [image.to(self.device, non_blocking=True) for image in images]
        normalized = [(image - self.pixel_mean) / self.pixel_std for image in on_device]
        normalized = [pad_to(image, min_size) for image in normalized]
        return ImageList.from_tensors(normalized, self.size_divisibility)

    def _extract_features(
        self, images: ImageList, clean: ImageList | None
    ) -> tuple[Features, Features | None]:
        """Features of all images for the student, and of clean ones for the teacher.

        A frozen backbone is the teacher's too, and takes both in one pass where their sizes agree.
        """
        if clean is None:
            return self.backbone(images.tensor), None
        backbone_trains = any(p.requires_grad for p in self.backbone.parameters())
        if backbone_trains or images.tensor.shape[1:] != clean.tensor.shape[1:]:
            with torch.no_grad():
                parts = self._require_pseudo_labeler().teacher_parts
                clean_features = parts["backbone"](clean.tensor)
            return self.backbone(images.tensor), clean_features
        both = self.backbone(torch.cat((images.tensor, clean.tensor)))
        count = len(images.tensor)
        return {k: v[:count] for k, v in both.items()}, {k: v[count:] for k, v in both.items()}

    def _student_images(self, batch: Sequence[Sample]) -> ImageList:
        images = self._preprocess([jittered(s, self.device) for s in batch], self.min_training_size)
        if self.block_masking is not None:
            hide_blocks(self.block_masking, batch, images)
        return images

    def _clean_images(self, batch: Sequence[Sample]) -> ImageList | None:
        clean = [sample["clean_image"] for sample in batch if needs_teacher(sample)]
        return self._preprocess(clean) if clean else None

    @torch.no_grad()
    def targets(
        self,
        batch: Sequence[Sample],
        clean: ImageList | None = None,
        features: Features | None = None,
    ) -> list[Targets]:
        """Targets of samples; of generated ones from what the teacher predicts for clean views.

        `clean` and `features` are these views and the teacher's features; None: computed here.
        """
        generated = [sample for sample in batch if needs_teacher(sample)]
        pseudo_targets: Iterator[Targets] = iter(())
        clean = clean or self._clean_images(batch)
        if clean is not None:
            labeler = self._require_pseudo_labeler()
            features = features or labeler.teacher_parts["backbone"](clean.tensor)
            images = [sample["clean_image"] for sample in generated]
            seeds = [int(sample.get("seed", 0)) for sample in generated]
            predictions = self._teacher_predictions(features, clean)
            given = [
                labelled_targets({**s, "sem_seg": s["given_label"]}, *self._label_options)
                for s in generated
                if "given_label" in s
            ]
            pseudo_targets = iter(labeler(images, predictions, seeds, given))
        targets = [
            next(pseudo_targets)
            if needs_teacher(sample)
            else labelled_targets(sample, *self._label_options)
            for sample in batch
        ]
        return [
            mix_targets(one, sample["pasted_label"]) if "pasted_label" in sample else one
            for one, sample in zip(targets, batch, strict=True)
        ]

    def predict_targets(
        self, batch: Sequence[Sample], targets: Sequence[Targets]
    ) -> tuple[Predictions, list[Targets]]:
        """All predictions of samples, and their targets on the padded image."""
        images = self._student_images(batch).tensor
        predictions = self._predict(self.network, self.backbone(images))
        return predictions, [target.padded(*images.shape[-2:]) for target in targets]

    @torch.no_grad()
    def _observe_class_losses(
        self,
        batch: Sequence[Sample],
        predictions: Predictions,
        features: Features,
        images: ImageList,
    ) -> None:
        """Add the student's losses on labelled images to the statistics of a filter."""
        labeler = self.pseudo_labeler
        if labeler is None or labeler.class_losses is None:
            return
        maps = self._semantic_maps(self.network, predictions, features, images, None)
        for sample, semantic_map in zip(batch, maps, strict=True):
            if not is_generated(sample):
                labeler.class_losses.observe(semantic_map.scores(), sample["sem_seg"])

    def _require_pseudo_labeler(self) -> PseudoLabeler:
        if self.pseudo_labeler is None:
            raise ValueError(
                "a generated image needs a teacher to label it, and this model has none: name the "
                "generated dataset (sd_<folder>) in DATASETS.TRAIN"
            )
        return self.pseudo_labeler

    def _teacher_predictions(
        self, features: Features, images: ImageList
    ) -> Iterator[TeacherPrediction]:
        """The teacher's prediction of each image, from the features of the normalized images."""
        maps = self._teacher_maps(features, images)
        if self.teacher_flip:
            mirrored = mirror_images(images, self.size_divisibility)
            backbone = self._require_pseudo_labeler().teacher_parts["backbone"]
            return flip_averaged(maps, self._teacher_maps(backbone(mirrored.tensor), mirrored))
        return (TeacherPrediction(one.scores(), one.query_confidence()) for one in maps)

    def _teacher_maps(self, features: Features, images: ImageList) -> Iterator[SemanticMap]:
        """The teacher's semantic map of each image."""
        teacher = self._require_pseudo_labeler().teacher_parts
        predictions = self._predict(teacher, features, final_only=True)
        return self._semantic_maps(teacher, predictions, features, images, self.teacher_ensemble)

    def _predict(
        self, network: Network, features: Features, final_only: bool = False
    ) -> Predictions:
        text = self._text_embeddings(network) if self.sem_seg_head.needs_text else None
        queries = adapter_of(network["backbone"]).object_queries()
        return self._call_head(network["sem_seg_head"], features, text, final_only, queries)

    def _semantic_maps(
        self,
        network: Network,
        predictions: Predictions,
        features: Features,
        images: ImageList,
        ensemble: EnsembleOptions | None,
    ) -> Iterator[SemanticMap]:
        """Per image, at its own size."""
        probabilities = self.class_probabilities(network, predictions, features, ensemble)
        mask_logits = predictions.final[1]
        padded = (images.tensor.shape[-2], images.tensor.shape[-1])
        for i, size in enumerate(images.image_sizes):
            yield SemanticMap(
                probabilities[i, :, :-1], mask_logits[i], padded, size, self.masks_at_once
            )

    def class_probabilities(
        self,
        network: Network,
        predictions: Predictions,
        features: Features,
        ensemble: EnsembleOptions | None,
    ) -> Tensor:
        """(N, Q, C + 1), no_object last, of a network's last prediction and its features."""
        if ensemble is None:
            return predictions.final[0].float().softmax(-1)
        encoder, text = network["backbone"], self._text_embeddings(network)
        return ensemble_probabilities(encoder, features, predictions, text, ensemble)

    def _text_embeddings(self, network: Network) -> TextEmbeddings:
        encoder, no_object = network["backbone"], network["void_embedding"]
        assert isinstance(encoder, TextEncoder) and isinstance(no_object, nn.Embedding)
        return self.text_classifier.embeddings(encoder, no_object.weight)


def _call(
    head: nn.Module,
    features: Features,
    text: TextEmbeddings | None,
    final_only: bool,
    queries: Tensor | None,
) -> Predictions:
    """The student's head or the teacher's."""
    predictions: Predictions = head(features, text, final_only=final_only, queries=queries)
    return predictions
