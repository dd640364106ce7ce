"""A tiny SAM, and images and teacher's labels for tests of refiners."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage

from clouds.config import get_cfg
from clouds.self_training.refiners.base import PseudoLabel
from clouds.self_training.refiners.sam.model import build_sam
from clouds.self_training.refiners.sam.predictor import ImageEmbedder, PointPredictor


def config(**sam):
    cfg = get_cfg()
    cfg.MODEL.CLOUDS.SAM.MODEL = "tiny"
    cfg.MODEL.CLOUDS.SAM.WEIGHTS = ""
    cfg.MODEL.CLOUDS.SAM.SIZE_THRESHOLD = 100
    for name, value in sam.items():
        assert name in cfg.MODEL.CLOUDS.SAM
        cfg.MODEL.CLOUDS.SAM[name] = value
    return cfg


def image_of(size=(96, 160), seed=0):
    """uint8 (3, H, W), smooth colors."""
    noise = np.random.default_rng(seed).normal(size=(3, *size))
    smooth = ndimage.gaussian_filter(noise, (0, 4, 4))
    smooth = (smooth - smooth.min()) / np.ptp(smooth)
    return torch.from_numpy((255 * smooth).astype(np.uint8))


def label_of(size=(96, 160), seed=0, classes=5):
    generator = np.random.default_rng(seed)
    fields = [ndimage.gaussian_filter(generator.normal(size=size), 8) for _ in range(classes)]
    return PseudoLabel(
        torch.from_numpy(np.argmax(fields, axis=0).astype(np.uint8)),
        torch.from_numpy(generator.random(size, np.float32)),
    )


def build_tiny_sam():
    """The tiny SAM, with predicted IoUs that spread: each of its three masks is best somewhere."""
    sam = build_sam(config(), "cpu")
    generator = torch.Generator().manual_seed(1)
    head = sam.mask_decoder.iou_prediction_head.layers
    for layer in head:
        layer.weight.normal_(std=0.2, generator=generator)
    points = torch.rand(64, 5, 2, generator=generator).numpy() * 95
    [(_, ious)] = PointPredictor(sam)(ImageEmbedder(sam)([image_of()]), [points], [(96, 160)])
    head[-1].bias[1:] -= ious.mean(0)
    return sam
