"""SAMs of transformers as refiners: transformers' own calls and processors as oracles."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_sam import config, image_of, label_of
from tiny_sam_models import POINT_MODELS, SIDE, build, save

from clouds.self_training.refiners import build_refiner
from clouds.self_training.refiners.base import PseudoLabel
from clouds.self_training.refiners.sam import pretrained
from clouds.self_training.refiners.sam.backends import build_point_sam
from clouds.self_training.refiners.sam.embedding_cache import CachedEmbedder
from clouds.self_training.refiners.sam.frame import Frame
from clouds.self_training.refiners.sam.pretrained import (
    POINT_FAMILIES,
    _advice,
    load_pretrained,
    load_tokenizer,
)
from clouds.self_training.refiners.sam.prompt_decoder import Prompts

transformers = pytest.importorskip("transformers", minversion="5")

SIZES = ((96, 160), (150, 75), (128, 128))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of a tiny model by family, saved at the first use."""
    root, saved = tmp_path_factory.mktemp("sams"), {}

    def folder(family):
        if family not in saved:
            saved[family] = save(family, root / family)
        return saved[family]

    return folder


def points_of(size, number, count, seed=0):
    """float32 (number, count, 2), (x, y) within an image."""
    drawn = np.random.default_rng(seed).random((number, count, 2))
    return (drawn * (size[1] - 1, size[0] - 1)).round().astype(np.float32)


def processor_of(family):
    side = SIDE.get(family, 128)
    if family in ("sam", "sam_hq"):
        square = {"height": side, "width": side}
        return transformers.SamImageProcessor(size={"longest_edge": side}, pad_size=square)
    kind = "Sam3ImageProcessor" if family.startswith("sam3") else "Sam2ImageProcessor"
    return getattr(transformers, kind)(size={"height": side, "width": side})


# ------------------------------------------------------------------------ frames


@pytest.mark.parametrize("family", [*POINT_MODELS, "sam3"])
@pytest.mark.parametrize("size", SIZES)
def test_pixel_values_are_the_processors(family, size, folders):
    image = image_of(size)
    families = POINT_FAMILIES if family != "sam3" else {"sam3": POINT_FAMILIES["sam3_tracker"]}
    kind = families[family]
    frame = Frame(SIDE.get(family, 128), kind.keep_aspect, *kind.colors)
    theirs = processor_of(family)(image.permute(1, 2, 0).numpy(), return_tensors="pt")
    ours = frame.pixel_values(image, CPU)
    difference = (ours - theirs["pixel_values"]).abs()
    # Pillow and torchvision resize uint8 to the same level or, at few pixels, to the one beside it
    assert difference.max() <= 1.01 / 57
    assert (difference > 1e-5).float().mean() < 0.05


@pytest.mark.parametrize("keep_aspect", [True, False])
@pytest.mark.parametrize("size", [(540, 960), (960, 540), (768, 768)])
def test_a_point_goes_to_the_frame_and_back(keep_aspect, size):
    """A mask around the point, drawn on the grid of mask logits, is around it in the image."""
    frame = Frame(1024, keep_aspect, (0.0,) * 3, (1.0,) * 3)
    cells = (np.arange(256) + 0.5) * 4 - 0.5
    for x, y in points_of(size, 1, 5)[0] * 0.8 + 0.1 * np.array(size[::-1]):
        u, v = frame.to_frame(np.array([x, y], np.float32), size)
        bump = np.exp(-((cells - u) ** 2 + (cells[:, None] - v) ** 2) / (2 * 30.0**2))
        logits = torch.from_numpy(bump.astype(np.float32))[None, None]
        mass = frame.from_frame(logits, size)[0, 0]
        assert mass.shape == size
        rows, columns = torch.meshgrid(*map(torch.arange, size), indexing="ij")
        near = mass > 0.6
        assert abs(float(columns[near].float().mean()) - x) < 0.5
        assert abs(float(rows[near].float().mean()) - y) < 0.5


def test_boxes_are_two_points():
    frame = Frame(1024, False, (0.0,) * 3, (1.0,) * 3)
    box = np.array([[[10, 20], [40, 60]]], np.float32)
    expected = np.array([[[51.2, 204.8], [204.8, 614.4]]])
    assert np.allclose(frame.to_frame(box, (100, 200)), expected)


# ------------------------------------------------------------ masks of each family


def direct(folder):
    """A model of transformers, its weights read as ours: their alignment decides the last bit."""
    mapping = transformers.AutoModelForMaskGeneration
    return mapping.from_pretrained(folder).eval().requires_grad_(False)


