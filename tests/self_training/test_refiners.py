"""Refiners: segment_anything's own predictor, loops over pixels and hand-drawn masks as oracles."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_sam import config, image_of, label_of

from clouds.config import get_cfg
from clouds.ops.sam import as_tokens, attend, best_masks, encode
from clouds.self_training.pseudo_labeler import pseudo_targets
from clouds.self_training.refiners import REFINER_REGISTRY, build_refiner
from clouds.self_training.refiners.base import PseudoLabel
from clouds.self_training.refiners.sam import predictor
from clouds.self_training.refiners.sam.frame import input_size
from clouds.self_training.refiners.sam.model import build_sam, read_weights
from clouds.self_training.refiners.sam.predictor import ImageEmbedder, PointPredictor
from clouds.self_training.refiners.sam.prompts import PointOptions, find_components, sample_points
from clouds.self_training.refiners.sam.refiner import (
    SamOptions,
    SamRefiner,
    merge_masks_by_class,
)
from clouds.self_training.refiners.superpixel import majority_vote, superpixels

SIZES = ((96, 160), (160, 96), (128, 128), (61, 83))


# ------------------------------------------------------- against segment_anything


def predicted(sam, image, points, second_pass):
    """Best masks and predicted IoUs by segment_anything's own predictor."""
    from segment_anything import SamPredictor

    predictor = SamPredictor(sam)
    predictor.set_image(image.permute(1, 2, 0).numpy())
    coords = predictor.transform.apply_coords(points, predictor.original_size)
    coords = torch.from_numpy(coords).float()
    ones = torch.ones(coords.shape[:2])
    masks, ious, logits = predictor.predict_torch(coords, ones)
    best = ious.max(1).indices
    if second_pass:
        chosen = logits[torch.arange(len(best)), best][:, None]
        masks, ious, _ = predictor.predict_torch(coords, ones, mask_input=chosen)
        best = ious.max(1).indices
    return masks[torch.arange(len(best)), best], ious, predictor.features[0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("second_pass", [False, True])
def test_embedding_and_masks_equal_segment_anythings(tiny_sam, size, second_pass):
    image, label = image_of(size), label_of(size)
    components = find_components(label.classes.numpy(), 100)
    points = sample_points(components, PointOptions(), np.random.default_rng(0))
    masks, ious, embedding = predicted(tiny_sam, image, points, second_pass)
    ours = ImageEmbedder(tiny_sam)([image])[0]
    assert ours.shape == (64, 8, 8)
    torch.testing.assert_close(ours, embedding)
    [(our_masks, our_ious)] = PointPredictor(tiny_sam, second_pass)([ours], [points], [size])
    torch.testing.assert_close(our_ious, ious, rtol=1e-4, atol=1e-4)
    assert our_masks.shape == masks.shape and our_masks.dtype == torch.bool
    assert (our_masks == masks).float().mean() > 0.9999
    assert len(set(ious.argmax(1).tolist())) > 1  # it is not always the same of the three
    assert 0.05 < masks.float().mean() < 0.95


def test_the_encoder_is_segment_anythings():
    """Distances count, and windows may stick out of the image: 8 pixels in windows of 4 and 3."""
    generator = torch.Generator().manual_seed(0)
    for window in (4, 3):
        sam = build_sam(config(), "cpu")
        sam.image_encoder.blocks[0].window_size = window
        attention = sam.image_encoder.blocks[0].attn
        attention.rel_pos_h = torch.nn.Parameter(torch.zeros(2 * window - 1, 16))
        attention.rel_pos_w = torch.nn.Parameter(torch.zeros(2 * window - 1, 16))
        for parameter in sam.image_encoder.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        images = torch.randn(2, 3, 128, 128, generator=generator)
        with torch.no_grad():
            expected = sam.image_encoder(images)
            found = encode(sam.image_encoder, images)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_encoder_of_another_architecture_is_called_as_it_is():
    images = torch.rand(2, 3, 8, 8)
    other = torch.nn.Conv2d(3, 5, 2, 2)  # as MobileSAM's TinyViT it has no `blocks`
    assert torch.equal(encode(other, images), other(images))


@pytest.mark.parametrize("use_rel_pos", [True, False])
def test_attention_over_an_oblong(use_rel_pos):
    from segment_anything.modeling.image_encoder import Attention

    generator = torch.Generator().manual_seed(0)
    attention = Attention(24, num_heads=3, use_rel_pos=use_rel_pos, input_size=(5, 7))
    for parameter in attention.parameters():
        parameter.data.normal_(generator=generator)
    x = torch.randn(2, 5, 7, 24, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(attend(attention, x), attention(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("points", [1, 5, 17])
def test_the_decoder_is_segment_anythings(points):
    """Every parameter counts: none is left at the zero or one that it begins with."""
    sam = build_sam(config(), "cpu")
    generator = torch.Generator().manual_seed(points)
    for parameter in sam.mask_decoder.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    embedding = torch.randn(3, 64, 8, 8, generator=generator)
    coords = 128 * torch.rand(3, points, 2, generator=generator)
    sparse, dense = sam.prompt_encoder((coords, torch.ones(3, points)), None, None)
    positions = sam.prompt_encoder.get_dense_pe()
    logits, ious = best_masks(
        sam.mask_decoder, as_tokens(embedding + dense), as_tokens(positions[0]), sparse, (8, 8)
    )
    for number in range(3):
        expected, expected_ious = sam.mask_decoder(
            embedding[number : number + 1],
            positions,
            sparse[number : number + 1],
            dense[number : number + 1],
            multimask_output=True,
        )
        torch.testing.assert_close(ious[number], expected_ious[0], rtol=1e-4, atol=1e-4)
        best = expected[0, expected_ious[0].argmax()]
        torch.testing.assert_close(logits[number, 0], best, rtol=1e-4, atol=1e-4)


def test_the_second_pass_changes_masks(tiny_sam):
    image, label = image_of(), label_of()
    points = sample_points(
        find_components(label.classes.numpy(), 100), PointOptions(), np.random.default_rng(0)
    )
    embeddings = ImageEmbedder(tiny_sam)([image])
    once, twice = (
        next(PointPredictor(tiny_sam, passes)(embeddings, [points], [(96, 160)]))[0]
        for passes in (False, True)
    )
    assert (once != twice).any()


@pytest.mark.parametrize("size", SIZES)
def test_resizing_is_segment_anythings(size):
    from segment_anything.utils.transforms import ResizeLongestSide

    for side in (128, 1024):
        assert input_size(*size, side) == ResizeLongestSide.get_preprocess_shape(*size, side)


@pytest.mark.parametrize("second_pass", [False, True])
def test_how_many_are_decoded_at_once_does_not_matter(tiny_sam, second_pass, monkeypatch):
    monkeypatch.setattr(predictor, "REGIONS_AT_ONCE_CPU", 1000)
    points = [
        sample_points(
            find_components(label_of(size, seed).classes.numpy(), 50),
            PointOptions(),
            np.random.default_rng(0),
        )
        for seed, size in enumerate(SIZES)
    ]
    images = [image_of(size, seed) for seed, size in enumerate(SIZES)]
    embeddings = ImageEmbedder(tiny_sam)(images)
    for at_once in (1, 3, 1000):  # 3: of one image, and of two
        together = list(PointPredictor(tiny_sam, second_pass, at_once)(embeddings, points, SIZES))
        assert len(together) == len(SIZES)
        for image, own, (masks, ious) in zip(images, points, together, strict=True):
            expected, expected_ious, _ = predicted(tiny_sam, image, own, second_pass)
            torch.testing.assert_close(ious, expected_ious, rtol=1e-4, atol=1e-4)
            assert masks.shape == expected.shape
            assert (masks == expected).float().mean() > 0.9999


# ----------------------------------------------------------------- overlaps


def drawn(*masks):
    return torch.tensor([[[int(c) for c in row] for row in mask.split()] for mask in masks]).bool()


MASKS = drawn("1100 1100", "0110 0000", "0010 0011", "0000 0000")
OF = torch.tensor([3, 3, 7, 9])
TEACHER = torch.tensor([[3, 3, 3, 7], [3, 0, 7, 7]], dtype=torch.uint8)


def test_overlap_between_classes():
    united = merge_masks_by_class(MASKS, OF, TEACHER)
    assert united.labels.tolist() == [3, 7]  # nothing is left of 9
    assert (united.masks == drawn("1100 1100", "0000 0011")).all()
    # 3: 1100 1100 has 3 of its 4 pixels in the teacher's 3; of 0110 is left 0100, which has all.
    assert united.agreement.tolist() == [[0.75, 1.0, 0, 0], [0.75, 0.75, 1.0, 1.0]]


def test_overlap_as_published():
    united = merge_masks_by_class(MASKS, OF, TEACHER, overlap="published")
    assert united.labels.tolist() == [3, 7, 9]
    assert (united.masks == drawn("1000 1100", "0000 0011", "0000 0000")).all()
    thirds = pytest.approx([2 / 3, 2 / 3])
    assert united.agreement[1, :2].tolist() == thirds
    assert (united.agreement > 0).tolist() == united.covered.tolist()


def test_overlap_left():
    united = merge_masks_by_class(MASKS, OF, TEACHER, remove_overlap=False)
    assert (united.masks == drawn("1110 1100", "0010 0011")).all()
    # Where masks meet the better agreement counts: at (0, 2), 1 of 0110 over 2/3 of 0010 0011.
    assert united.agreement[0, 2] == 1.0


def test_many_random_masks_pixel_by_pixel():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(12, 20, 30, generator=generator) < 0.1
    classes = torch.tensor([0, 0, 0, 2, 5, 5, 7, 7, 7, 7, 11, 18])
    teacher = torch.randint(0, 19, (20, 30), generator=generator).to(torch.uint8)
    before = masks.clone()
    ours, published = (
        merge_masks_by_class(masks, classes, teacher, overlap=o) for o in ("classes", "published")
    )
    assert (masks == before).all()
    for row in range(20):
        for column in range(30):
            by = classes[masks[:, row, column]].tolist()
            got = ours.labels[ours.masks[:, row, column]].tolist()
            assert got == (sorted(set(by)) if len(set(by)) == 1 else [])
            got = published.labels[published.masks[:, row, column]].tolist()
            assert got == (by if len(by) == 1 else [])


# ------------------------------------------------------------------- the refiner


def refine(cfg, images, labels, seeds):
    return build_refiner(cfg, "cpu").refine(images, labels, seeds)


def test_sam_refines_images_of_several_sizes():
    images = [image_of(size, seed) for seed, size in enumerate(SIZES)]
    labels = [label_of(size, seed) for seed, size in enumerate(SIZES)]
    refined = refine(config(RM_INTERSECTION=False), images, labels, [1, 2, 3, 4])
    for size, label, one in zip(SIZES, labels, refined, strict=True):
        large = find_components(label.classes.numpy(), 100)
        assert one.masks.shape[1:] == size and one.masks.dtype == torch.bool
        assert set(one.labels.tolist()) <= set(large.classes.tolist())
        assert one.labels.tolist() == sorted(set(one.labels.tolist()))
        assert one.points.shape == (len(large), 5, 2) and one.points.dtype == torch.float32
        assert one.agreement.shape == size and one.agreement.dtype == torch.float32
        assert ((one.agreement >= 0) & (one.agreement <= 1)).all()
        assert (one.agreement[~one.covered] == 0).all()
        columns, rows = one.points.long().permute(2, 0, 1)
        assert (large.ids[rows, columns] == np.arange(len(large))[:, None]).all()
        assert pseudo_targets(label, one).weights is None


def test_one_seed_one_label_whatever_else_is_in_the_batch():
    images, labels = [image_of(), image_of(seed=5)], [label_of(), label_of(seed=5)]
    first = refine(config(), images, labels, [11, 12])
    torch.manual_seed(99)
    again = refine(config(), images[::-1], labels[::-1], [12, 11])[::-1]
    other = refine(config(), images, labels, [13, 14])
    for a, b, c in zip(first, again, other, strict=True):
        assert (a.points == b.points).all() and (a.masks == b.masks).all()
        assert (a.points != c.points).any()


def test_an_image_without_a_large_component_keeps_its_label_and_is_not_embedded(tiny_sam):
    embedded = []

    def embed(images):
        embedded.extend(images)
        return ImageEmbedder(tiny_sam)(images)

    images, labels = [image_of(seed=s) for s in range(3)], [label_of(seed=s) for s in range(3)]
    checked = np.indices((96, 160)).sum(0) % 2
    labels[1] = PseudoLabel(torch.from_numpy(checked.astype(np.uint8)), labels[1].confidence)
    refiner = SamRefiner(embed, PointPredictor(tiny_sam), SamOptions(size_threshold=100))
    refined = refiner.refine(images, labels, [0, 1, 2])
    assert len(embedded) == 2
    assert embedded[0] is images[0] and embedded[1] is images[2]
    assert refined[1].labels.tolist() == [0, 1]
    assert (refined[1].class_map().numpy() == checked).all()
    assert (refined[1].agreement == 1).all()
    assert refined[1].points is None
    assert refined[0].points is not None


@pytest.mark.parametrize("refiner", ["sam", "superpixel", "none"])
def test_a_label_that_names_no_class(refiner):
    cfg = config()
    cfg.MODEL.CLOUDS.REFINER = refiner
    label = PseudoLabel(torch.full((96, 160), 255, dtype=torch.uint8), torch.zeros(96, 160))
    refined = refine(cfg, [image_of()], [label], [0])[0]
    assert refined.masks.shape == (0, 96, 160)
    assert (refined.agreement == 0).all()
    assert len(pseudo_targets(label, refined).labels) == 0


def test_no_images():
    assert refine(config(), [], [], []) == []


# ------------------------------------------------------------- building the model


def test_sam_is_frozen_and_in_evaluation_mode():
    sam = build_sam(config(), "cpu")
    assert not any(module.training for module in sam.modules())
    assert not any(parameter.requires_grad for parameter in sam.parameters())


def test_random_weights_follow_the_seed_and_are_told_of(caplog):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with caplog.at_level(logging.WARNING):
        first = build_sam(config(), "cpu").state_dict()
    assert torch.rand(1) == expected  # the global generator is left alone
    assert [r.message for r in caplog.records if "random weights" in r.message]
    cfg = config()
    again = build_sam(cfg, "cpu").state_dict()
    cfg.SEED = 1
    other = build_sam(cfg, "cpu").state_dict()
    assert all((first[name] == again[name]).all() for name in first)
    assert any((first[name] != other[name]).any() for name in first)


def test_weights_from_a_file(tmp_path, caplog):
    cfg = config()
    cfg.SEED = 3
    saved = build_sam(cfg, "cpu").state_dict()
    torch.save(saved, tmp_path / "sam.pth")
    caplog.clear()
    loaded = build_sam(config(WEIGHTS=str(tmp_path / "sam.pth")), "cpu").state_dict()
    assert all((loaded[name] == saved[name]).all() for name in saved)
    assert not caplog.records


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("vit_h", "sam_vit_h_4b8939.pth"),
        ("vit_l", "sam_vit_l_0b3195.pth"),
        ("vit_b", "sam_vit_b_01ec64.pth"),
        ("mobile", "mobile_sam.pt"),
    ],
)
def test_a_missing_file_says_where_weights_are(model, name, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        build_sam(config(MODEL=model, WEIGHTS=str(tmp_path / "gone.pth")), "cpu")
    message = str(caught.value)
    assert "gone.pth" in message and name in message and "https://" in message


def position_embedding(width):
    return {"image_encoder.pos_embed": torch.zeros(1, 2, 2, width)}


@pytest.mark.parametrize(
    ("state", "model", "seems"),
    [
        (position_embedding(1024), "vit_h", "vit_l"),
        (position_embedding(1280), "vit_b", "vit_h"),
        (position_embedding(768), "vit_l", "vit_b"),
        (position_embedding(32), "vit_b", "tiny"),
        (position_embedding(40), "vit_b", "a SAM with 40 channels"),
        ({"image_encoder.patch_embed.seq.0.c.weight": torch.zeros(1)}, "vit_h", "mobile"),
    ],
)
def test_weights_of_another_size(state, model, seems, tmp_path):
    torch.save(state, tmp_path / "sam.pth")
    with pytest.raises(ValueError, match=f"seems to hold {seems}, but .* is {model}"):
        read_weights(tmp_path / "sam.pth", model)


def test_a_file_of_something_else(tmp_path):
    for state in ({"weight": torch.zeros(2)}, torch.zeros(3)):
        torch.save(state, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=r"other.pth does not hold the weights of a SAM"):
            read_weights(tmp_path / "other.pth", "vit_b")
    torch.save(position_embedding(32), tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"part.pth does not fit tiny"):
        build_sam(config(WEIGHTS=str(tmp_path / "part.pth")), "cpu")


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 torn"])
def test_a_broken_file(content, tmp_path):
    (tmp_path / "torn.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"SAM\.WEIGHTS: .*torn.pth'.* cannot be read"):
        read_weights(tmp_path / "torn.pth", "vit_b")


def test_sam_weights_with_a_hole_or_nan_are_refused(tmp_path):
    path = tmp_path / "sam.pth"
    weights = build_sam(config(), "cpu").state_dict()
    torch.save(weights, path)
    whole = path.read_bytes()
    assert read_weights(path, "tiny").keys() == weights.keys()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(4096) + whole[middle + 4096 :])
    with pytest.raises(
        ValueError, match=r"SAM\.WEIGHTS: .*sam\.pth.* is damaged: .*match its checksum"
    ):
        read_weights(path, "tiny")
    weights["image_encoder.neck.0.weight"][0] = torch.nan
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r"not finite: image_encoder\.neck\.0\.weight"):
        read_weights(path, "tiny")


def test_mobile_sam_without_its_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mobile_sam", None)
    with pytest.raises(ImportError, match=r"pip install git\+https://github.com/Chao"):
        build_sam(config(MODEL="mobile"), "cpu")


def test_mobile_sam_comes_from_its_package(monkeypatch):
    made = build_sam(config(), "cpu").train()
    package = SimpleNamespace(sam_model_registry={"vit_t": lambda: made})
    monkeypatch.setitem(sys.modules, "mobile_sam", package)
    sam = build_sam(config(MODEL="mobile"), "cpu")
    assert sam is made
    assert not any(module.training for module in sam.modules())  # batch norm among them


def test_segment_anything_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "segment_anything", None)
    with pytest.raises(ImportError, match=r'pip install "clouds-dgss\[sam\]"'):
        build_sam(config(MODEL="vit_b"), "cpu")


# ------------------------------------------------------------------- superpixels


def test_majority_by_hand():
    segments = np.array([[0, 0, 1, 1], [0, 0, 1, 3], [3, 3, 3, 3]])
    classes = np.array([[7, 7, 2, 4], [7, 1, 255, 9], [9, 0, 0, 255]], np.uint8)
    winners, shares = majority_vote(segments, classes)
    # 0: 7 x3 of 4. 1: 2 and 4 once each, 255 has no vote. 3: 9 and 0 twice each, of 5.
    assert winners.tolist() == [[7, 7, 2, 2], [7, 7, 2, 0], [0, 0, 0, 0]]
    expected = [[3 / 4] * 2 + [1 / 3] * 2, [3 / 4] * 2 + [1 / 3, 2 / 5], [2 / 5] * 4]
    assert np.allclose(shares, expected)
    assert winners.dtype == np.uint8 and shares.dtype == np.float32


def test_a_segment_where_nobody_votes():
    winners, shares = majority_vote(np.array([[0, 1]]), np.array([[255, 3]], np.uint8))
    assert winners.tolist() == [[255, 3]]
    assert shares.tolist() == [[0, 1]]


def test_majority_segment_by_segment():
    generator = np.random.default_rng(0)
    segments = generator.integers(0, 40, (50, 70))
    classes = generator.choice(np.array([0, 3, 18, 255], np.uint8), (50, 70))
    winners, shares = majority_vote(segments, classes)
    for segment in range(40):
        inside = segments == segment
        votes = [(classes[inside] == kind).sum() for kind in (0, 3, 18)]
        assert (winners[inside] == (0, 3, 18)[int(np.argmax(votes))]).all()
        assert np.allclose(shares[inside], max(votes) / inside.sum())


def test_superpixels_bring_a_shifted_label_back_to_the_edge():
    image = np.full((64, 96, 3), (30, 60, 200), np.uint8)
    image[:, 41:] = (220, 190, 40)
    truth = np.where(np.arange(96) < 41, 2, 10).astype(np.uint8) + np.zeros((64, 1), np.uint8)
    shifted = np.roll(truth, 3, axis=1)
    shifted[:, :3] = 2
    cfg = get_cfg()
    cfg.MODEL.CLOUDS.REFINER = "superpixel"
    label = PseudoLabel(torch.from_numpy(shifted), torch.ones(64, 96))
    refined = refine(cfg, [torch.from_numpy(image).permute(2, 0, 1)], [label], [0])[0]
    assert refined.labels.tolist() == [2, 10]
    assert (refined.class_map().numpy() == truth).all()
    assert (shifted != truth).sum() == 3 * 64
    assert refined.covered.all() and refined.points is None
    assert refined.agreement[:, :20].min() == 1 and refined.agreement[:, 42].max() < 1


@pytest.mark.parametrize("ruler", [10.0, 40.0])
def test_superpixels_are_scikit_images(ruler):
    """Whose SLIC stretches RGB to its full range first: here it is full already."""
    from skimage.segmentation import slic

    image = image_of((96, 160)).permute(1, 2, 0).numpy()
    assert (image.min(), image.max()) == (0, 255)
    theirs = slic(image, 150, ruler, max_num_iter=5, enforce_connectivity=False, start_label=0)
    assert (superpixels(image, (96 * 160 / 150) ** 0.5, ruler) == theirs).mean() > 0.98


def test_the_size_of_superpixels():
    image = image_of((96, 160)).permute(1, 2, 0).numpy()
    for size in (8, 16):
        count = len(np.unique(superpixels(image, size, 10.0)))
        assert 0.7 < count * size**2 / (96 * 160) < 1.3


def test_an_image_smaller_than_a_superpixel():
    assert len(np.unique(superpixels(np.zeros((5, 7, 3), np.uint8), 16, 10.0))) == 1


def test_superpixels_without_scikit_image(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    with pytest.raises(ImportError, match="pip install scikit-image"):
        superpixels(np.zeros((8, 8, 3), np.uint8), 4, 10.0)


# ---------------------------------------------------------------------- registry


def test_none_hands_the_label_on():
    cfg = config()
    cfg.MODEL.CLOUDS.REFINER = "none"
    label = label_of()
    label.classes[0, :7] = 255
    refined = refine(cfg, [image_of()], [label], [0])[0]
    assert (refined.class_map() == label.classes).all()
    assert (refined.agreement == (label.classes != 255)).all()
    assert refined.points is None


def test_sam_switched_off_is_none():
    cfg = config(ENABLED=False, WEIGHTS="/no/such/file")
    label = label_of()
    refined = refine(cfg, [image_of()], [label], [0])[0]
    assert (refined.class_map() == label.classes).all()
    cfg.MODEL.CLOUDS.REFINER = "superpixel"  # which the switch does not concern
    assert (refine(cfg, [image_of()], [label], [0])[0].class_map() != label.classes).any()


def test_an_unknown_refiner():
    cfg = get_cfg()
    cfg.MODEL.CLOUDS.REFINER = "sam2"
    with pytest.raises(
        ValueError, match="'sam2'; registered are: none, regions, sam, sam_text, superpixel"
    ):
        build_refiner(cfg, "cpu")


def test_one_of_your_own():
    made = []

    def registered_here(cfg, device):
        made.append((cfg, device))
        return "mine"

    REFINER_REGISTRY.register(registered_here)
    try:
        cfg = get_cfg()
        cfg.MODEL.CLOUDS.REFINER = "registered_here"
        assert build_refiner(cfg, "cpu") == "mine"
        assert made == [(cfg, torch.device("cpu"))]
    finally:
        del REFINER_REGISTRY._obj_map["registered_here"]


def test_options_come_from_the_config():
    assert SamOptions.from_config(get_cfg()) == SamOptions()
    cfg = config(RM_INTERSECTION=False, OVERLAP="published", REFINEMENT=True, NUM_POINTS=3)
    options = SamOptions(100, PointOptions(num_points=3), False, "published")
    assert SamOptions.from_config(cfg) == options
    assert build_refiner(cfg, "cpu").predict_masks.second_pass
