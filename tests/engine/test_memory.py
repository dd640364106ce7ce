"""The estimate of a step's memory against counted steps, and what is chosen by it."""

from __future__ import annotations

import itertools
import logging
import time

import pytest
import torch
import yaml
from joint_samples import MIXED, source
from tiny_adapter import vit_model_config
from tiny_model import tiny_config

from clouds.engine import Trainer
from clouds.engine.live_memory import LiveBytes
from clouds.engine.memory import GIB, USABLE, estimate, fit_to_memory
from clouds.modeling.build import build_seeded

SMALL = {"INPUT__CROP__SIZE": (128, 128), "SOLVER__IMS_PER_BATCH": 2, "DATASETS__TEST": ()}
SAM = {"MODEL__CLOUDS__REFINER": "sam", "MODEL__CLOUDS__SAM__MODEL": "tiny"}


def all_classes(seed):
    """A sample of 128x128 pixels whose label has all 19 classes, as `estimate` assumes."""
    sample = source(seed, 128, 128)
    return {**sample, "sem_seg": (torch.arange(128 * 128) % 19).view(128, 128).to(torch.uint8)}


def test_the_estimate_is_close_to_a_counted_step(tmp_path):
    cfg = tiny_config(**SMALL, OUTPUT_DIR=str(tmp_path))
    trainer = Trainer(cfg, model=build_seeded(cfg), loader=lambda _: itertools.repeat([]))
    batch = [all_classes(seed) for seed in range(2)]
    trainer.train_step(0, batch, time.perf_counter())  # the optimizer makes its state
    with LiveBytes() as live:
        trainer.train_step(1, batch, time.perf_counter())
    memory = estimate(cfg)
    assert max(memory.phases.values()) == pytest.approx(live.peak, rel=0.15)
    state = [v for s in trainer.optimizer.state.values() for v in s.values() if v.dim()]
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    weights = [*trainer.model.parameters(), *trainer.model.buffers()]
    for name, tensors in (("optimizer", state), ("gradients", gradients), ("weights", weights)):
        assert memory.resident[name] == sum(t.nbytes for t in tensors), name


def test_parts_and_processes_divide_the_images():
    whole = estimate(tiny_config(**(SMALL | {"SOLVER__IMS_PER_BATCH": 4})))
    parts = estimate(tiny_config(**(SMALL | {"SOLVER__IMS_PER_BATCH": 4, "SOLVER__ACCUMULATE": 2})))
    two = estimate(tiny_config(**(SMALL | {"SOLVER__IMS_PER_BATCH": 4})), processes=2)
    assert parts.phases == two.phases
    assert parts.phases["head"] == pytest.approx(whole.phases["head"] / 2, rel=0.05)
    assert parts.resident == two.resident


def test_sharding_divides_what_stays_and_gathers_blocks_for_a_time():
    settings = SMALL | {"SOLVER__IMS_PER_BATCH": 4}
    for more in ({}, MIXED):
        cfg = vit_model_config("full", **(settings | more))
        whole = estimate(cfg, processes=2)
        cfg.SOLVER.PARALLEL = "fsdp"
        half = estimate(cfg, processes=2)
        for name in ("weights", "gradients", "optimizer"):
            assert half.resident[name] == whole.resident[name] // 2
        assert half.phases["head"] == whole.phases["head"]
        # gradients are freed block by block, and are then counted by their parts
        assert half.phases["backward"] <= whole.phases["backward"]
        assert half.sharded and not whole.sharded
        model = build_seeded(cfg)
        sizes = [
            sum(p.nbytes for p in block.parameters()) for block in model.backbone.transformer.blocks
        ]
        head = model.sem_seg_head
        encoder = head.pixel_decoder.transformer.encoder["layers"]
        sizes += [sum(p.nbytes for p in layer.parameters()) for layer in encoder]
        decoder = head.predictor
        lists = (
            decoder.transformer_self_attention_layers,
            decoder.transformer_cross_attention_layers,
            decoder.transformer_ffn_layers,
        )
        total = sum(sizes) + sum(p.nbytes for layers in lists for p in layers.parameters())
        gathered = whole.resident["weights"] - total + 3 * max(sizes)
        if more:  # student and teacher, all parts of which train
            parts = [model.backbone, head]
            teacher = sum(p.nbytes for part in parts for p in [*part.parameters(), *part.buffers()])
            gathered = max(gathered, whole.resident["weights"] + teacher)
        assert half.resident["gathered"] == gathered
    alone = estimate(cfg)
    assert "gathered" not in alone.resident


