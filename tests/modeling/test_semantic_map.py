"""Semantic maps and the geometric ensemble against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_model import tiny_config
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from clouds.modeling import postprocessing
from clouds.modeling.postprocessing import EnsembleOptions, SemanticMap, geometric_ensemble

NUM_QUERIES, NUM_CLASSES = 23, 5


def semantic_scores(*args):
    return SemanticMap(*args).scores()


def plain_scores(probabilities, mask_logits, padded_size, image_size):
    """All masks at full size at once, in float64."""
    full = F.interpolate(mask_logits[None].double(), padded_size, mode="bilinear")[0].sigmoid()
    scores = torch.einsum("qc,qhw->chw", probabilities.double(), full)
    return scores[:, : image_size[0], : image_size[1]]


def head_outputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.randn(NUM_QUERIES, NUM_CLASSES, generator=generator).softmax(-1)
    return probabilities, 3 * torch.randn(NUM_QUERIES, 8, 12, generator=generator)


@pytest.mark.parametrize("at_once", [1, 7, NUM_QUERIES, 100])
@pytest.mark.parametrize("image_size", [(32, 48), (27, 48), (32, 33), (1, 1)])
def test_scores_against_masks_at_full_size(at_once, image_size):
    probabilities, mask_logits = head_outputs()
    expected = plain_scores(probabilities, mask_logits, (32, 48), image_size)
    scores = semantic_scores(probabilities, mask_logits, (32, 48), image_size, at_once)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factors", [(1, 1), (2, 3), (8, 4), (5, 16)])
@pytest.mark.parametrize("cut", [0, 1, 3, 7])
@pytest.mark.parametrize("elements", [1, 1000, 1 << 30])
def test_every_integer_factor_and_image_size_within_the_padding(
    monkeypatch, factors, cut, elements
):
    monkeypatch.setattr(postprocessing, "SEMANTIC_MAP_CACHE_ELEMENTS", elements)
    probabilities, mask_logits = head_outputs()
    padded = (8 * factors[0], 12 * factors[1])
    size = (padded[0] - cut, padded[1] - cut)
    semantic_map = SemanticMap(probabilities, mask_logits, padded, size, 10)
    expected = plain_scores(probabilities, mask_logits, padded, size).float()
    torch.testing.assert_close(semantic_map.scores(), expected, rtol=1e-5, atol=1e-5)
    assert_classes(semantic_map.classes(size), expected)


def assert_classes(classes, scores):
    """Each class is the argmax, or its score differs from the largest by a rounding error."""
    assert classes.dtype == torch.uint8 and classes.shape == scores.shape[1:]
    assert (scores.amax(0) - scores.gather(0, classes.long()[None])[0]).max() < 1e-5
    assert (classes != scores.argmax(0)).float().mean() < 1e-3


@pytest.mark.parametrize("size", [(27, 45), (54, 90), (13, 11), (101, 45), (27, 31), (1, 1)])
@pytest.mark.parametrize("elements", [1, 1000, 1 << 30])
def test_classes_at_another_size(monkeypatch, size, elements):
    """Bands of one row of logits, of a few rows, and the whole image at once."""
    monkeypatch.setattr(postprocessing, "SEMANTIC_MAP_CACHE_ELEMENTS", elements)
    probabilities, mask_logits = head_outputs(seed=1)
    classes = SemanticMap(probabilities, mask_logits, (32, 48), (27, 45), 10).classes(size)
    scores = plain_scores(probabilities, mask_logits, (32, 48), (27, 45))
    assert_classes(classes, F.interpolate(scores[None], size, mode="bilinear")[0])


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest floating-point tensor created."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point() and out._base is None:
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("size", [(256, 384), (180, 400)])
@pytest.mark.parametrize("at_once", [1, 3, 6])
def test_memory_of_segmenting_is_bounded_by_masks_at_once(monkeypatch, at_once, size):
    monkeypatch.setattr(postprocessing, "SEMANTIC_MAP_CACHE_ELEMENTS", 1 << 30)  # as on a GPU
    torch.manual_seed(0)
    probabilities, mask_logits = torch.rand(30, 4), torch.randn(30, 64, 96)
    semantic_map = SemanticMap(probabilities, mask_logits, (256, 384), (256, 384), at_once)
    with Largest() as largest:
        semantic_map.classes(size)
    # three buffers of masks, and the scores of the same rows
    assert at_once * 256 * 384 / 8 < largest.elements <= at_once * 256 * 384 / 2


def test_masks_that_do_not_fit_the_image():
    with pytest.raises(AssertionError, match="masks of 8x12 do not fit an image of 32x50"):
        SemanticMap(*head_outputs(), (32, 50), (32, 50), 10)


def test_scores_by_hand():
    """Two queries, masks of constant logits: class 0 has 0.5 * 0.2 + 0.9 * 0.6."""
    probabilities = torch.tensor([[0.2, 0.7], [0.6, 0.1]])
    mask_logits = torch.tensor([0.0, np.log(9.0)]).float().view(2, 1, 1).expand(2, 3, 3)
    scores = semantic_scores(probabilities, mask_logits, (6, 6), (4, 5), 1)
    assert scores.shape == (2, 4, 5)
    assert scores[0].flatten().tolist() == pytest.approx([0.64] * 20)
    assert scores[1].flatten().tolist() == pytest.approx([0.44] * 20)


def test_scores_of_half_precision_predictions_are_summed_in_float32():
    probabilities, mask_logits = (t.bfloat16() for t in head_outputs())
    expected = semantic_scores(probabilities.float(), mask_logits.float(), (32, 48), (32, 48), 7)
    with torch.autocast("cpu", torch.bfloat16):
        scores = semantic_scores(probabilities, mask_logits, (32, 48), (32, 48), 7)
    assert torch.equal(scores, expected)


# ------------------------------------------------------------------ geometric ensemble


def class_logits(scale, seed):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(2, 6, NUM_CLASSES + 1, generator=generator)


SEEN = torch.tensor([True, False, True, True, False])


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize(("alpha", "beta"), [(0.4, 0.8), (0.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
def test_ensemble_against_the_product_of_probabilities(alpha, beta):
    head, clip = class_logits(2.0, 0), class_logits(2.0, 1)
    combined = geometric_ensemble(head, clip, SEEN, alpha, beta)
    inside, outside = (softmax(t.double().numpy()[..., :-1]) for t in (head, clip))
    exponent = np.where(SEEN, alpha, beta)
    product = inside ** (1 - exponent) * outside**exponent
    product /= product.sum(-1, keepdims=True)
    no_object = softmax(head.double().numpy())[..., -1:]
    expected = np.concatenate([product * (1 - no_object), no_object], -1)
    np.testing.assert_allclose(combined.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_without_clip_the_ensemble_is_the_plain_softmax():
    head, clip = class_logits(2.0, 0), class_logits(2.0, 1)
    combined = geometric_ensemble(head, clip, SEEN, 0.0, 0.0)
    torch.testing.assert_close(combined, head.softmax(-1))


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize(("alpha", "beta"), [(0.4, 0.8), (1.0, 1.0), (0.0, 0.0), (1.0, 0.0)])
@pytest.mark.parametrize("scale", [100.0, 1e4, 1e30])
def test_probabilities_that_underflow(scale, alpha, beta):
    """No log(0) and no 0 * log(0): against sums of logarithms in double precision."""
    head, clip = class_logits(scale, 0), class_logits(scale, 1)
    assert (head.softmax(-1) == 0).any() and (clip.softmax(-1) == 0).any()
    combined = geometric_ensemble(head, clip, SEEN, alpha, beta)
    inside, outside = (log_softmax(t.double().numpy()[..., :-1]) for t in (head, clip))
    exponent = np.where(SEEN, alpha, beta)
    expected = softmax((1 - exponent) * inside + exponent * outside)
    no_object = softmax(head.double().numpy())[..., -1:]
    np.testing.assert_allclose(combined[..., :-1].numpy(), expected * (1 - no_object), atol=1e-3)
    np.testing.assert_allclose(combined[..., -1:].numpy(), no_object, atol=1e-6)
    torch.testing.assert_close(combined.sum(-1), torch.ones(2, 6))


def test_queries_that_are_not_ensembled_keep_their_probabilities():
    torch.manual_seed(3)
    head, clip = torch.randn(2, 6, 20), torch.randn(2, 6, 20)
    seen = torch.arange(19) % 2 == 0
    valid = torch.rand(2, 6) > 0.5
    all_queries = geometric_ensemble(head, clip, seen, 0.4, 0.8)
    some = geometric_ensemble(head, clip, seen, 0.4, 0.8, valid)
    torch.testing.assert_close(some[valid], all_queries[valid])
    torch.testing.assert_close(some[~valid], head.softmax(-1)[~valid])


@pytest.mark.parametrize(
    ("train", "unseen"),
    [
        (("gta5",), []),
        (("synthia",), [9, 14, 16]),
        (("synthia", "sd_a"), [9, 14, 16]),
        (("synthia", "gta5"), []),
    ],
)
def test_seen_classes_are_those_of_the_training_datasets(train, unseen):
    cfg = tiny_config(
        MODEL__CLOUDS__GEOMETRIC_ENSEMBLE=True,
        MODEL__CLOUDS__GEOMETRIC_ENSEMBLE_ALPHA=0.25,
        DATASETS__TRAIN=train,
    )
    options = EnsembleOptions.from_config(cfg)
    assert [c for c, seen in enumerate(options.seen) if not seen] == unseen
    assert len(options.seen) == 19
    assert (options.alpha, options.beta) == (0.25, 0.8)
