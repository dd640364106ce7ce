"""The backbone of vision transformers, against timm's own forward pass."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_vit import ARCHITECTURES, images, tiny_vit
from torch import nn
from torch.nn import functional as F

from clouds.modeling.backbone.adapters.base import Adapter
from clouds.modeling.backbone.vit import pad_to_patches, proportional_blocks
from clouds.modeling.backbone.vit_pyramid import build_pyramid
from clouds.self_training.ema import EMATeacher

NAMES = ("res2", "res3", "res4", "res5")
BLOCKS = [0, 1, 2, 3]


def of_timm(backbone, x, blocks=BLOCKS):
    transformer = backbone.transformer
    return transformer.forward_intermediates(x, indices=list(blocks), intermediates_only=True)


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (48, 80)])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_maps_are_those_of_timm(family, size):
    backbone = tiny_vit(family, positions="timm")
    x = images(2, *size)
    with torch.no_grad():
        expected = of_timm(backbone, x)
    maps = backbone.maps(x)
    assert backbone.out_blocks == (0, 1, 2, 3)
    for ours, theirs in zip(maps, expected, strict=True):
        assert ours.shape == (2, 48, size[0] // 16, size[1] // 16)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (maps[0] - maps[3]).abs().max() > 0.1


@pytest.mark.parametrize("family", ["dinov2", "sam"])
def test_features_are_maps_resized_bilinearly(family):
    backbone = tiny_vit(family)
    x = images()
    features = backbone(x)
    assert tuple(features) == NAMES == tuple(backbone.output_shape())
    for (name, feature), raw, factor in zip(
        features.items(), backbone.maps(x), (4, 2, 1, 0.5), strict=True
    ):
        spec = backbone.output_shape()[name]
        assert feature.shape == (2, spec.channels, 64 // spec.stride, 96 // spec.stride)
        size = [int(n * factor) for n in raw.shape[-2:]]
        expected = F.interpolate(raw, size, mode="bilinear", align_corners=False)
        torch.testing.assert_close(feature, expected)
    assert [s.stride for s in backbone.output_shape().values()] == [4, 8, 16, 32]
    # the coarsest one is the mean of 2x2
    torch.testing.assert_close(features["res5"], F.avg_pool2d(backbone.maps(x)[3], 2))


def test_patches_of_8_pixels_have_the_same_strides():
    backbone = tiny_vit(changes={"patch_size": 8})
    features = backbone(images())
    assert [tuple(f.shape[-2:]) for f in features.values()] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    torch.testing.assert_close(features["res3"], backbone.maps(images())[1])


@pytest.mark.parametrize(("size", "padded"), [((50, 90), (64, 96)), ((16, 33), (32, 48))])
def test_other_sizes_are_padded_with_zeros(size, padded):
    x = images(1, *size)
    expected = torch.zeros(1, 3, *padded)
    expected[..., : size[0], : size[1]] = x
    assert torch.equal(pad_to_patches(x, 16), expected)
    backbone = tiny_vit()
    for name, feature in backbone(x).items():
        assert torch.equal(feature, backbone(expected)[name])


def test_blocks_of_the_maps():
    assert proportional_blocks(24) == (7, 11, 15, 23)
    assert proportional_blocks(12) == (2, 5, 8, 11)
    assert proportional_blocks(32) == (7, 15, 23, 31)
    assert proportional_blocks(40) == (9, 19, 29, 39)
    assert proportional_blocks(6) == (1, 2, 4, 5)
    backbone = tiny_vit(out_blocks=(0, 0, 1, 2), positions="timm")
    with torch.no_grad():
        expected = of_timm(backbone, images(), (0, 1, 2))
    maps = backbone.maps(images())
    for ours, i in zip(maps, (0, 0, 1, 2), strict=True):
        torch.testing.assert_close(ours, expected[i], rtol=1e-5, atol=1e-5)
    for wrong in ((0, 1, 2), (0, 1, 2, 4), (3, 2, 1, 0)):
        with pytest.raises(ValueError, match=r"OUT_BLOCKS .*4 blocks.*\(0, 1, 2, 3\)"):
            tiny_vit(out_blocks=wrong)


# ------------------------------------------------------------------ what trains


def test_a_frozen_one_stays_in_evaluation_mode_and_records_nothing():
    backbone = tiny_vit(changes={"drop_path_rate": 0.5})
    nn.Sequential(backbone, nn.Linear(2, 2)).train()
    assert not any(module.training for module in backbone.transformer.modules())
    assert not any(p.requires_grad for p in backbone.parameters())
    x = images().requires_grad_()
    first, second = backbone(x), backbone(x)
    for name, feature in first.items():
        assert not feature.requires_grad and not feature.is_inference()
        assert torch.equal(feature, second[name])  # no drop path


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_trained_one_trains_what_the_features_need(family):
    backbone = tiny_vit(family, frozen=False, out_blocks=(0, 1, 1, 2)).train()
    assert backbone.transformer.blocks[0].training
    sum(f.square().mean() for f in backbone(images()).values()).backward()
    trained = {n for n, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in backbone.named_parameters() if p.grad is not None}
    unused = {n for n in dict(backbone.named_parameters()) if n not in trained}
    starts = ("blocks.3.", "norm.", "neck.", "fc_norm.")
    assert all(n.removeprefix("transformer.").startswith(starts) for n in unused)
    assert any(n.startswith("transformer.blocks.3.") for n in unused)


def test_drop_path_acts_while_it_trains():
    backbone = tiny_vit(frozen=False, changes={"drop_path_rate": 0.5}).train()
    torch.manual_seed(0)
    first, second = (backbone(images())["res5"] for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("pyramid", ["learned", "neck"])
def test_a_learned_pyramid_trains_on_a_frozen_transformer(pyramid):
    backbone = tiny_vit(pyramid=pyramid).train()
    assert backbone.pyramid.training and not backbone.transformer.training
    features = backbone(images())
    assert [tuple(f.shape) for f in features.values()] == [
        (2, 48, 16, 24), (2, 48, 8, 12), (2, 48, 4, 6), (2, 48, 2, 3)
    ]  # fmt: skip
    sum(f.square().mean() for f in features.values()).backward()
    with_gradient = {n for n, p in backbone.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, p in backbone.named_parameters() if p.requires_grad}
    assert with_gradient and all(n.startswith("pyramid.") for n in with_gradient)


class Doubling(Adapter):
    """An adapter that doubles the patch tokens after block 1, and notes what it is called with."""

    acts_on_tokens = True

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))
        self.calls = []

    def after_block(self, index, patches):
        self.calls.append((index, tuple(patches.shape)))
        return patches * self.factor if index == 1 else patches


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_an_adapter_acts_on_patch_tokens_after_each_block(family):
    plain, backbone = tiny_vit(family), tiny_vit(family)
    backbone.adapter = Doubling()
    before, after = plain.maps(images()), backbone.maps(images())
    assert backbone.adapter.calls == [(i, (2, 24, 48)) for i in range(4)]
    assert torch.equal(before[0], after[0])
    torch.testing.assert_close(after[1], 2 * before[1])
    assert (after[3] - before[3]).abs().max() > 1e-2
    after[3].sum().backward()
    assert backbone.adapter.factor.grad.abs() > 0
    assert all(p.grad is None for p in backbone.transformer.parameters())
    prefix = {"dinov2_reg4": 5, "dinov3": 5, "siglip2": 0, "sam": 0}.get(family, 1)
    assert backbone.num_prefix_tokens == prefix


def test_the_teacher_shares_a_frozen_transformer():
    backbone = tiny_vit(pyramid="learned")
    teacher = EMATeacher({"backbone": backbone}, 0.9, 1)
    teacher.reset()
    copied = teacher.parts["backbone"]
    assert copied is not backbone
    assert copied.transformer.cls_token is backbone.transformer.cls_token
    assert copied.pyramid.fpn2[0].weight is not backbone.pyramid.fpn2[0].weight
    for name, feature in copied(images()).items():
        expected = copy.deepcopy(backbone).eval()(images())[name]
        torch.testing.assert_close(feature, expected)


# ------------------------------------------------------------------ pyramids by hand


def test_the_learned_pyramid_by_hand():
    pyramid = build_pyramid("learned", 2, 16).eval()
    one = torch.ones(1, 2, 1, 1)
    with torch.no_grad():
        for parameter in pyramid.parameters():
            parameter.fill_(0.5)
        fine, middle, same, coarse = pyramid([one, one, one, torch.arange(8.0).view(1, 2, 2, 2)])
    # two channels times 0.5, plus 0.5; the norm halves and adds 0.5
    once = 2 * 0.5 + 0.5
    hidden = F.gelu(torch.tensor(once / (1 + 1e-5) ** 0.5 * 0.5 + 0.5))
    torch.testing.assert_close(middle, torch.full((1, 2, 2, 2), once))
    torch.testing.assert_close(fine, (2 * 0.5 * hidden + 0.5).expand(1, 2, 4, 4))
    assert torch.equal(same, one)
    assert coarse.flatten().tolist() == [3.0, 7.0]


def test_the_neck_by_hand():
    pyramid = build_pyramid("neck", 1, 16)
    with torch.no_grad():
        for parameter in pyramid.parameters():
            parameter.fill_(1.0)
        results = pyramid([torch.full((1, 1, 4, 4), float(i)) for i in range(4)])
    assert [tuple(r.shape[-2:]) for r in results] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    # the map plus 1, nine times plus 1; four times plus 1 in corners
    for i, result in enumerate(results):
        assert result[0, 0, 0, 0].item() == 4 * (i + 1) + 1
        if i < 3:
            assert result[0, 0, 1, 1].item() == 9 * (i + 1) + 1


def test_the_learned_pyramid_needs_patches_of_16():
    with pytest.raises(ValueError, match=r"learned needs patches of 16 .*PATCH_SIZE is 8"):
        build_pyramid("learned", 2, 8)
