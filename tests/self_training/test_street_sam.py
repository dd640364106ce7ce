"""MODEL.CLOUDS.SAM.MODEL street: encoder, prompts, decoder, and its weights files."""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from tiny_sam import config, image_of

from clouds.files import atomic_write
from clouds.self_training.refiners.sam import similarity_decoder
from clouds.self_training.refiners.sam.backends import build_point_sam
from clouds.self_training.refiners.sam.conv_encoder import ConvEncoder
from clouds.self_training.refiners.sam.model import build_sam, random_sam, read_weights
from clouds.self_training.refiners.sam.prompt_decoder import (
    BestMaskPredictor,
    SegmentAnythingDecoder,
)
from clouds.self_training.refiners.sam.similarity_decoder import (
    CoordinateEncoder,
    gaussians,
    similarities,
)
from clouds.weights_io import write_safetensors


@pytest.fixture(scope="module")
def sam():
    return random_sam("street", 0).eval()


def write(sam, path):
    with atomic_write(path) as file:
        write_safetensors({name: value.half() for name, value in sam.state_dict().items()}, file)


def prompted(sam, points, labels=None, boxes=None, masks=None, embedding=None):
    """All masks and IoUs of prompts."""
    if embedding is None:
        generator = torch.Generator().manual_seed(3)
        embedding = torch.randn(1, 64 + 384, 40, 40, generator=generator)
    encoder = sam.prompt_encoder
    labels = torch.ones(points.shape[:2]) if labels is None else labels
    with torch.no_grad():
        sparse, dense = encoder(points=(points, labels), boxes=boxes, masks=masks)
        return sam.mask_decoder.predict_masks(embedding, encoder.get_dense_pe(), sparse, dense)


def test_the_embedding_has_coarse_and_fine_features():
    encoder = ConvEncoder(64, 8, 2, channels=(8, 16, 24, 32), layers=(1, 1, 1, 1), dim=32)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert encoder(x).shape == (2, 8 + 16 * 2, 8, 8)


def test_coordinates_and_labels_of_prompts(sam):
    points = torch.tensor([[[0.0, 319.0]], [[159.5, 79.5]]])
    boxes = torch.tensor([[0.0, 0.0, 159.5, 159.5], [79.5, 159.5, 319.0, 239.5]])
    sparse, dense = sam.prompt_encoder(points=(points, torch.ones(2, 1)), boxes=boxes, masks=None)
    half = 1 / 320
    expected = [
        [[half - 1, 1 - half, 1], [half - 1, half - 1, 2], [0, 0, 3]],
        [[0, -0.5, 1], [-0.5, 0, 2], [1 - half, 0.5, 3]],
    ]
    torch.testing.assert_close(sparse, torch.tensor(expected))
    assert dense.shape == (2, 2, 160, 160) and not dense.any()
    grid = sam.prompt_encoder.get_dense_pe()
    assert grid.shape == (1, 2, 160, 160)
    assert grid[0, :, 0, 0].tolist() == pytest.approx([-159 / 160] * 2)
    assert grid[0, :, 5, 159].tolist() == pytest.approx([159 / 160, 11 / 160 - 1])


