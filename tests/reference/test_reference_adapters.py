"""Rein's and SoMA's layers against the published code, for the same weights and inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference_adapters import (
    adapted,
    assert_close,
    needs_adapter_reference,
    peft_arrays,
    peft_facts,
    value_of,
)
from torch import nn

from clouds.modeling.backbone.adapters import merge_updates
from clouds.modeling.backbone.adapters.rein import Rein

pytestmark = needs_adapter_reference

VARIANTS = ("reins", "lora", "reins_zero", "lora_zero", "reins_nosoftmax", "lora_nosoftmax")


@pytest.fixture(scope="module")
def rein_reference():
    return peft_arrays("rein")


def build_rein(variant):
    """The variant's adapter with the reference's weights."""
    adapter = Rein(
        num_layers=6,
        width=64,
        num_tokens=100,
        rank=16 if variant.startswith("lora") else 0,
        query_dim=256,
        softmax="nosoftmax" not in variant,
        zero_start="zero" in variant,
    )
    entries = peft_facts("rein")["variants"][variant]["parameters"]
    adapter.load_state_dict({entry["name"]: value_of(entry) for entry in entries})
    return adapter


def kept(name, gradient):
    """The rows of a gradient that the reference keeps."""
    return gradient[::4] if name in ("merge.weight", "transform.weight") else gradient


@pytest.mark.parametrize("variant", VARIANTS)
def test_rein_alone(variant, rein_reference):
    adapter = build_rein(variant)
    published = peft_facts("rein")["variants"][variant]
    assert sum(p.numel() for p in adapter.parameters()) == published["parameter_count"]
    features = torch.from_numpy(rein_reference["in/feats"]).requires_grad_(True)
    class_token, patches = features[:, :1], features[:, 1:]
    loss = torch.zeros(())
    for layer in (1, 4):
        out = torch.cat((class_token, adapter.after_block(layer, patches)), dim=1)
        assert_close(out, rein_reference[f"{variant}/out_layer{layer}"], name=f"layer {layer}")
        loss = loss + (out * torch.from_numpy(rein_reference[f"in/cotangent_layer{layer}"])).sum()
    queries = adapter.object_queries()
    assert_close(queries, rein_reference[f"{variant}/queries"], name="queries")
    loss = loss + (queries * torch.from_numpy(rein_reference["in/cotangent_queries"])).sum()
    assert_close(loss, rein_reference[f"{variant}/loss"], name="loss")
    loss.backward()
    assert_close(features.grad, rein_reference[f"{variant}/grad_feats"], name="features")
    for name, parameter in adapter.named_parameters():
        key = f"{variant}/grad/{name}"
        if key in rein_reference:
            assert_close(kept(name, parameter.grad), rein_reference[key], name=name)
        norm = published["grad_norms"][name]
        assert parameter.grad.norm().item() == pytest.approx(norm, rel=1e-4), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_initial_ranges_of_rein(variant):
    """A uniform or zero start, by the range of the published code's draws."""
    torch.manual_seed(0)
    kind = {"rank": 16 if variant.startswith("lora") else 0, "zero_start": "zero" in variant}
    adapter = Rein(6, 64, 100, query_dim=256, **kind)
    published = peft_facts("rein")["variants"][variant]["init_min_max_std"]
    assert {name for name, _ in adapter.named_parameters()} == published.keys()
    for name, parameter in adapter.named_parameters():
        low, high, std = published[name]
        assert parameter.min().item() == pytest.approx(low, rel=0.1, abs=1e-9), name
        assert parameter.max().item() == pytest.approx(high, rel=0.1, abs=1e-9), name
        if parameter.numel() > 1:
            assert parameter.std().item() == pytest.approx(std, rel=0.1, abs=1e-9), name


# ------------------------------------------------------------------- SoMA


def soma_layer(reference, case):
    """A block of one linear layer, with the update of a case of the reference."""
    weight = torch.from_numpy(reference[f"single/{case}/given_weight"])
    block = nn.ModuleDict({"fc": nn.Linear(weight.shape[1], weight.shape[0])})
    with torch.no_grad():
        block["fc"].weight.copy_(weight)
        block["fc"].bias.copy_(torch.from_numpy(reference[f"single/{case}/given_bias"]))
    block.requires_grad_(False)
    alpha = peft_facts("soma")["single"][case]["options"].get("lora_alpha", 8)
    adapted("soma", [block], weight.shape[1], RANK=8, ALPHA=float(alpha), FIRST_BLOCK=0)
    return block


@pytest.mark.parametrize("case", ["tall", "wide", "alpha_twice_r", "merge"])
def test_start_of_one_soma_layer(case):
    reference = peft_arrays("soma")
    published = {n.rsplit("/", 1)[1]: reference[n] for n in reference if f"single/{case}/" in n}
    block = soma_layer(reference, case)
    update = block["fc"].updates["soma"]
    assert update.scale == peft_facts("soma")["single"][case]["scaling"]
    a, b = update.lora_A.detach(), update.lora_B.detach()
    assert_close(update.delta(torch.float32), published["BA"], 3e-4, "BA")
    sign = torch.from_numpy(np.sign((a.numpy() * published["lora_A"]).sum(1)))
    assert_close(a * sign[:, None], published["lora_A"], 3e-4, "A")
    assert_close(b * sign, published["lora_B"], 3e-4, "B")
    assert_close(block["fc"].weight, published["weight"], name="residual")
    x = torch.from_numpy(published["x"])
    assert_close(block["fc"](x), published["y"], name="output")
    assert block["fc"].bias.requires_grad and not block["fc"].weight.requires_grad
    assert merge_updates(block) == 1 and type(block["fc"]) is nn.Linear
    assert_close(block["fc"].weight, published["given_weight"], 1e-5, "merged")
