"""What the sections of `gpu.py` share: options, implementations and how they are measured."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import clouds.modeling  # noqa: F401 - registers what the config names
from clouds.d2 import CfgNode
from clouds.modeling.build import build_on_meta

sys.path.insert(0, str(Path(__file__).parent))
import step
from in_turns import Peak, in_turns, seconds_of

PUBLISHED, OURS, OURS_BF16 = "published code", "ours", "ours, bf16"
"""Names of implementations."""

SMALL_HEAD = {
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_DIM_FEEDFORWARD": 64,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.NHEADS": 4,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 24,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 64,
    "MODEL.MASK_FORMER.DEC_LAYERS": 4,
}
"""Settings of a head for --small, and for tests."""


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        device: on which.
        repeats: rounds of each measurement; another one before is dropped.
        clip, sam: models, as in `step.py`.
        size: side of a training crop, pixels.
        source, generated: images of a joint step.
        image: height and width of an evaluated image.
        attention_sizes: sides of the images of deformable attention.
        settings: KEY VALUE of the config.
        out: folder of the results.
    """

    device: torch.device
    repeats: int
    clip: str
    sam: str
    size: int
    source: int
    generated: int
    image: tuple[int, int]
    attention_sizes: tuple[int, ...]
    settings: tuple[str, ...]
    out: Path

    @property
    def images(self) -> int:
        """Of a step."""
        return self.source + self.generated


Way = Callable[[], object]


def measured(
    ways: Mapping[str, Way], options: Options
) -> dict[str, tuple[tuple[float, ...], float]]:
    """Name -> seconds of the rounds, and peak memory of a round minus that before it, MiB."""
    peaks = {}
    for name, way in ways.items():  # the first call compiles kernels and allocates workspaces
        way()
        with Peak(options.device) as peak:
            way()
        peaks[name] = peak.more
    taken = in_turns(ways, lambda way: seconds_of(way, options.device), options.repeats)
    return {name: (tuple(seconds), peaks[name]) for name, seconds in taken.items()}


def dtype_of(way: str) -> str:
    """The type of a way's matrix products."""
    return "bfloat16" if "bf16" in way else "float32"


def in_dtype(way: str, call: Callable[[], Any], device: torch.device) -> Any:
    """The result of `call` under bf16 autocast if the way's name says so."""
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype_of(way) == "bfloat16"):
        return call()


def in_bf16(cfg: CfgNode) -> CfgNode:
    """A copy of the config with autocast to bf16."""
    half = cfg.clone()
    half.defrost()
    half.SOLVER.AMP.ENABLED, half.SOLVER.AMP.DTYPE = True, "bf16"
    return half


def model_on_meta(options: Options) -> Any:
    """The model of the config of `step.py`, without values."""
    # torch's counter of operations fails in modules whose parameters require a gradient.
    model = build_on_meta(step.config(step_arguments(options), Path()))
    return model.eval().requires_grad_(False)


def step_arguments(options: Options) -> argparse.Namespace:
    """The options of `step.py`."""
    words = ["--clip", options.clip, "--sam", options.sam, "--size", str(options.size)]
    words += ["--source", str(options.source), "--generated", str(options.generated)]
    return step.parse([*words, "--device", str(options.device), *options.settings])
