"""Region labels: segment_anything's mask generator, loops over pixels and a plain EM as oracles."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_sam import build_tiny_sam, config, image_of, label_of
from tiny_sam_models import save

from clouds.self_training.refiners import build_refiner
from clouds.self_training.refiners.base import PseudoLabel
from clouds.self_training.refiners.sam.automatic_masks import (
    AutomaticOptions,
    automatic_masks,
    segments_of,
)
from clouds.self_training.refiners.sam.backends import PointSam
from clouds.self_training.refiners.sam.predictor import ImageEmbedder
from clouds.self_training.refiners.sam.prompt_decoder import SegmentAnythingDecoder
from clouds.self_training.refiners.sam.prompts import find_components
from clouds.self_training.refiners.sam.region_filter import noise_probabilities, region_losses
from clouds.self_training.refiners.sam.regions import (
    RegionOptions,
    RegionRefiner,
    Regions,
    grown_boxes,
    impurity,
    purest_points,
    stuff_regions,
    without_noise,
)

SIZE = (96, 160)
CPU = torch.device("cpu")
ANY_MASK = AutomaticOptions(6, -1.0, 0.3, 0.7)


@pytest.fixture(scope="module")
def sam():
    """With logits far from zero: masks at the thresholds +1 and -1 differ a little."""
    model = build_tiny_sam()
    for layers in model.mask_decoder.output_hypernetworks_mlps:
        layers.layers[-1].weight *= 300
        layers.layers[-1].bias *= 300
    return model


def point_sam(sam):
    return PointSam(ImageEmbedder(sam), None, SegmentAnythingDecoder(sam))


def options(**settings):
    return RegionOptions(**{"things": (3, 4), "automatic": ANY_MASK} | settings)


def scores_of(label, num_classes=19):
    """A semantic map whose largest scores are the label's classes, with its confidence."""
    scores = torch.full((num_classes, *label.classes.shape), 0.01)
    return scores.scatter_(0, label.classes[None].long(), 0.5 + 0.4 * label.confidence[None])


# ---------------------------------------------------------------- automatic masks


@pytest.mark.parametrize("size", [SIZE, (61, 83)])
@pytest.mark.parametrize("thresholds", [(-100.0, 0.3, 1.0), (0.01, 0.4, 1.0), (-100.0, 0.3, 0.97)])
def test_automatic_masks_equal_segment_anythings(sam, size, thresholds):
    from segment_anything import SamAutomaticMaskGenerator

    generator = SamAutomaticMaskGenerator(
        sam,
        points_per_side=6,
        pred_iou_thresh=thresholds[0],
        stability_score_thresh=thresholds[1],
        box_nms_thresh=thresholds[2],
    )
    image = image_of(size)
    expected = generator.generate(image.permute(1, 2, 0).numpy())
    expected = [each for each in expected if each["area"]]
    model = point_sam(sam)
    embedding = model.embed([image])[0]
    masks = automatic_masks(model.decoder, embedding, size, AutomaticOptions(6, *thresholds))
    assert len(masks) == len(expected) > (2 if thresholds[2] == 1 else 0)
    for ours, theirs in zip(masks, expected, strict=True):
        assert (ours.numpy() == theirs["segmentation"]).mean() > 0.999


def test_small_masks_lie_over_large_ones():
    masks = torch.zeros(3, 4, 6, dtype=torch.bool)
    masks[0, 1, 1:3] = True
    masks[1, :, :5] = True
    masks[2, :2, :4] = True
    assert segments_of(masks).tolist() == [
        [2, 2, 2, 2, 1, 0],
        [2, 3, 3, 2, 1, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 0],
    ]


def test_an_image_without_a_mask(sam):
    model = point_sam(sam)
    strict = AutomaticOptions(4, 100.0, 0.9, 0.7)
    masks = automatic_masks(model.decoder, model.embed([image_of()])[0], SIZE, strict)
    assert masks.shape == (0, *SIZE)
    label = replace(label_of(), scores=scores_of(label_of()))
    refiner = RegionRefiner(model, options(automatic=strict, things=()))
    refined = refiner.refine([image_of()], [label], [0])[0]
    assert torch.equal(refined.class_map(), label.classes)  # the teacher's


# ----------------------------------------------------------------- stuff and things