def direct_masks(network, family, frame, image, points):
    """The best masks and all IoUs by one call of transformers, and its resizing."""
    size, side = tuple(image.shape[1:]), SIDE.get(family, 128)
    ratio = side / max(size)
    resized = [int(n * ratio + 0.5) for n in size] if frame.keep_aspect else [side, side]
    scale = np.array([resized[1] / size[1], resized[0] / size[0]])
    prompts = torch.from_numpy((points * scale).astype(np.float32))[None]
    found = network.get_image_embeddings(frame.pixel_values(image, CPU))
    # contiguous, as ours: sums of other memory layouts differ in the last bit
    if family == "sam_hq":
        early = [each.contiguous() for each in found[1]]
        given = {"image_embeddings": found[0].contiguous(), "intermediate_embeddings": early}
    else:
        levels = found if isinstance(found, list) else [found]
        levels = [level.contiguous() for level in levels]
        given = {"image_embeddings": levels if isinstance(found, list) else levels[0]}
    out = network(
        **given,
        input_points=prompts,
        input_labels=torch.ones(prompts.shape[:3], dtype=torch.int),
        multimask_output=True,
    )
    best = out.iou_scores[0].argmax(1)
    logits = out.pred_masks[0][torch.arange(len(best)), best][:, None]
    if frame.keep_aspect:
        square = {"height": side, "width": side}
        processor = transformers.SamProcessor(processor_of(family))
        masks = processor.post_process_masks(
            [logits], [size], [tuple(resized)], binarize=True, pad_size=square
        )[0]
    else:
        masks = transformers.Sam2ImageProcessor().post_process_masks([logits], [size])[0]
    return masks[:, 0], out.iou_scores[0]


@pytest.mark.parametrize("family", POINT_MODELS)
def test_masks_equal_transformers_bit_for_bit(family, folders):
    cfg = config(MODEL=folders(family))
    sam = build_point_sam(cfg, CPU)
    sam.decoder.at_once_cpu = 64  # as the one call below
    network, frame = direct(folders(family)), sam.decoder.frame
    images = [image_of(size, seed) for seed, size in enumerate(SIZES)]
    # unequal numbers of masks and of points in one batch
    points = [points_of(s, m, p) for s, m, p in zip(SIZES, (5, 1, 7), (3, 1, 4), strict=True)]
    found = list(sam.predict_masks(sam.embed(images), points, SIZES))
    shares = []
    for image, own, (masks, ious) in zip(images, points, found, strict=True):
        expected, expected_ious = direct_masks(network, family, frame, image, own)
        assert torch.equal(ious, expected_ious)
        assert masks.shape == expected.shape and masks.dtype == torch.bool
        assert torch.equal(masks, expected)
        shares.append(float(masks.float().mean()))
    assert 0.01 < np.mean(shares) < 0.99


