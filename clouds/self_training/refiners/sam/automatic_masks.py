"""SAM's masks of everything in an image: a grid of point prompts, filters, non-maximum suppression.

As `segment_anything.SamAutomaticMaskGenerator` without crops, for every SAM.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import masks_to_boxes, nms

from clouds.d2 import CfgNode
from clouds.self_training.refiners.sam.frame import Points, Size
from clouds.self_training.refiners.sam.prompt_decoder import (
    PromptDecoder,
    Prompts,
    prompts_at_once,
)

STABILITY_OFFSET = 1.0
"""Distance of the two thresholds of the stability score from zero, in logits."""


@dataclass(frozen=True)
class AutomaticOptions:
    """Options of `automatic_masks`, named as in segment_anything.

    Attributes:
        points_per_side: points of the grid per row and per column.
        pred_iou_thresh: masks with at most this predicted IoU are left out.
        stability_score_thresh: masks with a lower stability score are left out: the IoU of the
            masks at the thresholds +1 and -1.
        box_nms_thresh: of masks whose boxes have a larger IoU, the one with the largest predicted
            IoU is kept.
    """

    points_per_side: int = 32
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    box_nms_thresh: float = 0.7

    @classmethod
    def from_config(cls, cfg: CfgNode) -> AutomaticOptions:
        """From MODEL.CLOUDS.REGIONS."""
        node = cfg.MODEL.CLOUDS.REGIONS
        return cls(
            node.POINTS_PER_SIDE,
            node.PRED_IOU_THRESH,
            node.STABILITY_SCORE_THRESH,
            node.BOX_NMS_THRESH,
        )


def automatic_masks(
    decoder: PromptDecoder, embedding: Tensor, size: Size, options: AutomaticOptions
) -> Tensor:
    """Masks bool (M, *size) of an image, by predicted IoU, largest first; they may overlap.

    Args:
        embedding: of the image of height and width `size`, see `PromptDecoder`.
    """
    points = decoder.frame.to_frame(point_grid(options.points_per_side, size), size)
    masks, scores = [], []
    with torch.autocast(embedding.device.type, enabled=False):
        for chunk in Prompts(points[:, None]).chunks(prompts_at_once(decoder, embedding.device)):
            logits, ious = decoder.decode(embedding, chunk, multimask=True)
            confident = ious > options.pred_iou_thresh
            resized = decoder.frame.from_frame(logits[confident][:, None], size)[:, 0]
            stable = stability_scores(resized) >= options.stability_score_thresh
            masks.append(resized[stable] > 0)
            scores.append(ious[confident][stable])
    found, score = torch.cat(masks), torch.cat(scores)
    not_empty = found.flatten(1).any(1)
    found, score = found[not_empty], score[not_empty]
    return found[nms(masks_to_boxes(found), score, options.box_nms_thresh)]


def point_grid(points_per_side: int, size: Size) -> Points:
    """float32 (points_per_side², 2), (x, y) of the centers of equal cells, row by row."""
    centers = (np.arange(points_per_side) + 0.5) / points_per_side
    x, y = np.meshgrid(centers * size[1], centers * size[0])
    return np.stack([x.ravel(), y.ravel()], 1).astype(np.float32)


def stability_scores(logits: Tensor) -> Tensor:
    """float32 (M,), the stability score of mask logits (M, H, W); 0 for a mask without a pixel."""
    inner = (logits > STABILITY_OFFSET).flatten(1).sum(1)
    outer = (logits > -STABILITY_OFFSET).flatten(1).sum(1)
    return inner / outer.clamp(min=1)


def segments_of(masks: Tensor) -> Tensor:
    """int64 (H, W): the smallest mask over each pixel, numbered from 1; 0 where there is none.

    Args:
        masks: bool (M, H, W).
    """
    areas = masks.flatten(1).sum(1)
    segments = torch.zeros(masks.shape[1:], dtype=torch.int64, device=masks.device)
    for number, index in enumerate(areas.argsort(descending=True, stable=True).tolist(), start=1):
        segments[masks[index]] = number
    return segments
