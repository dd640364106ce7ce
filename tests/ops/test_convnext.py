"""ConvNeXt's blocks some pixels at a time against timm's own forward pass."""

from __future__ import annotations

import pytest
import torch
from tiny_model import tiny_model

from clouds.ops import convnext

timm = pytest.importorskip("timm")


def stage_and_input(out=24, **settings):
    torch.manual_seed(0)
    norms = {"norm_layer": timm.layers.LayerNorm2d, "norm_layer_cl": timm.layers.LayerNorm}
    if settings.get("conv_mlp"):
        norms["norm_layer_cl"] = norms["norm_layer"]
    settings = {"ls_init_value": 1e-6, **norms, **settings}
    stage = timm.models.convnext.ConvNeXtStage(16, out, depth=2, **settings)
    for name, parameter in stage.named_parameters():
        torch.nn.init.normal_(parameter, std=0.5 if name.endswith("gamma") else 0.2)
    stage.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    x = torch.randn(2, 16, 74, 50).contiguous(memory_format=torch.channels_last)
    return stage, x


@pytest.mark.parametrize(("out", "stride"), [(24, 2), (16, 1)])
def test_timms_blocks_some_pixels_at_a_time(out, stride, monkeypatch):
    """Of the first stage the input itself is what the first block adds to."""
    stage, x = stage_and_input(out, stride=stride)
    monkeypatch.setattr(convnext, "PIXELS_AT_ONCE", 700)  # the last part is smaller
    with torch.no_grad():
        assert convnext.applies(stage, x)
        before = x.clone()
        got, expected = convnext.stage(stage, x), stage(x)
    assert x.equal(before)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (got - stage.downsample(x)).abs().max() > 0.1  # the blocks do something


@pytest.mark.parametrize(
    "settings",
    [{"conv_mlp": True}, {"use_grn": True}, {"ls_init_value": None}, {"act_layer": "gelu_tanh"}],
    ids=lambda settings: next(iter(settings)),
)
def test_other_blocks_take_timms_way(settings):
    stage, x = stage_and_input(**settings)
    with torch.no_grad():
        assert not convnext.applies(stage, x)
        assert convnext.stage(stage, x).equal(stage(x))


def test_the_frozen_backbone_takes_this_way(monkeypatch):
    """CLIP's ConvNeXts have GELU; the tiny one, which is timm's for tests, has its tanh form."""
    clip = tiny_model().eval().backbone
    trunk = clip.clip_model.visual.trunk
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        for stage in trunk.stages:
            for block in stage.blocks:
                block.mlp.act = torch.nn.GELU()
                block.gamma.fill_(0.5)  # the blocks count
        taken, applies = [], convnext.applies
        spy = monkeypatch.setattr
        spy(convnext, "applies", lambda *args: taken.append(applies(*args)) or taken[-1])
        ours = clip(x)
        assert taken == [True] * 4
        spy(convnext, "applies", lambda *args: False)
        expected = clip(x)
    for name, feature in expected.items():
        torch.testing.assert_close(ours[name], feature, rtol=1e-5, atol=1e-5)
        assert ours[name].stride() == feature.stride()


class Lora(torch.nn.Linear):
    """What replaces a layer may compute more."""


def test_changed_layers_and_hooks_take_timms_way():
    stage, x = stage_and_input()
    with torch.no_grad():
        handle = stage.blocks[1].mlp.register_forward_hook(lambda *args: None)
        assert not convnext.applies(stage, x)
        handle.remove()
        assert convnext.applies(stage, x)
        stage.blocks[1].mlp.fc2.__class__ = Lora
        assert not convnext.applies(stage, x)


def test_gradients_and_autocast_take_timms_way():
    stage, x = stage_and_input()
    assert not convnext.applies(stage, x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert not convnext.applies(stage, x)
        assert convnext.stage(stage, x).equal(stage(x))
    with torch.no_grad():
        assert not convnext.applies(stage, x.contiguous())
        assert not convnext.applies(stage.train(), x)
