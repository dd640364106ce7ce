"""Rein's and SoMA's layers against the published code, for the same weights and inputs."""

from __future__ import annotations

import functools
import re

import numpy as np
import pytest
import torch
from reference_adapters import (
    adapted,
    adapter_config,
    assert_close,
    cotangent,
    needs_adapter_reference,
    peft_arrays,
    peft_facts,
    value_of,
)
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from clouds.modeling.backbone.adapters import build_adapter, merge_updates
from clouds.modeling.backbone.adapters.low_rank import adapted_layers
from clouds.modeling.backbone.adapters.rein import Rein
from clouds.modeling.backbone.vit import ViTBackbone

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
    given = peft_facts("soma")["single"][case]["options"]
    options = {"RANK": 8, "ALPHA": float(given.get("lora_alpha", 8)), "FIRST_BLOCK": 0}
    if given.get("first_eigen"):
        options["COMPONENTS"] = "largest"
    adapted("soma", [block], weight.shape[1], **options)
    return block


@pytest.mark.parametrize("case", ["tall", "wide", "alpha_twice_r", "first_eigen", "merge"])
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


# ------------------------------------------------------------ in a transformer


def published_vit(name, cfg, splits_qkv=False):
    """DINOv2 of the reference's size and weights with an adapter, and the adapter's tensors."""
    sizes = peft_facts(name)["backbone"]
    transformer = VisionTransformer(
        img_size=sizes["img_size"],
        patch_size=sizes["patch_size"],
        embed_dim=sizes["embed_dim"],
        depth=sizes["depth"],
        num_heads=sizes["num_heads"],
        init_values=sizes["init_values"],
        num_classes=0,
    )
    values = {entry["name"]: value_of(entry) for entry in peft_facts(name)["keys"]}
    own = {key: value for key, value in values.items() if not key.startswith("reins.")}
    if splits_qkv:
        own = fuse_qkv(own)
    own.pop("mask_token")
    transformer.load_state_dict(own)
    backbone = ViTBackbone(
        transformer=transformer,
        pixel_mean=(0, 0, 0),
        pixel_std=(1, 1, 1),
        out_blocks=sizes["out_indices"],
        positions="dinov2",
        make_adapter=functools.partial(build_adapter, cfg),
    )
    adapter = {k.removeprefix("reins."): v for k, v in values.items() if k.startswith("reins.")}
    return backbone.train(), adapter


def fuse_qkv(values):
    """`attn.{q,k,v}.*` below each other as `attn.qkv.*`."""
    fused = {key: value for key, value in values.items() if not re.search(r"attn\.[qkv]\.", key)}
    for key in [key for key in values if "attn.q." in key]:
        parts = [values[key.replace("attn.q.", f"attn.{letter}.")] for letter in "qkv"]
        fused[key.replace("attn.q.", "attn.qkv.")] = torch.cat(parts)
    return fused


def pyramid_of(backbone, image):
    """The features by stride; of stride 4 every 4th channel, as the reference keeps it."""
    features = backbone(torch.from_numpy(image))
    return {4: features["res2"], 8: features["res3"], 16: features["res4"], 32: features["res5"]}


def kept_pyramid(features):
    return {s: f[:, ::4] if s == 4 else f for s, f in features.items()}


@pytest.mark.parametrize("kind", ["plain", "rein"])
def test_rein_in_dinov2(kind):
    reference = peft_arrays("rein_dinov2")
    cfg = adapter_config("rein") if kind == "rein" else adapter_config("none")
    backbone, values = published_vit("rein_dinov2", cfg)
    if kind == "rein":
        backbone.adapter.load_state_dict(values)
    image = torch.from_numpy(reference["in/image"])
    for suffix, maps in (
        ("", backbone.maps(image)),
        ("_square", backbone.maps(torch.from_numpy(reference["in/image_square"]))),
    ):
        for block, ours in zip((2, 3, 4, 7), maps, strict=True):
            assert_close(ours, reference[f"{kind}{suffix}/map_block{block}"], name=f"block {block}")
    features = pyramid_of(backbone, reference["in/image"])
    for stride, ours in kept_pyramid(features).items():
        assert_close(ours, reference[f"{kind}/stride{stride}"], name=f"stride {stride}")
    trained = {n for n, p in backbone.named_parameters() if p.requires_grad}
    assert trained == ({f"adapter.{name}" for name in values} if kind == "rein" else set())
    if kind == "plain":
        return
    queries = backbone.adapter.object_queries()
    assert_close(queries, reference["rein/queries"], name="queries")
    outputs = {"in/cotangent_queries": queries}
    outputs |= {f"in/cotangent_stride{stride}": f for stride, f in features.items()}
    loss = sum((cotangent(name, out.shape) * out).sum() for name, out in outputs.items())
    assert_close(loss, reference["rein/loss"], name="loss")
    loss.backward()
    for name, parameter in backbone.adapter.named_parameters():
        theirs = reference[f"rein/grad/reins.{name}"]
        assert_close(kept(name, parameter.grad), theirs, name=name)


