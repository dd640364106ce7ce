"""What is different on a GPU: half precision, determinism, copies, memory, compilation, processes.

On a machine with a GPU, `pytest -m gpu tests` runs these tests on it. Those that mean something on
a CPU run there, too, so that their own code is tested.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import time
from contextlib import contextmanager

import pytest
import torch
from joint_samples import MIXED, generated, source
from run_files import losses, resume, saved, train_until
from tiny_model import tiny_config

from clouds.engine import Trainer
from clouds.engine.launch import launch
from clouds.engine.live_memory import LiveBytes
from clouds.modeling.build import build_seeded

# cuBLAS is reproducible only with a workspace of this size, which it reads at its first call
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytestmark = pytest.mark.gpu
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
STEPS = 4


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def joint_batches(start):
    while True:
        yield [source(2 * start, 64, 64), generated(2 * start + 1, 64, 64)]
        start += 1


def trainer_of(folder, device=DEVICE, **settings):
    defaults = {
        "OUTPUT_DIR": str(folder),
        "MODEL__DEVICE": device,
        "DATASETS__TEST": (),
        "LOG_PERIOD": 1,
        "SOLVER__IMS_PER_BATCH": 2,
        "SOLVER__MAX_ITER": STEPS,
        "SOLVER__CHECKPOINT_PERIOD": 2,
        "SOLVER__BASE_LR": 1e-3,
    }
    cfg = tiny_config(**(MIXED | defaults | settings))
    return Trainer(cfg, model=build_seeded(cfg), loader=joint_batches)


def weights_of(trainer):
    return [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]


def run_step(trainer, number=0):
    return trainer.train_step(number, next(joint_batches(number)), time.perf_counter())


@pytest.mark.parametrize("amp", [False, True])
def test_a_joint_step_repeats_bit_for_bit(amp, tmp_path):
    with deterministic():
        results = []
        for name in "ab":
            trainer = trainer_of(tmp_path / name, SOLVER__AMP__ENABLED=amp)
            steps = [run_step(trainer, number).losses for number in range(2)]
            results.append((steps, weights_of(trainer)))
    (steps, weights), (others, same) = results
    assert steps == others
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))


def test_a_resumed_run_is_bit_identical(tmp_path):
    with deterministic():
        trainer_of(tmp_path / "whole").train()
        train_until(trainer_of(tmp_path / "parts"), 3)
        resume(trainer_of(tmp_path / "parts"))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for part in ("model", "teacher"):
        for name, value in saved(tmp_path / "whole")[part].items():
            assert torch.equal(value, saved(tmp_path / "parts")[part][name]), name


@pytest.mark.parametrize("half", [False, pytest.param(True, marks=needs_gpu)])
def test_an_overflow_skips_the_step_and_training_recovers(half, tmp_path):
    amp = {"SOLVER__AMP__ENABLED": True, "SOLVER__AMP__DTYPE": "fp16"} if half else {}
    trainer = trainer_of(tmp_path, **amp)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**127, backoff_factor=2.0**-60)
    trainer.train_step = dataclasses.replace(trainer.train_step, scaler=scaler)
    before = weights_of(trainer)
    step = run_step(trainer)
    assert not math.isfinite(step.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(trainer), strict=True))
    scales = [step.loss_scale]
    for number in range(1, 4):
        step = run_step(trainer, number)
        scales.append(step.loss_scale)
    assert scales[:2] == [2.0**127, 2.0**67] and scales == sorted(scales, reverse=True)
    assert math.isfinite(step.grad_norm) and step.grad_norm > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, weights_of(trainer), strict=True))


@needs_gpu
def test_bf16_losses_are_close_to_float32(tmp_path):
    steps = [run_step(trainer_of(tmp_path / str(amp), SOLVER__AMP__ENABLED=amp)) for amp in (0, 1)]
    assert steps[1].total_loss == pytest.approx(steps[0].total_loss, rel=0.02)


@needs_gpu
def test_the_losses_of_a_gpu_are_those_of_the_cpu(tmp_path):
    """Without random points, whose generator is another one on each device."""
    points = {"MODEL__MASK_FORMER__TRAIN_NUM_POINTS": 4096}
    steps = [run_step(trainer_of(tmp_path / d, d, **points)) for d in ("cpu", "cuda")]
    for name, loss in steps[0].losses.items():
        assert steps[1].losses[name] == pytest.approx(loss, rel=0.05), name


@pytest.mark.parametrize("at_once", [1, 4])
def test_evaluation_stays_within_its_bound_of_memory(at_once):
    """Twelve masks of a large label at the same time would be six times the bound or more."""
    cfg = tiny_config(TEST__MASKS_AT_ONCE=at_once, MODEL__DEVICE=DEVICE)
    model = build_seeded(cfg).eval()
    sample = {"image": source(0, 64, 64)["image"], "height": 1024, "width": 1024}
    with LiveBytes() as live:
        (classes,) = model.segment([sample])
    assert classes.shape == (1024, 1024)
    mask = 1024 * 1024 * 4
    assert live.peak < (at_once + 3) * mask + 2**22, live.peak / mask


def test_features_are_channels_last():
    model = build_seeded(tiny_config(MODEL__DEVICE=DEVICE)).eval()
    with torch.no_grad():
        features = model.backbone(torch.zeros(2, 3, 64, 64, device=DEVICE))
    for name in ("res2", "res3", "res4", "res5"):
        assert features[name].is_contiguous(memory_format=torch.channels_last), name


@pytest.mark.slow
@pytest.mark.parametrize("part", ["pixel_decoder", "predictor"])
def test_inductor_compiles_the_head_to_the_same_results(part):
    model = build_seeded(tiny_config(MODEL__DEVICE=DEVICE, MODEL__MASK_FORMER__DEC_LAYERS=3))
    head, compiled = model.sem_seg_head, copy.deepcopy(model.sem_seg_head)
    generator = torch.Generator().manual_seed(0)
    features = {
        name: torch.randn(
            1, shape.channels, 64 // shape.stride, 64 // shape.stride, generator=generator
        )
        for name, shape in model.backbone.output_shape().items()
    }
    features = {name: feature.to(DEVICE) for name, feature in features.items()}
    compiled.get_submodule(part).compile()
    results = []
    for module in (head, compiled):
        class_logits, mask_logits = module(features).final
        (class_logits.square().mean() + mask_logits.square().mean()).backward()
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        results.append([class_logits, mask_logits, *gradients])
    for expected, got in zip(*results, strict=True):
        scale = max(float(expected.detach().abs().max()), 1e-3)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * scale)


@needs_gpu
def test_batches_are_pinned_and_copied_without_waiting():
    image = torch.zeros(3, 64, 64, dtype=torch.uint8).pin_memory()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        copied = image.to("cuda", non_blocking=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert copied.is_cuda and image.is_pinned()


def train_in_a_process(folder, settings):
    trainer_of(folder, "cuda", **settings).train()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_as_many_processes_as_gpus_train_as_one(tmp_path):
    count = torch.cuda.device_count()
    settings = {"SOLVER__IMS_PER_BATCH": 2}
    train_in_a_process(tmp_path / "one", settings)
    launch(train_ranks, (str(tmp_path / "all"),), num_gpus=min(count, 2), device="cuda")
    one, several = losses(tmp_path / "one"), losses(tmp_path / "all")
    assert one.keys() == several.keys()
    for iteration, values in one.items():
        for name, value in values.items():
            assert several[iteration][name] == pytest.approx(value, rel=1e-2), (iteration, name)


def train_ranks(folder):
    from clouds import comm

    trainer = trainer_of(folder, "cuda")
    rank = comm.get_rank()
    trainer.loader = lambda start: ([batch[rank]] for batch in joint_batches(start))
    trainer.train()