def test_joint_training_adds_a_teacher_and_the_refiner():
    plain = estimate(tiny_config(**SMALL))
    none = estimate(tiny_config(**(SMALL | MIXED)))
    with_sam = estimate(tiny_config(**(SMALL | MIXED | SAM)))
    assert plain.resident["averages"] == 0
    assert none.resident["averages"] == none.resident["gradients"]
    assert "teacher" in none.phases and "refiner" not in none.phases
    copied = 3 * 3 * 128 * 128 * 4  # two images and a clean view, concatenated
    assert none.phases["backbone"] == 1.5 * plain.phases["backbone"] + copied
    assert with_sam.resident["refiner's weights"] > 0 and with_sam.phases["refiner"] > 0
    other = estimate(tiny_config(**(SMALL | MIXED | {"MODEL__CLOUDS__REFINER": "superpixel"})))
    assert other.not_counted and "superpixel" in str(other) and none.not_counted == ()


@pytest.mark.parametrize("head", ["linear", "text", "pooled"])
def test_half_precision_takes_less(head):
    cfg = {**SMALL, "MODEL__MASK_FORMER__TRANSFORMER_DECODER_NAME": head}
    full = estimate(tiny_config(**cfg))
    half = estimate(tiny_config(**cfg, SOLVER__AMP__ENABLED=True))
    assert half.phases["head"] < 0.9 * full.phases["head"]


def limit_for(cfg):
    """SOLVER.MEMORY_GIB that the config just fits."""
    return 1.001 * estimate(cfg).total / GIB / USABLE


def test_as_few_parts_as_fit(caplog):
    settings = SMALL | {"SOLVER__IMS_PER_BATCH": 4}
    cfg = tiny_config(**settings)
    assert fit_to_memory(cfg) is cfg
    for parts in (1, 2, 4):
        cfg.SOLVER.MEMORY_GIB = limit_for(tiny_config(**settings, SOLVER__ACCUMULATE=parts))
        with caplog.at_level(logging.INFO):
            chosen = fit_to_memory(cfg)
        assert parts == chosen.SOLVER.ACCUMULATE
        assert f"SOLVER.ACCUMULATE {parts}, " in caplog.messages[-1]
    cfg.SOLVER.MEMORY_GIB *= 0.9
    with pytest.raises(ValueError, match=r"with the smallest parts. Use a smaller INPUT.CROP"):
        fit_to_memory(cfg)


def test_blocks_are_computed_again_if_parts_are_not_enough():
    key = "MODEL__BACKBONE__ACTIVATION_CHECKPOINTING"
    settings = SMALL | {"SOLVER__IMS_PER_BATCH": 1}
    cfg = vit_model_config("rein", **settings)
    least = estimate(vit_model_config("rein", **settings, **{key: True}))
    assert least.total < estimate(cfg).total
    cfg.SOLVER.MEMORY_GIB = limit_for(vit_model_config("rein", **settings, **{key: True}))
    assert fit_to_memory(cfg).MODEL.BACKBONE.ACTIVATION_CHECKPOINTING is True


def test_the_trainer_divides_its_step(tmp_path):
    cfg = tiny_config(**SMALL, OUTPUT_DIR=str(tmp_path), MODEL__DEVICE="auto")
    cfg.SOLVER.MEMORY_GIB = limit_for(tiny_config(**SMALL, SOLVER__ACCUMULATE=2))
    trainer = Trainer(cfg, loader=lambda _: itertools.repeat([]))
    assert trainer.train_step.accumulate == 2
    saved = yaml.safe_load(trainer.checkpointer.provenance["config"])
    assert (saved["SOLVER"]["ACCUMULATE"], saved["MODEL"]["DEVICE"]) == (2, "auto")
