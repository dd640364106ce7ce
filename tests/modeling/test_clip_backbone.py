from __future__ import annotations

import copy
import pickle
import zipfile

import open_clip
import pytest
import torch
from tiny_model import CONVNEXT, RESNET, tiny_clip, tiny_config
from torch import nn
from torch.nn import functional as F

from clouds.d2 import BACKBONE_REGISTRY
from clouds.modeling.backbone import open_clip_models
from clouds.modeling.backbone.base import pool_masks
from clouds.modeling.backbone.clip import CLIP
from clouds.modeling.backbone.open_clip_models import create_clip
from clouds.modeling.backbone.torchscript import read_torchscript

NAMES = ("stem", "res2", "res3", "res4", "res5", "clip_vis_dense")
EMPTY, FULL = -1.0, 1.0


@pytest.fixture(scope="module", params=[CONVNEXT, RESNET])
def clip(request):
    return tiny_clip(request.param)


@pytest.fixture
def shapes_only(monkeypatch):
    """Large models without numbers in them: parameters are on the meta device.

    Gives what open_clip was asked for; weights are not loaded.
    """
    create_model, asked = open_clip.create_model, {}

    def on_meta(name, **options):
        asked.update(options)
        with torch.device("meta"):
            return create_model(name, **options | {"device": "meta", "pretrained": None})

    def download(config):
        asked["weights"] = config
        return "clip.pt"

    def without_weights(open_clip, name, path, tags):
        return open_clip_models._create(open_clip, name, tags)

    monkeypatch.setattr(open_clip, "create_model", on_meta)
    monkeypatch.setattr(open_clip, "download_pretrained", download)
    monkeypatch.setattr(open_clip_models, "_from_file", without_weights)
    return asked


def images(n=2, height=64, width=96, seed=0):
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def test_strides_and_channels(clip):
    strides = (4 if clip.is_convnext else 2, 4, 8, 16, 32, 32)
    features = clip(images())
    assert tuple(features) == NAMES == tuple(clip.output_shape())
    for name, stride in zip(NAMES, strides, strict=True):
        spec = clip.output_shape()[name]
        assert spec.stride == stride
        assert features[name].shape == (2, spec.channels, 64 // stride, 96 // stride)
    assert clip.size_divisibility == 32
    assert clip.embed_dim == 32


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("convnext_base", (128, 128, 256, 512, 1024, 1024)),
        ("RN50", (64, 256, 512, 1024, 2048, 2048)),
    ],
)
def test_channels_of_the_published_models(name, widths, shapes_only):
    clip = tiny_clip(name)
    assert [spec.channels for spec in clip.output_shape().values()] == list(widths)


def test_features_are_those_of_open_clip(clip):
    """Our dense feature through CLIP's own head is CLIP's image embedding."""
    x = images(height=64, width=64)
    expected = clip.clip_model.encode_image(x)
    dense = clip(x)["clip_vis_dense"]
    visual = clip.clip_model.visual
    got = visual.head(visual.trunk.head(dense)) if clip.is_convnext else visual.attnpool(dense)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    if not clip.is_convnext:
        features = clip(x)
        assert torch.equal(features["clip_vis_dense"], features["res5"])


def test_a_frozen_backbone_stays_in_evaluation_mode_and_records_nothing(clip):
    holder = nn.Sequential(clip, nn.Linear(2, 2)).train()
    assert holder[1].training
    assert not any(module.training for module in clip.modules())
    assert not any(p.requires_grad for p in clip.parameters())
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    features = clip(images().requires_grad_())
    assert not any(f.requires_grad for f in features.values())
    for name, value in clip.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_frozen_backbone_computes_with_the_channels_last(clip):
    """The same numbers as with channels first, from which nothing keeps a gradient away."""
    first = copy.deepcopy(clip)
    first.clip_model.to(memory_format=torch.contiguous_format)
    features = clip(images())
    with torch.no_grad():
        expected = (first._convnext if clip.is_convnext else first._resnet)(images())
    for name, feature in features.items():
        assert feature.is_contiguous(memory_format=torch.channels_last), name
        torch.testing.assert_close(feature, expected[name], rtol=1e-5, atol=1e-5)
        assert not feature.is_inference()
        layer = nn.Conv2d(feature.shape[1], 2, 1)
        layer(feature).sum().backward()
        assert layer.weight.grad.abs().max() > 0


def test_weights_of_either_layout_load(clip):
    state = {n: v.contiguous() for n, v in clip.state_dict().items()}
    other = tiny_clip(clip.model_name, seed=1)
    other.load_state_dict(state)
    for name, value in clip(images()).items():
        torch.testing.assert_close(other(images())[name], value, rtol=1e-5, atol=1e-5)
    trained = tiny_clip(clip.model_name, frozen=False)
    assert all(p.is_contiguous() for p in trained.parameters())
    trained.load_state_dict(clip.state_dict())
    assert all(p.is_contiguous() for p in trained.parameters())