@pytest.mark.parametrize("family", POINT_MODELS)
def test_a_second_pass_and_boxes_equal_transformers(family, folders):
    sam = build_point_sam(config(MODEL=folders(family)), CPU)
    network, frame = build(family), sam.decoder.frame
    embedding = sam.embed([image_of()])[0]
    points = points_of((100, 100), 3, 2)
    boxes = np.concatenate([points.min(1) - 5, points.max(1) + 5], 1).astype(np.float32)
    prompts = Prompts(points, boxes)
    logits, ious = sam.decoder.decode(embedding, prompts, multimask=False)
    again, _ = sam.decoder.decode(embedding, prompts, multimask=True, masks=logits)
    pixels = frame.pixel_values(image_of(), CPU)
    for i in range(3):
        inputs = {
            "input_points": torch.from_numpy(points[None, i : i + 1]),
            "input_boxes": torch.from_numpy(boxes[None, i : i + 1]),
            "input_labels": torch.ones(1, 1, 2, dtype=torch.int),
        }
        out = network(pixel_values=pixels, multimask_output=False, **inputs)
        torch.testing.assert_close(logits[i], out.pred_masks[0, 0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ious[i], out.iou_scores[0, 0], rtol=1e-4, atol=1e-4)
        out = network(pixel_values=pixels, input_masks=logits[i][None], **inputs)
        torch.testing.assert_close(again[i], out.pred_masks[0, 0], rtol=1e-4, atol=1e-4)
    assert logits.shape[1] == 1 and again.shape[1] == 3


@pytest.mark.parametrize("family", POINT_MODELS)
def test_chunks_of_prompts_do_not_matter(family, folders):
    sam = build_point_sam(config(MODEL=folders(family)), CPU)
    embeddings, points = sam.embed([image_of()]), [points_of((96, 160), 9, 2)]
    found = []
    for at_once in (1, 4, 100):
        sam.decoder.at_once_cpu = at_once
        found.append(next(iter(sam.predict_masks(embeddings, points, [(96, 160)]))))
    for masks, ious in found[1:]:
        torch.testing.assert_close(ious, found[0][1], rtol=1e-4, atol=1e-4)
        assert (masks == found[0][0]).float().mean() > 0.999


def test_padding_with_points_would_change_the_masks(folders):
    """Why masks with other numbers of points are prompted separately."""
    network = build("sam2")
    frame = Frame(128, False, *POINT_FAMILIES["sam2"].colors)
    pixels = frame.pixel_values(image_of(), CPU)
    point = torch.tensor([[[[40.0, 50.0]]]])
    padded = torch.cat([point, torch.full((1, 1, 1, 2), -10.0)], 2)
    alone = network(pixels, point, torch.tensor([[[1]]])).pred_masks
    with_padding = network(pixels, padded, torch.tensor([[[1, -10]]])).pred_masks
    assert (alone - with_padding).abs().max() > 1e-3


def test_video_models_hold_the_image_model(tmp_path):
    """The hub's SAM 2 has the type sam2_video."""
    network = build("sam2")
    network.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "sam2"
    (tmp_path / "config.json").write_text(json.dumps(written | {"model_type": "sam2_video"}))
    loaded = load_pretrained(str(tmp_path), POINT_FAMILIES, CPU).network
    assert type(loaded).__name__ == "Sam2Model"
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


# ------------------------------------------------------------------------- refining


@pytest.mark.parametrize("family", POINT_MODELS)
def test_a_second_epoch_runs_no_encoder(family, folders, tmp_path):
    cfg = config(MODEL=folders(family), CACHE_DIR=str(tmp_path))
    images = [image_of(size, seed) for seed, size in enumerate(SIZES)]
    labels = [label_of(size, seed) for seed, size in enumerate(SIZES)]
    epochs, calls = [], []
    for _ in range(2):
        refiner = build_refiner(cfg, CPU)
        encoder = refiner.embed.embed.network.vision_encoder
        encoder.register_forward_hook(lambda *_: calls.append(1))
        epochs.append(refiner.refine(images, labels, [0, 1, 2]))
    assert len(calls) == 3  # all in the first epoch
    without = build_refiner(config(MODEL=folders(family)), CPU).refine(images, labels, [0, 1, 2])
    for first, second, exact in zip(*epochs, without, strict=True):
        assert torch.equal(first.masks, second.masks)
        assert first.labels.tolist() == exact.labels.tolist()
        assert (first.masks == exact.masks).float().mean() > 0.995  # half precision


def test_keys_are_of_family_weights_frame_and_precision(folders, tmp_path):
    def key(model, autocast=False):
        refiner = build_refiner(config(MODEL=model, CACHE_DIR=str(tmp_path)), CPU)
        assert isinstance(refiner.embed, CachedEmbedder)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return refiner.embed.key(image_of())

    same = key(folders("sam2"))
    assert key(folders("sam2")) == same
    others = {key(folders("sam2"), autocast=True), key(folders("sam")), key(folders("sam_hq"))}
    others.add(key(save("sam2", tmp_path / "other", seed=1)))
    assert len({same} | others) == 5


def test_a_frame_is_in_the_key(folders, tmp_path, monkeypatch):
    cfg = config(MODEL=folders("sam2"), CACHE_DIR=str(tmp_path))
    before = build_refiner(cfg, CPU).embed.key(image_of())
    changed = replace(POINT_FAMILIES["sam2"], colors=pretrained.HALF)
    monkeypatch.setitem(POINT_FAMILIES, "sam2", changed)
    assert build_refiner(cfg, CPU).embed.key(image_of()) != before


def test_embeddings_beyond_half_precision_are_refused(folders, tmp_path):
    refiner = build_refiner(config(MODEL=folders("sam2"), CACHE_DIR=str(tmp_path)), CPU)
    refiner.embed.embed.network.no_memory_embedding.data += 1e5
    with pytest.raises(ValueError, match="half precision"):
        refiner.embed([image_of()])


# ------------------------------------------------------------------ SAM 3 by class names


def text_config(folder, **sam):
    cfg = config(MODEL=folder, TEXT_SCORE_THRESHOLD=0.2, **sam)
    cfg.MODEL.CLOUDS.REFINER = "sam_text"
    cfg.DATASETS.TRAIN = ("gta5", "sd_x")
    return cfg


def test_instances_by_class_names_equal_transformers(folders):
    refiner = build_refiner(text_config(folders("sam3")), CPU)
    network = transformers.Sam3Model.from_pretrained(folders("sam3")).eval().requires_grad_(False)
    tokenizer = load_tokenizer(folders("sam3"))
    image, size = image_of(), (96, 160)
    frame = refiner.embed.frame
    found = refiner.predict(refiner.embed([image])[0], [0, 2, 13], size)
    masks, scores, numbers = [], [], []
    for number, word in ((0, "road"), (2, "building"), (13, "car")):
        tokens = tokenizer(word, padding="max_length", max_length=32, return_tensors="pt")
        out = network(pixel_values=frame.pixel_values(image, CPU), **tokens)
        processor = transformers.Sam3ImageProcessor()
        [result] = processor.post_process_instance_segmentation(out, 0.2, 0.5, [size])
        masks.append(result["masks"].bool())
        scores.append(result["scores"])
        numbers += [number] * len(result["scores"])
    assert len(numbers) > 3
    assert found.classes.tolist() == numbers
    assert torch.equal(found.masks, torch.cat(masks))
    torch.testing.assert_close(found.scores, torch.cat(scores))


def test_refining_by_class_names(folders, tmp_path):
    cfg = text_config(folders("sam3"), CACHE_DIR=str(tmp_path), RM_INTERSECTION=False)
    images, labels = [image_of(), image_of((61, 83), 1)], [label_of(), label_of((61, 83), 1)]
    labels.append(PseudoLabel(torch.full((96, 160), 255, dtype=torch.uint8), torch.zeros(96, 160)))
    images.append(image_of(seed=3))
    calls, epochs = [], []
    for _ in range(2):
        refiner = build_refiner(cfg, CPU)
        backbone = refiner.embed.embed.network.vision_encoder.backbone
        backbone.register_forward_hook(lambda *_: calls.append(1))
        epochs.append(refiner.refine(images, labels, [0, 1, 2]))
    assert len(calls) == 2  # not for the image without a class, and not in the second epoch
    for first, second, label in zip(*epochs, labels, strict=True):
        assert torch.equal(first.masks, second.masks)
        assert first.masks.shape[1:] == label.classes.shape
        assert set(first.labels.tolist()) <= set(label.classes.unique().tolist())
        assert first.points is None
    # an image without an instance keeps the teacher's label
    refiner.predict.min_score = 1.0
    kept = refiner.refine(images[:1], labels[:1], [0])[0]
    assert torch.equal(kept.class_map(), labels[0].classes)


# -------------------------------------------------------------------------- messages


def error_of(model, refiner="sam"):
    cfg = text_config(model) if refiner == "sam_text" else config(MODEL=model)
    with pytest.raises((ValueError, FileNotFoundError, ImportError)) as caught:
        build_refiner(cfg, CPU)
    text = str(caught.value)
    assert "\n" not in text and text.startswith("MODEL.CLOUDS.SAM.MODEL")
    return text


def test_a_model_that_is_no_sam(tmp_path):
    transformers.BertConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    text = error_of(f"{tmp_path}/")
    assert "type bert" in text and "sam2" in text and "facebook/sam2.1-hiera-tiny" in text


def test_the_other_kind_of_sam(folders):
    assert "MODEL.CLOUDS.REFINER sam_text" in error_of(folders("sam3"))
    assert "MODEL.CLOUDS.REFINER sam." in error_of(folders("sam2"), "sam_text")


def test_folders_that_are_no_models(tmp_path, folders):
    assert "there is no folder" in error_of(f"{tmp_path}/gone")
    assert "no config.json" in error_of(f"{tmp_path}/")
    build("sam2").config.save_pretrained(tmp_path)
    assert "is not complete" in error_of(f"{tmp_path}/")
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    assert "no model that can be loaded" in error_of(f"{tmp_path}/")


def test_weights_that_are_missing_or_not_finite(tmp_path):
    network = build("sam2")
    state = network.state_dict()
    state.pop("vision_encoder.neck.convs.0.weight")
    network.save_pretrained(tmp_path, state_dict=state)
    assert "lacks weights of Sam2Model: vision_encoder.neck" in error_of(f"{tmp_path}/")
    network.no_memory_embedding.data[0, 0, 3] = float("nan")
    network.save_pretrained(tmp_path)
    assert "not finite: no_memory_embedding" in error_of(f"{tmp_path}/")


def test_no_connection(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = error_of("facebook/sam2.1-hiera-tiny")
    assert "not in the local cache" in text and "hf download facebook/sam2.1-hiera-tiny" in text


def test_gated_and_unknown_models():
    from huggingface_hub import errors

    for kind, advice in (
        (errors.GatedRepoError, "accept its terms on https://huggingface.co/facebook/sam3"),
        (errors.RepositoryNotFoundError, "no model facebook/sam3 on the Hugging Face hub"),
    ):
        error = OSError("cannot load")
        error.__cause__ = kind.__new__(kind)  # its arguments differ between versions
        assert advice in _advice("facebook/sam3", error, "")
    assert "hf auth login" in _advice("facebook/sam3", error, "")
