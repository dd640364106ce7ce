"""benchmarks/step.py: a ratio means something only where both ways do the same."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers_weights import randomize

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("transformers")
pytest.importorskip("segment_anything")
sys.path.insert(0, str(ROOT / "benchmarks"))
import published_step  # noqa: E402
import step  # noqa: E402
from gpu_common import SMALL_HEAD  # noqa: E402
from part_clock import PartClock  # noqa: E402

WORDS = ["--clip", "clouds_tiny", "--sam", "tiny", "--size", "128", "--source", "1"]
WORDS += ["--generated", "1", "--untimed", "0"]
SETTINGS = [str(word) for pair in SMALL_HEAD.items() for word in pair]


def build(folder):
    args = step.parse([*WORDS, *SETTINGS])
    return step.Parts(args, step.config(args, folder), torch.device("cpu"))


@pytest.fixture
def fresh(tmp_path):
    torch.manual_seed(0)
    return build(tmp_path)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """For tests that do not depend on the weights, which other tests change."""
    return build(tmp_path_factory.mktemp("parts"))


def losses_of(parts, phase):
    ways = parts.ways(phase)
    first = step.OURS if phase == "warmup" else step.COLD
    return [ways[name](PartClock(lambda: None)) for name in (step.PUBLISHED, first)]


@pytest.mark.parametrize("phase", ["warmup", "joint"])
def test_both_have_the_same_losses_except_for_random_points(fresh, phase):
    published, ours = losses_of(fresh, phase)
    assert (
        set(published) == set(ours) and len(ours) == 3 * SMALL_HEAD["MODEL.MASK_FORMER.DEC_LAYERS"]
    )
    for name, loss in ours.items():
        assert published[name] == pytest.approx(loss, rel=0.05), name
    assert sum(published.values()) == pytest.approx(sum(ours.values()), rel=0.01)


def test_both_steps_change_weights_equally(fresh):
    """AdamW's first step is the learning rate times the gradient's sign."""
    before = fresh.published.head.class_embed.weight.detach().clone()
    losses_of(fresh, "warmup")
    theirs = fresh.published.head.class_embed.weight.detach() - before
    ours = fresh.ours.trainer.model.sem_seg_head.predictor.class_embed.weight.detach() - before
    assert theirs.abs().median() == pytest.approx(1e-5, rel=0.1)
    assert (theirs.sign() == ours.sign()).float().mean() > 0.9


def test_both_refine_a_label_equally(parts):
    (sample,), (given,) = parts.generated, parts.given
    labels, masks = parts.published.refine(sample["clean_image"], given, sample["seed"])
    teacher = [step.PseudoLabel(torch.zeros(given.shape, dtype=torch.uint8), torch.ones(1))]
    (refined,) = parts.ours.refiner.refine([sample["clean_image"]], teacher, [sample["seed"]])
    assert len(labels) > 5
    assert labels.tolist() == refined.labels.tolist()
    assert masks.sum() > 100
    differ = (masks.bool() != refined.masks).sum()  # our embeddings are in half precision
    assert differ < 0.05 * masks.sum()


def test_ours_computes_an_embedding_only_with_an_empty_cache(parts):
    ways = parts.ways("joint")
    embed = parts.ours.refiner.refiner.embed
    computed = []
    for name in (step.COLD, step.WARM, step.WARM, step.COLD):
        before = embed.computed
        ways[name](PartClock(lambda: None))
        computed.append(embed.computed - before)
    assert computed == [1, 0, 0, 1]


def test_the_teachers_of_both_predict_the_same_label(parts):
    images = [parts.generated[0]["clean_image"]]
    published, model = parts.published, parts.ours.trainer.model
    head = randomize(model.pseudo_labeler.teacher_parts["sem_seg_head"])
    with torch.no_grad():  # queries differ in their classes and masks
        head.predictor.query_feat.weight.mul_(10)
        for layer in head.predictor.transformer_self_attention_layers:
            layer.self_attn.out_proj.weight.mul_(0.1)
        head.predictor.class_embed.weight.mul_(20)
        head.predictor.class_embed.bias.zero_()
        head.predictor.mask_embed.layers[-1].weight.mul_(20)
    published.teacher.load_weights(head)
    (theirs,) = published.predict_labels(published.features(images), images[0].shape[-2:])
    (ours,) = model.predict_pseudo_labels(images)
    assert len(np.unique(theirs)) > 2
    assert (ours.classes.numpy() == theirs).mean() > 0.999


def test_parts_are_measured_and_sum_to_the_whole(parts):
    ways = parts.ways("joint")
    taken = step.measure(ways, 0, 1, torch.device("cpu"))
    for name, (one,) in taken.items():
        assert set(one.parts) == set(step.PARTS)
        assert all(seconds > 0 for seconds in one.parts.values()), (name, one.parts)
        assert sum(one.parts.values()) == pytest.approx(one.cpu, rel=0.05)


def test_ignored_pixels_get_the_nearest_class():
    label = np.array([[3, 255, 255, 7], [3, 3, 255, 255]], np.uint8)
    assert step.without_ignore(label).tolist() == [[3, 3, 7, 7], [3, 3, 3, 7]]


def test_the_script_prints_both_phases(capsys):
    step.main([*WORDS, *SETTINGS])
    output = capsys.readouterr().out
    assert output.count(published_step.LOSSES) == 2
    for words in ("warmup step, 2 labelled", "joint step, 1 labelled", step.COLD, step.WARM):
        assert words in output
    step.main([*WORDS, "--only", "ours", "--phase", "warmup", *SETTINGS])
    assert step.PUBLISHED not in capsys.readouterr().out
