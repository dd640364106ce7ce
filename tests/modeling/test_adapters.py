"""Adapters of backbones: what trains, where they start, and merging."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import scipy.linalg
import timm
import torch
from joint_samples import MIXED, generated, source
from reference_adapters import adapted
from tiny_adapter import (
    FROZEN,
    LOW_RANK,
    SMALL,
    images,
    move_adapter,
    small_clip,
    small_config,
    small_vit,
    vit_model_config,
)
from torch import nn
from torch.nn import functional as F

from clouds.engine.optimizer import build_optimizer, parameter_groups
from clouds.modeling.backbone.adapters import (
    ADAPTER_REGISTRY,
    Adapter,
    adapter_of,
    merge_updates,
)
from clouds.modeling.backbone.adapters.low_rank import AdaptedConv2d, AdaptedLinear, adapted_layers
from clouds.modeling.backbone.adapters.soma import factors_of
from clouds.modeling.build import build_on_meta, build_seeded
from clouds.self_training.ema import EMATeacher

CNNS = ("clouds_tiny", "clouds_tiny_resnet")


def difference(first, second):
    """Largest, relative to the largest value."""
    return max(((first[k] - second[k]).abs().max() / second[k].abs().max()).item() for k in second)


def trained_names(module):
    return {name for name, p in module.named_parameters() if p.requires_grad}


# ------------------------------------------------------------- where they start


@pytest.mark.parametrize("name", LOW_RANK)
def test_a_low_rank_adapter_starts_as_the_frozen_network(name):
    assert difference(small_vit(name)(images()), small_vit()(images())) < 1e-5


def test_soma_as_published_starts_elsewhere_beside_the_whole_weights():
    plain, other = small_vit(), small_vit("soma", START="published")
    state, own = other.state_dict(), plain.state_dict()
    assert all(torch.equal(state[key], own[key]) for key in own)
    assert difference(other(images()), plain(images())) > 1e-2
    update = other.transformer.blocks[3].mlp.fc1.updates["soma_added"]
    # the smallest singular values of torch's initial matrix (192, 48): uniform ± 1 / sqrt(48)
    largest = torch.linalg.matrix_norm(update.delta(torch.float32), 2).item()
    assert 0 < largest < (192**0.5 - 48**0.5) / 12 + 0.5


@pytest.mark.parametrize("components", ["smallest", "largest"])
@pytest.mark.parametrize("size", [(40, 24), (24, 40), (24, 24)])
@pytest.mark.parametrize("spectrum", ["even", "to zero", "rank 12"])
def test_soma_takes_singular_values_of_either_end(components, size, spectrum):
    """Those of the matrix that was made with them, also next to 0, where squares are lost."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, 24)))[0] for n in size)
    values = {
        "even": np.linspace(3, 1, 24),
        "to zero": np.geomspace(3, 1e-7, 24),
        "rank 12": np.r_[np.linspace(3, 1, 12), np.zeros(12)],
    }[spectrum]
    weight = torch.from_numpy((u * values) @ v.T)
    a, b = factors_of(weight, 5, 0.5, components == "largest")
    chosen = slice(0, 5) if components == "largest" else slice(19, 24)
    part = (u[:, chosen] * values[chosen]) @ v[:, chosen].T
    assert a.shape == (5, size[1]) and b.shape == (size[0], 5)
    np.testing.assert_allclose(0.5 * (b @ a), part, rtol=0, atol=1e-9)  # float32 has 1e-7
    roots = np.sqrt(values[chosen] / 0.5)
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), roots, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(b, axis=0), roots, rtol=1e-4, atol=1e-6)


