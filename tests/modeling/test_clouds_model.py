from __future__ import annotations

import pytest
import torch
from tiny_model import CONVNEXT, RESNET, tiny_config, tiny_model
from torch.nn import functional as F

from clouds.data.structures import labelled_targets
from clouds.modeling import CLOUDS
from clouds.modeling.build import build_model
from clouds.modeling.postprocessing import ensemble_probabilities

HEADS = ("linear", "text", "pooled")


def head(name):
    return {"MODEL__MASK_FORMER__TRANSFORMER_DECODER_NAME": name}


def sample(index, height=64, width=64):
    """A picture of four blocks, each of a class with a color of its own, and some noise."""
    generator = torch.Generator().manual_seed(index)
    classes = torch.randperm(19, generator=generator)[:3]
    blocks = torch.tensor([[0, 1], [2, 0]])
    rows = torch.arange(height) * 2 // height
    columns = torch.arange(width) * 2 // width
    label = classes[blocks][rows][:, columns]
    colors = torch.randint(20, 236, (19, 3), generator=torch.Generator().manual_seed(99))
    noise = torch.randint(-20, 21, (3, height, width), generator=generator)
    image = (colors[label].permute(2, 0, 1) + noise).to(torch.uint8)
    return {"image": image, "sem_seg": label, "seed": index}


def train_step(model, batch):
    """Losses and gradients of one step."""
    model.zero_grad()
    losses = model(batch)
    sum(losses.values()).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return losses, gradients


# ------------------------------------------------------------------ Detectron2's protocol


@pytest.mark.parametrize("name", HEADS)
def test_training_gives_a_dict_of_losses(name):
    model = tiny_model(**head(name)).train()
    batch = [sample(0, 64, 96), sample(1, 70, 50)]
    losses, gradients = train_step(model, batch)
    expected = {
        f"loss_{kind}{i}" for kind in ("ce", "mask", "dice") for i in ("", "_0", "_1", "_2")
    }
    assert set(losses) == expected
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
    # Every parameter that trains gets a gradient: else distributed training would stop.
    assert set(gradients) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("clip", [CONVNEXT, RESNET])
@pytest.mark.parametrize("name", HEADS)
def test_evaluation_gives_scores_of_the_wanted_size(name, clip):
    model = tiny_model(MODEL__CLOUDS__CLIP_MODEL_NAME=clip, **head(name)).eval()
    batch = [
        sample(0, 64, 96) | {"height": 100, "width": 150},
        sample(1, 70, 50) | {"height": 35, "width": 25},
        {"image": sample(2, 33, 40)["image"]},  # without a wanted size: its own
    ]
    with torch.no_grad():
        outputs = model(batch)
    assert [set(o) for o in outputs] == [{"sem_seg"}] * 3
    assert [tuple(o["sem_seg"].shape) for o in outputs] == [
        (19, 100, 150), (19, 35, 25), (19, 33, 40)
    ]  # fmt: skip
    for output in outputs:
        scores = output["sem_seg"]
        assert scores.dtype == torch.float32 and scores.isfinite().all() and scores.min() >= 0


def test_segment_is_the_argmax_of_the_scores():
    model = tiny_model().eval()
    batch = [
        sample(0, 64, 96),
        sample(1, 70, 50) | {"height": 105, "width": 75},
        sample(2, 64, 64) | {"height": 50, "width": 91},
    ]
    maps = model.segment(batch)
    with torch.no_grad():
        scores = [output["sem_seg"] for output in model(batch)]
    for found, score in zip(maps, scores, strict=True):
        assert found.dtype == torch.uint8 and found.shape == score.shape[1:]
        assert not found.requires_grad
        different = found != score.argmax(0)
        best = score.topk(2, dim=0).values
        assert not (different & (best[0] - best[1] > 1e-5)).any()  # ties may fall either way
        assert different.float().mean() < 1e-3
    assert len(torch.cat([m.flatten() for m in maps]).unique()) > 1


