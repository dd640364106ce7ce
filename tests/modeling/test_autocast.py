"""What autocast leaves in full precision, and how close the rest is to full precision."""

from __future__ import annotations

import pytest
import torch
from joint_samples import generated, joint_model, source
from tiny_model import tiny_model
from tiny_sam import image_of

from clouds.self_training.refiners.sam.predictor import ImageEmbedder, PointPredictor

BF16 = torch.autocast("cpu", torch.bfloat16)


def test_sams_decoder_is_exact_and_its_encoder_close(tiny_sam):
    image, size = image_of(), (96, 160)
    points = torch.randint(0, 96, (6, 5, 2), generator=torch.Generator().manual_seed(0)).numpy()
    decoder = PointPredictor(tiny_sam)
    points = points.astype("float32")

    def decode(embedding):
        return next(decoder([embedding], [points], [size]))

    exact = ImageEmbedder(tiny_sam)([image])[0]
    masks, ious = decode(exact)
    with BF16:
        rounded = ImageEmbedder(tiny_sam)([image])[0]
        same_masks, same_ious = decode(exact)
        close_masks, _ = decode(rounded)
    assert torch.equal(same_masks, masks) and torch.equal(same_ious, ious)
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()
    assert (close_masks == masks).float().mean() > 0.97
    assert 0.05 < masks.float().mean() < 0.95


@pytest.mark.parametrize("head", ["linear", "text"])
def test_scores_stay_close(head):
    model = tiny_model(MODEL__MASK_FORMER__TRANSFORMER_DECODER_NAME=head).eval()
    batch = [source(3)]
    with torch.no_grad():
        expected = model(batch)[0]["sem_seg"]
        with BF16:
            scores = model(batch)[0]["sem_seg"]
    assert scores.dtype == torch.float32
    assert (scores - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("refiner", ["sam", "superpixel", "none"])
def test_a_joint_step_trains(refiner):
    model = joint_model(
        MODEL__CLOUDS__REFINER=refiner,
        MODEL__CLOUDS__SAM__MODEL="tiny",
        MODEL__CLOUDS__SAM__WEIGHTS="",
        MODEL__CLOUDS__SAM__SIZE_THRESHOLD=10,
    )
    with BF16:
        losses = model([source(0), generated(1)])
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    gradients = [p.grad for p in model.sem_seg_head.parameters()]
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)
    assert any(g.abs().max() > 0 for g in gradients)