@pytest.mark.parametrize("name", [CONVNEXT, RESNET])
def test_a_trained_backbone_trains_its_feature_layers_and_nothing_else(name):
    clip = tiny_clip(name, frozen=False).train()
    features = clip(images())
    sum(f.square().mean() for f in features.values()).backward()
    with_gradient = {n for n, p in clip.named_parameters() if p.grad is not None}
    trained = {n for n, p in clip.named_parameters() if p.requires_grad}
    assert with_gradient == trained
    visual = "clip_model.visual."
    layers = ("trunk.stem.", "trunk.stages.")
    if name == RESNET:
        layers = ("conv1.", "conv2.", "conv3.", "bn1.", "bn2.", "bn3.")
        layers += ("layer1.", "layer2.", "layer3.", "layer4.")
    names = {n for n, _ in clip.named_parameters()}
    assert trained == {n for n in names if n.removeprefix(visual).startswith(layers)}
    assert {n.removeprefix(visual).split(".")[0] for n in trained} == {
        x.split(".")[0] for x in layers
    }
    assert not {n for n in trained if "head" in n or "attnpool" in n or "text" in n}


def test_batch_statistics_of_a_trained_backbone_stay():
    clip = tiny_clip(RESNET, frozen=False).train()
    norms = [m for m in clip.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(m.training for m in norms)
    assert clip.training and clip.clip_model.visual.layer1.training
    before = [m.running_mean.clone() for m in norms]
    clip(images() + 3)
    for norm, mean in zip(norms, before, strict=True):
        assert torch.equal(norm.running_mean, mean)


def test_config_builds_it():
    for frozen in (True, False):
        cfg = tiny_config(MODEL__BACKBONE__FREEZE=frozen)
        clip = BACKBONE_REGISTRY.get("CLIP")(cfg, None)
        assert isinstance(clip, CLIP) and clip.frozen is frozen
        assert any(p.requires_grad for p in clip.parameters()) is not frozen


def test_a_mask_of_everything_is_the_image_embedding_of_a_convnext():
    clip = tiny_clip(CONVNEXT)
    x = images(height=96, width=64)
    masks = torch.full((2, 3, 24, 16), FULL)
    embeddings = clip.embed_masks(clip(x), masks)[0]
    expected = clip.clip_model.encode_image(x)
    assert embeddings.shape == (2, 3, 32)
    for q in range(3):
        torch.testing.assert_close(embeddings[:, q], expected, rtol=1e-5, atol=1e-5)


def masks_over_blocks(n, h, w, stride=8, seed=1):
    """Masks made of whole cells of a (h, w) map, and which cells are inside."""
    inside = torch.rand(n, 4, h, w, generator=torch.Generator().manual_seed(seed)) < 0.5
    inside[:, 0, 0, 0] = True
    inside[:, 1:, -1, -1] = True
    blocks = inside.float().repeat_interleave(stride, -1).repeat_interleave(stride, -2)
    return torch.where(blocks > 0, FULL, EMPTY), inside


def test_a_mask_is_embedded_as_the_mean_of_its_pixels_by_a_convnext():
    clip = tiny_clip(CONVNEXT)
    features = clip(images(height=96, width=128))
    dense = features["clip_vis_dense"]
    masks, inside = masks_over_blocks(2, 3, 4)
    embeddings, has_pixels = clip.embed_masks(features, masks)
    assert torch.equal(has_pixels, inside.flatten(2).any(-1))
    visual = clip.clip_model.visual
    for i in range(2):
        for q in range(4):
            mean = dense[i][:, inside[i, q]].mean(1)
            expected = visual.head(visual.trunk.head(mean[None, :, None, None]))[0]
            torch.testing.assert_close(embeddings[i, q], expected, rtol=1e-5, atol=1e-5)


def attention_pool_of_cells(pool, dense, cells):
    """CLIP's pool by torch's own attention: the mean pixel asks, the cells (h, w) answer.

    dense (C, h, w) -> (embed_dim,)
    """
    channels, h, w = dense.shape
    grid = int((len(pool.positional_embedding) - 1) ** 0.5)
    spatial = pool.positional_embedding[1:].view(grid, grid, channels).permute(2, 0, 1)
    spatial = F.interpolate(spatial[None], (h, w), mode="bilinear", align_corners=False)[0]
    keys = (dense + spatial)[:, cells].T[:, None]  # (cells, 1, C): others are not even there
    query = dense.flatten(1).mean(1) + pool.positional_embedding[0]
    out, _ = F.multi_head_attention_forward(
        query[None, None],
        keys,
        keys,
        channels,
        pool.num_heads,
        None,
        torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]),
        None,
        None,
        False,
        0.0,
        pool.c_proj.weight,
        pool.c_proj.bias,
        training=False,
        need_weights=False,
        use_separate_proj_weight=True,
        q_proj_weight=pool.q_proj.weight,
        k_proj_weight=pool.k_proj.weight,
        v_proj_weight=pool.v_proj.weight,
    )
    return out[0, 0]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 128)])
