"""CLIP's vision transformers as backbones, against open_clip."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from test_clouds_model import sample, train_step
from tiny_model import tiny_config, tiny_model
from tiny_vit import images

from clouds.d2 import BACKBONE_REGISTRY
from clouds.modeling.backbone import open_clip_models
from clouds.modeling.backbone.adapters.base import Adapter
from clouds.modeling.backbone.base import PixelStatistics, TextEncoder
from clouds.modeling.backbone.clip_vit import attention_of_masks, with_unrotated
from clouds.modeling.backbone.open_clip_models import create_clip

VIT, EVA = "clouds_tiny_vit", "eva_tiny"
SIZES = {VIT: 64, EVA: 224}
"""Images of the models, pixels."""

EVA_CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 224,
        "timm_model_name": "eva02_base_patch16_clip_224",
        "timm_model_pretrained": False,
        "timm_pool": "token",
        "timm_proj": None,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    "custom_text": True,
}


@pytest.fixture(scope="module", autouse=True)
def eva_config(tmp_path_factory):
    """EVA02-CLIP of 4 blocks; timm's model is made small where it is built."""
    import timm

    folder = tmp_path_factory.mktemp("configs")
    (folder / f"{EVA}.json").write_text(json.dumps(EVA_CONFIG))
    open_clip_models._register_own_configs()
    create_model = timm.create_model

    def small(name, **options):
        if name.startswith("eva02"):
            options |= {"embed_dim": 48, "depth": 4, "num_heads": 3}
        return create_model(name, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", small)
        open_clip.add_model_config(folder)
        yield
    del open_clip.factory._MODEL_CONFIGS[EVA]
    open_clip.factory._MODEL_CONFIG_PATHS[:] = [
        path for path in open_clip.factory._MODEL_CONFIG_PATHS if path != folder
    ]


def clip_with_weights(name):
    """open_clip's model, with values that all matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = create_clip(name)
        for parameter in clip.visual.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    return clip.eval()


@pytest.fixture(scope="module", params=[VIT, EVA])
def pair(request, tmp_path_factory):
    """open_clip's model, and the backbone with its weights."""
    clip = clip_with_weights(request.param)
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(clip.state_dict(), path)
    return clip, build(request.param, str(path))


def build(name, weights="", **settings):
    cfg = tiny_config(
        MODEL__BACKBONE__NAME="CLIPViT",
        MODEL__CLOUDS__CLIP_MODEL_NAME=name,
        MODEL__CLOUDS__CLIP_PRETRAINED_WEIGHTS=weights,
        MODEL__BACKBONE__IMG_SIZE=SIZES.get(name, 512),
        **settings,
    )
    return BACKBONE_REGISTRY.get("CLIPViT")(cfg, None)


def test_it_is_a_text_encoder(pair):
    clip, backbone = pair
    assert isinstance(backbone, TextEncoder) and isinstance(backbone, PixelStatistics)
    assert backbone.embed_dim == 32
    assert backbone.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-4)
    texts = ["a photo of a road", "a tuk-tuk"]
    expected = clip.encode_text(open_clip.get_tokenizer(VIT)(texts))
    torch.testing.assert_close(backbone.encode_text(texts), expected)


def test_features(pair):
    backbone = pair[1]
    features = backbone(images())
    assert tuple(features) == tuple(backbone.output_shape())
    for name, spec in backbone.output_shape().items():
        size = (1, 1) if name == "clip_vis_class" else (64 // spec.stride, 96 // spec.stride)
        assert features[name].shape == (2, spec.channels, *size)
    assert backbone.first_mask_block == 3
    # the input of the last block: the tokens after the one before it
    torch.testing.assert_close(features["clip_vis_dense"], backbone.maps(images())[2])


def test_a_mask_of_everything_is_the_image_embedding_of_open_clip(pair):
    clip, backbone = pair
    size = SIZES[backbone.model_name]
    x = images(2, size, size)
    expected = clip.encode_image(x)
    assert (expected[0] - expected[1]).abs().max() > 0.1
    embeddings, has_pixels = backbone.embed_masks(backbone(x), torch.ones(2, 3, 16, 16))
    assert has_pixels.all() and embeddings.shape == (2, 3, 32)
    for q in range(3):
        torch.testing.assert_close(embeddings[:, q], expected, rtol=1e-4, atol=1e-4)


def test_a_mask_sees_its_own_patches_alone(pair):
    """The last block without the other patches: there is nothing else to attend to."""
    backbone = pair[1]
    features = backbone(images(1, 64, 96))
    inside = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    logits = torch.where(inside, 1.0, -1.0)[None, None].repeat_interleave(4, 2)
    logits = logits.repeat_interleave(4, 3)
    found, has_pixels = backbone.embed_masks(features, torch.cat((logits, -logits), 1))
    assert has_pixels.all()
    t, rope = backbone.transformer, backbone.rotary_positions((4, 6))
    patches = features["clip_vis_dense"][0].flatten(1).T
    class_token = features["clip_vis_class"].flatten(2).transpose(1, 2)
    for q, cells in enumerate((inside.flatten(), ~inside.flatten())):
        tokens = torch.cat((class_token, patches[None, cells]), 1)
        options = {} if rope is None else {"rope": rope[cells]}
        with torch.no_grad():
            expected = t.head(t.norm(t.blocks[3](tokens, **options)))[0, 0]
        torch.testing.assert_close(found[0, q], expected, rtol=1e-4, atol=1e-5)
    assert (found[0, 0] - found[0, 1]).abs().max() > 1e-3


def test_empty_masks_have_finite_embeddings(pair):
    backbone = pair[1]
    embeddings, has_pixels = backbone.embed_masks(backbone(images()), -torch.ones(2, 3, 16, 24))
    assert not has_pixels.any() and embeddings.isfinite().all()


def test_an_adapter_sees_patches_alone(pair):
    class Counting(Adapter):
        acts_on_tokens = True

        def after_block(self, index, patches):
            counts.append((index, patches.shape[1]))
            return patches

    counts = []
    backbone = pair[1]
    features = backbone(images())
    expected = backbone.embed_masks(features, torch.ones(2, 5, 4, 6))[0]
    backbone.adapter = Counting()
    try:
        found = backbone.embed_masks(features, torch.ones(2, 5, 4, 6))[0]
    finally:
        backbone.adapter = None
    assert counts == [(3, 24)]
    assert torch.equal(found, expected)


def test_attention_of_masks_by_hand():
    masks = torch.tensor([[[True, False], [True, True]]])  # two masks, two patches
    expected = [
        [1, 1, 1, 0, 0],  # class token
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 1, 0, 1, 0],  # first mask: its patch and itself
        [0, 1, 1, 0, 1],
    ]
    assert attention_of_masks(masks).int().tolist() == [[expected]]


