"""Schedules of the published Rein and SoMA recipes, as their own schedulers computed them."""

from __future__ import annotations

import json

import pytest
import torch
from reference_files import REFERENCE
from torch import nn

from clouds.config import get_cfg
from clouds.engine.lr_scheduler import build_lr_scheduler

PEFT = REFERENCE / "peft"

needs_peft = pytest.mark.skipif(
    not (PEFT / "soma.json").is_file(), reason=f"no recorded recipes in {PEFT}"
)
pytestmark = needs_peft

SOMA = {  # setting -> (base rate, iterations, warm-up, factor of the warm-up)
    "sora_dinov2-L_mask2former (poly 40k)": (1e-4, 40000, 0, 1.0),
    "sora_dinov2_mask2former_c2bm (warm-up 1500)": (1e-4, 40000, 1500, 0.01),
    "sora_dinov2_mask2former_ACDC_1024x1024 (warm-up 10000)": (1e-4, 40000, 10000, 1e-6),
    "sora_dinov2-L_mask2former_gsuc16_2cbm_1024x1024 (4k)": (1e-5, 4000, 0, 1.0),
}


def scheduler_of(rate, iterations, warmup, start, decay="cosine"):
    cfg = get_cfg()
    solver = cfg.SOLVER
    solver.LR_SCHEDULER_NAME, solver.MAX_ITER = "PolyLR", iterations
    solver.WARMUP_ITERS, solver.WARMUP_FACTOR = warmup, start
    solver.WEIGHT_DECAY_SCHEDULE = decay
    groups = [
        {"params": nn.Linear(1, 1).parameters(), "lr": rate * factor, "weight_decay": base}
        for factor, base in ((1.0, 0.05), (0.5, 0.05), (1.0, 0.0))
    ]
    return build_lr_scheduler(cfg, torch.optim.AdamW(groups))


@pytest.mark.parametrize("setting", SOMA)
def test_rates_and_decays_of_soma(setting):
    recorded = json.loads((PEFT / "soma.json").read_text())["schedules"]
    assert recorded.keys() == SOMA.keys()
    scheduler = scheduler_of(*SOMA[setting])
    checked = 0
    for iteration, values in recorded[setting].items():
        if not iteration.isdecimal():
            continue
        scheduler.set(int(iteration))
        head, backbone, undecayed = scheduler.optimizer.param_groups
        assert head["lr"] == pytest.approx(values["lr"], rel=1e-7, abs=1e-15)
        assert backbone["lr"] == pytest.approx(values["lr of the backbone"], rel=1e-7, abs=1e-15)
        assert head["weight_decay"] == pytest.approx(values["weight_decay"], rel=1e-9)
        zero = values["weight_decay where it was 0"]
        assert undecayed["weight_decay"] == pytest.approx(zero, rel=1e-6, abs=1e-16)
        checked += 1
    assert checked >= 8


REIN = {"512 (poly)": (1e-4, 40000, 0, 1.0), "1024 (warm-up 10000)": (6e-5, 40000, 10000, 1e-6)}


@pytest.mark.parametrize("setting", REIN)
def test_rates_of_rein(setting):
    recorded = json.loads((PEFT / "checkpoints.json").read_text())["rein"]["schedules"]
    assert recorded.keys() == REIN.keys()
    scheduler = scheduler_of(*REIN[setting], decay="constant")
    assert {"0", "1000", "20000", "39999"} <= recorded[setting].keys()
    for iteration, rate in recorded[setting].items():
        scheduler.set(int(iteration))
        group = scheduler.optimizer.param_groups[0]
        assert group["lr"] == pytest.approx(rate, rel=1e-7, abs=1e-15), iteration
        assert group["weight_decay"] == 0.05
