"""Segment Anything, asked with points in the components of the teacher's label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from clouds.d2 import CfgNode
from clouds.self_training.components import Components, find_components
from clouds.self_training.point_prompts import PointOptions, choose_points
from clouds.self_training.pseudo_label import PseudoLabel, RefinedLabel
from clouds.self_training.refiners.embedding_cache import (
    CachedEmbedder,
    EmbeddingCache,
    fingerprint,
)
from clouds.self_training.refiners.none import as_it_is
from clouds.self_training.refiners.overlap import unite
from clouds.self_training.refiners.registry import REFINER_REGISTRY, Refiner
from clouds.self_training.refiners.sam_model import build_sam


def resized(height: int, width: int, long_side: int) -> tuple[int, int]:
    """Height and width of an image whose longer side becomes `long_side`, as SAM rounds them."""
    scale = long_side / max(height, width)
    return int(height * scale + 0.5), int(width * scale + 0.5)


CPU_AT_ONCE = 4
"""Components that a CPU decodes together at most: more do not fit its caches and take longer."""


class Embed(Protocol):
    """Clean images -> SAM's embeddings of them. A function of the image alone: it can be kept."""

    def __call__(self, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `ImageEmbedder`."""
        ...


class ImageEmbedder:
    """SAM's image encoder, where nearly all of its time goes.

    Args:
        sam: as from `build_sam`.
    """

    def __init__(self, sam: Any) -> None:
        self.sam = sam

    @torch.no_grad()
    def __call__(self, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Embed images, one after the other: they may differ in size, and memory stays bounded.

        Args:
            images: uint8 (3, H, W) RGB, on any device.

        Returns:
            (C, s, s) each, on SAM's device; the image, its longer side resized to SAM's (1024),
            lies at the top left, the rest is padding. C 256, s 64 but for the tiny model.
        """
        self.sam.image_encoder.to(self.sam.device)  # no copy where it is there
        return [self._embed(image) for image in images]

    def _embed(self, image: torch.Tensor) -> torch.Tensor:
        assert image.dtype == torch.uint8, f"expected uint8, got {image.dtype}"
        height, width = resized(image.shape[1], image.shape[2], self.sam.image_encoder.img_size)
        picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
        pixels = np.array(picture.resize((width, height), Image.Resampling.BILINEAR))
        fed = torch.from_numpy(pixels).to(self.sam.device).permute(2, 0, 1).contiguous()
        embedding: torch.Tensor = self.sam.image_encoder(self.sam.preprocess(fed[None]))
        return embedding[0]


class PointDecoder:
    """SAM's prompt encoder and mask decoder, for many components of an image at once.

    Args:
        sam: as from `build_sam`.
        second_pass: decode again, with the logits of each component's best mask as a prompt.
        at_once: components decoded together at most; bounds memory.
    """

    def __init__(self, sam: Any, second_pass: bool = False, at_once: int = 64) -> None:
        self.sam = sam
        self.second_pass = second_pass
        self.at_once = at_once

    @torch.no_grad()
    def __call__(
        self, embedding: torch.Tensor, points: npt.NDArray[np.float32], size: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best of SAM's three masks for each component.

        Args:
            embedding: (C, s, s), of the image.
            points: (M, P, 2), (x, y) pixels of the image, M >= 1; all on the component.
            size: height, width of the image.

        Returns:
            masks: bool (M, height, width), those with the largest predicted IoU.
            ious: float32 (M, 3), the predicted IoU of all three.
        """
        frame = resized(*size, self.sam.image_encoder.img_size)
        scale = np.array([frame[1] / size[1], frame[0] / size[0]])
        prompts = torch.from_numpy((points * scale).astype(np.float32)).to(embedding.device)
        at_once = self.at_once
        if embedding.device.type == "cpu":
            at_once = min(at_once, CPU_AT_ONCE)
        # In half precision points of a large image would lie pixels beside their places.
        with torch.autocast(embedding.device.type, enabled=False):
            parts = [
                self._decode(embedding.float(), some, frame, size)
                for some in torch.split(prompts, at_once)
            ]
        masks, ious = zip(*parts, strict=True)
        return torch.cat(masks), torch.cat(ious)

    def _decode(
        self,
        embedding: torch.Tensor,
        points: torch.Tensor,
        frame: tuple[int, int],
        size: tuple[int, int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits, ious = self._predict(embedding, points, None)
        if self.second_pass:
            logits, ious = self._predict(embedding, points, _best(logits, ious))
        # Only the chosen mask is brought to the image's size.
        upsampled = self.sam.postprocess_masks(_best(logits, ious), frame, size)
        return upsampled[:, 0] > self.sam.mask_threshold, ious

    def _predict(
        self, embedding: torch.Tensor, points: torch.Tensor, masks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (m, 3, 4s, 4s) and predicted IoUs (m, 3); `masks` (m, 1, 4s, 4s) are logits."""
        foreground = torch.ones(points.shape[:2], dtype=torch.int, device=points.device)
        sparse, dense = self.sam.prompt_encoder(
            points=(points, foreground), boxes=None, masks=masks
        )
        logits, ious = self.sam.mask_decoder(
            image_embeddings=embedding[None],
            image_pe=self.sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
        return logits, ious


def _best(logits: torch.Tensor, ious: torch.Tensor) -> torch.Tensor:
    """(m, 1, h, w), for each component the logits of the mask that SAM thinks best of."""
    best = ious.argmax(1)
    return logits[torch.arange(len(best), device=best.device), best][:, None]


@dataclass(frozen=True)
class SamOptions:
    """How SAM refines, besides its own size and weights.

    Attributes:
        larger_than: components of at most so many pixels get no mask.
        points: which points of a component it is asked with.
        remove_overlap, overlap: as for `unite`.
        second_pass, at_once: as for `PointDecoder`.
    """

    larger_than: int = 5000
    points: PointOptions = field(default_factory=PointOptions)
    remove_overlap: bool = True
    overlap: str = "classes"
    second_pass: bool = False
    at_once: int = 64

    @classmethod
    def from_config(cls, cfg: CfgNode) -> SamOptions:
        """From MODEL.CLOUDS.SAM."""
        node = cfg.MODEL.CLOUDS.SAM
        return cls(
            larger_than=node.SIZE_THRESHOLD,
            points=PointOptions.from_config(cfg),
            remove_overlap=node.RM_INTERSECTION,
            overlap=node.OVERLAP,
            second_pass=node.REFINEMENT,
            at_once=node.COMPONENTS_AT_ONCE,
        )


class SamRefiner:
    """CLOUDS' refiner (section 3 of the paper): points in each component, SAM's best mask of it.

    The masks of a class are joined; pixels that masks of different classes claim belong to none
    of them. Small components get no mask. An image that has no large one keeps its label.

    Args:
        sam: as from `build_sam`.
        options: see there.
        embed: where image embeddings come from; None: SAM's encoder, each time.
    """

    def __init__(self, sam: Any, options: SamOptions, embed: Embed | None = None) -> None:
        self.options = options
        self.embed = embed or ImageEmbedder(sam)
        self.decode = PointDecoder(sam, options.second_pass, options.at_once)

    @torch.no_grad()
    def refine(
        self,
        images: Sequence[torch.Tensor],
        labels: Sequence[PseudoLabel],
        seeds: Sequence[int],
    ) -> list[RefinedLabel]:
        """See `Refiner`. `RefinedLabel.points` are the points that SAM got."""
        found = [
            find_components(label.classes.cpu().numpy(), self.options.larger_than)
            for label in labels
        ]
        asked = [image for image, parts in zip(images, found, strict=True) if len(parts)]
        embeddings = iter(self.embed(asked))
        return [
            self._refine(next(embeddings), label, parts, seed) if len(parts) else as_it_is(label)
            for label, parts, seed in zip(labels, found, seeds, strict=True)
        ]

    def _refine(
        self, embedding: torch.Tensor, label: PseudoLabel, components: Components, seed: int
    ) -> RefinedLabel:
        points = choose_points(components, self.options.points, np.random.default_rng(seed))
        height, width = label.classes.shape
        masks, _ = self.decode(embedding, points, (height, width))
        device = label.classes.device
        united = unite(
            masks.to(device),
            torch.from_numpy(components.classes).to(device),
            label.classes,
            self.options.remove_overlap,
            self.options.overlap,
        )
        return replace(united, points=torch.from_numpy(points).to(device))


def sam(cfg: CfgNode, device: torch.device) -> Refiner:
    """MODEL.CLOUDS.REFINER sam."""
    model = build_sam(cfg, device)
    embed = cached(cfg, model) if cfg.MODEL.CLOUDS.SAM.CACHE_DIR else None
    return SamRefiner(model, SamOptions.from_config(cfg), embed)


def cached(cfg: CfgNode, model: Any) -> CachedEmbedder:
    """SAM's image encoder behind the cache that MODEL.CLOUDS.SAM.CACHE_DIR names.

    The encoder stays in main memory until a picture is not in the cache.

    Args:
        model: as from `build_sam`.

    Raises:
        OSError: the folder cannot be made.
    """
    from clouds.engine import distributed  # it imports the trainer, which imports refiners

    node = cfg.MODEL.CLOUDS.SAM
    prompts = model.prompt_encoder
    cache = EmbeddingCache(
        Path(node.CACHE_DIR).expanduser(),
        (prompts.embed_dim, *prompts.image_embedding_size),
        max_bytes=round(node.CACHE_GIB * 2**30),
        writers=distributed.world_size(),
    )
    model.image_encoder.cpu()
    encoder = fingerprint(model, node.MODEL)
    return CachedEmbedder(ImageEmbedder(model), cache, encoder, model.device)


REFINER_REGISTRY.register(sam)
