"""The three class heads against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers_weights import randomize

from clouds.modeling.text_classifier import TextEmbeddings
from clouds.modeling.transformer_decoder.decoder import CLASS_HEADS

N, NUM_QUERIES, HIDDEN_DIM, MASK_DIM, NUM_CLASSES, EMBED_DIM = 2, 4, 16, 12, 3, 8
COUNTS = (2, 1, 3)


def build(name):
    decoder = CLASS_HEADS[name](
        in_channels=HIDDEN_DIM,
        hidden_dim=HIDDEN_DIM,
        mask_dim=MASK_DIM,
        num_classes=NUM_CLASSES,
        embed_dim=EMBED_DIM,
        num_queries=NUM_QUERIES,
        num_layers=1,
        num_heads=2,
        dim_feedforward=8,
        dropout=0.0,
        num_levels=1,
    )
    return randomize(decoder, seed=1)


@pytest.fixture
def inputs():
    """Inputs of a class head: queries, their mask logits (one mask is empty), mask features."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(N, NUM_QUERIES, HIDDEN_DIM, generator=generator)
    mask_logits = torch.randn(N, NUM_QUERIES, 5, 7, generator=generator)
    mask_logits[0, 2] = -1.0
    return query, mask_logits, torch.randn(N, MASK_DIM, 5, 7, generator=generator)


@pytest.fixture
def text():
    rows = torch.randn(sum(COUNTS) + 1, EMBED_DIM, generator=torch.Generator().manual_seed(2))
    return TextEmbeddings(rows / rows.norm(dim=1, keepdim=True), COUNTS)


def numpy(*tensors):
    return [t.detach().double().numpy() for t in tensors]


def linear(x, layer):
    weight, bias = numpy(layer.weight, layer.bias)
    return x @ weight.T + bias


def pooled_plus_query(decoder, query, mask_logits, mask_features):
    """Mean feature of each mask -> LayerNorm -> Linear, plus the query."""
    query, mask_logits, mask_features = numpy(query, mask_logits, mask_features)
    norm, projection = decoder._mask_pooling_proj
    gain, shift = numpy(norm.weight, norm.bias)
    out = np.empty_like(query)
    for i in range(N):
        for q in range(NUM_QUERIES):
            inside = mask_logits[i, q] > 0
            empty = not inside.any()
            mean = np.zeros(MASK_DIM) if empty else mask_features[i][:, inside].mean(1)
            normal = (mean - mean.mean()) / np.sqrt(mean.var() + 1e-5) * gain + shift
            out[i, q] = linear(normal, projection) + query[i, q]
    return out


def test_linear_head(inputs):
    decoder = build("linear")
    assert not decoder.needs_text
    assert decoder.class_embed.weight.shape == (NUM_CLASSES + 1, HIDDEN_DIM)
    logits = decoder.classify(*inputs, None)
    expected = linear(*numpy(inputs[0]), decoder.class_embed)
    np.testing.assert_allclose(*numpy(logits), expected, rtol=1e-5, atol=1e-5)


def test_linear_head_uses_the_normalized_query():
    """The first prediction is that of the initial queries."""
    decoder = build("linear")
    maps = [torch.randn(N, HIDDEN_DIM, 2, 3)]
    predictions = decoder(maps, torch.randn(N, MASK_DIM, 5, 7))
    (x, gain, shift) = numpy(
        decoder.query_feat.weight, decoder.decoder_norm.weight, decoder.decoder_norm.bias
    )
    normal = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    expected = linear(normal * gain + shift, decoder.class_embed)
    for logits in predictions.class_logits[0]:
        np.testing.assert_allclose(*numpy(logits), expected, rtol=1e-4, atol=1e-5)


def test_pooled_head(inputs):
    decoder = build("pooled")
    assert not decoder.needs_text
    logits = decoder.classify(*inputs, None)
    expected = linear(pooled_plus_query(decoder, *inputs), decoder.class_embed)
    np.testing.assert_allclose(*numpy(logits), expected, rtol=1e-4, atol=1e-5)


def text_formula(decoder, inputs, text, scale):
    x = pooled_plus_query(decoder, *inputs)
    first, second, third = decoder.class_embed.layers
    x = linear(np.maximum(linear(np.maximum(linear(x, first), 0), second), 0), third)
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    (rows,) = numpy(text.rows)
    similarity = scale * x @ rows.T
    columns = [similarity[..., 0:2], similarity[..., 2:3], similarity[..., 3:6]]
    best = [c.max(-1) for c in columns]
    return np.stack([*best, similarity[..., 6]], axis=-1)  # no_object last


def test_text_head(inputs, text):
    decoder = build("text")
    assert decoder.needs_text
    decoder.logit_scale.data.fill_(math.log(7.0))
    logits = decoder.classify(*inputs, text)
    assert logits.shape == (N, NUM_QUERIES, NUM_CLASSES + 1)
    expected = text_formula(decoder, inputs, text, 7.0)
    np.testing.assert_allclose(*numpy(logits), expected, rtol=1e-4, atol=1e-4)


def test_text_head_clamps_the_scale_to_100(inputs, text):
    decoder = build("text")
    decoder.logit_scale.data.fill_(math.log(1000.0))
    expected = text_formula(decoder, inputs, text, 100.0)
    np.testing.assert_allclose(
        *numpy(decoder.classify(*inputs, text)), expected, rtol=1e-3, atol=1e-3
    )


def test_initial_scale_is_clips():
    decoder = CLASS_HEADS["text"](
        in_channels=8, hidden_dim=8, mask_dim=8, num_classes=2, embed_dim=4, num_queries=1,
        num_layers=1, num_heads=1, dim_feedforward=8, dropout=0.0, num_levels=1,
    )  # fmt: skip
    assert decoder.logit_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-5)


@pytest.mark.parametrize("name", ["pooled", "text"])
def test_classes_pass_gradients_to_features_but_not_to_masks(name, inputs, text):
    decoder = build(name)
    query, mask_logits, mask_features = (t.clone().requires_grad_() for t in inputs)
    logits = decoder.classify(query, mask_logits, mask_features, text)
    logits.square().sum().backward()
    assert mask_logits.grad is None
    assert query.grad.abs().max() > 0 and mask_features.grad.abs().max() > 0
    assert mask_features.grad.isfinite().all()


def test_short_names_are_aliases_of_the_published_ones():
    published = {
        "linear": "OriginalMultiScaleMaskedTransformerDecoder",
        "text": "MultiScaleMaskedTransformerDecoder",
        "pooled": "BisMultiScaleMaskedTransformerDecoder",
    }
    for short, name in published.items():
        assert CLASS_HEADS[short] is CLASS_HEADS[name]
        assert CLASS_HEADS[name].__name__ == name
    assert len(set(CLASS_HEADS.values())) == 3
