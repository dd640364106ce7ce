"""A tiny model for joint training, and samples for it."""

from __future__ import annotations

import torch
from tiny_model import tiny_model

from clouds.data.structures import Domain

MIXED = {"DATASETS__TRAIN": ("gta5", "sd_a"), "MODEL__CLOUDS__REFINER": "none"}


def source(seed, height=64, width=96):
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8),
        "sem_seg": torch.randint(0, 4, (height, width), generator=generator).to(torch.uint8),
        "domain": Domain.SOURCE,
        "seed": seed,
    }


def generated(seed, height=64, width=96):
    clean = source(seed, height, width)["image"]
    return {
        "image": clean // 2 + 30,
        "clean_image": clean,
        "domain": Domain.GENERATED,
        "seed": seed,
    }


def joint_model(**settings):
    return tiny_model(**(MIXED | settings)).train()