def test_unrotated_positions_rotate_nothing():
    from timm.layers import apply_rot_embed_cat

    rope = with_unrotated(torch.rand(3, 8), 2)
    x = torch.randn(1, 1, 5, 4)
    rotated = apply_rot_embed_cat(x, rope)
    assert torch.equal(rotated[..., 3:, :], x[..., 3:, :])
    assert not torch.equal(rotated[..., :3, :], x[..., :3, :])


def test_text_and_projection_never_train():
    backbone = build(VIT, MODEL__BACKBONE__FREEZE=False).train()
    assert backbone.transformer.training and not backbone.clip_model.training
    trained = {n for n, p in backbone.named_parameters() if p.requires_grad}
    assert trained and all(n.startswith("transformer.") for n in trained)
    assert not {n for n in trained if ".head." in n or n.startswith("transformer.norm.")}
    frozen = build(VIT)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not any(m.training for m in frozen.transformer.modules())


@pytest.mark.parametrize("head", ["linear", "text", "pooled"])
def test_the_whole_model_with_text_and_ensemble(head):
    settings = {
        "MODEL__BACKBONE__NAME": "CLIPViT",
        "MODEL__CLOUDS__CLIP_MODEL_NAME": VIT,
        "MODEL__BACKBONE__IMG_SIZE": 64,
        "MODEL__MASK_FORMER__TRANSFORMER_DECODER_NAME": head,
    }
    model = tiny_model(**settings).train()
    losses, gradients = train_step(model, [sample(0, 64, 96), sample(1, 70, 50)])
    assert all(loss.isfinite() for loss in losses.values())
    assert set(gradients) == {n for n, p in model.named_parameters() if p.requires_grad}
    ensemble = tiny_model(MODEL__CLOUDS__GEOMETRIC_ENSEMBLE=True, **settings).eval()
    with torch.no_grad():
        scores = [m.eval()([sample(0, 64, 96)])[0]["sem_seg"] for m in (model, ensemble)]
    assert scores[1].isfinite().all() and scores[1].shape == (19, 64, 96)
    assert not torch.equal(*scores)
    assert torch.allclose(model.pixel_mean.flatten(), torch.tensor(model.backbone.pixel_mean))


@pytest.mark.parametrize("name", ["clouds_tiny", "clouds_tiny_resnet", "ViT-B-16-SigLIP2"])
def test_other_models_are_refused(name, monkeypatch):
    if name.startswith("ViT"):  # large: without numbers in it
        with torch.device("meta"), pytest.raises(ValueError, match=f"{name}.*backbone ViT"):
            build(name)
    else:
        with pytest.raises(ValueError, match=f"{name}.*ConvNeXt and ResNet .* backbone CLIP;"):
            build(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mean"), [("EVA02-L-14-336", 122.77), ("ViT-L-14-336", 122.77), ("ViT-B-16", 122.77)]
)
def test_published_models_on_the_meta_device(name, mean):
    from clouds.modeling.backbone.pretrained import skip_pretrained_weights

    with torch.device("meta"), skip_pretrained_weights():
        backbone = build(name)
        features = backbone(torch.empty(1, 3, 512, 512))
    assert features["res5"].shape[-2:] == (16, 16)
    assert backbone.pixel_mean[0] == pytest.approx(mean, abs=0.01)
    assert backbone.embed_dim == backbone.transformer.head.out_features
