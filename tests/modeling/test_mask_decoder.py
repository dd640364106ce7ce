"""The masked-attention decoder against transformers' Mask2Former with the same weights."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers_weights import (
    mask2former,
    mask2former_config,
    mask_decoder_weights,
    randomize,
)

from clouds.modeling.text_classifier import TextEmbeddings
from clouds.modeling.transformer_decoder.decoder import (
    CLASS_HEADS,
    MultiheadAttention,
    Predictions,
    attention_mask,
)

NUM_QUERIES, NUM_CLASSES, NUM_LAYERS = 12, 5, 4


def build(in_channels=32, dropout=0.0, name="linear"):
    decoder = CLASS_HEADS[name](
        in_channels=in_channels,
        hidden_dim=32,
        mask_dim=24,
        num_classes=NUM_CLASSES,
        embed_dim=16,
        num_queries=NUM_QUERIES,
        num_layers=NUM_LAYERS,
        num_heads=4,
        dim_feedforward=64,
        dropout=dropout,
        num_levels=3,
    )
    return randomize(decoder)


def transformers_decoder(ours, in_channels):
    config = mask2former_config(
        hidden_dim=32,
        mask_feature_size=24,
        num_queries=NUM_QUERIES,
        decoder_layers=NUM_LAYERS + 1,
        num_attention_heads=4,
        dim_feedforward=64,
    )
    theirs = mask2former().Mask2FormerTransformerModule(in_features=in_channels, config=config)
    theirs.load_state_dict(mask_decoder_weights(ours.state_dict()))
    return theirs.eval()


def inputs(n, height, width, in_channels=32, offset=0.0, seed=0):
    """Multi-scale maps, coarse to fine, and mask features.

    The first mask feature is `offset` everywhere. It shifts all mask logits of a query, so that
    some masks are empty and some cover the whole image.
    """
    generator = torch.Generator().manual_seed(seed)
    maps = [
        torch.randn(n, in_channels, height // s, width // s, generator=generator)
        for s in (32, 16, 8)
    ]
    mask_features = torch.randn(n, 24, height // 4, width // 4, generator=generator)
    if offset:
        mask_features[:, 0] = offset
    return maps, mask_features


def attended_masks(mask_logits, maps):
    """Mask logits resized to the maps of the next layers."""
    return [
        F.interpolate(m, maps[i % 3].shape[-2:], mode="bilinear").flatten(2)
        for i, m in enumerate(mask_logits[:NUM_LAYERS])
    ]


@pytest.mark.parametrize("in_channels", [32, 40])
@pytest.mark.parametrize(
    ("n", "height", "width", "offset"), [(2, 64, 96, 0.0), (1, 128, 64, 0.0), (2, 96, 64, 8.0)]
)
def test_against_transformers(n, height, width, offset, in_channels):
    ours = build(in_channels).eval()
    theirs = transformers_decoder(ours, in_channels)
    maps, mask_features = inputs(n, height, width, in_channels, offset)
    leaves = [t.clone().requires_grad_() for t in (mask_features, *maps)]
    others = [t.clone().requires_grad_() for t in (mask_features, *maps)]
    predictions = ours(leaves[1:], leaves[0])
    expected = theirs(others[1:], others[0])
    class_logits = [
        ours.class_embed(s.transpose(0, 1)) for s in expected.intermediate_hidden_states
    ]

    assert len(predictions.mask_logits) == len(predictions.class_logits) == NUM_LAYERS + 1
    for got, want in zip(predictions.mask_logits, expected.masks_queries_logits, strict=True):
        assert got.shape == (n, NUM_QUERIES, height // 4, width // 4)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for got, want in zip(predictions.class_logits, class_logits, strict=True):
        assert got.shape == (n, NUM_QUERIES, NUM_CLASSES + 1)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert predictions.final == (predictions.class_logits[-1], predictions.mask_logits[-1])

    # The inputs cover both cases: masks are partial, and with an offset some are empty.
    attended = attended_masks(expected.masks_queries_logits, maps)
    shares = torch.stack([(m >= 0).float().mean(-1) for m in attended])
    assert ((shares > 0) & (shares < 1)).any()
    assert (shares == 0).any() or not offset

    predictions.final[0].square().mean().backward()
    class_logits[-1].square().mean().backward()
    for leaf, other in zip(leaves[1:], others[1:], strict=True):
        scale = other.grad.abs().max()
        assert scale > 0
        torch.testing.assert_close(leaf.grad / scale, other.grad / scale, rtol=1e-4, atol=1e-4)


def test_attention_mask_by_hand():
    """A query with an empty mask attends everywhere, others where the logit is at least 0."""
    mask_logits = torch.tensor(
        [[[[-1.0, -2.0], [-3.0, -4.0]], [[1.0, -1.0], [0.0, -5.0]], [[2.0, 2.0], [2.0, 2.0]]]]
    ).requires_grad_()
    mask = attention_mask(mask_logits)
    assert mask.tolist() == [
        [[True, True, True, True], [True, False, True, False], [True, True, True, True]]
    ]
    assert not mask.requires_grad


def test_attention_masks_are_the_resized_predicted_masks():
    decoder = build()
    maps, mask_features = inputs(2, 96, 64, offset=8.0)
    attn_masks = []
    for layer in decoder.transformer_cross_attention_layers:
        layer.register_forward_pre_hook(lambda _, args: attn_masks.append(args[-1]))
    predictions = decoder(maps, mask_features)
    assert len(attn_masks) == NUM_LAYERS
    resized = attended_masks(predictions.mask_logits, maps)
    for attn_mask, logits in zip(attn_masks, resized, strict=True):
        certain = logits.abs() > 1e-4  # at 0 rounding decides
        inside = logits >= 0
        expected = inside | ~inside.any(-1, keepdim=True)
        assert torch.equal(attn_mask[certain], expected[certain]) and certain.float().mean() > 0.99


@pytest.mark.parametrize("name", ["linear", "text", "pooled"])
def test_final_only_equals_the_last_prediction(name):
    decoder = build(name=name).eval()
    maps, mask_features = inputs(2, 64, 96)
    text = TextEmbeddings(
        F.normalize(torch.randn(NUM_CLASSES + 2, 16), dim=-1), (2,) + (1,) * (NUM_CLASSES - 1)
    )
    every_prediction = decoder(maps, mask_features, text)
    last = decoder(maps, mask_features, text, final_only=True)
    assert len(last.class_logits) == len(last.mask_logits) == 1
    for got, want in zip(last.final, every_prediction.final, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_matched_mask_logits_and_their_gradients():
    """Against indexing the mask logits, with and without their source."""
    decoder = build()
    maps, mask_features = inputs(2, 64, 64)
    mask_features.requires_grad_()
    layers = [NUM_LAYERS, 0, 2]
    queries = [torch.tensor([[3, 1], [0, 11], [5, 5]]), torch.tensor([[7], [2], [9]])]

    def gradients(compute):
        masks = compute()
        loss = sum((m * m.detach().sin()).sum() for m in masks)
        leaves = [mask_features, *decoder.mask_embed.parameters(), decoder.query_feat.weight]
        return masks, torch.autograd.grad(loss, leaves)

    predictions = decoder(maps, mask_features)
    indexed = [
        torch.stack(
            [
                torch.stack([predictions.mask_logits[i][n, q] for q in row])
                for i, row in zip(layers, rows, strict=True)
            ]
        )
        for n, rows in enumerate(queries)
    ]
    expected, expected_gradients = gradients(lambda: indexed)
    without_source = Predictions(predictions.class_logits, decoder(maps, mask_features).mask_logits)
    for each in (decoder(maps, mask_features), without_source):
        got, got_gradients = gradients(lambda each=each: each.matched_mask_logits(layers, queries))
        assert [tuple(m.shape) for m in got] == [(3, 2, 16, 16), (3, 1, 16, 16)]
        for one, other in zip(
            [*got, *got_gradients], [*expected, *expected_gradients], strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_against_torch(masked):
    ours = randomize(MultiheadAttention(16, 4, dropout=0.0))
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(2, n, 16, generator=generator) for n in (5, 7, 7))
    attn_mask = torch.rand(2, 5, 7, generator=generator) < 0.5
    attn_mask[..., 0] = True
    expected, _ = theirs(
        query, key, value, attn_mask=~attn_mask.repeat_interleave(4, 0) if masked else None
    )
    got = ours(query, key, value, attn_mask if masked else None)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_every_parameter_gets_a_gradient():
    decoder = build(in_channels=40)
    maps, mask_features = inputs(1, 64, 64, 40)
    predictions = decoder(maps, mask_features)
    sum(p.square().mean() for p in predictions.class_logits + predictions.mask_logits).backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_dropout_acts_in_training_only():
    decoder = build(dropout=0.5)
    maps, mask_features = inputs(1, 64, 64)

    def logits():
        return decoder(maps, mask_features).final[0]

    decoder.eval()
    assert torch.equal(logits(), logits())
    decoder.train()
    assert not torch.equal(logits(), logits())