def test_soma_of_the_largest_singular_values_starts_as_the_frozen_network():
    other = small_vit("soma", COMPONENTS="largest")
    assert difference(other(images()), small_vit()(images())) < 1e-5
    update = other.transformer.blocks[3].mlp.fc1.updates["soma"]
    weight = small_vit().transformer.blocks[3].mlp.fc1.weight.detach()
    expected = torch.linalg.svdvals(weight)[: update.rank]
    found = torch.linalg.svdvals(update.delta(torch.float32).detach())[: update.rank]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_recycle_starts_with_columns_of_a_pivoted_qr_decomposition():
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(3))
    for matrix in (weight, weight.T.contiguous(), weight[:, :6].contiguous()):
        block = nn.ModuleDict({"fc": nn.Linear(matrix.shape[1], matrix.shape[0])})
        block["fc"].weight.data.copy_(matrix)
        adapted("recycle", [block], matrix.shape[1], RANK=3, SUB_RANK=2)
        q, _, pivots = scipy.linalg.qr(matrix.numpy(), pivoting=True, mode="economic")
        expected = {"recycle_main": range(3, 6), "recycle_sub": range(2)}
        total = np.zeros(matrix.shape)
        for name, columns in expected.items():
            update = block["fc"].updates[name]
            assert update.scale == 1 / 5
            a = np.zeros((len(columns), matrix.shape[1]))
            a[np.arange(len(columns)), pivots[list(columns)]] = 1
            np.testing.assert_array_equal(update.lora_A.detach(), a)
            b = update.lora_B.detach().numpy()
            signs = np.sign((b * q[:, list(columns)]).sum(0))
            np.testing.assert_allclose(b * signs, q[:, list(columns)], atol=1e-5)
            total += b @ a / 5
        np.testing.assert_allclose(block["fc"].weight.detach(), matrix - total, atol=1e-6)


def test_lora_by_hand():
    """W x + (alpha / r) B A x, A uniform ± 1 / sqrt(in), B zero."""
    block = nn.ModuleDict({"qkv": nn.Linear(16, 6)})
    adapted("lora", [block], 16, RANK=2, ALPHA=6.0)
    layer, update = block["qkv"], block["qkv"].updates["lora"]
    assert update.lora_A.shape == (2, 16) and update.lora_B.shape == (6, 2)
    assert (update.lora_B == 0).all() and 0.2 < update.lora_A.abs().max() <= 1 / 4
    x = torch.randn(3, 16)
    with torch.no_grad():
        update.lora_B.normal_()
        expected = x @ layer.weight.T + layer.bias
        expected = expected + 3 * (x @ update.lora_A.T) @ update.lora_B.T
    torch.testing.assert_close(layer(x), expected)


def test_a_convolutions_update_is_a_convolution_with_the_updated_kernel():
    block = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1, dilation=2))
    adapted("lora", [block], 5, RANK=2, ALPHA=1.0, is_transformer=False)
    layer, update = block[0], block[0].updates["lora"]
    assert isinstance(layer, AdaptedConv2d)
    update.lora_B.data.normal_()
    kernel = layer.weight + (update.lora_B @ update.lora_A.flatten(1)).view(5, 3, 3, 3) / 2
    x = torch.randn(2, 3, 12, 10)
    expected = F.conv2d(x, kernel, layer.bias, stride=2, padding=1, dilation=2)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    assert merge_updates(block) == 1 and type(block[0]) is nn.Conv2d
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


def test_kinds_of_attention_call_the_adapted_layer():
    """EVA's uses the weight of the projection alone, with biases of its own, unless told else."""
    sizes = {"embed_dim": 48, "depth": 4, "num_heads": 3, "img_size": 64, "patch_size": 16}
    eva = timm.create_model(
        "eva02_small_patch14_224", num_classes=0, qkv_fused=True, **sizes
    ).eval()
    nn.init.normal_(eva.blocks[3].attn.q_bias)
    plain = small_vit(transformer=copy.deepcopy(eva))
    backbone = small_vit("soma", transformer=eva)
    square = images(width=64)
    assert difference(backbone(square), plain(square)) < 1e-5
    qkv = backbone.transformer.blocks[3].attn.qkv
    assert isinstance(qkv, AdaptedLinear)
    sum(f.sum() for f in backbone(square).values()).backward()
    assert qkv.updates["soma"].lora_B.grad.abs().max() > 0
    assert backbone.transformer.blocks[3].attn.q_bias.grad.abs().max() > 0


