from __future__ import annotations

import math

import pytest
import torch
from engine_toy import toy_config
from torch import nn

from clouds.config import ConfigError, load_config
from clouds.engine.lr_scheduler import build_lr_scheduler, learning_rate_factor


def factor(**solver):
    solver = {"WARMUP_ITERS": 0, "MAX_ITER": 100, **solver}
    words = [word for key, value in solver.items() for word in (f"SOLVER.{key}", value)]
    cfg = toy_config("unused")
    cfg.merge_from_list(words)
    return learning_rate_factor(cfg)


def test_constant_without_steps():
    rate = factor(LR_SCHEDULER_NAME="WarmupMultiStepLR")
    assert {rate(i) for i in range(101)} == {1.0}


def test_steps_multiply_by_gamma():
    rate = factor(LR_SCHEDULER_NAME="WarmupMultiStepLR", STEPS=(30, 60), GAMMA=0.1)
    found = [rate(i) for i in (0, 29, 30, 59, 60, 99, 100)]
    assert found == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.01])


def test_steps_are_exact_in_a_long_run():
    rate = factor(LR_SCHEDULER_NAME="WarmupMultiStepLR", STEPS=(33333,), MAX_ITER=40000)
    assert rate(33332) == 1.0
    assert rate(33333) == pytest.approx(0.1)


def test_steps_at_or_after_the_end_have_no_effect():
    rate = factor(LR_SCHEDULER_NAME="WarmupMultiStepLR", STEPS=(50, 100, 200))
    assert rate(99) == pytest.approx(0.1)


@pytest.mark.parametrize("steps", [(60, 30), (30, 30), (0, 30)])
def test_steps_that_do_not_increase_are_refused_by_the_config(steps):
    with pytest.raises(ConfigError, match="increasing order"):
        load_config(None, ["SOLVER.STEPS", steps])


def test_polynomial():
    rate = factor(LR_SCHEDULER_NAME="WarmupPolyLR", POLY_LR_POWER=0.9)
    for i in range(101):
        assert rate(i) == pytest.approx((1 - i / 100) ** 0.9, abs=1e-12)


def test_polynomial_ends_at_its_floor():
    rate = factor(LR_SCHEDULER_NAME="WarmupPolyLR", POLY_LR_CONSTANT_ENDING=0.3)
    for i in range(101):
        assert rate(i) == pytest.approx(max((1 - i / 100) ** 0.9, 0.3))


def test_only_the_polynomial_has_a_floor():
    rate = factor(LR_SCHEDULER_NAME="WarmupCosineLR", POLY_LR_CONSTANT_ENDING=0.3)
    assert rate(100) == pytest.approx(0.0)


def test_cosine():
    rate = factor(LR_SCHEDULER_NAME="WarmupCosineLR")
    for i in range(101):
        assert rate(i) == pytest.approx((1 + math.cos(math.pi * i / 100)) / 2)


def test_linear_warmup_multiplies_the_schedule():
    rate = factor(LR_SCHEDULER_NAME="WarmupPolyLR", WARMUP_ITERS=10, WARMUP_FACTOR=0.2)
    for i in range(101):
        warm = min(0.2 + 0.8 * i / 10, 1.0)
        assert rate(i) == pytest.approx(warm * (1 - i / 100) ** 0.9, abs=1e-12)


def test_constant_warmup():
    rate = factor(
        LR_SCHEDULER_NAME="WarmupMultiStepLR",
        WARMUP_ITERS=5,
        WARMUP_FACTOR=0.5,
        WARMUP_METHOD="constant",
    )
    assert [rate(i) for i in (0, 4, 5, 50)] == [0.5, 0.5, 1.0, 1.0]


# ------------------------------------------------------------------ mmengine's schedules


