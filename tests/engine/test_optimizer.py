from __future__ import annotations

import copy

import pytest
import torch
from engine_toy import Toy, toy_config
from torch import nn

from clouds.engine.optimizer import (
    build_clipping,
    build_optimizer,
    can_fuse,
    parameter_groups,
)


class Block(nn.Module):
    """One of everything that is grouped differently."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.norm = nn.LayerNorm(2)
        self.group_norm = nn.GroupNorm(1, 2)
        self.batch_norm = nn.BatchNorm2d(2)
        self.query = nn.Embedding(3, 2)
        self.level_embed = nn.Parameter(torch.zeros(3, 2))
        self.absolute_pos_embed = nn.Parameter(torch.zeros(1, 2))
        self.tied = self.linear


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.trunk = nn.Sequential(nn.Conv2d(3, 2, 1), nn.LayerNorm(2))
        self.backbone.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.head = Block()
        self.logit_scale = nn.Parameter(torch.zeros(()))


def config(**solver):
    return toy_config("unused", *[word for k, v in solver.items() for word in (f"SOLVER.{k}", v)])


def test_groups_against_a_list_made_by_hand():
    cfg = config(BASE_LR=0.1, WEIGHT_DECAY=0.05, BACKBONE_MULTIPLIER=0.5)
    optimizer = build_optimizer(cfg, Model())
    found = {
        name: (group["name"], group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    head, norm = ("head", 0.1, 0.05), ("head.norm", 0.1, 0.0)
    assert found == {
        "logit_scale": head,
        "backbone.trunk.0.weight": ("backbone", 0.05, 0.05),
        "backbone.trunk.0.bias": ("backbone", 0.05, 0.05),
        "backbone.trunk.1.weight": ("backbone.norm", 0.05, 0.0),
        "backbone.trunk.1.bias": ("backbone.norm", 0.05, 0.0),
        "head.linear.weight": head,
        "head.linear.bias": head,
        "head.norm.weight": norm,
        "head.norm.bias": norm,
        "head.group_norm.weight": norm,
        "head.group_norm.bias": norm,
        "head.batch_norm.weight": norm,
        "head.batch_norm.bias": norm,
        "head.query.weight": ("head.embed", 0.1, 0.0),
        "head.level_embed": head,
        "head.absolute_pos_embed": ("head.position", 0.1, 0.0),
    }
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(parameters) == len({id(p) for p in parameters}) == len(found)
    by_name = dict(Model().named_parameters())
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert by_name[name].shape == parameter.shape


def test_weight_decay_of_norms_and_embeddings_is_config():
    cfg = config(WEIGHT_DECAY_NORM=0.01, WEIGHT_DECAY_EMBED=0.02)
    decays = {g["name"]: g["weight_decay"] for g in parameter_groups(cfg, Model())}
    assert decays["head.norm"] == decays["backbone.norm"] == 0.01
    assert decays["head.embed"] == 0.02
    assert decays["head.position"] == 0.0


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="no parameter of the model is trainable"):
        build_optimizer(config(), Toy().requires_grad_(False))


@pytest.mark.parametrize(("decay", "kept"), [(0.05, 0.05), (0.0, 0.0)])
def test_first_adamw_step_by_its_formula(decay, kept):
    """After one step Adam's moments are g and g², so p becomes p (1 - lr wd) - lr sign(g)."""
    model = nn.Linear(3, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(config(BASE_LR=0.01, WEIGHT_DECAY=decay), model)
    gradient = torch.tensor([[0.5, -2.0, 4.0]])
    model.weight.grad = gradient.clone()
    optimizer.step()
    expected = before * (1 - 0.01 * kept) - 0.01 * gradient.sign()
    torch.testing.assert_close(model.weight.detach(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["ADAMW", "SGD"])
def test_the_fused_form_gives_what_torchs_plain_one_gives(name):
    cfg = config(OPTIMIZER=name, BASE_LR=0.01, WEIGHT_DECAY=0.1)
    ours, other = Toy(), Toy()
    optimizer = build_optimizer(cfg, ours)
    assert all(group["fused"] for group in optimizer.param_groups)
    groups = [
        {key: g[key] for key in ("lr", "weight_decay")}
        | {"params": [dict(other.named_parameters())[n] for n in g["param_names"]]}
        for g in optimizer.param_groups
    ]
    kinds = {
        "ADAMW": lambda: torch.optim.AdamW(groups, foreach=False),
        "SGD": lambda: torch.optim.SGD(groups, momentum=cfg.SOLVER.MOMENTUM, foreach=False),
    }
    plain = kinds[name]()
    for i in range(4):
        for model in (ours, other):
            generator = torch.Generator().manual_seed(i)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        if i == 2:  # the state of a checkpoint that was saved before there was a fused form
            saved = copy.deepcopy(plain.state_dict())
            for group, names in zip(saved["param_groups"], optimizer.param_groups, strict=True):
                group["param_names"] = names["param_names"]
            optimizer.load_state_dict(saved)
        optimizer.step()
        plain.step()
    for parameter, expected in zip(ours.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)


def test_where_torch_has_no_fused_form_the_plain_one_serves():
    groups = [{"params": [nn.Parameter(torch.zeros(2, device=d))]} for d in ("cpu", "meta")]
    assert can_fuse(groups[:1]) and not can_fuse(groups)


def test_sgd_has_momentum():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    cfg = config(OPTIMIZER="SGD", BASE_LR=0.1, MOMENTUM=0.5, WEIGHT_DECAY=0.0)
    optimizer = build_optimizer(cfg, model)
    for expected in (0.9, 0.75):  # steps 0.1 * 1, then 0.1 * (1 + 0.5)
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
        assert model.weight.item() == pytest.approx(expected)


def clipped(gradients, **clip):
    model = nn.ParameterList([nn.Parameter(torch.zeros(len(g))) for g in gradients])
    settings = {f"CLIP_GRADIENTS.{key}": value for key, value in clip.items()}
    cfg = config(**settings)
    clip_gradients = build_clipping(cfg, build_optimizer(cfg, model))
    for parameter, gradient in zip(model, gradients, strict=True):
        parameter.grad = torch.tensor(gradient)
    norm = clip_gradients()
    return float(norm), [parameter.grad.tolist() for parameter in model]


def test_full_model_clipping_scales_by_the_norm_over_everything():
    norm, gradients = clipped([[3.0], [4.0]], CLIP_TYPE="full_model", CLIP_VALUE=1.0)
    assert norm == pytest.approx(5.0)
    assert gradients == [[pytest.approx(0.6, rel=1e-5)], [pytest.approx(0.8, rel=1e-5)]]
    _, gradients = clipped([[0.3], [0.4]], CLIP_TYPE="full_model", CLIP_VALUE=1.0)
    assert gradients == [[pytest.approx(0.3)], [pytest.approx(0.4)]]
    norm, _ = clipped([[3.0], [4.0]], CLIP_TYPE="full_model", NORM_TYPE=1.0)
    assert norm == pytest.approx(7.0)


def test_clipping_of_each_parameter():
    norm, gradients = clipped([[3.0, 4.0], [0.1]], CLIP_TYPE="norm", CLIP_VALUE=1.0)
    assert norm == pytest.approx(25.01**0.5)
    assert gradients[0] == pytest.approx([0.6, 0.8], rel=1e-5)
    assert gradients[1] == pytest.approx([0.1])
    norm, gradients = clipped([[3.0, -4.0], [0.1]], CLIP_TYPE="value", CLIP_VALUE=1.0)
    assert norm == pytest.approx(25.01**0.5)
    assert gradients == [[1.0, -1.0], [pytest.approx(0.1)]]


def test_no_clipping_only_measures():
    norm, gradients = clipped([[3.0], [4.0]], ENABLED=False, CLIP_VALUE=1.0)
    assert norm == pytest.approx(5.0)
    assert gradients == [[3.0], [4.0]]


def stepped(model, cfg):
    optimizer = build_optimizer(cfg, model)
    for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.grad = torch.full_like(parameter, float(number + 1))
    optimizer.step()
    return optimizer


def test_state_is_restored_by_name_with_the_rates_of_the_new_config():
    class Reordered(nn.Module):
        def __init__(self):
            super().__init__()
            toy = Toy()
            self.query, self.norm, self.conv = toy.query, toy.norm, toy.conv

    class Ordered(nn.Module):
        def __init__(self):
            super().__init__()
            toy = Toy()
            self.conv, self.norm, self.query = toy.conv, toy.norm, toy.query

    saved = stepped(Ordered(), config(BASE_LR=0.1)).state_dict()
    model = Reordered()
    optimizer = build_optimizer(config(BASE_LR=0.5), model)
    optimizer.load_state_dict(saved)
    # Adam's first moment after one step is 0.1 g; g is 1, 2, … in the order of Ordered.
    order = ["conv.weight", "conv.bias", "norm.weight", "norm.bias", "query.weight"]
    for name, parameter in model.named_parameters():
        moment = optimizer.state[parameter]["exp_avg"]
        assert moment.unique().item() == pytest.approx(0.1 * (order.index(name) + 1))
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


def test_state_of_other_parameters_is_refused():
    saved = stepped(Toy(), config()).state_dict()
    thawed = Toy()
    thawed.backbone.requires_grad_(True)
    with pytest.raises(ValueError, match=r"Only now: backbone.bias, backbone.weight.*FREEZE"):
        build_optimizer(config(), thawed).load_state_dict(saved)


def published_without_decay():
    """Parameters that the published code trains without weight decay (its optimizer, read off).

    The pixel decoder's level embedding, which is a bare parameter, is not among them; the mask
    decoder's three embeddings are.
    """
    encoder = "sem_seg_head.pixel_decoder.transformer.encoder.layers"
    decoder = "sem_seg_head.predictor"
    layers = [f"sem_seg_head.pixel_decoder.input_proj.{i}.1" for i in range(3)]
    layers += [f"{encoder}.{i}.norm{k}" for i in range(6) for k in (1, 2)]
    layers += [f"sem_seg_head.pixel_decoder.{name}.norm" for name in ("adapter_1", "layer_1")]
    kinds = ("self_attention", "cross_attention", "ffn")
    layers += [f"{decoder}.transformer_{kind}_layers.{i}.norm" for kind in kinds for i in range(9)]
    layers += [f"{decoder}.decoder_norm"]
    names = {f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")}
    return names | {
        f"{decoder}.{name}.weight" for name in ("query_feat", "query_embed", "level_embed")
    }


def test_the_real_model_is_grouped_as_published():
    from clouds.modeling.build import build_seeded

    clip = ("MODEL.CLOUDS.CLIP_MODEL_NAME", "clouds_tiny")
    cfg = toy_config("unused", *clip, "MODEL.CLOUDS.CLIP_PRETRAINED_WEIGHTS", "")
    groups = parameter_groups(cfg, build_seeded(cfg))
    by_decay = {
        decay: {n for g in groups if g["weight_decay"] == decay for n in g["param_names"]}
        for decay in (0.0, 0.05)
    }
    # The published optimizer also lists the void embedding, which never gets a gradient there.
    assert by_decay[0.0] == published_without_decay()
    assert len(by_decay[0.0]) == 94 - 1
    assert len(by_decay[0.05]) == 199
    assert "sem_seg_head.pixel_decoder.transformer.level_embed" in by_decay[0.05]
    assert not any(name.startswith("backbone.") for names in by_decay.values() for name in names)


class PlainBackbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 2, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)) for _ in range(11)
        )


