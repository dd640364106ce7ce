"""Region labels (SeCo, Zhao et al., 2023): SAM's masks of everything, and of each object.

Stuff: each automatic mask takes the class of most of its pixels. Things: each component of the
teacher's label prompts SAM with its box and its purest points. Then regions whose loss is that of
wrong labels are left out or get another class.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clouds.d2 import CfgNode
from clouds.data.datasets import Datasets
from clouds.data.label_space import IGNORE, LabelSpace
from clouds.self_training.refiners.base import REFINER_REGISTRY, PseudoLabel, RefinedLabel, Refiner
from clouds.self_training.refiners.sam.automatic_masks import (
    AutomaticOptions,
    automatic_masks,
    segments_of,
)
from clouds.self_training.refiners.sam.backends import PointSam, build_point_sam
from clouds.self_training.refiners.sam.embedding_cache import HALF, CachedEmbedder, EmbeddingCache
from clouds.self_training.refiners.sam.frame import Points, Size
from clouds.self_training.refiners.sam.prompt_decoder import Prompts, prompts_at_once
from clouds.self_training.refiners.sam.prompts import Components, find_components
from clouds.self_training.refiners.sam.region_filter import noise_probabilities, region_losses
from clouds.self_training.refiners.superpixel import majority_vote

PURITY_RADIUS = 8
"""The purity of a pixel is that of the square of 2 * PURITY_RADIUS + 1 pixels around it."""
MAX_SEGMENTS = 2048
"""Half precision, in which segments are cached, holds whole numbers up to this."""

Classes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class RegionOptions:
    """Options of `RegionRefiner`.

    Attributes:
        things: train ids of things; all other classes are stuff.
        automatic: of the automatic masks.
        min_share: of the pixels of an automatic mask, the share that its class must exceed.
        min_area: things with fewer pixels are no regions.
        box_growth: distance by which the boxes of things grow on each side, in units of area /
            perimeter of the box: 0.31 of the side of a square for 1.25.
        num_points: point prompts per thing.
        noise: what happens with noisy regions: 'none', 'drop', or 'relabel' (to the class with the
            smallest loss; dropped if that is the same).
        noise_threshold: regions with a larger probability of being wrong are noisy.
    """

    things: tuple[int, ...]
    automatic: AutomaticOptions
    min_share: float = 0.2
    min_area: int = 10
    box_growth: float = 1.25
    num_points: int = 2
    noise: str = "drop"
    noise_threshold: float = 0.5

    @classmethod
    def from_config(cls, cfg: CfgNode) -> RegionOptions:
        """From MODEL.CLOUDS.REGIONS; raises ValueError as `things_of`."""
        node = cfg.MODEL.CLOUDS.REGIONS
        return cls(
            things=things_of(Datasets.from_config(cfg).label_space, node.THINGS),
            automatic=AutomaticOptions.from_config(cfg),
            min_share=node.MIN_SHARE,
            min_area=node.MIN_AREA,
            box_growth=node.BOX_GROWTH,
            num_points=node.NUM_POINTS,
            noise=node.FILTER,
            noise_threshold=node.NOISE_THRESHOLD,
        )


def things_of(label_space: LabelSpace, names: Sequence[str]) -> tuple[int, ...]:
    """Train ids of classes.

    Raises:
        ValueError: the label space has no class of a name.
    """
    unknown = [name for name in names if name not in label_space.names]
    if unknown:
        raise ValueError(
            f"MODEL.CLOUDS.REGIONS.THINGS: the label space {label_space.name} has no class "
            f"{', '.join(unknown)}. Name those of its classes that are objects: "
            f"{', '.join(label_space.names)}"
        )
    return tuple(label_space.names.index(name) for name in names)


@dataclass(frozen=True)
class Regions:
    """R regions of an image, which do not overlap.

    Attributes:
        ids: int64 (H, W), the region of each pixel, 0..R-1; -1 where there is none.
        classes: int64 (R,), train ids; 255: a region that was dropped.
        points: float32 (M, P, 2), point prompts of things, (x, y) in pixels; None: no things.
    """

    ids: npt.NDArray[np.int64]
    classes: npt.NDArray[np.int64]
    points: Points | None = None

    def class_map(self) -> Classes:
        """uint8 (H, W) train ids, 255 outside of all regions."""
        table = np.append(self.classes, IGNORE).astype(np.uint8)
        return table[self.ids]


class RegionRefiner:
    """Labels regions of SAM instead of pixels.

    Pixels in no region have no label. An image without a region keeps the teacher's label.

    Args:
        sam: image encoder and mask decoder.
        options: see there.
    """

    def __init__(self, sam: PointSam, options: RegionOptions) -> None:
        self.embed = sam.embed
        self.decoder = sam.decoder
        self.options = options
        self.needs_scores = options.noise != "none"
        self._caches: dict[Size, EmbeddingCache] = {}

    def fill_cache(self, images: Sequence[Tensor]) -> None:
        """See `SamRefiner.fill_cache`: embeddings and automatic masks."""
        for image in images:
            self.segments(image, self.embed([image])[0])

    @torch.no_grad()
    def refine(
        self, images: Sequence[Tensor], labels: Sequence[PseudoLabel], seeds: Sequence[int]
    ) -> list[RefinedLabel]:
        """See `Refiner`. `RefinedLabel.points` are those of things."""
        embeddings = self.embed(images) if images else []
        return [self._refine(*each) for each in zip(images, labels, embeddings, strict=True)]

    def _refine(self, image: Tensor, label: PseudoLabel, embedding: Tensor) -> RefinedLabel:
        classes = label.classes.cpu().numpy()
        regions = self._with_things(
            stuff_regions(self.segments(image, embedding), classes, self.options),
            classes,
            embedding,
        )
        if not len(regions.classes):
            return RefinedLabel.from_teacher(label)
        if label.scores is not None and self.options.noise != "none":
            regions = without_noise(regions, label.scores, self.options)
        return _refined_label(regions, label)

    def segments(self, image: Tensor, embedding: Tensor) -> npt.NDArray[np.int64]:
        """(H, W), the automatic masks of an image by `segments_of`; cached with the embeddings."""
        size = (int(image.shape[1]), int(image.shape[2]))
        if not isinstance(self.embed, CachedEmbedder):
            return self._segments(embedding, size)
        known = f"{self.embed.key(image)} {self.options.automatic}"
        key = hashlib.blake2b(known.encode(), digest_size=16).hexdigest()
        if size not in self._caches:
            folder = self.embed.cache.folder / "segments"
            self._caches[size] = EmbeddingCache(folder, (1, *size))
        cached = self._caches[size].get(key)
        if cached is not None:
            return np.asarray(cached[0], np.int64)
        segments = self._segments(embedding, size)
        self._caches[size].put(key, segments[None].astype(HALF))
        return segments

    def _segments(self, embedding: Tensor, size: Size) -> npt.NDArray[np.int64]:
        masks = automatic_masks(self.decoder, embedding, size, self.options.automatic)
        segments: npt.NDArray[np.int64] = segments_of(masks[:MAX_SEGMENTS]).cpu().numpy()
        return segments

    def _with_things(self, stuff: Regions, classes: Classes, embedding: Tensor) -> Regions:
        """Regions of things over those of stuff, smaller ones over larger ones."""
        label = np.where(np.isin(classes, self.options.things), classes, np.uint8(IGNORE))
        components = find_components(label, self.options.min_area - 1)
        if not len(components):
            return stuff
        points = purest_points(components, impurity(classes), self.options.num_points)
        boxes = grown_boxes(components, self.options.box_growth)
        masks = self._thing_masks(embedding, points, boxes, (classes.shape[0], classes.shape[1]))
        ids, offset = stuff.ids.copy(), len(stuff.classes)
        for index in np.argsort(-masks.sum((1, 2)), kind="stable"):
            ids[masks[index]] = offset + index
        return Regions(ids, np.concatenate([stuff.classes, components.classes]), points)

    def _thing_masks(
        self, embedding: Tensor, points: Points, boxes: Points, size: Size
    ) -> npt.NDArray[np.bool_]:
        """bool (M, *size), one mask per box (M, 4) and its points (M, P, 2), in pixels."""
        frame = self.decoder.frame
        corners = frame.to_frame(boxes.reshape(-1, 2, 2), size).reshape(-1, 4)
        prompts = Prompts(frame.to_frame(points, size), corners)
        masks = []
        with torch.autocast(embedding.device.type, enabled=False):
            for chunk in prompts.chunks(prompts_at_once(self.decoder, embedding.device)):
                logits, _ = self.decoder.decode(embedding, chunk, multimask=False)
                masks.append((frame.from_frame(logits, size)[:, 0] > 0).cpu())
        return torch.cat(masks).numpy()


def stuff_regions(
    segments: npt.NDArray[np.int64], classes: Classes, options: RegionOptions
) -> Regions:
    """Segments, 0 where there is none, with the stuff class of the largest share, if it is enough.

    Args:
        segments: (H, W), from `segments_of`.
        classes: uint8 (H, W), the teacher's.
    """
    stuff = np.where(np.isin(classes, options.things), np.uint8(IGNORE), classes)
    winners, shares = majority_vote(segments, stuff)
    kept = (shares > options.min_share) & (winners != IGNORE) & (segments > 0)
    numbers, first, ids = np.unique(
        np.where(kept, segments, 0), return_index=True, return_inverse=True
    )
    has_rest = bool(len(numbers)) and numbers[0] == 0
    order = ids.reshape(segments.shape) - int(has_rest)
    chosen = winners.ravel()[first][int(has_rest) :]
    return Regions(order.astype(np.int64), chosen.astype(np.int64))


def impurity(classes: Classes) -> npt.NDArray[np.float32]:
    """(H, W), entropy of the classes in the square around each pixel, within the image."""
    side = (2 * PURITY_RADIUS + 1,) * 2
    total: npt.NDArray[np.float32] = np.zeros(classes.shape, np.float32)
    ones = np.ones(classes.shape, np.float32)
    counts = cv2.boxFilter(ones, -1, side, normalize=False, borderType=cv2.BORDER_CONSTANT)
    for number in np.unique(classes):
        own = (classes == number).astype(np.float32)
        share = cv2.boxFilter(own, -1, side, normalize=False, borderType=cv2.BORDER_CONSTANT)
        share = np.clip(share / counts, 1e-12, 1)
        total -= share * np.log(share)
    return total


def purest_points(
    components: Components, impurities: npt.NDArray[np.float32], num_points: int
) -> Points:
    """float32 (M, num_points, 2), (x, y): of equal parts in scan order, the purest pixel of each.

    From a component with fewer pixels than points some pixels are taken twice.
    """
    points = np.empty((len(components), num_points, 2), np.float32)
    for index in range(len(components)):
        top, left = components.boxes[index, :2]
        pixels = np.argwhere(components.crop(index)) + np.array([top, left])
        if len(pixels) < num_points:
            pixels = np.resize(pixels, (num_points, 2))
        for number, part in enumerate(np.array_split(pixels, num_points)):
            row, column = part[impurities[part[:, 0], part[:, 1]].argmin()]
            points[index, number] = column, row
    return points


def grown_boxes(components: Components, growth: float) -> Points:
    """float32 (M, 4): left, top, right, bottom of each component, grown, within the image."""
    top, left, bottom, right = components.boxes.T.astype(np.float64)
    height, width = bottom - top, right - left
    distance = growth * height * width / (2 * (height + width))
    rows, columns = components.ids.shape
    sides = (
        np.maximum(left - distance, 0),
        np.maximum(top - distance, 0),
        np.minimum(right - 1 + distance, columns - 1),
        np.minimum(bottom - 1 + distance, rows - 1),
    )
    return np.stack(sides, 1).astype(np.float32)


def without_noise(regions: Regions, scores: Tensor, options: RegionOptions) -> Regions:
    """Regions of which noisy ones are dropped (class 255) or have another class.

    Args:
        scores: float32 (C, H, W), the teacher's.
    """
    count = len(regions.classes)
    ids = torch.from_numpy(regions.ids).to(scores.device)
    losses = region_losses(scores, ids, count).cpu().numpy().astype(np.float64)
    visible = np.bincount(regions.ids[regions.ids >= 0], minlength=count) > 0
    own = losses[np.arange(count), regions.classes]
    noisy = np.zeros(count, np.bool_)
    noisy[visible] = noise_probabilities(own[visible]) > options.noise_threshold
    classes = regions.classes.copy()
    classes[noisy] = IGNORE
    if options.noise == "relabel":
        best = losses.argmin(1)
        changed = noisy & (best != regions.classes)
        classes[changed] = best[changed]
    return replace(regions, classes=classes)


def _refined_label(regions: Regions, label: PseudoLabel) -> RefinedLabel:
    device, class_map = label.classes.device, regions.class_map()
    same = (class_map == label.classes.cpu().numpy())[regions.ids >= 0]
    inside = regions.ids[regions.ids >= 0]
    count = len(regions.classes)
    areas = np.bincount(inside, minlength=count)
    shares = np.bincount(inside, weights=same, minlength=count) / np.maximum(areas, 1)
    agreement = np.where(class_map != IGNORE, np.append(shares, 0)[regions.ids], 0)
    refined = RefinedLabel.from_teacher(
        PseudoLabel(torch.from_numpy(class_map).to(device), label.confidence)
    )
    points = regions.points
    segments = np.where(class_map != IGNORE, regions.ids, -1)
    return replace(
        refined,
        agreement=torch.from_numpy(agreement.astype(np.float32)).to(device),
        points=None if points is None else torch.from_numpy(points).to(device),
        segments=torch.from_numpy(segments).to(device),
    )


def regions(cfg: CfgNode, device: torch.device) -> Refiner:
    """MODEL.CLOUDS.REFINER regions."""
    options = RegionOptions.from_config(cfg)
    return RegionRefiner(build_point_sam(cfg, device), options)


REFINER_REGISTRY.register(regions)
