"""Models of timm from a config: names, weights of any source and size, pixel statistics."""

from __future__ import annotations

import logging

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from test_clouds_model import sample, train_step
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from tiny_model import tiny_config, tiny_model
from tiny_vit import images, tiny_transformer
from torch.nn import functional as F

from clouds.d2 import BACKBONE_REGISTRY
from clouds.modeling.backbone.base import pixel_statistics
from clouds.modeling.backbone.convnext import ConvNeXtBackbone
from clouds.modeling.backbone.pretrained import skip_pretrained_weights
from clouds.modeling.backbone.timm_models import (
    convert,
    full_name,
    load_converted,
    load_pretrained,
)

TINY = "test_vit"  # timm's own, of width 64, 6 blocks, patches of 16 and images of 160 pixels


def build(**settings):
    options = {f"MODEL__BACKBONE__{name}": value for name, value in settings.items()}
    defaults = {
        "MODEL__BACKBONE__TIMM_NAME": TINY,
        "MODEL__BACKBONE__WEIGHTS": "",
        "MODEL__BACKBONE__IMG_SIZE": 64,
    }
    cfg = tiny_config(**(defaults | options))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BACKBONE_REGISTRY.get("ViT")(cfg, None)


def on_meta(name, **settings):
    with torch.device("meta"), skip_pretrained_weights():
        return build(TIMM_NAME=name, WEIGHTS="pretrained", IMG_SIZE=512, **settings)


# ------------------------------------------------------------------ models


def own_size(name):
    """timm's model at its own patch and image size, without pooling, on the meta device."""
    head = {} if name.startswith("samvit") else {"global_pool": ""}
    with torch.device("meta"):
        return timm.create_model(name, num_classes=0, **head)


SMALL = [
    ("vit_small_patch14_dinov2.lvd142m", 1, 123.675),
    ("vit_small_patch14_reg4_dinov2.lvd142m", 5, 123.675),
    ("vit_small_patch16_dinov3.lvd1689m", 5, 123.675),
    ("eva02_small_patch14_224.mim_in22k", 1, 122.771),
    ("vit_pe_spatial_small_patch16_512.fb", 1, 127.5),
]
LARGE = [
    ("vit_large_patch14_dinov2.lvd142m", 1, 123.675),
    ("vit_large_patch14_reg4_dinov2.lvd142m", 5, 123.675),
    ("vit_large_patch16_dinov3.lvd1689m", 5, 123.675),
    ("eva02_large_patch14_224.mim_m38m", 1, 122.771),
    ("eva02_large_patch14_clip_336.merged2b", 1, 122.771),
    ("vit_large_patch14_clip_336.openai", 1, 122.771),
    ("vit_large_patch16_siglip_512.v2_webli", 0, 127.5),
    ("vit_pe_spatial_large_patch14_448.fb", 1, 127.5),
    ("samvit_large_patch16.sa1b", 0, 123.675),
]
SLOW = [pytest.param(*values, marks=pytest.mark.slow) for values in LARGE]