def test_stuff_segment_by_segment():
    generator = np.random.default_rng(0)
    segments = generator.integers(0, 30, (40, 50))
    classes = generator.choice(np.array([0, 1, 2, 3, 4, 255], np.uint8), (40, 50))
    found = stuff_regions(segments, classes, options(min_share=0.22))
    labels = found.class_map()
    num_labelled = 0
    for number in range(30):
        inside = segments == number
        shares = [(classes[inside] == kind).mean() for kind in (0, 1, 2)]
        expected = int(np.argmax(shares)) if max(shares) > 0.22 and number else 255
        assert (labels[inside] == expected).all()
        num_labelled += expected != 255
        if expected != 255:
            assert len(np.unique(found.ids[inside])) == 1
    assert 0 < num_labelled < 29
    assert len(found.classes) == num_labelled == found.ids.max() + 1
    nothing = stuff_regions(np.zeros((4, 5), np.int64), classes[:4, :5], options())
    assert len(nothing.classes) == 0 and (nothing.class_map() == 255).all()


def test_impurity_pixel_by_pixel():
    classes = np.random.default_rng(0).choice(np.array([0, 3, 255], np.uint8), (20, 26))
    found = impurity(classes)
    for row, column in ((0, 0), (10, 13), (19, 3), (5, 25)):
        window = classes[max(0, row - 8) : row + 9, max(0, column - 8) : column + 9]
        share = np.array([(window == kind).mean() for kind in (0, 3, 255)])
        assert found[row, column] == pytest.approx(-(share * np.log(share)).sum(), abs=1e-5)


def test_purest_points_and_boxes_by_hand():
    classes = np.full((30, 40), 9, np.uint8)
    classes[4:24, 6:36] = 3  # 20 x 30
    classes[27, 0:2] = 4
    components = find_components(np.where(classes == 9, np.uint8(255), classes))
    purity = impurity(classes)
    points = purest_points(components, purity, 3)
    pixels = [(row, column) for row in range(4, 24) for column in range(6, 36)]
    for number, (x, y) in enumerate(points[0]):
        part = pixels[200 * number : 200 * (number + 1)]
        assert (int(y), int(x)) in part
        assert purity[int(y), int(x)] == min(purity[pixel] for pixel in part)
    # a component of two pixels, three points
    assert {tuple(point) for point in points[1].tolist()} == {(0, 27), (1, 27)}
    # grown by 1.25 * 600 / 100 = 7.5; by 1.25 * 2 / 6 within the image
    boxes = grown_boxes(components, 1.25)
    assert boxes[0].tolist() == [0, 0, 39, 29]
    assert np.allclose(boxes[1], [0, 27 - 2.5 / 6, 1 + 2.5 / 6, 27 + 2.5 / 6])


def test_things_are_masks_of_box_and_points(sam):
    """Against segment_anything's predictor."""
    from segment_anything import SamPredictor

    label = label_of()
    refiner = RegionRefiner(
        point_sam(sam), options(noise="none", automatic=AutomaticOptions(2, 100.0, 1, 1))
    )
    assert not refiner.needs_scores
    refined = refiner.refine([image_of()], [label], [0])[0]
    classes = label.classes.numpy()
    things = np.where((classes == 3) | (classes == 4), classes, np.uint8(255))
    components = find_components(things, 9)
    points = purest_points(components, impurity(classes), 2)
    assert torch.equal(refined.points, torch.from_numpy(points))
    boxes = grown_boxes(components, 1.25)
    predictor = SamPredictor(sam)
    predictor.set_image(image_of().permute(1, 2, 0).numpy())
    masks = [
        predictor.predict(own, np.ones(2), box, multimask_output=False)[0][0]
        for own, box in zip(points, boxes, strict=True)
    ]
    expected = np.full(SIZE, 255, np.uint8)
    for index in sorted(range(len(masks)), key=lambda i: -masks[i].sum()):
        expected[masks[index]] = components.classes[index]
    assert (expected != 255).any()
    assert (refined.class_map().numpy() == expected).mean() > 0.999
    # the agreement of a region is the share of its pixels with the teacher's class
    assert ((refined.agreement > 0) <= torch.from_numpy(expected != 255)).float().mean() > 0.999


# ------------------------------------------------------------------------- noise


