"""Checkpoints of the tiny model, as the trainer writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tiny_model import tiny_config

from clouds.engine import Trainer

DRAWN = ("query_feat", "class_embed", "mask_embed")


def save_checkpoint(folder, **settings):
    """Path of `model_final.pth` and the model in it; `settings` as in `tiny_config`.

    Queries and classifiers have larger weights than at initialization, so that an image has
    several classes.
    """
    settings = {"TEST__SHORT_SIDE": 64, "DATASETS__TEST": ()} | settings
    cfg = tiny_config(OUTPUT_DIR=str(folder), **settings)
    trainer = Trainer(cfg, loader=lambda start: [])  # no data is needed
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in trainer.model.sem_seg_head.predictor.named_parameters():
            if name.startswith(DRAWN):
                scale = 1 if value.ndim > 1 else 0.1
                value.copy_(torch.randn(value.shape, generator=generator) * scale)
    trainer.checkpointer.save("model_final", iteration=0)
    return Path(folder, "model_final.pth"), trainer.model.eval()


def block_image(height, width, seed=0):
    """(height, width, 3) uint8: four blocks of different colors, and noise."""
    rng = np.random.default_rng(seed)
    colors = rng.integers(20, 236, (2, 2, 3))
    rows, columns = np.arange(height) * 2 // height, np.arange(width) * 2 // width
    noise = rng.integers(-20, 21, (height, width, 3))
    return (colors[rows][:, columns] + noise).astype(np.uint8)