@pytest.mark.parametrize(("name", "prefix", "mean"), [*SMALL, *SLOW])
def test_every_family_at_its_width(name, prefix, mean):
    backbone, own = on_meta(name), own_size(name)
    count, own_count = (sum(p.numel() for p in m.parameters()) for m in (backbone, own))
    width, (rows, columns) = own.embed_dim, own.patch_embed.grid_size
    kernel = 3 * (16**2 - own.patch_embed.patch_size[0] ** 2)
    table = 0 if own.pos_embed is None or own.pos_embed.dim() == 4 else 32**2 - rows * columns
    assert count == own_count + (kernel + table) * width
    assert backbone.num_prefix_tokens == prefix
    assert backbone.pixel_mean[0] == pytest.approx(mean, abs=1e-3)
    blocks = backbone.transformer.blocks
    assert all(hasattr(block.attn, "proj") and hasattr(block.mlp, "fc2") for block in blocks)
    features = backbone(torch.empty(1, 3, 64, 96, device="meta"))
    assert [tuple(f.shape) for f in features.values()] == [
        (1, width, 64 // s, 96 // s) for s in (4, 8, 16, 32)
    ]


@pytest.mark.slow
def test_parameters_of_large_models():
    """In millions, as published: at the models' own sizes."""
    for name, millions in (
        ("vit_large_patch14_dinov2.lvd142m", 304.4),
        ("vit_large_patch16_dinov3.lvd1689m", 303.1),
    ):
        count = sum(p.numel() for p in own_size(name).parameters()) / 1e6
        assert count == pytest.approx(millions, abs=0.05)


@pytest.mark.slow
def test_dinov2_large_is_the_published_network():
    """Counted by hand: 24 blocks, tables of 32x32 + 1 positions, kernels of 16x16, final norm."""
    d = 1024
    block = 2 * 2 * d + (3 * d * d + 3 * d) + (d * d + d) + 2 * d + (8 * d * d + 5 * d)
    expected = 24 * block + (1 + 1025) * d + (3 * 256 * d + d) + 2 * d
    backbone = on_meta("vit_large_patch14_dinov2.lvd142m", FREEZE=False)
    assert sum(p.numel() for p in backbone.parameters()) == expected
    trained = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    assert trained == expected - 2 * d  # the features do not need the final norm
    assert backbone.out_blocks == (7, 11, 15, 23)


def test_a_convnext_has_its_own_stages():
    frozen, trained = (build(TIMM_NAME="test_convnext", FREEZE=f) for f in (True, False))
    assert isinstance(frozen, ConvNeXtBackbone)
    x = images()
    with torch.no_grad():
        expected = frozen.convnext.forward_intermediates(x, intermediates_only=True)
    features = frozen.train()(x)
    assert tuple(features) == tuple(frozen.output_shape())
    for (name, feature), theirs, stride in zip(
        features.items(), expected, (4, 8, 16, 32), strict=True
    ):
        torch.testing.assert_close(feature, theirs, rtol=1e-5, atol=1e-5)
        spec = frozen.output_shape()[name]
        assert (spec.stride, spec.channels) == (stride, feature.shape[1])
    assert not any(p.requires_grad for p in frozen.parameters()) and not frozen.training
    sum(f.square().mean() for f in trained.train()(x).values()).backward()
    with_gradient = {n for n, p in trained.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, p in trained.named_parameters() if p.requires_grad}
    assert trained.convnext.training
    assert on_meta("convnext_large.dinov3_lvd1689m").output_shape()["res5"].channels == 1536


@pytest.mark.parametrize(
    ("name", "weights", "words"),
    [
        ("vit_large_patch14_dino", "", "'vit_large_patch14_dino'.*vit_large_patch14_dinov2"),
        ("zzzz", "", r"'zzzz', which timm \S+ does not know. Examples are vit_large"),
        ("resnet50", "", "'resnet50', which is no plain vision transformer and no ConvNeXt"),
        ("vit_large_patch14_dinov2.lvd", "", r"TIMM_NAME .*'lvd' is neither.*\(lvd142m\)"),
        (TINY, "none.pth", r"WEIGHTS is 'none.pth'.*neither a file nor.*\(r160_in1k\)"),
    ],
)
def test_unknown_names_are_told_with_the_known_ones(name, weights, words):
    with pytest.raises(ValueError, match=words):
        build(TIMM_NAME=name, WEIGHTS=weights)


def test_the_tag_is_in_the_name_or_in_the_weights():
    assert full_name("vit_large_patch16_dinov3", "sat493m") == "vit_large_patch16_dinov3.sat493m"
    name = "vit_large_patch16_dinov3.lvd1689m"
    assert full_name(name, "sat493m").endswith(".sat493m")
    assert full_name(name, "pretrained") == full_name(name, "") == name
    # satellite images have another mean
    assert on_meta("vit_large_patch16_dinov3.sat493m").pixel_mean[0] == pytest.approx(255 * 0.43)


def test_weights_of_another_activation_are_told(caplog):
    full_name("vit_large_patch14_clip_336.openai", "")
    assert "vit_large_patch14_clip_quickgelu_336.openai has it" in caplog.text
    caplog.clear()
    full_name("vit_large_patch14_clip_quickgelu_336.openai", "")
    assert caplog.text == ""


# ------------------------------------------------------------------ weights


@pytest.fixture
def saved():
    """A transformer of patches of 14 pixels and 5x5 positions."""
    return tiny_transformer(img_size=70, seed=3, patch_size=14)


def test_kernel_and_positions_of_a_file_are_resized_bicubically(saved):
    model = tiny_transformer()
    converted = convert(saved.state_dict(), model, "bicubic")
    kernel = F.interpolate(
        saved.patch_embed.proj.weight, (16, 16), mode="bicubic", align_corners=False
    )
    assert torch.equal(converted["patch_embed.proj.weight"], kernel)
    grid = saved.pos_embed[:, 1:].reshape(1, 5, 5, 48).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (4, 4), mode="bicubic", align_corners=False)
    expected = torch.cat((saved.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)), 1)
    assert torch.equal(converted["pos_embed"], expected)
    others = converted.keys() - {"patch_embed.proj.weight", "pos_embed"}
    assert all(torch.equal(converted[n], saved.state_dict()[n]) for n in others)
    timm_way = convert(saved.state_dict(), model, "timm")
    kernel = resample_patch_embed(saved.patch_embed.proj.weight, [16, 16])
    torch.testing.assert_close(timm_way["patch_embed.proj.weight"], kernel)
    positions = resample_abs_pos_embed(saved.pos_embed, [4, 4], [5, 5], 1)
    torch.testing.assert_close(timm_way["pos_embed"], positions)