def test_a_mask_is_embedded_by_attention_to_its_pixels_by_a_resnet(height, width):
    clip = tiny_clip(RESNET)
    features = clip(images(height=height, width=width))
    dense = features["clip_vis_dense"]
    masks, inside = masks_over_blocks(2, height // 32, width // 32)
    masks[1, 3], inside[1, 3] = EMPTY, True  # nothing inside: the whole image
    embeddings, has_pixels = clip.embed_masks(features, masks)
    assert has_pixels.sum() == 7 and not has_pixels[1, 3]
    pool = clip.clip_model.visual.attnpool
    for i in range(2):
        for q in range(4):
            expected = attention_pool_of_cells(pool, dense[i], inside[i, q])
            torch.testing.assert_close(embeddings[i, q], expected, rtol=1e-4, atol=1e-5)
    assert (embeddings[0, 0] - embeddings[0, 1]).abs().max() > 1e-4


def test_empty_masks_have_finite_embeddings(clip):
    embeddings, has_pixels = clip.embed_masks(clip(images()), torch.full((2, 3, 16, 24), EMPTY))
    assert not has_pixels.any()
    assert embeddings.shape == (2, 3, 32) and embeddings.isfinite().all()


def test_pool_masks_by_hand():
    features = torch.tensor([[[[1.0, 2.0, 3.0]], [[10.0, 20.0, 30.0]]]])  # (1, 2, 1, 3)
    inside = torch.tensor([[[[True, False, True]], [[False, False, False]]]])
    assert pool_masks(features, inside).tolist() == [[[2.0, 20.0], [0.0, 0.0]]]


def test_the_logit_scale_is_at_most_100(clip):
    original = clip.clip_model.logit_scale.data.clone()
    assert clip.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-4)
    clip.clip_model.logit_scale.data.fill_(10.0)
    assert clip.logit_scale.item() == 100
    clip.clip_model.logit_scale.data.copy_(original)


# ------------------------------------------------------------------ what can be wrong


def test_an_unknown_model_is_named_and_the_known_ones_are_listed():
    with pytest.raises(ValueError, match=r"'convnext_huge'.*convnext_large_d_320.*RN50"):
        create_clip("convnext_huge")


def test_a_vision_transformer_has_no_pyramid(shapes_only):
    model = create_clip("ViT-B-32")
    with pytest.raises(ValueError, match=r"ViT-B-32 is neither .* nor a ResNet.*NAME CLIPViT"):
        CLIP(clip_model=model, model_name="ViT-B-32")


def test_unknown_weights_are_named_and_the_known_ones_are_listed():
    with pytest.raises(ValueError, match=r"'opanai'.*neither a file.*RN50 \(.*openai"):
        create_clip("RN50", "opanai")
    with pytest.raises(ValueError, match="it has none"):
        create_clip(CONVNEXT, "missing.pt")


class Bomb:
    def __init__(self, fuse):
        self.fuse = fuse

    def __reduce__(self):
        return open, (str(self.fuse), "w")


def write_weights(kind, path):
    if kind == "another model":
        torch.save(tiny_clip(RESNET).clip_model.state_dict(), path)
    elif kind == "text":
        path.write_text("<html>404</html>")
    elif kind == "empty file":
        path.write_bytes(b"")
    elif kind == "empty dict":
        torch.save({}, path)
    elif kind == "a list":
        torch.save([1, 2], path)
    elif kind == "truncated":
        torch.save(tiny_clip(CONVNEXT).clip_model.state_dict(), path)
        path.write_bytes(path.read_bytes()[:100_000])
    elif kind == "code":
        path.write_bytes(pickle.dumps({"weight": Bomb(path.with_suffix(".ran"))}, 2))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "kind", ["another model", "text", "empty file", "empty dict", "a list", "truncated", "code"]
)
def test_a_file_without_the_weights_is_named(kind, suffix, tmp_path):
    path = tmp_path / f"clip{suffix}"
    write_weights(kind, path)
    message = rf"clip\{suffix}'.*does not hold weights of CLIP {CONVNEXT}"
    with pytest.raises(ValueError, match=message) as caught:
        create_clip(CONVNEXT, str(path))
    assert len(str(caught.value)) < 700
    assert not path.with_suffix(".ran").exists()


