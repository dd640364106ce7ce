"""`clouds.load`: configs, weights, devices and classes."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from tiny_checkpoint import block_image, save_checkpoint
from tiny_model import tiny_config

import clouds
from clouds.data.label_space import CITYSCAPES_19, distinct_colors
from clouds.evaluation.protocols import build_protocol
from clouds.inference.classes import label_space_of, parse_classes
from clouds.modeling.postprocessing import EnsembleOptions

TEXT = {"MODEL__MASK_FORMER__TRANSFORMER_DECODER_NAME": "text"}


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("linear"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("text"), **TEXT)


def changed(path, target, change):
    """A copy of a checkpoint whose entries `change` has changed."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, target)
    return target


def test_the_package_offers_build_and_load():
    assert {"build", "load", "__version__"} <= set(dir(clouds))


@pytest.mark.parametrize("protocol", ["native", "clouds", "slide"])
@pytest.mark.parametrize("size", [(70, 90), (64, 64), (150, 48)])
def test_labels_are_those_that_evaluation_scores(linear, protocol, size):
    path, model = linear
    slide = {"TEST.SLIDE.CROP_SIZE": 64, "TEST.SLIDE.SHORT_SIDE": 72}
    words = ["TEST.PROTOCOL", protocol, *(w for pair in slide.items() for w in pair)]
    segmenter = clouds.load(path, overrides=words)
    image = block_image(*size)
    evaluation = build_protocol(segmenter.cfg)
    prepared, _ = evaluation.prepare(image, None, "bdd_val")
    sample = {"image": torch.tensor(prepared).permute(2, 0, 1), "height": size[0], "width": size[1]}
    with torch.no_grad():
        expected = evaluation.predict(model, sample).numpy()
    result = segmenter(image)
    assert result.labels.dtype == np.uint8
    np.testing.assert_array_equal(result.labels, expected)
    assert len(np.unique(expected)) > 1
    assert result.label_space == CITYSCAPES_19


def test_weights_alone_need_a_config(linear, tmp_path):
    path, _ = linear
    content = torch.load(path, weights_only=True)
    bare = tmp_path / "published.pth"
    torch.save({"model": content["model"]}, bare)
    with pytest.raises(ValueError, match=r"carries no config.*config_file"):
        clouds.load(bare)
    config = tmp_path / "config.yaml"
    config.write_text(content["clouds"]["config"])
    image = block_image(64, 80)
    expected = clouds.load(path)(image).labels
    np.testing.assert_array_equal(clouds.load(bare, config)(image).labels, expected)


def test_weights_of_clip_are_not_fetched(linear, tmp_path, caplog):
    def name_a_tag(content):
        content["clouds"]["config"] = content["clouds"]["config"].replace(
            "CLIP_PRETRAINED_WEIGHTS: ''", "CLIP_PRETRAINED_WEIGHTS: of_nowhere"
        )
        assert "of_nowhere" in content["clouds"]["config"]

    with caplog.at_level(logging.INFO, "clouds"):
        clouds.load(changed(linear[0], tmp_path / "a.pth", name_a_tag))
    assert "random weights" not in caplog.text


def test_unusable_checkpoints(linear, tmp_path):
    path, _ = linear
    name = "sem_seg_head.predictor.class_embed.weight"

    def remove(content):
        del content["model"][name]

    def damage(content):
        content["model"][name][0, 0] = float("nan")

    with pytest.raises(ValueError, match=rf"not complete(.|\n)*{name}"):
        clouds.load(changed(path, tmp_path / "a.pth", remove))
    partial = ["MODEL.WEIGHTS_PARTIAL", True]
    with pytest.raises(ValueError, match="not complete"):
        clouds.load(tmp_path / "a.pth", overrides=partial)
    with pytest.raises(ValueError, match=f"not finite: {name}"):
        clouds.load(changed(path, tmp_path / "b.pth", damage))
    with pytest.raises(FileNotFoundError, match=r"none\.pth' does not exist"):
        clouds.load(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="is a folder; name the checkpoint in it"):
        clouds.load(tmp_path)
    (tmp_path / "c.pth").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="cannot be read"):
        clouds.load(tmp_path / "c.pth")