def split(name, tensor):
    """An adapted layer's tensor by the names of the published layers: q, k, v, or its own."""
    if not name.endswith("qkv"):
        return {name: tensor}
    return {f"{name[:-3]}{n}": part for n, part in zip("qkv", tensor.chunk(3), strict=True)}


def test_soma_in_dinov2_and_one_step():
    reference = peft_arrays("soma")
    plain, _ = published_vit("soma", adapter_config("none"), splits_qkv=True)
    backbone, _ = published_vit("soma", adapter_config("soma"), splits_qkv=True)
    for stage, network in (("before", plain), ("init", backbone)):
        for stride, ours in kept_pyramid(pyramid_of(network, reference["in/image"])).items():
            assert_close(ours, reference[f"{stage}/stride{stride}"], name=f"{stage} {stride}")
    layers = adapted_layers(backbone.transformer)
    assert len(layers) == 8 and min(layers) == "blocks.8.attn.proj"
    signs = check_soma_start(layers, reference)

    features = pyramid_of(backbone, reference["in/image"])
    parts = [
        (cotangent(f"in/cotangent_soma_stride{s}", f.shape) * f).sum() for s, f in features.items()
    ]
    loss = sum(parts)
    assert_close(loss, reference["loss"], name="loss")
    loss.backward()
    check_soma_gradients(layers, reference, signs)
    trained = [p for p in backbone.parameters() if p.requires_grad]
    torch.optim.SGD(trained, lr=peft_facts("soma")["sgd_lr"]).step()
    for stride, ours in kept_pyramid(pyramid_of(backbone, reference["in/image"])).items():
        assert_close(ours, reference[f"step/stride{stride}"], name=f"step {stride}")

    assert merge_updates(backbone) == 8
    for name in layers:
        layer = backbone.transformer.get_submodule(name)
        for kind, tensor in (("merged_weight", layer.weight), ("bias", layer.bias)):
            for part, ours in split(name, tensor).items():
                key = f"step/{part}/{kind}"
                if key in reference:
                    assert_close(kept_of(part, key, ours, reference), reference[key], name=key)
    for stride, ours in kept_pyramid(pyramid_of(backbone, reference["in/image"])).items():
        assert_close(ours, reference[f"step/stride{stride}"], 1e-5, name=f"merged {stride}")


def kept_of(part, key, tensor, reference):
    """What the reference keeps of a matrix: of fc1 every 4th row, of fc2 every 4th column."""
    if tensor.shape == reference[key].shape:
        return tensor
    return tensor[::4] if part.endswith("fc1") else tensor[:, ::4]


def check_soma_start(layers, reference):
    """Compare factors and residuals; returns the signs of the published factors by layer."""
    signs = {}
    for name, layer in layers.items():
        update = layer.updates["soma"]
        tensors = {
            "lora_A": update.lora_A,
            "lora_B": update.lora_B,
            "weight": layer.weight,
            "BA": update.delta(torch.float32),
        }
        parts = {kind: split(name, tensor.detach()) for kind, tensor in tensors.items()}
        for part in parts["lora_A"]:
            a = parts["lora_A"][part].numpy()
            sign = signs[part] = np.sign((a * reference[f"init/{part}/lora_A"]).sum(1))
            parts["lora_A"][part] = torch.from_numpy(a * sign[:, None])
            parts["lora_B"][part] = parts["lora_B"][part] * torch.from_numpy(sign)
            for kind in tensors:
                key = f"init/{part}/{kind}"
                if key in reference:
                    ours = kept_of(part, key, parts[kind][part], reference)
                    assert_close(ours, reference[key], 3e-4, name=key)
    return signs


def check_soma_gradients(layers, reference, signs):
    compared = 0
    for name, layer in layers.items():
        update = layer.updates["soma"]
        grads = {
            "bias": layer.bias.grad,
            "lora_A.weight": update.lora_A.grad,
            "lora_B.weight": update.lora_B.grad,
        }
        for kind, grad in grads.items():
            for part, ours in split(name, grad).items():
                key = f"grad/{part}.{kind}"
                if key not in reference:
                    assert key.endswith("attn.k.bias")
                    continue
                sign = torch.from_numpy(signs[part])
                if kind.startswith("lora"):
                    ours = ours * (sign[:, None] if kind == "lora_A.weight" else sign)
                assert_close(ours, reference[key], 3e-4, name=key)
                compared += 1
    assert compared == 2 * (3 * 6 - 1)