def test_a_weights_file_is_loaded(tmp_path):
    saved = tiny_clip(CONVNEXT, seed=3).clip_model
    torch.save(saved.state_dict(), tmp_path / "clip.pt")
    loaded = create_clip(CONVNEXT, str(tmp_path / "clip.pt")).state_dict()
    for name, value in saved.state_dict().items():
        assert torch.equal(loaded[name], value), name


def test_openai_files_are_read_as_tensors(tmp_path):
    """TorchScript in half precision, with OpenAI's three numbers and masks besides the weights."""
    saved = tiny_clip(RESNET, seed=3).clip_model.half()
    holder = nn.Module()
    for name, value in {**saved.state_dict(), "transformer.attn_mask": torch.ones(2)}.items():
        *parts, last = name.split(".")
        module = holder
        for part in parts:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_buffer(last, value)
    for number, name in enumerate(("input_resolution", "context_length", "vocab_size")):
        holder.register_buffer(name, torch.tensor(number))
    path = tmp_path / "RN50.pt"
    torch.jit.script(holder).save(str(path))
    expected = torch.jit.load(path).state_dict()
    tensors = read_torchscript(path)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    loaded = create_clip(RESNET, str(path)).state_dict()
    for name, value in saved.state_dict().items():
        assert loaded[name].dtype in (torch.float32, torch.int64)
        assert torch.equal(loaded[name], value.to(loaded[name].dtype)), name


class Scripted(nn.Module):
    """Views, shared values, lists, numbers and several types in a TorchScript archive."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.blocks = nn.ModuleList([nn.BatchNorm2d(2), nn.Linear(2, 1)])
        self.tied = self.linear.weight
        base = torch.arange(24.0)
        self.register_buffer("turned", base[6:18].view(3, 4).t())
        self.register_buffer("empty", torch.empty(0, 3, dtype=torch.float16))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.sizes = [1, 2, 3]
        self.name = "text"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def test_tensors_of_torchscript_are_those_that_torch_reads(tmp_path):
    path = tmp_path / "m.pt"
    torch.jit.script(Scripted()).save(str(path))
    expected, got = torch.jit.load(path).state_dict(), read_torchscript(path)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value) and got[name].dtype == value.dtype, name


def test_torchscript_with_other_objects_or_damage_is_refused(tmp_path):
    path, trace = tmp_path / "m.pt", tmp_path / "ran"
    torch.jit.script(Scripted()).save(str(path))
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    for name, content in files.items():
        files[name] = pickle.dumps(Bomb(trace), 2) if name.endswith("/data.pkl") else content
    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=r"evil\.pt.*'(io|_io)\.open'.*could run code"):
        create_clip(RESNET, str(tmp_path / "evil.pt"))
    assert not trace.exists()
    start = path.read_bytes().index(torch.arange(24.0).numpy().tobytes()[24:72])
    content = bytearray(path.read_bytes())
    content[start] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.pt.*data/\d+ does not match its checksum"):
        create_clip(RESNET, str(path))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    weights = tiny_clip(RESNET).clip_model.state_dict()
    weights["visual.conv1.weight"][0] = torch.nan
    torch.save(weights, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match=r"clip\.pt.*not finite: visual\.conv1\.weight"):
        create_clip(RESNET, str(tmp_path / "clip.pt"))


def test_weights_that_cannot_be_downloaded_say_what_to_do(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    name, tag = "convnext_large_d_320", "laion2b_s29b_b131k_ft_soup"
    with pytest.raises(FileNotFoundError, match=rf"'{tag}'.*{name}.*c\.download_pretrained"):
        create_clip(name, tag)


@pytest.mark.parametrize(
    ("name", "pretrained", "quick"),
    [
        ("RN50", "openai", True),
        ("RN101", "", True),
        ("convnext_large_d_320", "laion2b_s29b_b131k_ft_soup", False),
        (CONVNEXT, "", False),
    ],
)
def test_the_activation_is_that_which_the_weights_were_trained_with(
    name, pretrained, quick, shapes_only
):
    """OpenAI's weights want QuickGELU in the text encoder; open_clip would only warn."""
    model = create_clip(name, pretrained)
    assert shapes_only["pretrained"] is None  # open_clip itself reads no file
    wanted = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else None
    assert shapes_only.get("weights") == wanted
    activation = model.transformer.resblocks[0].mlp.gelu
    assert isinstance(activation, open_clip.transformer.QuickGELU if quick else nn.GELU)