def test_a_device_that_is_missing(linear, tmp_path, caplog):
    def train_elsewhere(content):
        config = content["clouds"]["config"]
        config = config.replace("DEVICE: cpu", "DEVICE: cuda:99").replace(
            "AMP:\n    DTYPE: bf16\n    ENABLED: false", "AMP:\n    DTYPE: fp16\n    ENABLED: true"
        )
        content["clouds"]["config"] = config.replace("ATTENTION: auto", "ATTENTION: triton")
        assert all(word in content["clouds"]["config"] for word in ("cuda:99", "fp16", "triton"))

    image = block_image(64, 80)
    expected = clouds.load(linear[0])(image).labels
    elsewhere = changed(linear[0], tmp_path / "a.pth", train_elsewhere)
    with caplog.at_level(logging.INFO, "clouds"):
        segmenter = clouds.load(elsewhere)
    assert "MODEL.DEVICE of the config is cuda:99, which is not available: cpu" in caplog.text
    np.testing.assert_array_equal(segmenter(image).labels, expected)
    with pytest.raises(ValueError, match="device is 'cuda:99'"):
        clouds.load(linear[0], device="cuda:99")


# ------------------------------------------------------------------------ classes


def test_names_of_classes():
    assert parse_classes(" road, tuk-tuk ,traffic  light") == ("road", "tuk-tuk", "traffic light")
    assert parse_classes(["road, wet", "dog"]) == ("road, wet", "dog")
    for wrong in ("", " , ", [], "road,,dog", "road, dog,", "Dog, dog", "a, b, a"):
        with pytest.raises(ValueError, match="classes"):
            parse_classes(wrong)
    with pytest.raises(ValueError, match="at most 255"):
        parse_classes([str(i) for i in range(256)])
    with pytest.raises(TypeError, match="allowed are names"):
        parse_classes(["road", 3])


def test_a_label_space_of_ones_own():
    space = label_space_of(("dog", "Road", "tuk-tuk"), CITYSCAPES_19)
    assert space.names == ("dog", "Road", "tuk-tuk")
    assert space.colors[1] == (128, 64, 128)  # road's color in Cityscapes
    assert space.synonyms == (("dog",), ("road", "railroad"), ("tuk-tuk",))
    assert len(set(space.colors)) == 3


def test_colors_are_distinct():
    from skimage.color import rgb2lab

    def distance(colors):
        lab = rgb2lab(np.array(colors, np.uint8)[None])[0]
        between = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
        return between[~np.eye(len(colors), dtype=bool)].min()

    assert len(set(distinct_colors(255))) == 255
    assert distance([(0, 0, 0), (255, 255, 255), *distinct_colors(20)]) > 30
    road = (128, 64, 128)
    assert distance([road, *distinct_colors(20, [road])]) > 30


def test_the_names_of_training_in_another_order_give_the_same_classes(text):
    path, _ = text
    image = block_image(64, 96)
    expected = clouds.load(path)(image)
    found = clouds.load(path, classes=CITYSCAPES_19.names[::-1])(image)
    np.testing.assert_allclose(found.scores[::-1], expected.scores, atol=1e-4)
    covered = expected.scores.max(0) > 0  # elsewhere all scores are 0, and the class is the first
    assert ((18 - found.labels) != expected.labels)[covered].mean() < 1e-3
    assert len(np.unique(expected.labels[covered])) > 1
    assert found.label_space.colors == CITYSCAPES_19.colors[::-1]


def test_three_classes(text):
    segmenter = clouds.load(text[0], classes="road, tuk-tuk, dog")
    result = segmenter(block_image(64, 96))
    assert result.scores.shape == (3, 64, 96)
    assert result.labels.max() < 3 and result.confidence.min() >= 0
    assert result.label_space.names == ("road", "tuk-tuk", "dog")


def test_classes_need_a_text_head(linear):
    with pytest.raises(ValueError, match=r"need a text class head.*DECODER_NAME text"):
        clouds.load(linear[0], classes="road, dog")


def test_the_ensemble_counts_known_names_as_seen(tmp_path):
    path, _ = save_checkpoint(tmp_path, **TEXT, MODEL__CLOUDS__GEOMETRIC_ENSEMBLE=True)
    model = clouds.load(path, classes="dog, road").model
    cfg = tiny_config()
    options = cfg.MODEL.CLOUDS
    assert model.ensemble == EnsembleOptions(
        (False, True), options.GEOMETRIC_ENSEMBLE_ALPHA, options.GEOMETRIC_ENSEMBLE_BETA
    )
