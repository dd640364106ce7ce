"""ConvNeXt stages in chunks of pixels against timm's own forward pass."""

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
def test_chunks_of_pixels_equal_timms_forward(out, stride, monkeypatch):
    """Without a downsampling layer (stride 1) the input must not be overwritten."""
    stage, x = stage_and_input(out, stride=stride)
    monkeypatch.setattr(convnext, "PIXELS_PER_CHUNK", 700)  # the last chunk is smaller
    with torch.no_grad():
        assert convnext.is_supported(stage, x)
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
def test_other_blocks_use_timms_forward(settings):
    stage, x = stage_and_input(**settings)
    with torch.no_grad():
        assert not convnext.is_supported(stage, x)
        assert convnext.stage(stage, x).equal(stage(x))


def test_the_frozen_backbone_uses_chunks(monkeypatch):
    """CLIP's ConvNeXts have GELU; timm's tiny one for tests has the tanh form, not supported."""
    clip = tiny_model().eval().backbone
    trunk = clip.clip_model.visual.trunk
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        for stage in trunk.stages:
            for block in stage.blocks:
                block.mlp.act = torch.nn.GELU()
                block.gamma.fill_(0.5)  # the blocks contribute to the output
        decisions, is_supported = [], convnext.is_supported

        def record(*args):
            decisions.append(is_supported(*args))
            return decisions[-1]

        monkeypatch.setattr(convnext, "is_supported", record)
        ours = clip(x)
        assert decisions == [True] * 4
        monkeypatch.setattr(convnext, "is_supported", lambda *args: False)
        expected = clip(x)
    for name, feature in expected.items():
        torch.testing.assert_close(ours[name], feature, rtol=1e-5, atol=1e-5)
        assert ours[name].stride() == feature.stride()


class Lora(torch.nn.Linear):
    """A replaced layer, which may compute more than a linear layer."""


def test_replaced_layers_and_hooks_use_timms_forward():
    stage, x = stage_and_input()
    with torch.no_grad():
        handle = stage.blocks[1].mlp.register_forward_hook(lambda *args: None)
        assert not convnext.is_supported(stage, x)
        handle.remove()
        assert convnext.is_supported(stage, x)
        stage.blocks[1].mlp.fc2.__class__ = Lora
        assert not convnext.is_supported(stage, x)


def test_gradients_and_autocast_use_timms_forward():
    stage, x = stage_and_input()
    assert not convnext.is_supported(stage, x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert not convnext.is_supported(stage, x)
        assert convnext.stage(stage, x).equal(stage(x))
    with torch.no_grad():
        assert not convnext.is_supported(stage, x.contiguous())
        assert not convnext.is_supported(stage.train(), x)
