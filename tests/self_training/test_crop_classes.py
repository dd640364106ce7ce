"""Classes of regions by the teacher and CLIP: crops, zero-shot classes, their combination."""

from __future__ import annotations

import dataclasses
import functools
import math

import cv2
import numpy as np
import open_clip
import pytest
import torch
from torch.nn import functional as F

from clouds.config import get_cfg
from clouds.data.label_space import CITYSCAPES_19
from clouds.modeling.backbone.open_clip_models import create_clip
from clouds.modeling.crop_classifier import CropClassifier, build_crop_classifier
from clouds.modeling.text_classifier import TEMPLATES
from clouds.self_training.pseudo_labeler import configured_refiner
from clouds.self_training.refiners.base import NoRefiner, PseudoLabel, RefinedLabel
from clouds.self_training.refiners.crop_classes import (
    CropClasses,
    CropClassOptions,
    crop_box,
    region_probabilities,
)
from clouds.self_training.refiners.sam.prompts import find_components

NAMES = (("road",), ("car", "truck"), ("sky",))


@pytest.fixture(scope="module")
def clip_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_clip("street_clip")


class Fixed:
    """Log-probabilities that are given, and the boxes that were asked for."""

    def __init__(self, *rows):
        self.rows, self.boxes = torch.tensor(rows), []

    def __call__(self, image, boxes):
        self.boxes += boxes
        return self.rows[: len(boxes)]


def logs(*probabilities):
    return [math.log(p) for p in probabilities]


def component(shape, top, left, bottom, right):
    label = np.full(shape, 255, np.uint8)
    label[top:bottom, left:right] = 3
    return find_components(label)


@pytest.mark.parametrize(
    ("shape", "region", "expected"),
    [
        # side 1.2 * sqrt(20 * 30) = 29.4, center (50, 95)
        ((100, 200), (40, 80, 60, 110), (36, 80, 29)),
        # at the border the square is shifted into the image
        ((100, 200), (0, 180, 20, 200), (0, 176, 24)),
        # at least 0.15 and at most 0.6 of the shorter side
        ((100, 200), (48, 98, 52, 102), (42, 92, 15)),
        ((100, 200), (0, 20, 100, 180), (20, 70, 60)),
        # a pole is cut around its middle pixel, row 40 of 10..70, column 52: 1.2 * sqrt(240) = 19
        ((100, 200), (10, 50, 70, 54), (30, 42, 19)),
    ],
)
def test_a_crop_is_a_square_around_the_region(shape, region, expected):
    box = crop_box(component(shape, *region), 0)
    assert box[2] == expected[2]
    assert box[:2] == pytest.approx(expected[:2], abs=1)


def test_classes_of_crops_are_those_of_open_clip(clip_model):
    classifier = CropClassifier(clip_model, "street_clip", NAMES)
    image = torch.randint(0, 256, (3, 90, 120), generator=torch.Generator().manual_seed(1))
    image = cv2.GaussianBlur(image.permute(1, 2, 0).numpy().astype(np.uint8), (0, 0), 4)
    found = classifier(torch.from_numpy(image).permute(2, 0, 1), [(10, 20, 64), (26, 0, 64)])
    tokenizer = open_clip.get_tokenizer("street_clip")
    mean, std = ([122.7709383, 116.7460125, 104.09373615], [68.5005327, 66.6321579, 70.32316305])
    with torch.no_grad():
        rows = []
        for name in ("road", "car", "truck", "sky"):
            texts = clip_model.encode_text(tokenizer([t.format(name) for t in TEMPLATES]))
            rows.append(F.normalize(F.normalize(texts, dim=-1).mean(0), dim=0))
        scale = clip_model.logit_scale.exp()
        for row, (top, left) in zip(found, ((10, 20), (26, 0)), strict=True):
            crop = image[top : top + 64, left : left + 64].astype(np.float32)
            x = torch.from_numpy((crop - np.array(mean)) / np.array(std)).float()
            embedding = F.normalize(clip_model.encode_image(x.permute(2, 0, 1)[None])[0], dim=0)
            road, car, truck, sky = (float(scale * (embedding @ text)) for text in rows)
            logits = torch.tensor([road, max(car, truck), sky])
            torch.testing.assert_close(row, logits - logits.logsumexp(0), atol=1e-4, rtol=1e-4)


