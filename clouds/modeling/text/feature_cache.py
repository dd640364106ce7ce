"""Text features on disk: hundreds of prompts through a large text encoder take a CPU minutes."""

from __future__ import annotations

import hashlib
import logging
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from clouds.raw_bytes import raw_bytes
from clouds.whole_file import written_whole

logger = logging.getLogger(__name__)

NOT_TEXT = ("visual", "logit_scale", "logit_bias")
"""Parts of an open_clip model that its text features do not depend on."""


class FeatureCache:
    """A folder of text features, for any number of processes and models.

    An entry is named after all that goes into it, so it is never out of date, and it appears whole
    or not at all; one that cannot be read is made again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """The file of an entry, there or not."""
        return self.folder / f"text_{key}.npz"

    def get(self, key: str) -> Tensor | None:
        """An entry, on the host; None when it is not there or is broken."""
        path = self.path(key)
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                return torch.from_numpy(file["features"])
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            logger.warning("%s cannot be read (%s); the text features are made again", path, error)
            return None

    def put(self, key: str, features: Tensor) -> None:
        """Keep an entry; where that is not possible, say so and go on without."""
        path = self.path(key)
        try:
            with written_whole(path) as file:
                np.savez(file, features=features.cpu().numpy())
        except OSError as error:
            logger.warning(
                "the text features are not kept in MODEL.CLOUDS.TEXT_CACHE_DIR: %s", error
            )


def key_of(clip_model: nn.Module, name: str, tokens: Tensor, templates: int) -> str:
    """What text features depend on: the text encoder, its weights, and what it reads.

    Args:
        clip_model: open_clip's.
        name: of the model.
        tokens: of all prompts (P, context length), on the host.
        templates: how many prompts are averaged.
    """
    layers = [f"{n}: {m!r}" for n, m in clip_model.named_children() if n not in NOT_TEXT]
    digest = hashlib.sha256("\n".join([name, str(templates), *layers]).encode())
    weights = clip_model.state_dict()
    for weight, value in sorted([*weights.items(), ("tokens", tokens)]):
        if weight.split(".")[0] in NOT_TEXT:
            continue
        digest.update(f"{weight} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(raw_bytes(value))
    return digest.hexdigest()[:32]