def test_official_dinov2_files_with_registers():
    """Positions of the class token are added to it, as timm keeps them for patches alone."""
    model = tiny_transformer("dinov2_reg4", img_size=64)
    official = tiny_transformer("dinov2_reg4", img_size=80, seed=4).state_dict()
    positions = torch.randn(1, 26, 48)
    official["pos_embed"] = positions
    official["register_tokens"] = official.pop("reg_token")
    official["mask_token"] = torch.zeros(1, 48)
    converted = convert(official, model, "bicubic")
    assert converted.keys() == model.state_dict().keys()
    torch.testing.assert_close(
        converted["cls_token"], official["cls_token"] + positions[:, :1], rtol=0, atol=0
    )
    assert converted["pos_embed"].shape == (1, 16, 48)


def test_eva02_files_of_its_authors():
    """Names of EVA's own code, which Rein's has as well."""
    model = tiny_transformer("eva02")
    state = model.state_dict()
    pairs = (
        *(("mlp.fc1_g", "mlp.w1"), ("mlp.fc1_x", "mlp.w2"), ("mlp.fc2", "mlp.w3")),
        *(("mlp.norm", "mlp.ffn_ln"), ("attn.norm", "attn.inner_attn_ln")),
        *(("q_proj.bias", "q_bias"), ("v_proj.bias", "v_bias")),
    )

    def official(name):
        for ours, theirs in pairs:
            name = name.replace(ours, theirs)
        return name

    file = {official(name): value for name, value in state.items()}
    assert file.keys() != state.keys()
    file |= {"mask_token": torch.zeros(1, 1, 48), "blocks.0.attn.rope.freqs_cos": torch.zeros(4)}
    converted = convert(file, model, "bicubic")
    load_converted(model, converted, "the file")
    names = {n for n in state if not n.startswith("norm.")}
    assert names <= converted.keys()
    assert all(torch.equal(converted[n], state[n]) for n in names)


