"""`clouds list-parameters`: numbers of parameters without weights."""

from __future__ import annotations

import json

import pytest
from tiny_model import tiny_config, tiny_model

from clouds.cli import list_parameters

VIT_L = ["--config-file", "warmup/gta_convnext_large", "MODEL.BACKBONE.NAME", "ViT"]


def counts_of(capsys, *overrides):
    list_parameters.main([*VIT_L[:2], "--json", *VIT_L[2:], *map(str, overrides)])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("adapter", "backbone", "head"),
    [
        ("none", 0, 20_565_204),
        ("rein", 2_990_081, 20_579_796),
        ("soma", 4_718_592 + 147_456, 20_565_204),
        ("recycle", 14_155_776, 20_565_204),
    ],
)
def test_published_numbers_at_vit_large(capsys, adapter, backbone, head):
    """The head of Rein has a linear layer in place of query embeddings and features."""
    counts = counts_of(capsys, "MODEL.BACKBONE.ADAPTER.NAME", adapter)
    assert (counts["backbone"], counts["head"]) == (backbone, head)
    assert counts["total"] == backbone + head
    assert sum(group["parameters"] for group in counts["groups"]) == counts["total"]
    biases = 147_456 if adapter == "soma" else 0
    assert counts["frozen"] == 304_198_656 - biases


def test_lora_at_vit_large(capsys):
    """Of 24 blocks: 1024 -> 3072, 1024 -> 1024, 1024 -> 4096, 4096 -> 1024, rank r each."""
    overrides = ("MODEL.BACKBONE.ADAPTER.NAME", "lora", "MODEL.BACKBONE.ADAPTER.LORA.RANK", 8)
    assert counts_of(capsys, *overrides)["backbone"] == 24 * 8 * (4096 + 2048 + 5120 + 5120)


def test_groups_have_the_rates_of_the_config(capsys):
    overrides = ("MODEL.BACKBONE.ADAPTER.NAME", "recycle", "SOLVER.BASE_LR", 1e-4)
    groups = counts_of(capsys, *overrides, "SOLVER.BACKBONE_MULTIPLIER", 1.0)["groups"]
    assert {g["name"]: (g["lr"], g["weight_decay"]) for g in groups} == {
        "backbone.*.updates.recycle_main": (1e-4, 0),
        "backbone.*.updates.recycle_sub": (5e-5, 0),
        "head": (1e-4, 0.05),
        "head.norm": (1e-4, 0),
        "head.embed": (1e-4, 0),
    }


def test_numbers_are_those_of_the_built_model(tmp_path, capsys):
    settings = {
        "MODEL__BACKBONE__ADAPTER__NAME": "lora",
        "MODEL__MASK_FORMER__TRANSFORMER_DECODER_NAME": "text",
    }
    (tmp_path / "c.yaml").write_text(tiny_config(**settings).dump())
    list_parameters.main(["--config-file", str(tmp_path / "c.yaml"), "--json"])
    counts = json.loads(capsys.readouterr().out)
    model = tiny_model(**settings)
    parts = {"backbone": 0, "sem_seg_head": 0, "void_embedding": 0}
    for name, parameter in model.named_parameters():
        parts[name.split(".")[0]] += parameter.numel() * parameter.requires_grad
    assert counts["backbone"] == parts["backbone"] > 0
    assert counts["head"] == parts["sem_seg_head"]
    assert counts["void_embedding"] == parts["void_embedding"] > 0
    assert counts["frozen"] == sum(p.numel() for p in model.parameters()) - counts["total"]


def test_the_table(capsys):
    list_parameters.main([*VIT_L, "MODEL.BACKBONE.ADAPTER.NAME", "rein"])
    out = capsys.readouterr().out
    assert "backbone         2,990,081" in out
    assert any(line.split()[:2] == ["backbone.adapter.scale", "1e-06"] for line in out.splitlines())


def test_an_adapter_that_the_backbone_cannot_have(capsys):
    with pytest.raises(SystemExit):
        list_parameters.main([*VIT_L[:2], "MODEL.BACKBONE.ADAPTER.NAME", "soma"])
    assert "soma adapts transformer blocks" in capsys.readouterr().err