def test_order_and_padding_of_points_make_no_difference(sam):
    points = torch.tensor([[[9.0, 20.0], [100.0, 60.0], [33.0, 90.0]]])
    expected = prompted(sam, points)
    for other, labels in (
        (points[:, [2, 0, 1]], None),
        (torch.cat((points, points[:, :1] + 50), 1), torch.tensor([[1, 1, 1, -1]])),
    ):
        for mine, theirs in zip(prompted(sam, other, labels), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_prompts_are_decoded_independently(sam):
    points = torch.tensor([[[9.0, 20.0]], [[100.0, 60.0]]])
    boxes = torch.tensor([[0.0, 0.0, 50.0, 50.0], [90.0, 30.0, 150.0, 90.0]])
    both = prompted(sam, points, boxes=boxes)
    for index in range(2):
        part = slice(index, index + 1)
        for mine, theirs in zip(prompted(sam, points[part], boxes=boxes[part]), both, strict=True):
            torch.testing.assert_close(mine, theirs[part], rtol=1e-4, atol=1e-4)


def test_a_prompt_of_a_box_whose_points_are_all_padding(sam):
    """It is decoded alone as beside a prompt with points, wherever the padding lies."""
    points = torch.tensor([[[9.0, 20.0]], [[100.0, 60.0]]])
    boxes = torch.tensor([[0.0, 0.0, 50.0, 50.0], [90.0, 30.0, 150.0, 90.0]])
    both = prompted(sam, points, torch.tensor([[-1], [1]]), boxes)
    for moved in (0.0, 77.0):
        alone = prompted(sam, points[:1] + moved, torch.tensor([[-1]]), boxes[:1])
        for mine, theirs in zip(alone, both, strict=True):
            torch.testing.assert_close(mine, theirs[:1], rtol=1e-4, atol=1e-4)


def test_inference_is_what_was_trained(sam):
    """With gradients the maps of all prompts are computed together."""
    generator = torch.Generator().manual_seed(5)
    embedding = torch.randn(1, 64 + 384, 40, 40, generator=generator)
    points = torch.rand(5, 3, 2, generator=generator) * 300
    encoder = sam.prompt_encoder
    sparse, dense = encoder(points=(points, torch.ones(5, 3)), boxes=None, masks=None)
    trained = sam.mask_decoder.predict_masks(embedding, encoder.get_dense_pe(), sparse, dense)
    assert trained[0].requires_grad
    for mine, theirs in zip(prompted(sam, points, embedding=embedding), trained, strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-4, atol=1e-4)


def test_prompts_at_once_do_not_matter(sam):
    generator = torch.Generator().manual_seed(4)
    embeddings = [torch.randn(64 + 384, 40, 40, generator=generator)]
    points = [np.random.default_rng(0).uniform(0, 90, (9, 5, 2)).astype(np.float32)]
    found = [
        next(iter(BestMaskPredictor(decoder, True)(embeddings, points, [(96, 160)])))
        for decoder in (SegmentAnythingDecoder(sam, at_once) for at_once in (1, 4, 8))
    ]
    assert found[0][0].shape == (9, 96, 160)
    for masks, ious in found[1:]:
        torch.testing.assert_close(ious, found[0][1], rtol=1e-4, atol=1e-4)
        assert (masks == found[0][0]).float().mean() > 0.999


def test_boxes_and_masks_matter(sam):
    points = torch.tensor([[[9.0, 20.0]]])
    plain = prompted(sam, points)[0]
    mask = torch.full((1, 1, 160, 160), 4.0)
    for more in ({"boxes": torch.tensor([[0.0, 0.0, 50.0, 50.0]])}, {"masks": mask}):
        assert (prompted(sam, points, **more)[0] - plain).abs().max() > 1e-3


def test_background_points_are_refused(sam):
    with pytest.raises(ValueError, match=r"foreground points .* alone"):
        prompted(sam, torch.zeros(1, 2, 2), labels=torch.tensor([[1, 0]]))
    with pytest.raises(ValueError, match="needs foreground points"):
        sam.prompt_encoder(points=None, boxes=torch.zeros(1, 4), masks=None)
    with pytest.raises(ValueError, match="needs foreground points"):
        prompted(sam, torch.zeros(1, 0, 2), boxes=torch.zeros(1, 4))


def test_similarity_is_that_of_cosine_similarity():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 5, 8, 8, generator=generator)
    # centers of pixels (row 2, column 3) and (6, 1); the third point is padding
    points = torch.tensor([[[-1 + 7 / 8, -1 + 5 / 8], [-1 + 3 / 8, -1 + 13 / 8], [0.0, 0.0]]])
    mean, largest = similarities(image, points, torch.tensor([[True, True, False]]))[0]
    each = [
        torch.nn.functional.cosine_similarity(image[0], image[0, :, r, c, None, None], dim=0)
        for r, c in ((2, 3), (6, 1))
    ]
    torch.testing.assert_close(mean, (each[0] + each[1]) / 2)
    torch.testing.assert_close(largest, torch.maximum(*each))


def test_gaussians_fall_with_the_distance_to_the_nearest_point():
    positions = torch.tensor([[[-0.5, 0.5]], [[0.0, 0.0]]])  # x, y of two pixels
    points = torch.tensor([[[-0.5, 0.03], [0.5, 0.24], [0.5, 0.0]]])
    found = gaussians(positions, points, torch.tensor([[True, True, False]]))[0]
    expected = [[math.exp(-0.5), math.exp(-32)], [math.exp(-(0.25**2) / 2), math.exp(-2)]]
    torch.testing.assert_close(found, torch.tensor(expected)[:, None])


def test_an_image_of_a_batch_is_embedded_as_alone(sam):
    x = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(
            sam.image_encoder(x)[1:], sam.image_encoder(x[1:]), rtol=1e-4, atol=1e-4
        )