def test_sams_file_has_a_prefix():
    model = tiny_transformer("sam")
    state = {n: v for n, v in model.state_dict().items() if not n.startswith("head.")}
    official = {f"image_encoder.{n.replace('mlp.fc', 'mlp.lin')}": v for n, v in state.items()}
    official["mask_decoder.x"] = torch.zeros(1)
    assert convert(official, model, "bicubic").keys() == state.keys()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_is_loaded(suffix, tmp_path, saved):
    path = tmp_path / f"weights{suffix}"
    state = {**saved.state_dict(), "head.weight": torch.zeros(1000, 48)}
    save = torch.save if suffix == ".pth" else safetensors.torch.save_file
    save(state, path)
    model = tiny_transformer(img_size=70, patch_size=14)
    load_pretrained(model, TINY, str(path), "bicubic")
    for name, value in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda state: state.pop("blocks.3.attn.qkv.weight"),
            r"1 of \d+ tensors are missing \(blocks.3.attn.qkv.weight\)",
        ),
        (
            lambda state: state.update({"blocks.0.norm1.bias": torch.zeros(64)}),
            r"1 have other shapes \(blocks.0.norm1.bias \(64,\) instead of \(48,\)\)",
        ),
        (
            lambda state: state.update({"cls_token": torch.full((1, 1, 48), torch.nan)}),
            "not finite: cls_token",
        ),
        (lambda state: state.clear(), "tensors are missing"),
        (lambda state: state.update({"pos_embed": torch.zeros(1, 48, 48)}), "48 tokens"),
    ],
)
def test_a_file_of_other_weights_is_refused(change, words, tmp_path):
    model = tiny_transformer()
    state = dict(model.state_dict())
    change(state)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=words) as caught:
        load_pretrained(model, "vit_x", str(tmp_path / "other.pth"), "bicubic")
    text = str(caught.value)
    assert "other.pth' (MODEL.BACKBONE.WEIGHTS) does not hold weights of vit_x: " in text
    assert len(text) < 700


def test_weights_of_another_size_are_refused(tmp_path):
    torch.save(build().transformer.state_dict(), tmp_path / "small.pth")
    path = str(tmp_path / "small.pth")
    with pytest.raises(
        ValueError, match=r"of test_vit3: .*\(64,\) instead of \(96,\).*of this model and"
    ):
        build(TIMM_NAME="test_vit3", WEIGHTS=path)
    assert build(WEIGHTS=path).out_blocks == (1, 2, 4, 5)


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "damaged.pth").write_bytes(b"PK\3\4damaged")
    with pytest.raises(ValueError, match=r"damaged.pth' \(MODEL.BACKBONE.WEIGHTS\).*damaged"):
        build(WEIGHTS=str(tmp_path / "damaged.pth"))


def test_random_weights_are_told(caplog):
    build()
    assert "test_vit starts from random weights" in caplog.text


@pytest.fixture
def hub(monkeypatch):
    """Downloads from the hub: files by name; what is not there is missing on the hub."""

    class Hub(dict):
        error = None

    there = Hub()

    def download(repository, file):
        there.asked.append((repository, file))
        if there.error is not None:
            raise there.error
        if file not in there:
            raise EntryNotFoundError("404")
        return there[file]

    there.asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return there


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_of_a_tag_come_from_the_hub(file, hub, tmp_path):
    expected = {n: v + 1 for n, v in build(IMG_SIZE=160).transformer.state_dict().items()}
    save = torch.save if file.endswith("bin") else safetensors.torch.save_file
    save(expected, tmp_path / file)
    hub[file] = str(tmp_path / file)
    for weights in ("pretrained", "r160_in1k"):
        state = build(WEIGHTS=weights, IMG_SIZE=160).transformer.state_dict()
        assert all(torch.equal(state[n], v) for n, v in expected.items())
    assert hub.asked[-1] == ("timm/test_vit.r160_in1k", file)


