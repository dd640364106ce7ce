"""Training of Street-CLIP: the loss, resuming, and weights that the library's loader reads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from street_models.crops import CropSampler
from street_models.scenes import Scenes
from street_models.train_clip import (
    Options,
    Trainer,
    contrastive_loss,
    learning_rate,
    main,
    train,
    write_weights,
)
from torch.nn import functional as F

from clouds.modeling.backbone.clip import CLIP
from clouds.modeling.backbone.open_clip_models import create_clip
from clouds.weights_io import read_safetensors

SMALL = Options(steps=4, batch_size=6, lr=1e-3, seed=3)


@pytest.fixture(scope="module")
def sampler(scene_folder):
    return CropSampler(Scenes(scene_folder / "train"))


@pytest.fixture
def no_scores(monkeypatch):
    """No zero-shot classification at checkpoints, which takes as long as many small steps."""
    monkeypatch.setattr("street_models.train_clip.classify", lambda model, x: np.zeros(len(x), int))


def random_pairs(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, 5, generator=generator, dtype=torch.float64)


def test_without_equal_captions_it_is_the_loss_of_clip():
    images, texts = random_pairs(6)
    logits = 7 * F.normalize(images) @ F.normalize(texts).T
    diagonal = torch.arange(6)
    expected = (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2
    loss = contrastive_loss(images, texts, torch.tensor(7.0), list("abcdef"))
    torch.testing.assert_close(loss, expected)


def test_equal_captions_are_positives_by_a_double_loop():
    images, texts = random_pairs(5)
    groups = ["car", "x", "car", "car", "y"]
    cosine = [[float(F.cosine_similarity(i, t, dim=0)) for t in texts] for i in images]
    total = 0.0
    for table in (cosine, [list(column) for column in zip(*cosine, strict=True)]):
        for i, row in enumerate(table):
            norm = math.log(sum(math.exp(3 * value) for value in row))
            same = [j for j in range(5) if groups[j] == groups[i]]
            total -= sum((3 * row[j] - norm) / len(same) for j in same) / 5
    loss = contrastive_loss(images, texts, torch.tensor(3.0, dtype=torch.float64), groups)
    assert float(loss) == pytest.approx(total / 2)


def test_learning_rates():
    options = Options(steps=1100, lr=2.0)
    assert learning_rate(0, options) == pytest.approx(0.02)
    assert learning_rate(99, options) == pytest.approx(2.0)
    assert learning_rate(600, options) == pytest.approx(1.0)  # in the middle of the cosine
    assert learning_rate(1100, options) == pytest.approx(0.0)


def test_steps_change_all_parameters(sampler):
    trainer = Trainer(Options(steps=12, batch_size=16, lr=2e-2))
    before = {n: p.clone() for n, p in trainer.averaged.named_parameters()}
    losses = [trainer.train_step(sampler) for _ in range(2)]
    assert all(math.isfinite(loss) for loss in losses)
    assert abs(losses[0] - math.log(16)) < 1.5  # chance
    changed = [n for n, p in trainer.averaged.named_parameters() if not torch.equal(p, before[n])]
    assert len(changed) == len(before)


def test_it_learns_one_batch_by_heart(sampler):
    """The same crops again and again: the loss falls far below that of chance."""

    class SameBatch:
        def __init__(self):
            rng = np.random.default_rng(0)
            self.crops = [sampler.draw(rng) for _ in range(8)]
            self.next = 0

        def draw(self, rng):
            self.next += 1
            return self.crops[(self.next - 1) % 8]

    batch = SameBatch()
    trainer = Trainer(Options(steps=10_000, batch_size=8, lr=3e-2))
    losses = [trainer.train_step(batch) for _ in range(15)]
    assert min(losses) < 0.5 * losses[0]


def test_an_interrupted_run_ends_bit_for_bit_as_a_whole_one(sampler, tmp_path):
    whole = Trainer(SMALL)
    for _ in range(4):
        whole.train_step(sampler)
    first = Trainer(SMALL)
    for _ in range(2):
        first.train_step(sampler)
    torch.save(first.state(), tmp_path / "state.pt")
    second = Trainer(SMALL)
    second.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.step == 2
    for _ in range(2):
        second.train_step(sampler)
    for name in ("model", "averaged"):
        mine, theirs = (t.state()[name] for t in (second, whole))
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_a_run_with_other_options_is_not_continued(sampler):
    state = Trainer(SMALL).state()
    with pytest.raises(ValueError, match=r"'seed': 3.*this one has.*'seed': 4"):
        Trainer(Options(steps=4, batch_size=6, lr=1e-3, seed=4)).load_state(state)


def test_the_weights_load_as_any_others(tmp_path):
    model = create_clip("street_clip")
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    write_weights(model, tmp_path / "weights.safetensors")
    loaded = create_clip("street_clip", str(tmp_path / "weights.safetensors"))
    for (name, mine), (_, theirs) in zip(
        loaded.named_parameters(), model.named_parameters(), strict=True
    ):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs.half().float()), name
    clip = CLIP(clip_model=loaded, model_name="street_clip")
    assert float(clip.logit_scale) == pytest.approx(math.exp(3.0))
    features = clip(torch.zeros(1, 3, 64, 96))
    assert {n: tuple(f.shape[1:]) for n, f in features.items()} == {
        "stem": (32, 16, 24), "res2": (32, 16, 24), "res3": (64, 8, 12), "res4": (128, 4, 6),
        "res5": (256, 2, 3), "clip_vis_dense": (256, 2, 3),
    }  # fmt: skip


def test_its_stages_in_chunks_of_pixels_are_the_plain_ones():
    clip = CLIP(clip_model=create_clip("street_clip"), model_name="street_clip")
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    trunk = clip.clip_model.visual.trunk
    with torch.no_grad():
        expected = trunk.stages(trunk.stem(x))
    torch.testing.assert_close(clip(x)["res5"], expected, rtol=1e-4, atol=1e-5)


def test_the_command_renders_trains_and_continues(tmp_path, no_scores):
    words = ["--scenes", tmp_path / "scenes", "--output", tmp_path / "run", "--count", "12"]
    words += ["--held-out", "3", "--size", "64", "128", "--batch-size", "4", "--save-every", "1"]
    arguments = [str(word) for word in words]
    main([*arguments, "--steps", "2"])
    weights = (tmp_path / "run" / "street_clip.safetensors").read_bytes()
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))
    create_clip("street_clip", str(tmp_path / "run" / "street_clip.safetensors"))
    main([*arguments, "--steps", "2"])  # done already
    assert (tmp_path / "run" / "street_clip.safetensors").read_bytes() == weights


def test_training_in_two_runs_writes_the_weights_of_one(
    scene_folder, tmp_path, monkeypatch, no_scores
):
    train_scenes, val_scenes = (Scenes(scene_folder / split) for split in ("train", "val"))
    train(train_scenes, val_scenes, tmp_path / "whole", SMALL, save_every=2)
    steps = []
    original = Trainer.train_step

    def cut(self, sampler):
        if len(steps) == 3:
            raise KeyboardInterrupt
        steps.append(self.step)
        return original(self, sampler)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", cut)
        with pytest.raises(KeyboardInterrupt):
            train(train_scenes, val_scenes, tmp_path / "cut", SMALL, save_every=2)
    train(train_scenes, val_scenes, tmp_path / "cut", SMALL, save_every=2)
    mine, theirs = (
        read_safetensors(tmp_path / run / "street_clip.safetensors") for run in ("cut", "whole")
    )
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