def test_probabilities_of_a_region_are_means_over_its_pixels():
    scores = torch.tensor([[[0.9, 0.2, 3.0]], [[0.3, 0.2, 1.0]]])  # sums 1.2, 0.4, 4
    found = region_probabilities(scores, torch.tensor([[1, 1, 0]]), 2)
    expected = [[0.75, 0.25], [(0.75 + 0.2) / 2, (0.25 + 0.2) / 2]]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert region_probabilities(scores * 0, torch.zeros(1, 3).long(), 1).min() > 0


def halves(confidence):
    """Teacher's label: class 0 on the left, class 1 on the right, each with `confidence`."""
    scores = torch.full((3, 10, 20), (1 - confidence) / 2)
    scores[0, :, :10] = scores[1, :, 10:] = confidence
    classes = scores.argmax(0).to(torch.uint8)
    return PseudoLabel(classes, scores.amax(0), scores)


IMAGE = torch.zeros(3, 10, 20, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("weight", "changes"),
    # the teacher: log 0.8 - log 0.1 = 2.08 for its class; CLIP: log 0.9 - log 0.05 = 2.89 against
    [(0.5, False), (0.71, False), (0.73, True), (1.0, True)],
)
def test_teacher_and_clip_decide_together(weight, changes):
    clip = Fixed(logs(0.05, 0.05, 0.9), logs(1e-3, 0.998, 1e-3))
    refiner = CropClasses(NoRefiner(), clip, CropClassOptions(weight, min_area=50))
    label = halves(0.8)
    [refined] = refiner.refine([IMAGE], [label], [0])
    left = 2 if changes else 0
    assert refined.class_map()[:, :10].eq(left).all()
    assert refined.class_map()[:, 10:].eq(1).all()
    # 0 where the teacher's class is another one (changes), or CLIP's is (it does not change)
    assert refined.agreement[:, :10].eq(0).all()
    assert refined.agreement[:, 10:].eq(1).all()
    assert len(clip.boxes) == 2


def test_agreement_is_the_share_of_the_teacher_where_clip_agrees():
    label = halves(0.8)
    label.classes[:3, :10] = 2  # 30 of the left region's pixels, in the refiner's label alone
    refiner = CropClasses(
        Fill(torch.tensor([0, 1])),
        Fixed(logs(0.8, 0.1, 0.1), logs(0.1, 0.1, 0.8)),
        CropClassOptions(0.5, 50),
    )
    [refined] = refiner.refine([IMAGE], [label], [0])
    assert refined.class_map()[0].tolist() == [0] * 10 + [1] * 10
    assert refined.agreement[:, :10].eq(0.7).all()
    assert refined.agreement[:, 10:].eq(0).all()  # CLIP alone: class 2


class Fill:
    """A refiner of two classes, left and right."""

    needs_scores = False

    def __init__(self, labels):
        self.labels = labels

    def refine(self, images, labels, seeds):
        masks = torch.zeros(2, 10, 20, dtype=torch.bool)
        masks[0, :, :10] = masks[1, :, 10:] = True
        return [RefinedLabel(self.labels, masks, torch.ones(10, 20))]


def test_small_regions_keep_their_class():
    label = halves(0.4)
    label.classes[:, :3] = 2
    clip = Fixed(logs(1e-6, 1e-6, 1 - 2e-6))
    refiner = CropClasses(NoRefiner(), clip, CropClassOptions(1.0, min_area=100))
    [refined] = refiner.refine([IMAGE], [label], [0])
    columns = refined.class_map()[0]
    assert columns.tolist() == [2] * 3 + [0] * 7 + [2] * 10  # 30, 70 and 100 pixels
    assert len(clip.boxes) == 1


class Middle:
    """A refiner whose masks cover columns 5 to 14 alone, as class 0."""

    needs_scores = False

    def refine(self, images, labels, seeds):
        mask = torch.zeros(1, 10, 20, dtype=torch.bool)
        mask[:, :, 5:15] = True
        return [RefinedLabel(torch.tensor([0]), mask, mask[0].float() * 0.5)]


@pytest.mark.parametrize("fill", [False, True])
def test_pixels_in_no_mask_are_regions_of_the_teacher_where_they_get_its_class(fill):
    label = halves(0.4)
    clip = Fixed(*[logs(1e-6, 1e-6, 1 - 2e-6)] * 3)
    refiner = CropClasses(Middle(), clip, CropClassOptions(1.0, 50, fill))
    [refined] = refiner.refine([IMAGE], [label], [0])
    columns = refined.class_map()[0].tolist()
    # with `fill` columns 0 to 14 are one region of class 0, and 15 to 19 are one of class 1
    assert columns == ([2] * 20 if fill else [255] * 5 + [2] * 10 + [255] * 5)
    assert len(clip.boxes) == (2 if fill else 1)
    assert refined.agreement[0, 0] == 0 and refined.agreement[0, 7] == 0


