"""SAM 3 as refiner without points: the name of each class in the image is a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clouds.d2 import CfgNode
from clouds.data.datasets import Datasets
from clouds.self_training.refiners.base import REFINER_REGISTRY, PseudoLabel, RefinedLabel, Refiner
from clouds.self_training.refiners.sam.backends import with_cache
from clouds.self_training.refiners.sam.frame import Size
from clouds.self_training.refiners.sam.predictor import Embed
from clouds.self_training.refiners.sam.pretrained import (
    TEXT_FAMILIES,
    Pretrained,
    load_pretrained,
    load_tokenizer,
)
from clouds.self_training.refiners.sam.refiner import merge_masks_by_class

MAX_TOKENS = 32
"""Length that prompts are padded to, as in the training of SAM 3."""


class TextEmbedder:
    """The backbone of SAM 3's image encoder: an `Embed`.

    Its pyramid is five times as large as its input and cheap, so it is computed from cached output
    of the backbone.
    """

    def __init__(self, model: Pretrained) -> None:
        self.network, self.frame = model.network, model.frame
        self.device = model.network.device

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Embeddings, float32 (1, s * s, C), of images, uint8 (3, H, W) RGB, one by one."""
        backbone = self.network.vision_encoder.backbone.to(self.device)
        return [
            backbone(self.frame.pixel_values(image, self.device)).last_hidden_state.float()
            for image in images
        ]


class InstancePredictor:
    """Instances of named classes by SAM 3.

    Args:
        model: of `TEXT_FAMILIES`.
        tokenizer: of its text encoder.
        words: one per class, its prompt.
        min_score: instances with a lower score are left out.
    """

    def __init__(
        self, model: Pretrained, tokenizer: Any, words: Sequence[str], min_score: float
    ) -> None:
        self.network = model.network
        self.min_score = min_score
        self._texts = [self._encode(tokenizer, word) for word in words]

    @torch.no_grad()
    def _encode(self, tokenizer: Any, word: str) -> tuple[Any, Tensor]:
        """Text features of a prompt, and the mask of its tokens."""
        tokens = tokenizer(
            word, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        ).to(self.network.device)
        ids, mask = tokens.input_ids, tokens.attention_mask
        return self.network.get_text_features(input_ids=ids, attention_mask=mask), mask

    @torch.no_grad()
    def __call__(self, embedding: Tensor, classes: Sequence[int], size: Size) -> Instances:
        """Instances in one image.

        Args:
            embedding: of the image, from `TextEmbedder`.
            classes: ascending; each is one prompt.
            size: height, width of the image.
        """
        with torch.autocast(embedding.device.type, enabled=False):
            views = self._pyramid(embedding.float())
            found = [self._of_class(views, number, size) for number in classes]
        masks, scores = (torch.cat(part) for part in zip(*found, strict=True))
        counts = torch.tensor([len(own) for own, _ in found], device=masks.device)
        numbers = torch.tensor(classes, device=masks.device)
        return Instances(masks, scores, numbers.repeat_interleave(counts))

    def _pyramid(self, hidden: Tensor) -> Any:
        """Output of the image encoder, from that of its backbone."""
        from transformers.models.sam3.modeling_sam3 import Sam3VisionEncoderOutput

        side = round(hidden.shape[1] ** 0.5)
        spatial = hidden.view(1, side, side, -1).permute(0, 3, 1, 2)
        maps, positions = self.network.vision_encoder.neck(spatial)
        return Sam3VisionEncoderOutput(
            last_hidden_state=hidden, fpn_hidden_states=maps, fpn_position_encoding=positions
        )

    def _of_class(self, views: Any, number: int, size: Size) -> tuple[Tensor, Tensor]:
        """Masks bool (M, *size) and scores (M,) of one class."""
        text, mask = self._texts[number]
        out = self.network(vision_embeds=views, text_embeds=text, attention_mask=mask)
        scores = out.pred_logits[0].sigmoid() * out.presence_logits[0].sigmoid()
        kept = scores > self.min_score
        # Probabilities rather than logits are resized, as transformers' processor does.
        masks = out.pred_masks[:, kept].sigmoid()
        if not kept.any():
            return masks.new_zeros(0, *size, dtype=torch.bool), scores[kept]
        resized = F.interpolate(masks, size, mode="bilinear", align_corners=False)[0]
        return resized > 0.5, scores[kept]


@dataclass(frozen=True)
class Instances:
    """M instances in one image: masks bool (M, H, W), scores (M,), classes int64 (M,) ascending."""

    masks: Tensor
    scores: Tensor
    classes: Tensor


class SamTextRefiner:
    """Replaces the teacher's masks of each class by SAM 3's instances of the class's name.

    The classes are those of more than `size_threshold` pixels in the teacher's label. Pixels in
    instances of different classes are in none of them. An image without an instance keeps the
    teacher's label.
    """

    needs_scores = False

    def __init__(
        self,
        embed: Embed,
        predict: InstancePredictor,
        size_threshold: int,
        remove_overlap: bool,
        overlap: str,
    ) -> None:
        self.embed = embed
        self.predict = predict
        self.size_threshold = size_threshold
        self.remove_overlap = remove_overlap
        self.overlap = overlap

    def fill_cache(self, images: Sequence[Tensor]) -> None:
        """See `SamRefiner.fill_cache`."""
        self.embed(images)

    @torch.no_grad()
    def refine(
        self, images: Sequence[Tensor], labels: Sequence[PseudoLabel], seeds: Sequence[int]
    ) -> list[RefinedLabel]:
        """See `Refiner`."""
        return [self._refine(i, label) for i, label in zip(images, labels, strict=True)]

    def _refine(self, image: Tensor, label: PseudoLabel) -> RefinedLabel:
        counts = torch.bincount(label.classes.flatten().int(), minlength=256)[:255]
        classes = (counts > self.size_threshold).nonzero()[:, 0].tolist()
        if not classes:
            return RefinedLabel.from_teacher(label)
        height, width = label.classes.shape
        found = self.predict(self.embed([image])[0], classes, (height, width))
        if not len(found.masks):
            return RefinedLabel.from_teacher(label)
        device = label.classes.device
        return merge_masks_by_class(
            found.masks.to(device),
            found.classes.to(device),
            label.classes,
            self.remove_overlap,
            self.overlap,
        )


def sam_text(cfg: CfgNode, device: torch.device) -> Refiner:
    """MODEL.CLOUDS.REFINER sam_text."""
    node = cfg.MODEL.CLOUDS.SAM
    model = load_pretrained(node.MODEL, TEXT_FAMILIES, device)
    label_space = Datasets.from_config(cfg).label_space
    words = [synonyms[0] for synonyms in label_space.synonyms]
    predict = InstancePredictor(model, load_tokenizer(node.MODEL), words, node.TEXT_SCORE_THRESHOLD)
    backbone = model.network.vision_encoder.backbone
    num_tokens = (model.frame.size // backbone.config.patch_size) ** 2
    shape = (1, num_tokens, backbone.config.hidden_size)
    embed = with_cache(cfg, TextEmbedder(model), model, backbone, shape)
    return SamTextRefiner(embed, predict, node.SIZE_THRESHOLD, node.RM_INTERSECTION, node.OVERLAP)


REFINER_REGISTRY.register(sam_text)
