"""SAMs of transformers at their published sizes, with random weights, saved to a folder.

Published are `facebook/sam-vit-base`, `syscv-community/sam-hq-vit-base`,
`facebook/sam2.1-hiera-tiny`, `yonigozlan/EdgeTAM-hf` and `facebook/sam3`, of which there are two
models here: detector and tracker. The default configuration of each class in transformers is the
published one, except that of EdgeTAM: it builds a ResNet-50, whose features its neck does not take.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FAMILIES = {
    "sam": ("SamConfig", "SamModel"),
    "sam_hq": ("SamHQConfig", "SamHQModel"),
    "sam2": ("Sam2Config", "Sam2Model"),
    "edgetam": ("EdgeTamConfig", "EdgeTamModel"),
    "sam3_tracker": ("Sam3TrackerConfig", "Sam3TrackerModel"),
    "sam3": ("Sam3Config", "Sam3Model"),
}
"""Names of the classes of configuration and network in transformers."""

REPVIT_M1 = {
    "model_type": "timm_wrapper",
    "architecture": "repvit_m1",
    "num_classes": 1000,
    "model_args": {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]},
}
"""Image encoder of EdgeTAM, as in transformers' conversion of its published weights."""


def published_config(family: str) -> Any:
    """Configuration of the published model of a family."""
    import transformers

    settings = {"vision_config": {"backbone_config": REPVIT_M1}} if family == "edgetam" else {}
    return getattr(transformers, FAMILIES[family][0])(**settings)


def build_random(family: str) -> Any:
    """A network of published size with the random weights that transformers initializes."""
    import transformers

    return getattr(transformers, FAMILIES[family][1])(published_config(family))


def save_random(family: str, folder: Path) -> str:
    """Save a network of published size to a folder, SAM 3 with a tokenizer; return its path."""
    build_random(family).save_pretrained(folder)
    if family == "sam3":
        save_letter_tokenizer(folder)
    return str(folder)


def save_letter_tokenizer(folder: Path) -> None:
    """CLIP's tokenizer with a vocabulary of letters."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
