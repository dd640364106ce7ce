"""One joint step of the published code and of ours with the same weights, images and points.

Refinement by SAM is compared in test_reference_refiners.py; here the recorded pseudo-label replaces
it, so that a difference shows in the test of its cause. Points of the losses are sampled as in the
published code, after `torch.manual_seed(70)`, the seed of the recorded step.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference_files import (
    TEXT_ENCODER,
    facts,
    needs_reference,
    reference_config,
    weights_rule,
)

from clouds.data.structures import Domain
from clouds.engine.optimizer import build_clipping, build_optimizer
from clouds.modeling import criterion
from clouds.modeling.build import build_seeded
from clouds.modeling.matcher import match
from clouds.self_training.refiners.base import RefinedLabel

pytestmark = needs_reference

TOLERANCE = 1e-4
SEED = 70


@pytest.fixture(scope="module")
def cfg():
    cfg = reference_config()
    cfg.MODEL.CLOUDS.ITERATION_UPDATE = 1
    cfg.MODEL.CLOUDS.REFINER = "none"
    cfg.DATASETS.TRAIN = ("gta5", "sd_llama70b_v2")
    return cfg


@pytest.fixture(scope="module")
def model(cfg):
    model = build_seeded(cfg)
    state = model.state_dict()
    part = {name: value for name, value in state.items() if not name.startswith(TEXT_ENCODER)}
    weights_rule().fill(model, part)
    model.pseudo_labeler.teacher.reset()
    model.pseudo_labeler.teacher.update()  # as the published code does before its first step
    return model.train()


@pytest.fixture(scope="module")
def batch(reference):
    """Source, generated, source."""

    def source(name):
        return {
            "image": torch.from_numpy(reference[f"in/joint0/{name}/image"]),
            "sem_seg": torch.from_numpy(reference[f"in/joint0/{name}/labels"]),
            "domain": Domain.SOURCE,
        }

    generated = {
        "image": torch.from_numpy(reference["in/joint0/generated/image_aug"]),
        "clean_image": torch.from_numpy(reference["in/joint0/generated/image"]),
        "domain": Domain.GENERATED,
    }
    return [source("source0"), generated, source("source1")]


@pytest.fixture(scope="module")
def step(cfg, model, batch, reference):
    """Teacher's label, losses, matched pairs, gradient norm and the parameters after the step."""
    teacher, matches = [], []
    recorded = RefinedLabel(
        labels=torch.from_numpy(reference["joint0/pseudo_labels"]),
        masks=torch.from_numpy(reference["joint0/pseudo_masks"]),
        agreement=torch.zeros(256, 320),
    )

    def refine(images, labels, seeds):
        teacher.extend(labels)
        return [recorded]

    def record(*args):
        matches.extend(match(*args))
        return matches

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.pseudo_labeler, "refine", refine)
        patch.setattr(criterion, "match", record)
        torch.manual_seed(SEED)
        losses = model(batch)
    optimizer = build_optimizer(cfg, model)
    sum(losses.values()).backward()
    norm = build_clipping(cfg, optimizer)()
    optimizer.step()
    after = {name: p.detach() for name, p in model.named_parameters()}
    return teacher[0], losses, matches, float(norm), after


def agree(name, ours, theirs, record_property):
    difference = np.abs(np.asarray(ours, np.float64) - theirs)
    record_property(f"largest difference: {name}", float(difference.max()))
    assert (difference <= TOLERANCE + TOLERANCE * np.abs(theirs)).all(), (name, difference.max())


def test_the_teachers_label(step, reference, record_property):
    equal = float((step[0].classes.numpy() == reference["joint0/teacher_sem_seg"]).mean())
    record_property("equal pixels: teacher's label", equal)
    assert equal >= 0.999


@pytest.mark.parametrize("layer", range(10))
def test_matched_pairs_of_all_three_images(layer, step, reference):
    for image in range(3):
        queries, targets = step[2][layer][image]
        published = reference[f"joint0/indices{layer}/img{image}"]
        assert queries.tolist() == published[0].tolist()
        assert targets.tolist() == published[1].tolist()


def test_all_losses(step, record_property):
    published = facts()["joint0/losses"]
    assert step[1].keys() == published.keys() and len(published) == 30
    names = sorted(published)
    ours = [step[1][name].item() for name in names]
    agree("joint losses", ours, np.array([published[name] for name in names]), record_property)


def test_the_gradients_norm(step, record_property):
    published = facts()["joint0/grad_norm_before_clip"]
    agree("gradient norm", step[3], np.array(published), record_property)


STEPPED = ("sem_seg_head.predictor.query_feat.weight", "sem_seg_head.predictor.decoder_norm.weight")


@pytest.mark.parametrize("name", ["void_embedding.weight", *STEPPED])
def test_parameters_after_the_step(name, step, reference, record_property):
    published = reference[f"joint0/after_step/{name}"]
    agree(f"after the step: {name}", step[4][name], published, record_property)


@pytest.mark.parametrize("name", STEPPED)
def test_the_step_has_the_published_direction(name, step, model, reference):
    """The recorded parameters differ from the initial ones by up to twice the learning rate: two
    steps of AdamW, of which only the first is recorded. As the tolerance of the other comparison
    is larger than the whole change, its direction is compared here."""
    shape = reference[f"joint0/after_step/{name}"].shape
    before = weights_rule().value_for(name, shape)
    published = reference[f"joint0/after_step/{name}"] - before
    ours = step[4][name].numpy() - before
    assert 1.5e-5 < np.abs(published).max() < 2.1e-5 and 0.9e-5 < np.abs(ours).max() < 1.1e-5
    assert np.corrcoef(ours.ravel(), published.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("name", STEPPED)
def test_the_step_is_adamws(name, step, model):
    """AdamW's first step by its formula: the learning rate times the gradient's sign."""
    gradient = dict(model.named_parameters())[name].grad.double().numpy()
    before = weights_rule().value_for(name, gradient.shape).astype(np.float32).astype(np.float64)
    # no decay on norm layers and embeddings, which both of these are
    expected = before - 1e-5 * gradient / (np.abs(gradient) + 1e-8)
    np.testing.assert_allclose(step[4][name].numpy(), expected, atol=2e-7)
