"""SAMs of transformers at their published sizes, with random weights: each refines one image.

The published configurations are those of transformers' conversions of the published weights. They
are the defaults of the configuration classes, except for EdgeTAM: its default builds a ResNet-50
instead of RepViT-M1, with which no forward pass runs (see `sam_models.py`).
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
from tiny_sam import config, image_of

from clouds.self_training.refiners import build_refiner
from clouds.self_training.refiners.base import PseudoLabel

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from sam_models import FAMILIES, build_random, save_random

pytest.importorskip("transformers", minversion="5")
pytestmark = pytest.mark.slow

SIZE = (768, 768)
ROAD, CAR = 0, 13
# Side of the mask logits, and how many numbers the levels of the image encoder's output have.
POINT_MODELS = {
    "edgetam": (256, 32 * 256**2 + 64 * 128**2 + 256 * 64**2),
    "sam2": (256, 32 * 256**2 + 64 * 128**2 + 256 * 64**2),
    "sam": (256, 256 * 64**2),
    "sam_hq": (256, 256 * 64**2 + 768 * 64**2),
    "sam3_tracker": (288, 32 * 288**2 + 64 * 144**2 + 256 * 72**2),
}
TEXT_MODEL = (288, 1024 * 72**2)


@pytest.fixture(autouse=True)
def one_network_in_memory():
    yield
    gc.collect()


def label():
    """Road in the left half, a car in the right one: two components."""
    classes = torch.full(SIZE, ROAD, dtype=torch.uint8)
    classes[:, SIZE[1] // 2 :] = CAR
    return PseudoLabel(classes, torch.ones(SIZE))


def refine_twice(cfg, encoder_of):
    """Both results, the network's outputs in the first call, and the number of encoder calls."""
    refiner = build_refiner(cfg, torch.device("cpu"))
    network = refiner.embed.embed.network
    outputs, encoded = [], []
    network.register_forward_hook(lambda _module, _inputs, out: outputs.append(out))
    encoder_of(network).register_forward_hook(lambda *_: encoded.append(1))
    first = refiner.refine([image_of(SIZE)], [label()], [0])[0]
    of_first = list(outputs)
    second = refiner.refine([image_of(SIZE)], [label()], [0])[0]
    return first, second, of_first, len(encoded)


def check(first, second, num_encoded, cache, num_values):
    """What holds for refiners with and without points."""
    assert num_encoded == 1  # the second time the embedding comes from the cache
    (entry,) = cache.iterdir()
    assert entry.stat().st_size == 64 + 2 * num_values  # a header, and half precision
    for refined in (first, second):
        assert refined.masks.dtype == torch.bool and refined.masks.shape[1:] == SIZE
        assert set(refined.labels.tolist()) <= {ROAD, CAR}
        assert refined.agreement.isfinite().all()
    assert torch.equal(first.masks, second.masks)


def parameters(network):
    return sum(each.numel() for each in network.parameters())


def test_numbers_of_parameters_are_the_published_ones():
    import segment_anything
    import transformers

    with torch.device("meta"):  # allocates nothing
        built = {family: build_random(family) for family in FAMILIES}
        vit_b = segment_anything.sam_model_registry["vit_b"]()
        sam2_with_memory = transformers.Sam2VideoModel(transformers.Sam2VideoConfig())
    count = {family: parameters(network) for family, network in built.items()}
    # the matrix of position encodings (2, 128), a buffer in segment-anything
    assert count["sam"] == parameters(vit_b) + 2 * 128
    # SAM-HQ's paper: 4.1 MB of float32 are added to ViT-B
    assert (count["sam_hq"] - count["sam"]) * 4 / 2**20 == pytest.approx(4.1, abs=0.05)
    # 38.9 million in the table of SAM 2.1's README (38.96, cut), with the memory for videos
    assert parameters(sam2_with_memory) == pytest.approx(38.9e6, abs=0.1e6)
    for part in ("vision_encoder", "prompt_encoder", "mask_decoder"):
        ours, theirs = (getattr(each, part) for each in (built["sam2"], sam2_with_memory))
        assert parameters(ours) == parameters(theirs)
    # EdgeTAM's README: the image encoder in half precision has about 9.6 MB
    encoder = built["edgetam"].vision_encoder
    assert 2e-6 * parameters(encoder) == pytest.approx(9.6, rel=0.05)
    # SAM 3 has 848 million, those of the tracker included; detector and tracker share the encoder
    assert count["sam3"] == pytest.approx(848e6, rel=0.02)
    tracker = built["sam3_tracker"]
    assert parameters(tracker.vision_encoder) == parameters(built["sam3"].vision_encoder)
    assert parameters(tracker.mask_decoder) == parameters(built["sam2"].mask_decoder)


@pytest.mark.parametrize("family", POINT_MODELS)
def test_refining_by_points(family, tmp_path):
    side, num_values = POINT_MODELS[family]
    model = save_random(family, tmp_path / family)
    cache = tmp_path / "cache"
    cfg = config(MODEL=model, SIZE_THRESHOLD=5000, CACHE_DIR=str(cache), RM_INTERSECTION=False)
    first, second, outputs, encoded = refine_twice(cfg, lambda network: network.vision_encoder)
    check(first, second, encoded, cache, num_values)
    assert first.points.shape == (2, cfg.MODEL.CLOUDS.SAM.NUM_POINTS, 2)
    logits = torch.cat([out.pred_masks.flatten(0, 1) for out in outputs])
    ious = torch.cat([out.iou_scores.flatten(0, 1) for out in outputs])
    assert logits.shape == (2, 3, side, side) and ious.shape == (2, 3)
    assert logits.isfinite().all() and ious.isfinite().all()
    assert logits.std() > 0


def test_refining_by_class_names(tmp_path):
    side, num_values = TEXT_MODEL
    model = save_random("sam3", tmp_path / "sam3")
    cache = tmp_path / "cache"
    options = {"TEXT_SCORE_THRESHOLD": 0.0, "RM_INTERSECTION": False}
    cfg = config(MODEL=model, SIZE_THRESHOLD=5000, CACHE_DIR=str(cache), **options)
    cfg.MODEL.CLOUDS.REFINER = "sam_text"
    cfg.DATASETS.TRAIN = ("gta5", "sd_x")
    first, second, outputs, encoded = refine_twice(cfg, lambda net: net.vision_encoder.backbone)
    check(first, second, encoded, cache, num_values)
    assert len(outputs) == 2  # a prompt for each class in the label
    for out in outputs:
        assert out.pred_masks.shape == (1, 200, side, side)
        assert out.pred_masks.isfinite().all() and out.pred_logits.isfinite().all()
