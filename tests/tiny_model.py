"""The whole model, small enough for a test on one core."""

from __future__ import annotations

import torch

import clouds.modeling  # noqa: F401 - registers what the config names
from clouds.config import get_cfg
from clouds.modeling.backbone.clip import CLIP
from clouds.modeling.backbone.open_clip_models import create_clip
from clouds.modeling.build import build_seeded

CONVNEXT, RESNET = "clouds_tiny", "clouds_tiny_resnet"


def tiny_config(**settings):
    """Keys as keywords, `__` for the dot."""
    cfg = get_cfg()
    defaults = {
        "MODEL__DEVICE": "cpu",
        "MODEL__CLOUDS__CLIP_MODEL_NAME": CONVNEXT,
        "MODEL__CLOUDS__CLIP_PRETRAINED_WEIGHTS": "",
        "MODEL__SEM_SEG_HEAD__CONVS_DIM": 32,
        "MODEL__SEM_SEG_HEAD__MASK_DIM": 32,
        "MODEL__SEM_SEG_HEAD__TRANSFORMER_ENC_LAYERS": 1,
        "MODEL__SEM_SEG_HEAD__TRANSFORMER_ENC_DIM_FEEDFORWARD": 64,
        "MODEL__MASK_FORMER__HIDDEN_DIM": 32,
        "MODEL__MASK_FORMER__NHEADS": 4,
        "MODEL__MASK_FORMER__NUM_OBJECT_QUERIES": 12,
        "MODEL__MASK_FORMER__DIM_FEEDFORWARD": 64,
        "MODEL__MASK_FORMER__DEC_LAYERS": 4,
        "MODEL__MASK_FORMER__TRAIN_NUM_POINTS": 256,
    }
    for name, value in (defaults | settings).items():
        *parents, leaf = name.split("__")
        node = cfg
        for parent in parents:
            node = node[parent]
        assert leaf in node, name
        node[leaf] = value
    return cfg


def tiny_model(**settings):
    return build_seeded(tiny_config(**settings))


def tiny_clip(name=CONVNEXT, frozen=True, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CLIP(clip_model=create_clip(name), model_name=name, frozen=frozen)
