from __future__ import annotations

import open_clip
import pytest
import torch
from tiny_model import tiny_clip, tiny_model
from torch.nn import functional as F

from clouds.data.label_space import CITYSCAPES_19
from clouds.modeling.backbone import clip_text
from clouds.modeling.text_classifier import TEMPLATES, TextClassifier, TextEmbeddings, prompts_for

SYNONYMS = (("road", "railroad"), ("traffic light",), ("train", "trains", "locomotive"))


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


def loop_over_prompts(clip, words):
    """The same with open_clip alone: one prompt at a time."""
    tokenizer = open_clip.tokenizer.SimpleTokenizer()
    rows = []
    for word in words:
        total = 0
        for template in TEMPLATES:
            with torch.no_grad():
                text = clip.clip_model.encode_text(tokenizer([template.format(word)]))[0]
            total = total + text / text.norm()
        mean = total / len(TEMPLATES)
        rows.append(mean / mean.norm())
    return torch.stack(rows)


def test_against_a_loop_over_prompts(clip):
    features = TextClassifier(SYNONYMS).synonym_embeddings(clip)
    expected = loop_over_prompts(clip, [word for words in SYNONYMS for word in words])
    assert features.shape == (6, 32) and not features.requires_grad
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    assert (features[0] - features[1]).abs().max() > 1e-3  # words differ at all


def test_features_do_not_depend_on_how_prompts_are_grouped(clip, monkeypatch):
    expected = TextClassifier(SYNONYMS).synonym_embeddings(clip)
    monkeypatch.setattr(clip_text, "TEXTS_AT_ONCE", 5)
    features = TextClassifier(SYNONYMS).synonym_embeddings(clip)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)


def test_features_are_computed_once_and_in_full_precision(clip):
    texts = TextClassifier(SYNONYMS)
    with torch.autocast("cpu", torch.bfloat16):
        first = texts.synonym_embeddings(clip)
    assert first.dtype == torch.float32
    assert texts.synonym_embeddings(clip) is first
    torch.testing.assert_close(first, TextClassifier(SYNONYMS).synonym_embeddings(clip))
    texts.reset()
    assert texts.synonym_embeddings(clip) is not first


def test_order_of_prompts():
    """Class by class, synonym by synonym, template by template; full stops as in the list."""
    prompts = prompts_for((("road", "railroad"), ("car",)))
    assert len(prompts) == 3 * 14
    assert prompts[:6] == [
        "a photo of a road.",
        "This is a photo of a road",
        "There is a road in the scene",
        "There is the road in the scene",
        "a photo of a road in the scene",
        "a photo of a small road.",
    ]
    assert prompts[13:15] == ["There is a large road in the scene.", "a photo of a railroad."]
    assert prompts[28] == "a photo of a car."
    assert len(prompts_for(CITYSCAPES_19.synonyms)) == 840


def test_no_object_is_normalized_and_last(clip):
    texts = TextClassifier(SYNONYMS)
    no_object = torch.full((1, 32), 3.0, requires_grad=True)
    rows = texts.embeddings(clip, no_object)
    assert rows.counts == (2, 1, 3)
    assert torch.equal(rows.rows[:-1], texts.synonym_embeddings(clip))
    torch.testing.assert_close(rows.rows[-1], torch.full((32,), 32**-0.5))
    assert rows.rows.requires_grad


def test_logits_by_hand():
    """The best synonym of each class counts; lengths of embeddings do not."""
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.6, 0.8]])
    text = TextEmbeddings(rows, (2, 1))
    embeddings = torch.tensor([[[3.0, 4.0], [0.0, -2.0]]])  # directions (0.6, 0.8), (0, -1)
    logits = text.logits(embeddings, torch.tensor(10.0))
    expected = torch.tensor([[[8.0, -6.0, 10.0], [0.0, 0.0, -8.0]]])
    torch.testing.assert_close(logits, expected)


def test_logits_under_autocast_are_exact(clip):
    text = TextClassifier(SYNONYMS).embeddings(clip, torch.ones(1, 32))
    embeddings = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(4)).bfloat16()
    expected = text.logits(embeddings.float(), torch.tensor(100.0))
    with torch.autocast("cpu", torch.bfloat16):
        logits = text.logits(embeddings, torch.tensor(100.0))
    assert logits.dtype == torch.float32
    assert torch.equal(logits, expected)


def test_loading_weights_into_the_model_makes_the_features_anew():
    model = tiny_model(MODEL__MASK_FORMER__TRANSFORMER_DECODER_NAME="text")
    before = model.text_classifier.synonym_embeddings(model.backbone)
    weights = model.state_dict()
    name = "backbone.clip_model.token_embedding.weight"
    weights[name] = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(5))
    model.load_state_dict(weights)
    after = model.text_classifier.synonym_embeddings(model.backbone)
    assert (after - before).abs().max() > 1e-2
    fresh = TextClassifier(CITYSCAPES_19.synonyms).synonym_embeddings(model.backbone)
    torch.testing.assert_close(after, fresh)
    assert F.cosine_similarity(after, fresh).min() > 0.999


def test_classes_without_names_are_an_error(clip):
    with pytest.raises(ValueError, match=r"no names of classes.*TRANSFORMER_DECODER_NAME linear"):
        TextClassifier(()).synonym_embeddings(clip)