def test_padding_is_not_encoded(sam):
    """The encoder of the part that is no padding, and zeros beside it."""
    x = torch.zeros(2, 3, 256, 256)
    generator = torch.Generator().manual_seed(1)
    x[0, :, :100, :256] = torch.randn(3, 100, 256, generator=generator)
    x[1, :, :, :64] = torch.randn(3, 256, 64, generator=generator)
    encoder = sam.image_encoder
    with torch.no_grad():
        found = encoder(x)
        for own, image, (height, width) in zip(found, x, ((128, 256), (256, 64)), strict=True):
            part = image[None, :, :height, :width]
            half, *others = encoder.trunk(part)
            quarter, eighth, *_ = encoder.pyramid(dict(enumerate(others))).values()
            coarse = encoder.coarse(eighth)[0]
            rows, columns = height // 8, width // 8
            torch.testing.assert_close(own[:64, :rows, :columns], coarse, atol=1e-4, rtol=1e-4)
            fine = encoder.fine(torch.cat((encoder.quarter(quarter), half), 1))[0]
            stacked = own[64:, :rows, :columns].reshape(24, 4, 4, rows, columns)
            # channel, row in the block, column in the block, row of blocks, column of blocks
            unstacked = stacked.permute(0, 3, 1, 4, 2).reshape(24, 4 * rows, 4 * columns)
            torch.testing.assert_close(unstacked, fine, atol=1e-4, rtol=1e-4)
            assert not own[:, rows:].any() and not own[:, :, columns:].any()


def test_masks_of_a_padded_image_are_those_of_its_part(sam):
    """A decoder for a frame of half the size, whose embedding has no padding."""
    generator = torch.Generator().manual_seed(2)
    part = torch.randn(1, 64 + 384, 20, 20, generator=generator)
    padded = torch.nn.functional.pad(part, (0, 20, 0, 20))
    points = torch.tensor([[[9.0, 20.0], [100.0, 60.0]], [[33.0, 90.0], [40.0, 80.0]]])
    logits, ious = prompted(sam, points, embedding=padded)
    prompts = CoordinateEncoder(64 + 384, 20, 160)
    sparse, dense = prompts(points=(points, torch.ones(2, 2)), boxes=None, masks=None)
    with torch.no_grad(), gaussian_scales_of_the_whole_frame():
        expected, expected_ious = sam.mask_decoder.predict_masks(
            part, prompts.get_dense_pe(), sparse, dense
        )
    torch.testing.assert_close(logits[..., :80, :80], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ious, expected_ious, atol=1e-4, rtol=1e-4)
    # beyond it, the logits of the border
    torch.testing.assert_close(
        logits[..., 80:, :80], logits[..., 79:80, :80].expand(-1, -1, 80, -1)
    )
    torch.testing.assert_close(logits[..., 80:], logits[..., 79:80].expand(-1, -1, -1, 80))


@contextmanager
def gaussian_scales_of_the_whole_frame():
    """Widths of the Gaussians, in units of half the frame, for a frame of half the size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similarity_decoder, "SCALES", tuple(2 * s for s in similarity_decoder.SCALES))
        yield


def test_random_weights_are_a_function_of_the_seed():
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first, again, other = (random_sam("street", seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    name = "image_encoder.coarse.2.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_masks_are_those_of_segment_anythings_own_predictor(sam, tmp_path):
    write(sam, tmp_path / "sam.safetensors")
    cfg = config(MODEL="street", WEIGHTS=str(tmp_path / "sam.safetensors"))
    ours, loaded = build_point_sam(cfg, torch.device("cpu")), build_sam(cfg, "cpu")
    image = image_of((96, 160))
    points = np.random.default_rng(0).uniform(0, 95, (3, 5, 2)).astype(np.float32)
    predictor = SamPredictor(loaded)
    predictor.set_image(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    [(masks, ious)] = ours.predict_masks(ours.embed([image]), [points], [(96, 160)])
    for own, mask, iou in zip(points, masks, ious, strict=True):
        expected, expected_ious, _ = predictor.predict(own, np.ones(5))
        assert iou.numpy() == pytest.approx(expected_ious, abs=1e-3)
        chosen = expected[expected_ious.argmax()]
        assert (mask.numpy() == chosen).mean() > 0.995


def test_the_weights_say_which_model_they_are_of(sam, tmp_path):
    write(sam, tmp_path / "sam.safetensors")
    weights = read_weights(tmp_path / "sam.safetensors", "street")
    assert weights.keys() == sam.state_dict().keys()
    with pytest.raises(ValueError, match=r"seems to hold street, but .* is tiny"):
        read_weights(tmp_path / "sam.safetensors", "tiny")


def test_an_altered_file_is_named_with_its_hash_and_the_command(sam, tmp_path):
    path = tmp_path / "sam.safetensors"
    write(sam, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    record = {"sha256": digest, "command": "python -m street_models.train_sam"}
    (tmp_path / "sam.record.json").write_text(json.dumps(record))
    read_weights(path, "street")
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError) as caught:
        build_sam(config(MODEL="street", WEIGHTS=str(path)), "cpu")
    altered = hashlib.sha256(path.read_bytes()).hexdigest()
    for part in ("MODEL.CLOUDS.SAM.WEIGHTS", digest, altered, record["command"]):
        assert part in str(caught.value)
