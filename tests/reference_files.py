"""Where outputs of the published code are kept, for tests that compare ours with them.

They are no part of the repository: a folder `reference`, beside it under `shared` or where the
environment variable CLOUDS_REFERENCE says, with `reference_a.npz`, `reference_a.json`,
`official_keys.json` and `weights.py`, the rule by which parameters get values from their names.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest

from clouds.config import get_cfg

BESIDE = Path(__file__).resolve().parents[2] / "shared" / "reference"
TEXT_ENCODER = ("backbone.clip_model.transformer.", "backbone.clip_model.token_embedding.")
"""Begin the names of weights that only a class head with text needs."""
REFERENCE = Path(os.environ.get("CLOUDS_REFERENCE", BESIDE))

needs_reference = pytest.mark.skipif(
    not (REFERENCE / "reference_a.npz").is_file(),
    reason=f"no outputs of the published code in {REFERENCE} (set CLOUDS_REFERENCE to them)",
)


def arrays(name="reference_a"):
    return np.load(REFERENCE / f"{name}.npz")


def facts(name="reference_a"):
    return json.loads((REFERENCE / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def reference():
    """Recorded arrays by name."""
    return arrays()


@pytest.fixture(scope="module")
def published():
    """Recorded facts that are no arrays."""
    return facts()


def reference_config():
    """Of the network whose outputs are recorded, on the CPU and without weights."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.CLOUDS.CLIP_MODEL_NAME = "convnext_base"
    cfg.MODEL.CLOUDS.CLIP_PRETRAINED_WEIGHTS = ""
    return cfg


def weights_rule():
    """The module `weights.py`: `fill(module, state_dict)` sets values in place."""
    spec = importlib.util.spec_from_file_location("reference_weights", REFERENCE / "weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