def test_scores_against_the_plain_formula():
    """From the head's predictions to scores, with padding and a size of output of its own."""
    model = tiny_model(TEST__MASKS_AT_ONCE=5).eval()
    item = sample(0, 70, 50) | {"height": 140, "width": 90}
    mean, std = ([122.7709383, 116.7460125, 104.09373615], [68.5005327, 66.6321579, 70.32316305])
    image = item["image"].double()
    for channel in range(3):
        image[channel] = (image[channel] - mean[channel]) / std[channel]
    padded = F.pad(image.float(), (0, 14, 0, 26))[None]  # to multiples of 32, with zeros
    with torch.no_grad():
        predictions = model.sem_seg_head(model.backbone(padded))
        masks = F.interpolate(predictions.mask_logits[-1], (96, 64), mode="bilinear").sigmoid()
        classes = predictions.class_logits[-1].softmax(-1)[..., :-1]
        scores = torch.einsum("nqc,nqhw->nchw", classes, masks)[..., :70, :50]
        expected = F.interpolate(scores, (140, 90), mode="bilinear")[0]
        found = model([item])[0]["sem_seg"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_images_of_one_size_do_not_see_one_another():
    model = tiny_model().eval()
    batch = [sample(i, 64, 96) for i in range(3)]
    with torch.no_grad():
        together = model(batch)
        for item, output in zip(batch, together, strict=True):
            alone = model([item])[0]["sem_seg"]
            torch.testing.assert_close(output["sem_seg"], alone, rtol=1e-4, atol=1e-5)


def test_padding_is_in_no_target():
    model = tiny_model()
    batch = [sample(0, 64, 96), sample(1, 70, 50)]
    images = model._preprocess([item["image"] for item in batch])
    assert images.tensor.shape == (2, 3, 96, 96)
    for item in batch:
        targets = labelled_targets(item, "ignore", model.device).padded(96, 96)
        height, width = item["sem_seg"].shape
        assert targets.labels.tolist() == item["sem_seg"].unique().tolist()
        assert targets.masks.shape == (3, 96, 96)
        assert torch.equal(
            targets.masks[:, :height, :width], item["sem_seg"] == targets.labels[:, None, None]
        )
        assert targets.masks.sum() == height * width


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_labels_of_any_integer_type_train(dtype):
    model = tiny_model().train()
    item = sample(0)
    expected = model([item])
    losses = model([item | {"sem_seg": item["sem_seg"].to(dtype)}])
    assert all(torch.equal(losses[name], expected[name]) for name in expected)


# ------------------------------------------------------------------ training


def test_two_images_can_be_learned_by_heart():
    """What is left is the outline: logits at stride 4 cannot follow an edge to the pixel."""
    model = tiny_model(MODEL__MASK_FORMER__DEC_LAYERS=3).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    batch = [sample(0), sample(1)]
    history = []
    for _ in range(120):
        losses = model(batch)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[0] > 20
    assert history[-1] < 0.08 * history[0]
    assert losses["loss_ce"] < 0.1 and losses["loss_dice"] < 0.3 and losses["loss_mask"] < 0.5
    model.eval()
    for item, found in zip(batch, model.segment(batch), strict=True):
        assert (found == item["sem_seg"]).float().mean() > 0.995


@pytest.mark.parametrize("seeded", [True, False])
def test_a_step_from_a_seed_is_repeated_bit_for_bit(seeded):
    """Points come from the samples' seeds, or else from torch's global generator."""
    batch = [sample(0), sample(1)]
    if not seeded:
        for item in batch:
            del item["seed"]

    def step(model_seed, seed):
        torch.manual_seed(seed)
        return train_step(tiny_model(SEED=model_seed).train(), batch)

    losses, gradients = step(4, seed=1)
    again, same_gradients = step(4, seed=1)
    assert all(torch.equal(losses[name], again[name]) for name in losses)
    assert gradients.keys() == same_gradients.keys()
    assert all(torch.equal(gradients[name], same_gradients[name]) for name in gradients)
    other, _ = step(4, seed=2)
    assert torch.equal(losses["loss_mask"], other["loss_mask"]) is seeded
    different_model, _ = step(5, seed=1)
    assert not torch.equal(losses["loss_ce"], different_model["loss_ce"])


@pytest.mark.parametrize("name", HEADS)
def test_labels_with_ignored_pixels_only_train(name):
    model = tiny_model(**head(name)).train()
    batch = [sample(0), sample(1)]
    batch[0]["sem_seg"] = torch.full((64, 64), 255)
    for images in (batch[:1], batch):
        losses, gradients = train_step(model, images)
        assert all(loss.isfinite() for loss in losses.values())
        assert set(gradients) == {n for n, p in model.named_parameters() if p.requires_grad}
        assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_ignored_pixels_do_not_count():
    """They are in no target; every other pixel is in exactly one."""
    model = tiny_model()
    item = sample(0)
    label = item["sem_seg"].clone()
    label[:16] = 255
    targets = labelled_targets(item | {"sem_seg": label}, "ignore", model.device)
    covered = targets.masks.sum(0)
    assert not covered[:16].any()
    assert (covered[16:] == 1).all()


@pytest.mark.parametrize(("name", "trains"), [("linear", False), ("pooled", False), ("text", True)])
def test_the_void_embedding_trains_with_the_text_classifier_only(name, trains):
    model = tiny_model(**head(name)).train()
    _, gradients = train_step(model, [sample(0)])
    assert ("void_embedding.weight" in gradients) is trains
    if trains:
        assert gradients["void_embedding.weight"].abs().max() > 0
    assert model.void_embedding.weight.requires_grad is trains


def test_the_backbone_gets_gradients_only_if_it_is_not_frozen():
    _, gradients = train_step(tiny_model().train(), [sample(0)])
    assert not any(name.startswith("backbone.") for name in gradients)
    model = tiny_model(MODEL__BACKBONE__FREEZE=False).train()
    _, gradients = train_step(model, [sample(0)])
    assert gradients["backbone.clip_model.visual.trunk.stem.0.weight"].abs().max() > 0


@pytest.mark.parametrize("name", HEADS)
def test_a_step_under_autocast_is_near_that_in_full_precision(name):
    model = tiny_model(**head(name)).train()
    batch = [sample(0), sample(1)]
    expected, _ = train_step(model, batch)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(batch)
    sum(losses.values()).backward()
    for n, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected[n].item(), rel=0.15), n
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# ------------------------------------------------------------------ geometric ensemble


