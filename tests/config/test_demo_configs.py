"""The demo's configs with a vision transformer, against those with the tiny CLIP."""

from __future__ import annotations

import pytest

from clouds.config import load_config
from clouds.modeling.build import build_on_meta


@pytest.mark.parametrize("adapter", ["lora", "rein"])
def test_the_joint_phase_is_that_of_the_demo_with_a_frozen_transformer(adapter):
    demo = load_config("demo/joint")
    cfg = load_config("demo/vit_joint", ["MODEL.BACKBONE.ADAPTER.NAME", adapter])
    assert cfg.DATASETS == demo.DATASETS and cfg.INPUT == demo.INPUT
    assert cfg.MODEL.CLOUDS.SUPERPIXEL == demo.MODEL.CLOUDS.SUPERPIXEL
    assert cfg.MODEL.CLOUDS.ITERATION_UPDATE == demo.MODEL.CLOUDS.ITERATION_UPDATE
    assert cfg.MODEL.CLOUDS.SAM.ALPHA_EMA == demo.MODEL.CLOUDS.SAM.ALPHA_EMA
    assert cfg.SOLVER.BASE_LR == demo.SOLVER.BASE_LR
    trained = [n for n, p in build_on_meta(cfg).backbone.named_parameters() if p.requires_grad]
    part = ".updates.lora." if adapter == "lora" else "adapter."
    assert trained and all(part in name for name in trained)


@pytest.mark.parametrize(("phase", "before"), [("adapter", "warmup"), ("joint", "adapter")])
def test_each_phase_starts_from_the_one_before(phase, before):
    cfg, earlier = load_config(f"demo/vit_{phase}"), load_config(f"demo/vit_{before}")
    assert f"{earlier.OUTPUT_DIR}/model_final.pth" == cfg.MODEL.WEIGHTS
    same_network = cfg.MODEL.BACKBONE.ADAPTER == earlier.MODEL.BACKBONE.ADAPTER
    assert (not same_network) == cfg.MODEL.WEIGHTS_PARTIAL