@pytest.mark.parametrize(
    ("warmup", "start", "expected"),
    [
        # (1 - i / 39999) ** 0.9
        (0, 1.0, {0: 1.0, 1000: 0.9774710498103, 20000: 0.5358746735001765, 39999: 0.0}),
        (1500, 0.01, {0: 0.01, 1000: 0.6704402935290213, 1499: 1.0, 1500: 1.0, 39999: 0.0}),
        (10000, 1e-6, {0: 1e-6, 1: 1.0100990099e-4, 1000: 0.10001090099009918, 39999: 0.0}),
    ],
)
def test_poly_after_warmup_as_mmengine_computes_it(warmup, start, expected):
    rate = factor(
        LR_SCHEDULER_NAME="PolyLR",
        MAX_ITER=40000,
        WARMUP_ITERS=warmup,
        WARMUP_FACTOR=start,
        POLY_LR_POWER=0.9,
    )
    assert {i: rate(i) for i in expected} == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert rate(40000) == 0.0


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"MAX_ITER": 5, "WARMUP_ITERS": 1, "WARMUP_FACTOR": 0.1}, [1, 1, 2 / 3, 1 / 3, 0]),
        ({"MAX_ITER": 3, "WARMUP_ITERS": 2, "WARMUP_FACTOR": 0.5}, [0.5, 1, 1]),
        ({"MAX_ITER": 3, "WARMUP_ITERS": 9, "WARMUP_FACTOR": 0.2}, [0.2, 0.3, 0.4]),
        ({"MAX_ITER": 1}, [1]),
        (
            {
                "MAX_ITER": 5,
                "WARMUP_ITERS": 2,
                "WARMUP_FACTOR": 0.5,
                "WARMUP_METHOD": "constant",
            },
            [0.5, 0.5, 1, 0.5, 0],
        ),
    ],
)
def test_poly_after_warmup_in_short_runs(keys, expected):
    rate = factor(LR_SCHEDULER_NAME="PolyLR", POLY_LR_POWER=1.0, **keys)
    assert [rate(i) for i in range(len(expected))] == pytest.approx(expected)


def annealed_groups(*overrides):
    layers = [nn.Linear(1, 1), nn.Linear(1, 1)]
    decays = (0.05, 0.0)
    optimizer = torch.optim.AdamW(
        [
            {"params": layer.parameters(), "weight_decay": decay}
            for layer, decay in zip(layers, decays, strict=True)
        ]
    )
    words = ("SOLVER.MAX_ITER", "40000", "SOLVER.WEIGHT_DECAY_SCHEDULE", "cosine")
    return build_lr_scheduler(toy_config("unused", *words, *overrides), optimizer)


def test_weight_decays_of_all_groups_are_annealed():
    scheduler = annealed_groups()
    expected = {
        0: [0.05, 0.0],
        20000: [0.025005, 0.000005],  # the mean of both ends
        30000: [0.007330866004242192, 8.53553390593277e-06],
        39999: [1.0000077090863989e-05, 9.999999984578743e-06],
        40000: [1e-5, 1e-5],
    }
    for iteration in (30000, 0, 20000, 39999, 40000):  # in any order
        scheduler.set(iteration)
        found = [group["weight_decay"] for group in scheduler.optimizer.param_groups]
        assert found == pytest.approx(expected[iteration], rel=1e-9, abs=1e-15)


def test_another_end_of_the_weight_decay():
    scheduler = annealed_groups("SOLVER.WEIGHT_DECAY_END", "0.2")
    scheduler.set(20000)
    found = [group["weight_decay"] for group in scheduler.optimizer.param_groups]
    assert found == pytest.approx([0.125, 0.1])


def test_weight_decays_are_constant_by_default():
    optimizer = torch.optim.AdamW(nn.Linear(1, 1).parameters(), weight_decay=0.3)
    build_lr_scheduler(toy_config("unused"), optimizer).set(11)
    assert optimizer.param_groups[0]["weight_decay"] == 0.3


def test_zero_iterations():
    assert factor(LR_SCHEDULER_NAME="WarmupPolyLR", MAX_ITER=0)(0) == 1.0


def test_unknown_schedule():
    with pytest.raises(ValueError, match="WarmupStepLR"):
        factor(LR_SCHEDULER_NAME="WarmupStepLR")


def test_groups_keep_their_ratio_and_state_is_the_iteration():
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    groups = [{"params": first.parameters(), "lr": 1.0}, {"params": second.parameters(), "lr": 0.1}]
    optimizer = torch.optim.SGD(groups)
    cfg = toy_config("unused", "SOLVER.MAX_ITER", "100", "SOLVER.WARMUP_ITERS", "0")
    scheduler = build_lr_scheduler(cfg, optimizer)
    scheduler.set(40)
    expected = [0.6**0.9, 0.1 * 0.6**0.9]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)
    state = scheduler.state_dict()
    scheduler.set(99)
    state["base_lrs"] = [5.0, 5.0]  # of another config: base rates are those of this run
    scheduler.load_state_dict(state)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)
