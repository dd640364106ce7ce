"""The backbone ViT against DINOv2 in the published code of Rein: same weights and images."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from reference_files import REFERENCE, arrays, facts, weights_rule
from timm.models.vision_transformer import VisionTransformer

from clouds.modeling.backbone.timm_models import convert, load_converted
from clouds.modeling.backbone.vit import ViTBackbone
from clouds.modeling.backbone.vit_resize import resize_kernel, resize_positions

NAME = "peft/rein_dinov2"
STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}

pytestmark = pytest.mark.skipif(
    not (REFERENCE / f"{NAME}.npz").is_file(), reason=f"no {NAME}.npz in {REFERENCE}"
)


@pytest.fixture(scope="module")
def published():
    return facts(NAME)


@pytest.fixture(scope="module")
def reference():
    return arrays(NAME)


@pytest.fixture(scope="module")
def weights(published):
    """Of the published network without adapters, under its own names."""
    value_for = weights_rule().value_for
    return {
        key["name"]: torch.from_numpy(
            value_for(key["name"], key["shape"]) * np.float32(key["gain"])
        )
        for key in published["keys"]
        if not key["name"].startswith("reins.")
    }


def backbone(published, weights, positions):
    facts = published["backbone"]
    transformer = VisionTransformer(
        img_size=facts["img_size"],
        patch_size=facts["patch_size"],
        embed_dim=facts["embed_dim"],
        depth=facts["depth"],
        num_heads=facts["num_heads"],
        init_values=facts["init_values"],
        num_classes=0,
    )
    load_converted(transformer, convert(weights, transformer, "bicubic"), "the reference")
    return ViTBackbone(
        transformer=transformer,
        pixel_mean=(0.0,) * 3,
        pixel_std=(1.0,) * 3,
        out_blocks=facts["out_indices"],
        positions=positions,
    )


def distance(ours, theirs):
    """max |a - b| / max(1, max |b|), the measure of the reference."""
    theirs = torch.from_numpy(np.asarray(theirs))
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))


def test_tokens_maps_and_pyramid(published, reference, weights):
    model = backbone(published, weights, "dinov2")
    x = torch.from_numpy(reference["in/image"])
    assert distance(model.embed(x)[0], reference["plain/tokens0"]) < 1e-5
    positions = model.positions_for((4, 6))
    assert distance(positions, reference["plain/pos_embed_for_image"]) < 1e-6
    for i, found in zip(published["backbone"]["out_indices"], model.maps(x), strict=True):
        assert distance(found, reference[f"plain/map_block{i}"]) < 1e-5
    for name, feature in model(x).items():
        kept = feature[:, ::4] if name == "res2" else feature
        assert distance(kept, reference[f"plain/stride{STRIDES[name]}"]) < 1e-5


def test_square_images_need_no_other_positions(published, reference, weights):
    x = torch.from_numpy(reference["in/image_square"])
    for positions in ("dinov2", "bicubic", "timm"):
        model = backbone(published, weights, positions)
        for i, found in zip(published["backbone"]["out_indices"], model.maps(x), strict=True):
            assert distance(found, reference[f"plain_square/map_block{i}"]) < 1e-5


def test_positions_resized_to_the_size(published, reference, weights):
    """The difference that the offset makes is as large as it was measured."""
    found = backbone(published, weights, "bicubic").positions_for((4, 6))
    assert distance(found[:, 1:], reference["plain/pos_embed_bicubic_to_size"]) < 1e-6
    theirs = torch.from_numpy(reference["plain/pos_embed_for_image"])
    measured = published["pos_embed_resize"]["plain bicubic to size (difference)"]
    assert float((found - theirs).abs().max()) == pytest.approx(measured, rel=1e-4)


def test_conversion_of_patches_of_14_pixels(reference):
    def given(name, shape):
        seed = zlib.crc32(name.encode())
        values = np.random.RandomState(seed).standard_normal(shape)
        return torch.from_numpy(values.astype(np.float32))

    kernel = resize_kernel(given("convert/patch_embed_14", (1024, 3, 14, 14)), 16)
    assert distance(kernel[::32], reference["convert/patch_embed_16"]) < 1e-5
    positions = given("convert/pos_embed_37", (1, 1370, 1024))
    for size, tokens in ((512, 1), (1024, 4)):
        resized = resize_positions(positions, (37, 37), (size // 16, size // 16))
        kept = resized[:, ::tokens, ::128]
        assert distance(kept, reference[f"convert/pos_embed_{size}"]) < 1e-5
