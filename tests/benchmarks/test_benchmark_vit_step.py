"""benchmarks/vit_step.py: a ratio means something only where both steps do the same."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("transformers")
pytest.importorskip("segment_anything")  # benchmarks/step.py imports it
sys.path.insert(0, str(ROOT / "benchmarks"))
import vit_step  # noqa: E402
from gpu_common import SMALL_HEAD  # noqa: E402
from part_clock import PartClock  # noqa: E402
from published_step import with_masks  # noqa: E402
from step import PARTS, source_sample  # noqa: E402

HEAD = {**SMALL_HEAD, "MODEL.BACKBONE.ADAPTER.REIN.NUM_TOKENS": 24}
WORDS = ["--timm-name", "test_vit", "--size", "64", "--untimed", "0", "--repeats", "1"]
SETTINGS = [str(word) for pair in HEAD.items() for word in pair]
ADAPTERS = ("lora", "rein")


@pytest.fixture(params=ADAPTERS)
def steps(request, tmp_path):
    torch.manual_seed(0)
    args = vit_step.parse([*WORDS, "--adapter", request.param, *SETTINGS])
    return vit_step.build(vit_step.config(args, tmp_path), torch.device("cpu"))


def test_both_have_the_same_features_and_predictions(steps):
    composed, ours = steps
    model = ours.trainer.model
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = composed.network.features(images)
        features = model.backbone(images)
        plain = model.backbone.transformer.forward_intermediates(
            images, indices=composed.network.blocks, norm=False, intermediates_only=True
        )
        queries = model.backbone.adapter.object_queries()
        predictions = model.sem_seg_head(features, None, queries=queries)
        classes, _ = composed.network.predict(theirs)
    for a, b in zip(theirs, features.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(classes, predictions.class_logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    if queries is not None:  # LoRA's updates are in the layers, Rein's are not
        assert (plain[-2] - theirs[2]).abs().max() > 1e-3


def test_both_have_the_same_losses_except_for_random_points_and_train_the_same(steps):
    composed, ours = steps
    batch = [source_sample(seed, 64) for seed in range(2)]
    trained = [
        sum(p.numel() for p in network.parameters() if p.requires_grad)
        for network in (composed.network, ours.trainer.model)
    ]
    assert trained[0] == trained[1]
    expected = composed([with_masks(sample) for sample in batch], PartClock(lambda: None))
    actual = ours(batch, PartClock(lambda: None))
    assert set(expected) == set(actual) and len(actual) == 3 * HEAD["MODEL.MASK_FORMER.DEC_LAYERS"]
    assert sum(expected.values()) == pytest.approx(sum(actual.values()), rel=0.02)
    untrained = [
        n for n, p in composed.network.named_parameters() if p.requires_grad != (p.grad is not None)
    ]
    assert untrained == []


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_script_prints_both(adapter, capsys):
    vit_step.main([*WORDS, "--adapter", adapter, *SETTINGS])
    output = capsys.readouterr().out
    assert f"test_vit with {adapter}, ours float32" in output
    assert all(part in output for part in PARTS)
    assert vit_step.COMPOSED in output and vit_step.OURS in output
