"""The configs of published recipes, against the recipes' tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from clouds.config import load_config
from clouds.engine.lr_scheduler import learning_rate_factor

ROOT = Path(__file__).resolve().parents[2]

SHORT_SIDES = {
    512: [256, 307, 358, 409, 460, 512, 563, 614, 665, 716, 768, 819, 870, 921, 972, 1024],
    1024: [512, 614, 716, 819, 921, 1024, 1126, 1228, 1331, 1433, 1536, 1638, 1740, 1843, 1945,
           2048],
}  # fmt: skip
"""mmsegmentation's RandomChoiceResize: k/10 of the size for k = 5..20, rounded down."""

# name: adapter, backbone's factor, rate, batch, warm-up (iterations, factor), size, average from
RECIPES = {
    "rein_gta": ("rein", 1.0, 1e-4, 4, (0, None), 512, None, "rein512"),
    "rein_cityscapes": ("rein", 1.0, 1e-4, 4, (0, None), 512, None, "rein512"),
    "rein_cityscapes_1024": ("rein", 1.0, 6e-5, 8, (10_000, 1e-6), 1024, None, "rein1024"),
    "soma_gta": ("soma", 0.5, 1e-4, 4, (0, None), 512, 12_000, "soma512"),
    "soma_cityscapes": ("soma", 0.5, 1e-4, 8, (1500, 0.01), 512, 20_000, "soma512"),
    "recycle_gta": ("recycle", 1.0, 1e-4, 4, (0, None), 512, None, "soma512"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name):
    adapter, factor, rate, batch, (warmup, start), size, average, protocol = RECIPES[name]
    cfg = load_config(f"papers/{name}")
    solver = cfg.SOLVER
    assert cfg.MODEL.BACKBONE.NAME == "ViT" and cfg.MODEL.BACKBONE.FREEZE
    assert adapter == cfg.MODEL.BACKBONE.ADAPTER.NAME
    assert size == cfg.MODEL.BACKBONE.IMG_SIZE
    assert (
        factor,
        rate,
        batch,
    ) == (solver.BACKBONE_MULTIPLIER, solver.BASE_LR, solver.IMS_PER_BATCH)
    assert (solver.LR_SCHEDULER_NAME, solver.POLY_LR_POWER) == ("PolyLR", 0.9)
    assert warmup == solver.WARMUP_ITERS and (start is None or start == solver.WARMUP_FACTOR)
    assert solver.MAX_ITER == 40_000 and not solver.CLIP_GRADIENTS.ENABLED
    assert solver.WEIGHT_DECAY == 0.05 and solver.WEIGHT_DECAY_NORM == 0
    assert (average is not None) == solver.WEIGHT_AVERAGE.ENABLED
    assert average is None or average == solver.WEIGHT_AVERAGE.START_ITER
    assert ("constant" if adapter == "rein" else "cosine") == solver.WEIGHT_DECAY_SCHEDULE
    inputs = cfg.INPUT
    assert list(inputs.SHORT_SIDES) == SHORT_SIDES[size]
    assert list(inputs.SHORT_SIDES) == [size * k // 10 for k in range(5, 21)]
    assert 4 * size == inputs.LONG_SIDE_MAX and tuple(inputs.CROP.SIZE) == (size, size)
    assert (inputs.CROP.CAT_MAX_RATIO, inputs.CROP.PADDING) == (0.75, "mean")
    assert inputs.PHOTOMETRIC_DISTORTION and not inputs.COLOR_AUG_SSD and inputs.FLIP
    assert protocol == cfg.TEST.PROTOCOL and cfg.SEED == 42
    former = cfg.MODEL.MASK_FORMER
    weights = former.CLASS_WEIGHT, former.MASK_WEIGHT, former.DICE_WEIGHT, former.NO_OBJECT_WEIGHT
    assert weights == (2, 5, 5, 0.1) and former.NUM_OBJECT_QUERIES == 100


@pytest.mark.parametrize("adapter", ["rein", "soma", "recycle"])
def test_the_joint_recipes_differ_from_the_papers_in_the_loop_alone(adapter):
    paper = load_config(f"papers/{adapter}_gta")
    joint = load_config(f"joint_vit/{adapter}_gta_dinov2_large")
    assert joint.MODEL.BACKBONE == paper.MODEL.BACKBONE
    assert joint.SOLVER == paper.SOLVER and joint.INPUT == paper.INPUT
    assert f"{paper.OUTPUT_DIR}/model_final.pth" == joint.MODEL.WEIGHTS
    assert tuple(joint.DATASETS.TRAIN) == ("gta5", "sd_street_scenes")
    assert joint.MODEL.CLOUDS.REFINER == "sam"


def test_the_recipe_of_tqdm_names_what_is_missing():
    cfg = load_config("papers/tqdm_gta")
    solver, sampling = cfg.SOLVER, cfg.DATASETS.RARE_CLASS_SAMPLING
    assert (solver.BASE_LR, solver.BACKBONE_MULTIPLIER, solver.WEIGHT_DECAY) == (1e-5, 0.1, 1e-4)
    assert (solver.MAX_ITER, solver.WARMUP_ITERS, solver.IMS_PER_BATCH) == (20_000, 1500, 8)
    factor = learning_rate_factor(cfg)
    assert [round(factor(i), 3) for i in (0, 750, 20_000)] == [0, 0.483, 0.1]
    # mmcv's poly rule with a lower bound of 1e-6 for a rate of 1e-5, after the warm-up
    for i in (1500, 5000, 10_000, 15_000, 20_000):
        published = 0.9 * (1 - i / 20_000) ** 0.9 + 0.1
        assert published - 0.1 <= factor(i) <= published
    assert sampling.ENABLED and sampling.TEMPERATURE == 100 and sampling.MIN_PIXELS == 3000
    assert (cfg.INPUT.INITIAL_HEIGHT, cfg.INPUT.INITIAL_WIDTH) == (0, 0)
    assert cfg.TEST.PROTOCOL == "tqdm" and not solver.CLIP_GRADIENTS.ENABLED
    head = (ROOT / "configs/papers/tqdm_gta.yaml").read_text().partition("_BASE_")[0]
    assert "NOT tqdm" in head and "Missing:" in head