class Segments:
    """A refiner whose columns 0-3, 4-9, 10-19 are segments of classes 0, 0, 1; 2 rows in none."""

    needs_scores = False

    def refine(self, images, labels, seeds):
        classes = torch.zeros(10, 20, dtype=torch.uint8)
        classes[:, 10:] = 1
        classes[8:] = 255
        segments = torch.tensor([7] * 4 + [300] * 6 + [2] * 10).repeat(10, 1)
        segments[8:] = -1
        refined = RefinedLabel.from_teacher(PseudoLabel(classes, torch.ones(10, 20)))
        return [dataclasses.replace(refined, segments=segments)]


@pytest.mark.parametrize("fill", [False, True])
def test_neighboring_segments_of_one_class_get_different_classes(fill):
    # the regions of the teacher's classes, of the last two rows, come first
    first = 4 if fill else 2
    clip = Fixed(*[logs(0.9, 0.05, 0.05)] * first, logs(1e-4, 1e-4, 1 - 2e-4))
    refiner = CropClasses(Segments(), clip, CropClassOptions(1.0, 20, fill))
    [refined] = refiner.refine([IMAGE], [halves(0.4)], [0])
    # numbers in ascending order: segment 2 (columns 10-19), 7 (0-3), 300 (4-9)
    expected = [0] * 4 + [2] * 6 + [0] * 10
    assert refined.class_map()[:8].tolist() == [expected] * 8
    assert refined.class_map()[8:].eq(0 if fill else 255).all()
    assert len(clip.boxes) == (5 if fill else 3)


def test_a_segment_of_two_parts_has_two_regions():
    numbers = np.array([[260, 260, 3, 260], [255, 255, 3, 260]], np.int32)
    found = find_components(numbers)
    assert found.classes.tolist() == [3, 260, 260]
    assert found.ids.tolist() == [[1, 1, 0, 2], [-1, -1, 0, 2]]
    assert found.areas.tolist() == [2, 2, 2]


def test_a_model_without_classifier_is_refused():
    cfg = get_cfg()
    cfg.MODEL.CLOUDS.REFINER, cfg.MODEL.CLOUDS.CROP_CLASSES.WEIGHT = "none", 0.5
    with pytest.raises(ValueError, match=r"CROP_CLASSES.WEIGHT is positive, but .* no classifier"):
        configured_refiner(cfg, None, torch.device("cpu"))


def test_street_clip_corrects_a_teacher_that_is_not_sure(rendered_bus):
    """The weights of the demo, through the config: a bus that the teacher calls a building."""
    image, mask = rendered_bus
    bus, building = (CITYSCAPES_19.names.index(name) for name in ("bus", "building"))
    scores = torch.full((19, *mask.shape), 0.01)
    scores[0] = 0.8
    scores[:, mask] = 0.01
    scores[building, mask], scores[bus, mask] = 0.45, 0.35
    label = PseudoLabel(scores.argmax(0).to(torch.uint8), scores.amax(0), scores)
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("gta5",)
    node = cfg.MODEL.CLOUDS
    node.REFINER, node.CROP_CLASSES.WEIGHT = "none", 0.5
    node.CLIP_MODEL_NAME = node.CLIP_PRETRAINED_WEIGHTS = "street_clip"
    make = functools.partial(build_crop_classifier, cfg)
    refiner = configured_refiner(cfg, make, torch.device("cpu"))
    [refined] = refiner.refine([image], [label], [0])
    assert refined.class_map()[mask].eq(bus).all()


@pytest.fixture
def rendered_bus():
    """An image (3, H, W) of an unseen look, and the largest bus in it as a mask (H, W)."""
    from street_renderer.dataset_writer import Recipe, render_sample

    bus = CITYSCAPES_19.names.index("bus")
    for index in range(40):
        scene = render_sample(Recipe.of("bdd_val", 1, (160, 320)), index)
        components = find_components(scene.label, 800)
        found = [i for i, c in enumerate(components.classes) if c == bus]
        if found:
            mask = torch.from_numpy(components.ids == found[0])
            return torch.from_numpy(scene.image.copy()).permute(2, 0, 1), mask
    raise AssertionError("no image has a bus")