# ------------------------------------------------------------------ what trains


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_parts_get_no_gradient_and_all_that_trains_gets_one(name):
    backbone = small_vit(name)
    own = set(small_vit().state_dict())
    biases = {
        f"transformer.blocks.{i}.{layer}.bias"
        for i in (2, 3)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert own & trained_names(backbone) == (biases if name == "soma" else set())
    move_adapter(backbone)  # B of LoRA is zero at first, and A then gets none
    features = backbone(images())
    loss = sum((f * torch.randn_like(f)).sum() for f in features.values())
    queries = backbone.adapter.object_queries()
    assert (queries is None) == (name != "rein")
    if queries is not None:
        assert queries.shape == (12, 32)
        loss = loss + (queries * torch.randn_like(queries)).sum()
    loss.backward()
    for key, parameter in backbone.named_parameters():
        trains = key in trained_names(backbone)
        assert (parameter.grad is not None) == trains, key
        if trains:
            assert parameter.grad.abs().max() > 0, key
    frozen_modules = (m for m in backbone.transformer.modules())
    assert not any(module.training for module in frozen_modules)


@pytest.mark.parametrize("model", CNNS)
@pytest.mark.parametrize("name", ["lora", "rein"])
def test_adapters_of_convolutional_networks(name, model):
    backbone, plain = small_clip(name, model), small_clip("none", model)
    trained = trained_names(backbone)
    own = set(plain.state_dict())
    assert trained and not trained & own
    assert all(torch.equal(backbone.state_dict()[k], plain.state_dict()[k]) for k in own)
    before = plain(images())
    start = 1e-5 if name == "lora" else 0.05  # Rein's scale is 0.001 at first
    assert difference(backbone(images()), before) < start
    move_adapter(backbone)
    moved = backbone(images())
    assert all(difference({k: moved[k]}, {k: before[k]}) > 1e-3 for k in ("res2", "res5"))
    loss = sum((f * torch.randn_like(f)).sum() for f in moved.values())
    if name == "rein":
        loss = loss + backbone.adapter.object_queries().square().sum()
    loss.backward()
    grads = {n for n, p in backbone.named_parameters() if p.grad is not None}
    assert grads == trained


def test_reins_queries_of_stages_are_maximum_mean_and_last_by_channel():
    backbone = small_clip("rein")
    adapter = backbone.adapter
    projected = torch.stack(
        [
            F.linear(stage.learnable_tokens_a[0] @ stage.learnable_tokens_b[0], t.weight, t.bias)
            for stage, t in zip(adapter.stages, adapter.transforms, strict=True)
        ]
    )
    assert projected.shape == (4, 12, 32)
    interleaved = torch.zeros(12, 96)
    interleaved[:, 0::3], interleaved[:, 1::3] = projected.max(0)[0], projected.mean(0)
    interleaved[:, 2::3] = projected[3]
    expected = F.linear(interleaved, adapter.merge.weight, adapter.merge.bias)
    torch.testing.assert_close(adapter.object_queries(), expected)


def test_full_trains_all_that_the_features_need():
    backbone = small_vit("full")
    assert not backbone.frozen and backbone.transformer.training
    sum(f.square().sum() for f in backbone(images()).values()).backward()
    grads = {n for n, p in backbone.named_parameters() if p.grad is not None}
    assert grads == trained_names(backbone)
    untrained = set(dict(backbone.named_parameters())) - grads
    assert untrained == {"transformer.norm.weight", "transformer.norm.bias"}


def groups_of(name, **settings):
    cfg = vit_model_config(name, SOLVER__BASE_LR=1.0, SOLVER__BACKBONE_MULTIPLIER=0.5, **settings)
    model = build_on_meta(cfg)
    groups = parameter_groups(cfg, model)
    return {n: (g["lr"], g["weight_decay"]) for g in groups for n in g["param_names"]}


def test_layer_decay():
    """6 blocks, factor 0.5 from the last to the first, and once more before that."""
    rates = groups_of("full")
    for i in range(6):
        name = f"backbone.transformer.blocks.{i}.mlp.fc1.weight"
        assert rates[name] == (0.5 * 0.5 ** (5 - i), 0.05)
        assert rates[f"backbone.transformer.blocks.{i}.norm1.weight"][1] == 0
    assert rates["backbone.transformer.patch_embed.proj.weight"][0] == 0.5 * 0.5**6
    assert rates["sem_seg_head.predictor.class_embed.weight"][0] == 1


def test_rates_and_decays_of_adapters():
    rein = groups_of("rein")
    undecayed = {n for n, (_, decay) in rein.items() if n.startswith("backbone") and decay == 0}
    assert undecayed == {
        f"backbone.adapter.{n}" for n in ("learnable_tokens_a", "learnable_tokens_b", "scale")
    }
    assert "sem_seg_head.predictor.query_to_feat.weight" in rein
    assert not [name for name in rein if "query_embed" in name or "query_feat" in name]
    recycle = groups_of("recycle")
    updates = {n: v for n, v in recycle.items() if ".updates." in n}
    assert len(updates) == 6 * 4 * 2 * 2
    for name, options in updates.items():
        assert options == (0.25 if ".recycle_sub." in name else 0.5, 0)
    soma = groups_of("soma")
    backbone = {options for name, options in soma.items() if name.startswith("backbone")}
    assert backbone == {(0.5, 0.05)}


def test_the_optimizer_has_state_for_what_trains_alone():
    cfg = vit_model_config("soma")
    model = build_seeded(cfg).train()
    optimizer = build_optimizer(cfg, model)
    sizes = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert sizes == sum(p.numel() for p in model.parameters() if p.requires_grad)
    # blocks 2 to 5: q, k, v, proj 64 -> 64, fc1 64 -> 192, fc2 192 -> 64; rank 4; biases
    adapters = 4 * 4 * (4 * 2 * 64 + 2 * (64 + 192))
    biases = 4 * (3 * 64 + 64 + 192 + 64)
    trained = sum(p.numel() for p in model.backbone.parameters() if p.requires_grad)
    assert trained == adapters + biases


def test_the_teacher_averages_the_adapter_and_shares_the_rest():
    backbone = small_vit("soma")
    teacher = EMATeacher({"backbone": backbone}, momentum=0.75, interval=1)
    teacher.reset()
    name = "transformer.blocks.3.mlp.fc1.updates.soma.lora_B"
    before = backbone.get_parameter(name).detach().clone()
    move_adapter(backbone)
    teacher.update()
    copied = teacher.parts["backbone"]
    now = backbone.get_parameter(name).detach()
    torch.testing.assert_close(copied.get_parameter(name).detach(), 0.75 * before + 0.25 * now)
    shared = "transformer.blocks.3.mlp.fc1.weight"
    assert copied.get_parameter(shared) is backbone.get_parameter(shared)
    averaged = {key.removeprefix("backbone.") for key in teacher.state_dict()}
    assert averaged == trained_names(backbone)


# -------------------------------------------------------------------- merging


@pytest.mark.parametrize("name", LOW_RANK)
def test_merged_equals_unmerged(name):
    backbone = small_vit(name).eval()
    move_adapter(backbone)
    before, start = backbone(images()), small_vit()(images())
    assert difference(before, start) > 1e-3
    assert merge_updates(backbone) == (8 if name == "soma" else 16)
    assert difference(backbone(images()), before) < 1e-5
    assert backbone.state_dict().keys() == small_vit().state_dict().keys()
    assert adapted_layers(backbone) == {}


@pytest.mark.parametrize("model", CNNS)
def test_merged_equals_unmerged_of_convolutional_networks(model):
    backbone = small_clip("lora", model).eval()
    move_adapter(backbone)
    before = backbone(images())
    assert merge_updates(backbone) > 0
    assert difference(backbone(images()), before) < 1e-5
    assert backbone.state_dict().keys() == small_clip("none", model).state_dict().keys()


# ------------------------------------------------------------------- bad input


def test_an_unknown_adapter():
    with pytest.raises(KeyError, match=r"'lara' is not registered.*full, lora, none, recycle"):
        cfg = small_config("none")
        cfg.MODEL.BACKBONE.ADAPTER.NAME = "lara"
        adapted("lara", [nn.ModuleDict()], 8, cfg=cfg)


@pytest.mark.parametrize("name", ["soma", "recycle"])
def test_an_adapter_of_transformers_on_a_convolutional_network(name):
    with pytest.raises(ValueError, match=f"{name} adapts transformer blocks.*CLIP clouds_tiny"):
        small_clip(name)


def test_blocks_and_ranks_that_do_not_exist():
    with pytest.raises(ValueError, match=r"FIRST_BLOCK is 4.*blocks 0 to 3"):
        small_vit("soma", FIRST_BLOCK=4)
    with pytest.raises(ValueError, match=r"rank 49 of a weight \(144, 48\).*up to 48"):
        small_vit("soma", RANK=49)


def test_attention_that_reads_weights_itself_cannot_be_adapted():
    """`nn.MultiheadAttention` multiplies with its weights, and would skip the updates."""
    block = nn.TransformerEncoderLayer(16, 2)
    with pytest.raises(ValueError, match="LORA: the backbone a test's cannot have this adapter"):
        adapted("lora", [block], 16)


def test_a_registered_adapter_of_ones_own():
    class Half(Adapter):
        acts_on_tokens = True

        def after_block(self, index, tokens):
            return tokens / 2 if index == 3 else tokens

    ADAPTER_REGISTRY._do_register("half", lambda cfg, layers: Half())
    try:
        cfg = small_config("none")
        cfg.MODEL.BACKBONE.ADAPTER.NAME = "half"
        layers = adapted("half", [nn.Identity()] * 4, 8, cfg=cfg)
        x = torch.ones(1, 8, 2, 2)
        assert torch.equal(layers.after_stage(3, x), x / 2)
    finally:
        del ADAPTER_REGISTRY._obj_map["half"]


def test_a_backbone_without_a_place_for_adapters_has_none():
    assert adapter_of(nn.Linear(1, 1)).object_queries() is None


def test_all_adapters_are_tested_here():
    assert {name for name, _ in ADAPTER_REGISTRY} == set(SMALL)


# --------------------------------------------------------------- the whole model


@pytest.mark.parametrize("name", ["rein", "soma"])
def test_joint_training_labels_with_the_teachers_adapter(name):
    cfg = vit_model_config(name, **MIXED)
    model = build_seeded(cfg).train()
    model.pseudo_labeler.teacher.reset()
    clean = [generated(3, 64, 64)["clean_image"]]
    before = model.predict_pseudo_labels(clean)[0].confidence
    move_adapter(model)
    assert torch.equal(model.predict_pseudo_labels(clean)[0].confidence, before)
    losses = model([source(1, 64, 64), generated(2, 64, 64)])
    assert len(losses) == 12 and all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    model.pseudo_labeler.teacher.reset()
    assert not torch.equal(model.predict_pseudo_labels(clean)[0].confidence, before)


@pytest.mark.parametrize("name", FROZEN)
def test_adapters_of_clips_vision_transformer(name):
    """The text head and the ensemble go on working, and text encoder and projection stay frozen."""
    settings = {
        "MODEL__BACKBONE__NAME": "CLIPViT",
        "MODEL__CLOUDS__CLIP_MODEL_NAME": "clouds_tiny_vit",
        "MODEL__MASK_FORMER__TRANSFORMER_DECODER_NAME": "text",
        "MODEL__CLOUDS__GEOMETRIC_ENSEMBLE": True,
    }
    cfg = vit_model_config(name, **settings)
    model = build_seeded(cfg).train()
    own = set(build_seeded(vit_model_config("none", **settings)).backbone.state_dict())
    trained = trained_names(model.backbone)
    assert trained and all(n.endswith("bias") for n in own & trained)
    sum(model([source(1, 64, 64)]).values()).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    scores = model.eval()([{"image": source(1, 64, 64)["image"]}])[0]["sem_seg"]
    assert torch.isfinite(scores).all()
