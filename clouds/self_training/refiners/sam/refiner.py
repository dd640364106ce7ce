"""Segment Anything as refiner: point prompts in the components of the teacher's label."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from clouds.d2 import CfgNode
from clouds.ops.sam import as_tokens, best_masks, encode
from clouds.self_training.refiners.base import (
    REFINER_REGISTRY,
    PseudoLabel,
    RefinedLabel,
    Refiner,
    as_it_is,
    union,
)
from clouds.self_training.refiners.sam.embedding_cache import (
    CachedEmbedder,
    EmbeddingCache,
    fingerprint,
)
from clouds.self_training.refiners.sam.model import build_sam
from clouds.self_training.refiners.sam.prompts import (
    Components,
    PointOptions,
    choose_points,
    find_components,
)


def unite(
    masks: torch.Tensor,
    classes: torch.Tensor,
    teacher: torch.Tensor,
    remove_overlap: bool = True,
    overlap: str = "classes",
) -> RefinedLabel:
    """Remove overlaps, then join the masks of each class.

    Args:
        masks: bool (M, H, W), M >= 1; not written to.
        classes: int64 (M,), train ids, ascending.
        teacher: uint8 (H, W), the teacher's classes, for the agreement with them.
        remove_overlap: whether pixels that several masks cover leave all of them.
        overlap: which pixels those are: covered by masks of different 'classes', or by any two
            ('published', where also a class that has no pixel left stays, with an empty mask).

    Returns:
        Without points. The agreement is that of each component's mask as overlap removal left it.
    """
    labels, counts = torch.unique_consecutive(classes, return_counts=True)
    per_class = counts.tolist()
    if remove_overlap:
        covers = masks if overlap == "published" else _join(masks, per_class)
        masks = masks & ~_covered_twice(covers)
    unions = _join(masks, per_class)
    areas = torch.stack([mask.count_nonzero() for mask in masks])
    agreement = _agreement(masks, areas, classes, teacher)
    if overlap != "published":
        kept = torch.stack([some.any() for some in torch.split(areas, per_class)])
        labels, unions = labels[kept], unions[kept]
    return RefinedLabel(labels, unions, agreement)


# Masks are few and large: the loops below read each of them a few times at memory speed, which
# on a CPU is several times faster than reducing (M, H, W), and needs no other array of that size.


def _join(masks: torch.Tensor, per_class: list[int]) -> torch.Tensor:
    """(K, H, W), the union of each run of masks."""
    return torch.stack([union(run) for run in torch.split(masks, per_class)])


def _covered_twice(masks: torch.Tensor) -> torch.Tensor:
    """bool (H, W), where more than one mask is."""
    once = torch.zeros_like(masks[0])
    twice = torch.zeros_like(once)
    for mask in masks:
        twice |= once & mask
        once |= mask
    return twice


def _agreement(
    masks: torch.Tensor, areas: torch.Tensor, classes: torch.Tensor, teacher: torch.Tensor
) -> torch.Tensor:
    """float32 (H, W): per mask, the share where the teacher says its class; the best per pixel."""
    agreement = torch.zeros(teacher.shape, device=teacher.device)
    for mask, area, kind in zip(masks, areas, classes, strict=True):
        same = torch.count_nonzero(mask & (teacher == kind))
        share = (same / area.clamp(min=1)).to(torch.float32)
        agreement.masked_fill_(mask & (agreement < share), share)
    return agreement


def resized(height: int, width: int, long_side: int) -> tuple[int, int]:
    """Height and width of an image whose longer side becomes `long_side`, as SAM rounds them."""
    scale = long_side / max(height, width)
    return int(height * scale + 0.5), int(width * scale + 0.5)


CPU_AT_ONCE = 1
"""Components that a CPU decodes together at most: more do not fit its caches and take longer."""

Size = tuple[int, int]
Points = npt.NDArray[np.float32]


class Embed(Protocol):
    """Clean images -> SAM's embeddings, which depend on image and autocast alone."""

    def __call__(self, images: Sequence[Tensor]) -> list[Tensor]:
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
    def __call__(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Embed images, one after the other: they may differ in size, and memory stays bounded.

        Args:
            images: uint8 (3, H, W) RGB, on any device.

        Returns:
            (C, s, s) each, on SAM's device; the image, its longer side resized to SAM's (1024),
            lies at the top left, the rest is padding. C 256, s 64 but for the tiny model.
        """
        self.sam.image_encoder.to(self.sam.device)  # no copy where it is there
        return [self._embed(image) for image in images]

    def _embed(self, image: Tensor) -> Tensor:
        assert image.dtype == torch.uint8, f"expected uint8, got {image.dtype}"
        height, width = resized(image.shape[1], image.shape[2], self.sam.image_encoder.img_size)
        picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
        pixels = np.array(picture.resize((width, height), Image.Resampling.BILINEAR))
        fed = torch.from_numpy(pixels).to(self.sam.device).permute(2, 0, 1).contiguous()
        return encode(self.sam.image_encoder, self.sam.preprocess(fed[None]))[0]


class PointDecoder:
    """SAM's prompt encoder and mask decoder, for many components of several images at once.

    Args:
        sam: as from `build_sam`.
        second_pass: decode again, with the logits of each component's best mask as a prompt.
        at_once: components decoded together at most, which bounds memory; on a CPU it is
            CPU_AT_ONCE.
    """

    def __init__(self, sam: Any, second_pass: bool = False, at_once: int = 64) -> None:
        self.sam = sam
        self.second_pass = second_pass
        self.at_once = at_once

    @torch.no_grad()
    def __call__(
        self, embeddings: Sequence[Tensor], points: Sequence[Points], sizes: Sequence[Size]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The best of SAM's three masks for each component of each image.

        Args:
            embeddings: (C, s, s) of each image, on one device.
            points: (M, P, 2) for each image, (x, y) pixels of it, all on the component, M >= 1; M
                may differ, P may not.
            sizes: height, width of each image.

        Yields:
            For each image, whose masks exist only then:
            masks: bool (M, height, width), those with the largest predicted IoU.
            ious: float32 (M, 3), the predicted IoU of all three.
        """
        device, counts = embeddings[0].device, [len(one) for one in points]
        at_once = min(self.at_once, CPU_AT_ONCE) if device.type == "cpu" else self.at_once
        frames = [resized(*size, self.sam.image_encoder.img_size) for size in sizes]
        placed = [to_frame(*one) for one in zip(points, sizes, frames, strict=True)]
        prompts = torch.from_numpy(np.concatenate(placed)).to(device)
        # In half precision points of a large image would lie pixels beside their places.
        with torch.autocast(device.type, enabled=False):
            images = [as_tokens(embedding.float()).contiguous() for embedding in embeddings]
            positions = as_tokens(self.sam.prompt_encoder.get_dense_pe()[0]).contiguous()
            image_of = [image for image, m in zip(images, counts, strict=True) for _ in range(m)]
            together = [slice(i, i + at_once) for i in range(0, len(prompts), at_once)]
            parts = [
                self._decode(torch.stack(image_of[some]), positions, prompts[some])
                for some in together
            ]
        logits, ious = (torch.split(torch.cat(part), counts) for part in zip(*parts, strict=True))
        for own, own_ious, frame, size in zip(logits, ious, frames, sizes, strict=True):
            yield self._masks(own, frame, size, at_once), own_ious

    def _decode(self, pixels: Tensor, positions: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """Best logits (m, 1, 4s, 4s) and predicted IoUs (m, 3).

        Args:
            pixels: (m, s * s, C), the image of each component.
            positions: (s * s, C).
            points: (m, P, 2) in SAM's frame.
        """
        logits, ious = self._predict(pixels, positions, points, None)
        if self.second_pass:
            logits, ious = self._predict(pixels, positions, points, logits)
        return logits, ious

    def _predict(
        self, pixels: Tensor, positions: Tensor, points: Tensor, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One pass of `_decode`; `masks` are logits (m, 1, 4s, 4s) that go with the points."""
        encoder = self.sam.prompt_encoder
        foreground = torch.ones(points.shape[:2], dtype=torch.int, device=points.device)
        sparse, dense = encoder(points=(points, foreground), boxes=None, masks=masks)
        return best_masks(
            self.sam.mask_decoder,
            pixels + as_tokens(dense),
            positions,
            sparse,
            encoder.image_embedding_size,
        )

    def _masks(self, logits: Tensor, frame: Size, size: Size, at_once: int) -> Tensor:
        """Only chosen masks are brought to the image's size."""
        return torch.cat(
            [
                self.sam.postprocess_masks(some, frame, size)[:, 0] > self.sam.mask_threshold
                for some in torch.split(logits, at_once)
            ]
        )


def to_frame(points: Points, size: Size, frame: Size) -> Points:
    """Points of an image of a size, in SAM's frame."""
    scale = np.array([frame[1] / size[1], frame[0] / size[0]])
    placed: Points = (points * scale).astype(np.float32)
    return placed


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
        images: Sequence[Tensor],
        labels: Sequence[PseudoLabel],
        seeds: Sequence[int],
    ) -> list[RefinedLabel]:
        """See `Refiner`. `RefinedLabel.points` are the points that SAM got."""
        found = [
            find_components(label.classes.cpu().numpy(), self.options.larger_than)
            for label in labels
        ]
        asked = [i for i, components in enumerate(found) if len(components)]
        if not asked:
            return [as_it_is(label) for label in labels]
        points = [
            choose_points(found[i], self.options.points, np.random.default_rng(seeds[i]))
            for i in asked
        ]
        sizes = [(int(h), int(w)) for h, w in (labels[i].classes.shape for i in asked)]
        decoded = self.decode(self.embed([images[i] for i in asked]), points, sizes)
        refined = {
            i: self._united(labels[i], found[i], masks, own)
            for i, (masks, _), own in zip(asked, decoded, points, strict=True)
        }
        return [refined[i] if i in refined else as_it_is(label) for i, label in enumerate(labels)]

    def _united(
        self, label: PseudoLabel, components: Components, masks: Tensor, points: Points
    ) -> RefinedLabel:
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
    node = cfg.MODEL.CLOUDS.SAM
    prompts = model.prompt_encoder
    cache = EmbeddingCache(
        Path(node.CACHE_DIR).expanduser(),
        (prompts.embed_dim, *prompts.image_embedding_size),
    )
    model.image_encoder.cpu()
    encoder = fingerprint(model, node.MODEL)
    return CachedEmbedder(ImageEmbedder(model), cache, encoder, model.device)


REFINER_REGISTRY.register(sam)