class GroupedBackbone(PlainBackbone):
    """A backbone with options for some of its parameters."""

    def __init__(self, options):
        super().__init__()
        self.options = options

    def param_group_options(self):
        return self.options


def model_of(backbone):
    model = nn.Module()
    model.backbone = backbone
    model.head = nn.Linear(2, 2)
    return model


def test_options_of_a_backbone():
    options = {
        "blocks": {"lr_factor": 0.5},
        "blocks.1": {"lr_factor": 4.0, "weight_decay": 0.3},
        "blocks.2.0.bias": {"weight_decay": 0.0},
    }
    cfg = config(BASE_LR=0.1, WEIGHT_DECAY=0.05, BACKBONE_MULTIPLIER=0.1)
    groups = {
        name: (group["name"], pytest.approx(group["lr"]), group["weight_decay"])
        for group in parameter_groups(cfg, model_of(GroupedBackbone(options)))
        for name in group["param_names"]
    }
    assert groups["head.weight"] == ("head", 0.1, 0.05)
    assert groups["backbone.stem.weight"] == ("backbone", 0.01, 0.05)
    assert groups["backbone.blocks.0.0.weight"] == ("backbone.blocks", 0.005, 0.05)
    assert groups["backbone.blocks.0.1.weight"] == ("backbone.blocks.norm", 0.005, 0.0)
    assert groups["backbone.blocks.1.0.bias"] == ("backbone.blocks.1", 0.04, 0.3)
    assert groups["backbone.blocks.1.1.bias"] == ("backbone.blocks.1.norm", 0.04, 0.3)
    assert groups["backbone.blocks.2.0.bias"] == ("backbone.blocks.2.0.bias", 0.01, 0.0)
    assert groups["backbone.blocks.2.0.weight"] == ("backbone.blocks", 0.005, 0.05)
    assert groups["backbone.blocks.10.0.bias"] == ("backbone.blocks", 0.005, 0.05)
    assert len(groups) == 2 + 2 + 11 * 4


def test_a_backbone_without_options_is_grouped_as_without_the_method():
    cfg = config(BASE_LR=0.1, BACKBONE_MULTIPLIER=0.1)
    plain, grouped = (
        [(g["name"], g["lr"], g["param_names"]) for g in parameter_groups(cfg, model_of(backbone))]
        for backbone in (PlainBackbone(), GroupedBackbone({}))
    )
    assert plain == grouped
    assert {name for name, *_ in plain} == {"backbone", "backbone.norm", "head"}


def test_an_unknown_option_of_a_backbone():
    options = {"stem": {"lr": 0.1}}
    with pytest.raises(ValueError, match=r"option 'lr' of the parameters 'stem' is unknown"):
        parameter_groups(config(), model_of(GroupedBackbone(options)))