@pytest.mark.parametrize("clip", [CONVNEXT, RESNET])
def test_the_ensemble_against_its_parts(clip):
    settings = {
        "MODEL__CLOUDS__CLIP_MODEL_NAME": clip,
        "DATASETS__TRAIN": ("synthia",),
    }
    plain = tiny_model(**settings).eval()
    model = tiny_model(MODEL__CLOUDS__GEOMETRIC_ENSEMBLE=True, **settings).eval()
    with torch.no_grad():
        # CLIP's text features are small random numbers: larger, they tell classes apart.
        for m in (plain, model):
            m.backbone.clip_model.logit_scale.fill_(4.0)
        images = model._preprocess([sample(0, 64, 96)["image"]]).tensor
        predictions, features = model.predict(images)
        class_logits, mask_logits = predictions.final
        rows = model._text_embeddings(model.network)
        found = ensemble_probabilities(model.backbone, features, predictions, rows, model.ensemble)
        embeddings, _ = model.backbone.embed_masks(features, mask_logits)
        similarity = 54.5981 * F.normalize(embeddings, dim=-1) @ rows.rows.T  # exp(4)
        zero_shot = torch.stack(
            [s.amax(-1) for s in similarity[..., :-1].split(rows.counts, -1)], -1
        ).softmax(-1)
        inside = class_logits[..., :-1].softmax(-1)
        exponent = torch.full((19,), 0.4)
        exponent[[9, 14, 16]] = 0.8  # SYNTHIA has no terrain, truck, train
        product = inside ** (1 - exponent) * zero_shot**exponent
        void = class_logits.softmax(-1)[..., -1:]
        expected = product / product.sum(-1, keepdim=True) * (1 - void)
        torch.testing.assert_close(found[..., :-1], expected, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found[..., -1:], void)
        scores = [m([sample(0, 64, 96)])[0]["sem_seg"] for m in (plain, model)]
    assert scores[1].isfinite().all()
    assert (scores[0] - scores[1]).abs().max() > 1e-3


# ------------------------------------------------------------------ building


def test_it_is_built_by_its_registered_name():
    cfg = tiny_config()
    assert cfg.MODEL.META_ARCHITECTURE == "CLOUDS"
    model = build_model(cfg)
    assert type(model) is CLOUDS
    assert model.device.type == "cpu"
    names = {name.split(".")[0] for name in model.state_dict()}
    assert names == {"backbone", "sem_seg_head", "criterion", "void_embedding"}


def test_its_state_can_be_loaded_into_another():
    first, second = tiny_model(SEED=1).eval(), tiny_model(SEED=2).eval()
    batch = [sample(0)]
    with torch.no_grad():
        expected = first(batch)[0]["sem_seg"]
        assert not torch.equal(second(batch)[0]["sem_seg"], expected)
        result = second.load_state_dict(first.state_dict())
        assert not result.missing_keys and not result.unexpected_keys
        assert torch.equal(second(batch)[0]["sem_seg"], expected)


def test_a_label_of_another_size_than_its_image_is_refused():
    model = tiny_model().train()
    sample = {
        "image": torch.zeros(3, 64, 64, dtype=torch.uint8),
        "sem_seg": torch.zeros(32, 64, dtype=torch.uint8),
        "file_name": "street.png",
    }
    with pytest.raises(ValueError, match=r"street\.png.*\(32, 64\).*\(64, 64\)"):
        model([sample])


def test_small_training_images_are_padded_after_normalization():
    """As if the image were as large as the crop, its padding of the mean color and unlabelled."""
    size = {"INPUT__CROP__SIZE": (96, 64), "INPUT__CROP__PADDING": "mean"}
    mean = [100.0, 80.0, 60.0]
    model = tiny_model(MODEL__PIXEL_MEAN=mean, **size).train()
    small = sample(0, 64, 48)
    large = {**small, "image": torch.zeros(3, 96, 64), "sem_seg": torch.full((96, 64), 255)}
    large["image"] += torch.tensor(mean).view(3, 1, 1)
    large["image"][:, :64, :48] = small["image"]
    large["sem_seg"][:64, :48] = small["sem_seg"]
    losses, expected = model([small]), model([large])
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss)
    plain = tiny_model(MODEL__PIXEL_MEAN=mean).train()
    assert plain([small])["loss_ce"] != losses["loss_ce"]
    assert model.eval()([small])[0]["sem_seg"].shape == (19, 64, 48)
