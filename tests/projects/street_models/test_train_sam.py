"""Training of Street-SAM: losses, initialization, steps, resuming, and weights that load."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from street_models.sam_data import SamExample, SamExamples
from street_models.train_sam import (
    Options,
    Step,
    Training,
    learning_rate,
    main,
    mask_ious,
    mask_losses,
    region_contrast,
    train,
)
from torchvision.ops import sigmoid_focal_loss

from clouds.config import get_cfg
from clouds.self_training.refiners.sam import model
from clouds.self_training.refiners.sam.backends import build_point_sam
from clouds.self_training.refiners.sam.frame import Frame
from clouds.self_training.refiners.sam.model import random_sam
from clouds.weights_io import read_safetensors

SMALL = Options(iterations=4, batch=1, prompts=2, seed=3)


@pytest.fixture
def small(monkeypatch):
    """Street-SAM for images of 64 pixels."""
    monkeypatch.setattr(model, "STREET_SIDE", 64)


def random_logits(*shape):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_the_mask_loss_is_20_focal_plus_dice():
    logits, targets = random_logits(2, 3, 4, 6), (random_logits(2, 4, 6) > 0).float()
    losses = mask_losses(logits, targets)
    for k in range(2):
        for m in range(3):
            focal = sigmoid_focal_loss(logits[k, m], targets[k], alpha=-1, reduction="mean")
            p, t = logits[k, m].sigmoid(), targets[k]
            dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
            assert float(losses[k, m]) == pytest.approx(float(20 * focal + dice), rel=1e-5)


def test_a_pixel_that_is_partly_in_the_mask_gets_its_share():
    logit = torch.zeros(1, 1, 1, 1, requires_grad=True)
    target = torch.full((1, 1, 1), 0.3)
    for _ in range(400):
        (gradient,) = torch.autograd.grad(mask_losses(logit, target).sum(), logit)
        logit = (logit - 0.5 * gradient).detach().requires_grad_()
    assert 0.2 < logit.sigmoid().item() < 0.5


def test_ious_by_hand():
    logits = torch.tensor([[[[1.0, 1.0], [-1.0, -1.0]], [[-1.0, 1.0], [1.0, 1.0]]]])
    target = torch.tensor([[[1.0, 0.2], [0.6, 0.0]]])
    assert mask_ious(logits, target).tolist() == [[pytest.approx(1 / 3), pytest.approx(1 / 4)]]


def with_regions(regions, classes, samples):
    nothing = torch.zeros(0)
    return SamExample(
        nothing, nothing, nothing, nothing, torch.tensor(regions), torch.tensor(classes),
        torch.tensor(samples),
    )  # fmt: skip


def test_the_contrast_of_regions_by_hand():
    """Three regions in one row of five pixels, the last in none; the first two have a class."""
    features = torch.tensor([[2.0, 0.0, 0.0, 1.0, 9.0], [0.0, 3.0, 1.0, 1.0, 9.0]])[:, None]
    # pixels: (1, 0), (0, 1) | (0, 1) | (1, 1); region 0 is represented by its first pixel alone
    example = with_regions([[0, 0, 1, 2, -1]], [4, 4, 7], [[0, 0], [2, 2], [3, 3]])
    half = math.sqrt(0.5)
    losses = []
    # cosines of each pixel with the centers (1, 0), (0, 1), (half, half); region 1 is of the class
    # of region 0 and does not count for its pixels, and the other way round
    for own, others in ((1.0, [half]), (0.0, [half]), (1.0, [half]), (1.0, [half, half])):
        total = sum(math.exp(c / 0.1) for c in [own, *others])
        losses.append(math.log(total) - own / 0.1)
    regions = [(losses[0] + losses[1]) / 2, losses[2], losses[3]]
    expected = 0.5 * sum(losses) / 4 + 0.5 * sum(regions) / 3
    assert region_contrast(features, example).item() == pytest.approx(expected, rel=1e-5)


def test_a_view_without_regions_has_no_contrast():
    example = with_regions([[-1, -1]], [], np.zeros((0, 5), int).tolist())
    features = torch.ones(2, 1, 2, requires_grad=True)
    loss = region_contrast(features, example)
    loss.backward()
    assert loss.item() == 0 and not features.grad.any()


def test_learning_rates():
    options = Options(iterations=400, learning_rate=2.0, warmup=10)
    # it falls in the last 70 % of the steps, 280
    rates = [learning_rate(options, i) for i in (0, 4, 9, 100, 120, 260, 399)]
    assert rates == pytest.approx([0.2, 1.0, 2.0, 2.0, 2.0, 1.0, 2 / 280])


def test_a_step_decodes_as_the_mask_decoder(small, scenes):
    sam = random_sam("street", 0)
    example = SamExamples(scenes, Frame.of_segment_anything(sam), 0)(0, 3, 4)
    encoder = sam.prompt_encoder
    with torch.no_grad():
        [embedding] = sam.image_encoder(example.pixels[None])
        logits, ious = Step(sam)._decode(embedding, example, True, None)
        sparse, dense = encoder(
            points=(example.points, torch.ones(example.points.shape[:2])),
            boxes=example.boxes,
            masks=None,
        )
        for many, slots in ((True, slice(1, None)), (False, slice(0, 1))):
            expected, expected_ious = sam.mask_decoder(
                embedding[None], encoder.get_dense_pe(), sparse, dense, many
            )
            torch.testing.assert_close(logits[:, slots], expected)
            torch.testing.assert_close(ious[:, slots], expected_ious)


def test_it_learns_an_image_by_heart(small, scenes, tmp_path):
    training = Training(tmp_path, scenes, Options(seed=1))
    example = training.examples(0, 4, 5)
    values = []
    for _ in range(25):
        losses = training.step([example], False, False)
        training.optimizer.zero_grad()
        losses.total.backward()
        training.optimizer.step()
        values.append(losses.total.item())
    assert values[-1] < 0.7 * values[0]


@pytest.mark.parametrize(("boxes", "second_pass"), [(False, False), (True, True)])
def test_a_step_trains_all_parts(boxes, second_pass, small, scenes, tmp_path):
    training = Training(tmp_path, scenes, SMALL)
    losses = training.step([training.examples(0, 3, 5)], boxes, second_pass)
    losses.total.backward()
    assert math.isfinite(losses.total.item())
    unused = {n for n, p in training.sam.named_parameters() if p.grad is None}
    # of the pyramid, the two finest levels alone are used
    assert all("pyramid.layer_blocks" in name for name in unused)


def test_training_in_two_runs_writes_the_weights_of_one(small, scenes, tmp_path, monkeypatch):
    train(Training(tmp_path / "whole", scenes, SMALL), tmp_path / "whole.safetensors", 1e9)
    original = Training.run_step

    def cut(self):
        if self.iteration == 3:
            raise KeyboardInterrupt
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "run_step", cut)
        with pytest.raises(KeyboardInterrupt):
            train(Training(tmp_path / "cut", scenes, SMALL), tmp_path / "cut.safetensors", -1)
    again = Training(tmp_path / "cut", scenes, SMALL)
    again.resume()
    assert again.iteration == 3
    train(again, tmp_path / "cut.safetensors", 1e9)
    mine, theirs = (read_safetensors(tmp_path / f"{run}.safetensors") for run in ("cut", "whole"))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    train(again, tmp_path / "other.safetensors", 1e9)  # no step is left
    other = read_safetensors(tmp_path / "other.safetensors")
    assert all(torch.equal(other[name], theirs[name]) for name in theirs)


def test_a_run_starts_from_given_weights(small, scenes, tmp_path):
    train(Training(tmp_path / "first", scenes, SMALL), tmp_path / "first.safetensors", 1e9)
    given = str(tmp_path / "first.safetensors")
    still = replace(SMALL, iterations=1, learning_rate=0.0, weight_decay=0.0, seed=5)
    train(
        Training(tmp_path / "second", scenes, replace(still, initial_weights=given)),
        tmp_path / "second.safetensors",
        1e9,
    )
    first, second = (
        read_safetensors(tmp_path / f"{run}.safetensors") for run in ("first", "second")
    )
    assert all(torch.equal(second[name], first[name]) for name in first)
    with pytest.raises(FileNotFoundError, match="no file nowhere"):
        Training(tmp_path, scenes, replace(still, initial_weights="nowhere"))


def test_a_run_may_get_more_steps_but_no_other_options(small, scenes, tmp_path):
    training = Training(tmp_path, scenes, Options(iterations=40, batch=1, prompts=2, warmup=5))
    training.iteration = 12
    training.save()
    longer = Training(tmp_path, scenes, Options(iterations=80, batch=1, prompts=2, warmup=5))
    longer.resume()
    assert longer.iteration == 12
    for other in (
        Options(iterations=12, batch=1, prompts=2, warmup=5),  # its learning rate fell already
        Options(iterations=40, batch=1, prompts=3, warmup=5),
        Options(iterations=40, batch=1, prompts=2, warmup=5, seed=4),
    ):
        with pytest.raises(ValueError, match=r"is of a run with .* but this one has"):
            Training(tmp_path, scenes, other).resume()


def test_the_command_trains_and_the_library_loads_its_weights(small, scene_folder, tmp_path):
    words = ["--scenes", scene_folder, "--count", 24, "--size", 80, "160"]
    words += ["--output", tmp_path / "run", "--iterations", 2, "--batch", 1, "--prompts", 2]
    assert main([str(word) for word in words]) == 0
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))
    cfg = get_cfg()
    node = cfg.MODEL.CLOUDS.SAM
    node.MODEL, node.WEIGHTS = "street", str(tmp_path / "run" / "street_sam.safetensors")
    sam = build_point_sam(cfg, torch.device("cpu"))
    image = torch.zeros(3, 32, 64, dtype=torch.uint8)
    points = np.full((2, 5, 2), 9, np.float32)
    [(masks, ious)] = sam.predict_masks(sam.embed([image]), [points], [(32, 64)])
    assert masks.shape == (2, 32, 64) and ious.shape == (2, 3)
