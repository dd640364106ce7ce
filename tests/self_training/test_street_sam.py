"""MODEL.CLOUDS.SAM.MODEL street: a SAM with a convolutional encoder, and its weights files."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from tiny_sam import config, image_of

from clouds.files import atomic_write
from clouds.self_training.refiners.sam.backends import build_point_sam
from clouds.self_training.refiners.sam.conv_encoder import ConvEncoder
from clouds.self_training.refiners.sam.model import build_sam, random_sam, read_weights
from clouds.weights_io import write_safetensors


@pytest.fixture(scope="module")
def sam():
    return random_sam("street", 0).eval()


def write(sam, path):
    with atomic_write(path) as file:
        write_safetensors({name: value.half() for name, value in sam.state_dict().items()}, file)


def test_the_encoder_uses_all_of_its_weights():
    encoder = ConvEncoder(64, 16, channels=(8, 16, 24, 32), layers=(1, 1, 1, 1), dim=32)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    embedding = encoder(x)
    assert embedding.shape == (2, 16, 8, 8)
    embedding.square().mean().backward()
    unused = [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
    # a fresh ResNet's blocks are the identity, by a zero in their last normalization; of the
    # pyramid, the finest level alone is used
    assert all("conv" in name or "bn1" in name or "layer_blocks" in name for name in unused)


def test_an_image_of_a_batch_is_embedded_as_alone(sam):
    x = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(
            sam.image_encoder(x)[1:], sam.image_encoder(x[1:]), rtol=1e-4, atol=1e-4
        )


def test_random_weights_are_a_function_of_the_seed():
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first, again, other = (random_sam("street", seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    name = "image_encoder.neck.2.weight"
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