def grid_regions(rows, columns, cell=8):
    """Squares of `cell` pixels, numbered in rows."""
    numbers = np.arange(rows * columns).reshape(rows, columns)
    return np.kron(numbers, np.ones((cell, cell), np.int64))


def test_losses_region_by_region():
    generator = np.random.default_rng(0)
    scores = generator.random((4, 12, 15)).astype(np.float32)
    scores[:, 0] *= 0.01  # sums below 1 are not scaled up
    regions = generator.integers(-1, 6, (12, 15))
    regions[regions == 4] = -1
    found = region_losses(torch.from_numpy(scores), torch.from_numpy(regions), 6)
    for region in (0, 1, 2, 3, 5):
        sums = np.zeros(4)
        for row, column in np.argwhere(regions == region):
            pixel = scores[:, row, column]
            sums += -np.log(pixel / max(pixel.sum(), 1))
        assert np.allclose(found[region], sums / (regions == region).sum(), atol=1e-5)
    assert (found[4] == 0).all()


def plain_em(values, steps=200):
    """Posterior of the upper of two Gaussians."""
    means, variances, shares = np.array([values.min(), values.max()]), np.full(2, 0.1), [0.5, 0.5]
    for _ in range(steps):
        densities = shares * np.exp(-((values[:, None] - means) ** 2) / (2 * variances))
        densities /= np.sqrt(2 * np.pi * variances)
        weights = densities / densities.sum(1, keepdims=True)
        shares = weights.mean(0)
        means = (weights * values[:, None]).sum(0) / weights.sum(0)
        variances = (weights * (values[:, None] - means) ** 2).sum(0) / weights.sum(0) + 5e-4
    return weights[:, means.argmax()]


@pytest.mark.parametrize("seed", range(5))
def test_noise_probabilities_are_those_of_a_plain_em(seed):
    generator = np.random.default_rng(seed)
    losses = np.concatenate([generator.normal(0.5, 0.15, 60), generator.normal(3, 0.6, 15)])
    scaled = (losses - losses.min()) / np.ptp(losses)
    found = noise_probabilities(losses)
    assert np.abs(found - plain_em(scaled)).max() < 0.02
    assert (found[:60] < 0.5).mean() > 0.95 and (found[60:] > 0.5).mean() > 0.9
    assert np.allclose(noise_probabilities(losses * 7 + 3), found)


def test_one_group_has_no_noise():
    for seed in range(5):
        losses = np.random.default_rng(seed).normal(1, 0.2, 60)
        assert (noise_probabilities(losses) == 0).all()
    assert (noise_probabilities(np.array([0.1, 0.1, 0.1, 5.0])) == 0).all()  # too few
    assert (noise_probabilities(np.ones(20)) == 0).all()
    assert len(noise_probabilities(np.zeros(0))) == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noise", ["drop", "relabel"])
def test_regions_planted_wrong_are_found(seed, noise):
    """15 % of regions with another class: at least 80 % go, at most 10 % of the right pixels."""
    generator = np.random.default_rng(seed)
    ids, count = grid_regions(8, 12), 96
    truth = generator.integers(0, 19, count)
    logits = generator.normal(size=(19, *ids.shape)) * 1.5
    rows, columns = np.indices(ids.shape)
    logits[truth[ids], rows, columns] += generator.uniform(2, 4, count)[ids]
    scores = torch.from_numpy(logits).softmax(0).float()
    wrong = generator.permutation(count) < round(0.15 * count)
    given = np.where(wrong, (truth + generator.integers(1, 19, count)) % 19, truth)
    found = without_noise(Regions(ids, given), scores, options(noise=noise)).classes
    still_wrong = found[wrong] == given[wrong]
    assert still_wrong.mean() <= 0.2
    lost = found[~wrong] != truth[~wrong]
    assert lost.mean() <= 0.1
    if noise == "relabel":
        assert (found[wrong] == truth[wrong]).mean() >= 0.8
    else:
        assert set(found[wrong & (found != given)].tolist()) == {255}


def test_covered_regions_do_not_count():
    ids = grid_regions(3, 4)
    ids[ids == 5] = 4
    scores = torch.full((5, *ids.shape), 0.2)
    classes = np.zeros(12, np.int64)
    found = without_noise(Regions(ids, classes), scores, options(things=()))
    assert (found.classes == 0).all()