def test_a_machine_without_internet(hub):
    hub.error = LocalEntryNotFoundError("cannot find the requested files")
    with pytest.raises(FileNotFoundError) as caught:
        build(WEIGHTS="pretrained")
    text = str(caught.value)
    for words in (
        "weights of test_vit.r160_in1k are not on this machine",
        "cannot find the requested files",
        "timm.create_model('test_vit.r160_in1k', pretrained=True)".replace("'", "'\"'\"'"),
        "MODEL.BACKBONE.WEIGHTS to a weights file",
        "MODEL.WEIGHTS to a checkpoint",
        "https://huggingface.co/timm/test_vit.r160_in1k",
    ):
        assert words in text
    assert len(hub.asked) == 1
    with skip_pretrained_weights():
        build(WEIGHTS="pretrained")
    assert len(hub.asked) == 1


# ------------------------------------------------------------------ pixel statistics


class Own:
    pixel_mean, pixel_std = (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)


def statistics(backbone, mean=(), std=()):
    return pixel_statistics(tiny_config(MODEL__PIXEL_MEAN=mean, MODEL__PIXEL_STD=std), backbone)


def test_pixel_statistics_are_those_of_the_backbone_unless_set(caplog):
    with caplog.at_level(logging.WARNING):
        assert statistics(Own()) == (Own.pixel_mean, Own.pixel_std)
        assert statistics(Own(), [1.0, 2.0, 3.05]) == ((1.0, 2.0, 3.05), Own.pixel_std)
        assert caplog.text == ""
        assert statistics(Own(), std=[4.0, 5.0, 7.0]) == (Own.pixel_mean, (4.0, 5.0, 7.0))
    assert "MODEL.PIXEL_STD is (4.0, 5.0, 7.0)" in caplog.text and "(4.0, 5.0, 6.0)" in caplog.text
    assert "PIXEL_MEAN is" not in caplog.text


def test_a_backbone_that_does_not_tell_its_pixel_statistics_needs_them_in_the_config():
    assert statistics(object(), [1.0] * 3, [2.0] * 3) == ((1.0,) * 3, (2.0,) * 3)
    for mean, std in (([1.0] * 3, []), ([], [1.0] * 3), ([], [])):
        with pytest.raises(ValueError, match="is empty, and the backbone CLIP does not tell"):
            statistics(object(), mean, std)


# ------------------------------------------------------------------ the whole model


@pytest.mark.parametrize("frozen", [True, False])
def test_the_whole_model_trains_and_predicts(frozen):
    model = tiny_model(
        MODEL__BACKBONE__NAME="ViT",
        MODEL__BACKBONE__TIMM_NAME=TINY,
        MODEL__BACKBONE__WEIGHTS="",
        MODEL__BACKBONE__IMG_SIZE=64,
        MODEL__BACKBONE__FREEZE=frozen,
    ).train()
    losses, gradients = train_step(model, [sample(0, 64, 96), sample(1, 70, 50)])
    assert all(loss.isfinite() for loss in losses.values())
    assert set(gradients) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(n.startswith("backbone.") for n in gradients) is not frozen
    assert model.pixel_mean.flatten().tolist() == pytest.approx([127.5] * 3)
    assert not hasattr(model, "void_embedding")
    with torch.no_grad():
        scores = model.eval()([sample(0, 33, 40)])[0]["sem_seg"]
    assert scores.shape == (19, 33, 40) and scores.isfinite().all()


def test_a_text_head_names_the_backbones_that_have_a_text_encoder():
    with pytest.raises(ValueError, match=r"NAME ViT has none.*the backbone CLIP or CLIPViT"):
        tiny_model(
            MODEL__BACKBONE__NAME="ViT",
            MODEL__BACKBONE__TIMM_NAME=TINY,
            MODEL__BACKBONE__WEIGHTS="",
            MODEL__MASK_FORMER__TRANSFORMER_DECODER_NAME="text",
        )
