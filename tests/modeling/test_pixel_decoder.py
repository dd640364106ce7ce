"""The pixel decoder against transformers' Mask2Former with the same weights."""

from __future__ import annotations

import pytest
import torch
from transformers_weights import (
    mask2former,
    mask2former_config,
    pixel_decoder_weights,
    randomize,
)

from clouds.d2 import ShapeSpec
from clouds.modeling.pixel_decoder.msdeformattn import MSDeformAttnPixelDecoder

NAMES = ("res2", "res3", "res4", "res5")
STRIDES = (4, 8, 16, 32)
CHANNELS = (8, 12, 20, 24)


def build(transformer_in_features=NAMES[1:], order=NAMES):
    specs = {
        name: ShapeSpec(channels=channels, stride=stride)
        for name, channels, stride in zip(NAMES, CHANNELS, STRIDES, strict=True)
    }
    decoder = MSDeformAttnPixelDecoder(
        {name: specs[name] for name in order},
        transformer_in_features=transformer_in_features,
        conv_dim=64,
        mask_dim=48,
        num_layers=2,
        num_heads=4,
        num_points=4,
        dim_feedforward=96,
        dropout=0.0,
    )
    return randomize(decoder)


def features(n, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(n, channels, height // s, width // s, generator=generator)
        for name, channels, s in zip(NAMES, CHANNELS, STRIDES, strict=True)
    }


def transformers_decoder(ours):
    config = mask2former_config(
        feature_size=64,
        mask_feature_size=48,
        encoder_layers=2,
        num_attention_heads=4,
        encoder_feedforward_dim=96,
    )
    theirs = mask2former().Mask2FormerPixelDecoder(config, feature_channels=list(CHANNELS))
    theirs.load_state_dict(pixel_decoder_weights(ours.state_dict()))
    return theirs.eval()


@pytest.mark.parametrize(("n", "height", "width"), [(2, 64, 96), (1, 160, 64)])
def test_against_transformers(n, height, width):
    ours = build().eval()
    theirs = transformers_decoder(ours)
    inputs = features(n, height, width)
    leaves = {name: f.clone().requires_grad_() for name, f in inputs.items()}
    mask_features, maps = ours(leaves)
    other_leaves = [f.clone().requires_grad_() for f in inputs.values()]
    expected = theirs(other_leaves, return_dict=True)

    assert mask_features.shape == (n, 48, height // 4, width // 4)
    assert [tuple(m.shape) for m in maps] == [(n, 64, height // s, width // s) for s in (32, 16, 8)]
    torch.testing.assert_close(mask_features, expected.mask_features, rtol=1e-4, atol=1e-4)
    for got, want in zip(maps, expected.multi_scale_features, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    mask_features.square().mean().backward()
    expected.mask_features.square().mean().backward()
    for leaf, other in zip(leaves.values(), other_leaves, strict=True):
        assert other.grad.abs().max() > 1e-6
        scale = other.grad.abs().max()
        torch.testing.assert_close(leaf.grad / scale, other.grad / scale, rtol=1e-4, atol=1e-4)


def test_the_order_in_which_features_are_named_does_not_matter():
    inputs = features(1, 64, 64)
    expected, _ = build()(inputs)
    shuffled = build(transformer_in_features=("res5", "res3", "res4"), order=NAMES[::-1])
    got, maps = shuffled(dict(reversed(inputs.items())))
    assert torch.equal(got, expected)
    assert [m.shape[-1] for m in maps] == [2, 4, 8]


@pytest.mark.parametrize(
    ("transformer_in", "num_fpn_levels"),
    [(NAMES, 0), (NAMES[1:], 1), (NAMES[2:], 2), (NAMES[3:], 3)],
)
def test_masks_have_stride_4_for_any_features_of_the_transformer(transformer_in, num_fpn_levels):
    decoder = build(transformer_in_features=transformer_in)
    adapters = {name for name, _ in decoder.named_children() if name.startswith("adapter")}
    assert adapters == {f"adapter_{i + 1}" for i in range(num_fpn_levels)}
    mask_features, maps = decoder(features(1, 64, 96))
    assert mask_features.shape == (1, 48, 16, 24)
    assert len(maps) == len(transformer_in)


def test_every_parameter_and_feature_gets_a_gradient():
    decoder = build()
    inputs = {name: f.requires_grad_() for name, f in features(1, 64, 64).items()}
    mask_features, maps = decoder(inputs)
    (mask_features.square().mean() + sum(m.square().mean() for m in maps)).backward()
    for name, tensor in [*decoder.named_parameters(), *inputs.items()]:
        assert tensor.grad is not None and tensor.grad.abs().max() > 0, name


def test_the_memory_layout_of_features_does_not_matter():
    decoder = build()
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        inputs = {
            name: f.contiguous(memory_format=layout).requires_grad_()
            for name, f in features(2, 64, 96).items()
        }
        mask_features, maps = decoder(inputs)
        loss = mask_features.square().mean() + sum(m.square().mean() for m in maps)
        results.append([mask_features, *maps, *torch.autograd.grad(loss, list(inputs.values()))])
    for first, last in zip(*results, strict=True):
        torch.testing.assert_close(first, last, rtol=1e-4, atol=1e-5)