# ------------------------------------------------------------------------ refiner


def region_config(folder="", model="tiny"):
    cfg = config(CACHE_DIR=str(folder), MODEL=model)
    cfg.MODEL.CLOUDS.REFINER = "regions"
    cfg.DATASETS.TRAIN = ("gta5", "sd_x")
    node = cfg.MODEL.CLOUDS.REGIONS
    node.POINTS_PER_SIDE, node.PRED_IOU_THRESH, node.STABILITY_SCORE_THRESH = 4, -1.0, 0.1
    node.THINGS = ("wall", "fence")  # train ids 3 and 4
    return cfg


@pytest.mark.parametrize("family", ["tiny", "sam2", "sam_hq"])
def test_regions_and_their_cache(family, tmp_path):
    model = family if family == "tiny" else save(family, tmp_path / family)
    images = [image_of(), image_of((61, 83), 1), image_of(seed=2)]
    labels = [label_of(), label_of((61, 83), 1), label_of(seed=2)]
    labels = [replace(label, scores=scores_of(label)) for label in labels]
    without = build_refiner(region_config(model=model), CPU).refine(images, labels, [0, 1, 2])
    epochs, prompts = [], []
    for _ in range(2):
        refiner = build_refiner(region_config(tmp_path / "cache", model), CPU)
        assert refiner.needs_scores
        decode = refiner.decoder.decode

        def counted(embedding, own, multimask, masks=None, decode=decode):
            prompts.append(multimask)
            return decode(embedding, own, multimask, masks)

        refiner.decoder.decode = counted
        epochs.append(refiner.refine(images, labels, [0, 1, 2]))
        prompts.append("end")
    first, second = (prompts[: prompts.index("end")], prompts[prompts.index("end") + 1 : -1])
    assert True in first and True not in second  # no grid in the second epoch
    assert refiner.embed.computed == 0
    for once, again, exact, label in zip(*epochs, without, labels, strict=True):
        assert torch.equal(once.masks, again.masks) and torch.equal(once.agreement, again.agreement)
        assert (once.class_map() == exact.class_map()).float().mean() > 0.97  # half precision
        assert once.masks.shape[1:] == label.classes.shape
        assert once.masks.sum(0).max() <= 1
        assert ((once.agreement >= 0) & (once.agreement <= 1)).all()
        assert (once.agreement[~once.covered] == 0).all()


def test_fill_cache_computes_embeddings_and_masks(tmp_path):
    refiner = build_refiner(region_config(tmp_path), CPU)
    refiner.fill_cache([image_of(), image_of(seed=1)])
    assert len(list(tmp_path.glob("*.npe"))) == len(list(tmp_path.glob("segments/*.npe"))) == 2
    again = build_refiner(region_config(tmp_path), CPU)
    again.fill_cache([image_of()])
    assert again.embed.computed == 0
    # masks of other options are others
    cfg = region_config(tmp_path)
    cfg.MODEL.CLOUDS.REGIONS.BOX_NMS_THRESH = 0.5
    build_refiner(cfg, CPU).fill_cache([image_of()])
    assert len(list(tmp_path.glob("segments/*.npe"))) == 3


def test_no_images():
    assert build_refiner(region_config(), CPU).refine([], [], []) == []


def test_options_come_from_the_config():
    cfg = region_config()
    assert RegionOptions.from_config(cfg) == options(
        automatic=AutomaticOptions(4, -1.0, 0.1, 0.7), things=(3, 4)
    )
    cfg.MODEL.CLOUDS.REGIONS.THINGS = ("car", "tree", "lamp")
    with pytest.raises(ValueError, match=r"has no class tree, lamp\. Name those .* vegetation"):
        build_refiner(cfg, CPU)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.mixture", None)
    with pytest.raises(ImportError, match=r"REGIONS.FILTER needs scikit-learn: pip install"):
        noise_probabilities(np.arange(20.0))


def test_a_label_that_names_no_class(sam):
    label = PseudoLabel(torch.full(SIZE, 255, dtype=torch.uint8), torch.zeros(SIZE))
    refiner = RegionRefiner(point_sam(sam), options(noise="none"))
    refined = refiner.refine([image_of()], [label], [0])[0]
    assert refined.masks.shape == (0, *SIZE) and (refined.agreement == 0).all()
