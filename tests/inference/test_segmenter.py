"""Kinds of images, batches, windows and scores."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkpoint import block_image, save_checkpoint
from tiny_model import tiny_config
from torch.nn import functional as F

import clouds
from clouds.data.label_space import CITYSCAPES_19
from clouds.evaluation import protocols
from clouds.evaluation.protocols import Slide
from clouds.inference.images import to_rgb
from clouds.inference.segmenter import Segmenter
from clouds.inference.windows import windows
from clouds.modeling.postprocessing import SemanticMap
from clouds.self_training.pseudo_labeler import label_from_scores


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def segmenter(checkpoint):
    return clouds.load(checkpoint[0])


# ------------------------------------------------------------------------ images


def test_the_same_image_of_every_kind(tmp_path):
    pixels = block_image(20, 30)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    tensor = torch.tensor(pixels).permute(2, 0, 1)
    kinds = [
        *(tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pixels), pixels, tensor),
        *(pixels / 255, (pixels / 255).astype(np.float32), tensor.double() / 255, tensor / 255),
        np.asfortranarray(pixels),
    ]
    for image in kinds:
        found = to_rgb(image)
        assert found.dtype == np.uint8 and found.flags.c_contiguous
        np.testing.assert_array_equal(found, pixels)


def test_pillow_images_are_converted_as_files_are(tmp_path):
    pixels = block_image(20, 30)
    gray = Image.fromarray(pixels[..., 0])
    np.testing.assert_array_equal(to_rgb(gray), np.repeat(pixels[..., :1], 3, 2))
    alpha = Image.fromarray(np.dstack([pixels, pixels[..., 0]]))
    np.testing.assert_array_equal(to_rgb(alpha), pixels)
    turned = Image.fromarray(pixels)
    turned.getexif()[0x0112] = 6  # to be rotated by 90 degrees clockwise
    np.testing.assert_array_equal(to_rgb(turned), np.rot90(pixels, -1))


NAN = np.full((4, 5, 3), 0.5)
NAN[0, 0, 0] = np.nan


@pytest.mark.parametrize(
    ("image", "error", "what"),
    [
        (np.zeros((4, 5), np.uint8), ValueError, r"\(4, 5\).*repeat the channel 3 times"),
        (np.zeros((4, 5, 1), np.uint8), ValueError, "repeat the channel 3 times"),
        (np.zeros((4, 5, 4), np.uint8), ValueError, "RGBA drop the last channel"),
        (np.zeros((3, 4, 5), np.uint8), ValueError, r"transpose\(1, 2, 0\)"),
        (np.zeros((2, 4, 5, 3), np.uint8), ValueError, r"list\(batch\)"),
        (np.zeros((0, 5, 3), np.uint8), ValueError, "has no pixel"),
        (np.full((4, 5, 3), 200.0), ValueError, "from 200 to 200.*convert the image to uint8"),
        (np.full((4, 5, 3), -0.5), ValueError, "Undo a normalization"),
        (NAN, ValueError, "nan to nan.*Remove nan"),
        (np.zeros((4, 5, 3), np.int64), TypeError, "int64.*convert it to uint8"),
        (np.zeros((4, 5, 3), np.uint16), TypeError, "uint16"),
        (np.zeros((4, 5, 3), bool), TypeError, "bool"),
        (torch.zeros(3, 4, 5, dtype=torch.bool), TypeError, "torch.bool; allowed are uint8"),
        (torch.zeros(3, 4, 5, dtype=torch.complex64), TypeError, "torch.complex64; allowed"),
        (torch.zeros(4, 5, 3), ValueError, r"permute\(2, 0, 1\)"),
        (torch.zeros(4, 5), ValueError, "repeat the channel 3 times"),
        (torch.zeros(4, 6, 5), ValueError, "RGBA drop the last channel"),
        (torch.zeros(1, 3, 4, 5), ValueError, r"list\(batch\)"),
        (torch.full((3, 4, 5), 200.0), ValueError, "from 200 to 200"),
        (Image.fromarray(np.zeros((4, 5), np.uint16)), ValueError, "mode 'I;16'"),
        (None, TypeError, "NoneType; allowed are a path"),
    ],
)
def test_wrong_images(image, error, what):
    with pytest.raises(error, match=what):
        to_rgb(image)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float64])
def test_types_of_tensors_that_numpy_lacks(dtype):
    image = torch.tensor([0, 0.5, 1]).to(dtype)[:, None, None].repeat(1, 2, 4)
    assert to_rgb(image).tolist() == [[[0, 128, 255]] * 4] * 2


def test_a_file_that_is_missing(segmenter, tmp_path):
    with pytest.raises(FileNotFoundError):
        segmenter(tmp_path / "none.png")


# ------------------------------------------------------------------------ predictions


def test_a_list_gives_a_list_with_the_same_results(segmenter):
    images = [
        block_image(64, 96, 0),
        block_image(64, 96, 1),
        block_image(70, 64, 2),
        block_image(64, 96, 3),
    ]
    results = segmenter(images, batch_size=3)
    for image, result in zip(images, results, strict=True):
        single = segmenter(image)
        assert (result.labels != single.labels).mean() < 1e-3  # ties may fall either way
        np.testing.assert_allclose(result.confidence, single.confidence, atol=1e-3)
        np.testing.assert_array_equal(result.image, image)
    assert segmenter([]) == []
    with pytest.raises(ValueError, match="batch_size is 0"):
        segmenter(images, batch_size=0)


@pytest.mark.parametrize("size", [(64, 96), (90, 120)])
def test_scores_and_confidence(checkpoint, segmenter, size):
    image = block_image(*size)
    result = segmenter(image)
    resized = Image.fromarray(image).resize((round(size[1] * 64 / size[0]), 64), 2)
    tensor = torch.tensor(np.asarray(resized)).permute(2, 0, 1)
    with torch.no_grad():
        (output,) = checkpoint[1]([{"image": tensor, "height": size[0], "width": size[1]}])
    expected = output["sem_seg"].numpy()
    np.testing.assert_allclose(result.scores, expected, atol=1e-5)
    share = expected.max(0) / np.maximum(expected.sum(0), 1)
    np.testing.assert_allclose(result.confidence, share, atol=1e-5)
    label = label_from_scores(output["sem_seg"])
    np.testing.assert_allclose(result.confidence, label.confidence.numpy(), atol=1e-5)
    assert result.confidence.dtype == np.float32
    assert (result.scores.argmax(0) != result.labels).mean() < 1e-3


def test_scores_under_the_protocol_slide(checkpoint):
    words = ["TEST.PROTOCOL", "slide", "TEST.SLIDE.CROP_SIZE", 64]
    segmenter = clouds.load(checkpoint[0], overrides=words)
    result = segmenter(block_image(64, 90))
    assert result.scores.shape == (19, 64, 90)
    assert (result.scores.argmax(0) != result.labels).mean() < 1e-3
    share = result.scores.max(0) / np.maximum(result.scores.sum(0), 1)
    np.testing.assert_allclose(result.confidence, share, atol=1e-5)


@pytest.mark.parametrize("tta", [False, True])
def test_scores_under_the_protocol_of_a_paper(checkpoint, tta):
    """A whole image as one window; with its mirror image the mean of both."""
    words = ["TEST.PROTOCOL", "rein512", "TEST.AUG.ENABLED", tta]
    image = block_image(256, 512)
    result = clouds.load(checkpoint[0], overrides=words)(image)
    protocol = Slide(0, 0, 512, 341 / 512)
    shown = cv2.resize(image, (1024, 512), interpolation=cv2.INTER_LINEAR)
    tensor = torch.from_numpy(shown).permute(2, 0, 1)
    with torch.no_grad():
        scores = protocol.scores(checkpoint[1], {"image": tensor})
        if tta:
            mirrored = protocol.scores(checkpoint[1], {"image": tensor.flip(-1)})
            scores = (scores + mirrored.flip(-1)) / 2
    expected = F.interpolate(scores[None], (256, 512), mode="bilinear")[0].numpy()
    np.testing.assert_allclose(result.scores, expected, atol=1e-4)
    assert (result.scores.argmax(0) != result.labels).mean() < 1e-3


def test_scores_that_were_not_kept(segmenter):
    result = segmenter(block_image(64, 64), keep_scores=False)
    with pytest.raises(ValueError, match="not kept"):
        _ = result.scores


# ------------------------------------------------------------------------ windows


@pytest.mark.parametrize(
    ("size", "input_size", "max_pixels"),
    [
        ((3000, 4000), (3000, 4000), 1 << 22),
        ((16, 1600), (1024, 102400), 1 << 22),
        ((1600, 16), (102400, 1024), 1 << 22),
        ((1, 100), (1024, 102400), 1 << 22),
        ((9000, 50), (4500, 25), 10000),
        ((37, 53), (37, 53), 100),
        ((10, 10), (10, 10), 1 << 22),
    ],
)
def test_windows_cover_each_pixel_once_and_are_bounded(size, input_size, max_pixels):
    covered = np.zeros(size, np.uint8)
    sizes = set()
    for window in windows(size, input_size, max_pixels):
        sizes.add(window.size)
        assert window.rows.start <= window.kept_rows.start < window.kept_rows.stop
        assert window.kept_rows.stop <= window.rows.stop
        assert window.columns.start >= 0 and window.columns.stop <= size[1]
        rows, columns = window.kept_inside
        assert rows.start + window.rows.start == window.kept_rows.start
        covered[window.kept_rows, window.kept_columns] += 1
        assert columns.stop - columns.start == window.kept_columns.stop - window.kept_columns.start
    assert (covered == 1).all()
    ((height, width),) = sizes
    scale = input_size[0] / size[0], input_size[1] / size[1]
    assert height * scale[0] * width * scale[1] <= max_pixels * 1.01


class PixelModel:
    """Class of a pixel: its red value; the scores are 1 for it and 0 for the others."""

    device = torch.device("cpu")

    def __init__(self):
        self.sizes = []

    def semantic_maps(self, batch):
        for sample in batch:
            image = sample["image"]
            size = (image.shape[1], image.shape[2])
            self.sizes.append(size)
            logits = 200 * F.one_hot(image[0].long(), 19).permute(2, 0, 1).float() - 100
            yield SemanticMap(torch.eye(19), logits, size, size, 10)


@pytest.mark.parametrize("size", [(200, 300), (16, 1600), (1600, 16)])
def test_an_image_predicted_in_windows(size):
    cfg = tiny_config(TEST__SHORT_SIDE=0)
    model = PixelModel()
    segmenter = Segmenter(model, cfg, CITYSCAPES_19, max_pixels=4096)
    image = np.random.default_rng(0).integers(0, 19, (*size, 3), dtype=np.uint8)
    result = segmenter(image)
    np.testing.assert_array_equal(result.labels, image[..., 0])
    np.testing.assert_allclose(result.confidence, 1, atol=1e-5)
    np.testing.assert_array_equal(result.scores.argmax(0), image[..., 0])
    assert len(model.sizes) > 1 and max(h * w for h, w in model.sizes) <= 4096


def test_a_long_image_is_limited_and_told_once(caplog):
    protocols._warn_of_limit.cache_clear()
    cfg = tiny_config(TEST__SHORT_SIDE=32, TEST__LONG_SIDE_MAX=400)
    model = PixelModel()
    image = np.repeat(np.repeat(np.array([[3, 7]], np.uint8), 800, 1), 16, 0)
    result = Segmenter(model, cfg, CITYSCAPES_19)(np.stack([image] * 3, 2))
    assert model.sizes == [(4, 400)]  # 16 * 400 / 1600
    assert result.labels.shape == (16, 1600)
    assert (result.labels[:, :780] == 3).all() and (result.labels[:, 820:] == 7).all()
    assert caplog.text.count("TEST.LONG_SIDE_MAX, 400") == 1


def test_a_batch_has_at_most_the_pixels_of_a_window():
    cfg = tiny_config(TEST__SHORT_SIDE=0)
    counts = []

    class Counting(PixelModel):
        def semantic_maps(self, batch):
            counts.append(len(batch))
            return super().semantic_maps(batch)

    segmenter = Segmenter(Counting(), cfg, CITYSCAPES_19, max_pixels=4096)
    images = [np.full((40, 40, 3), i, np.uint8) for i in range(7)]
    results = segmenter(images, batch_size=5)
    assert [int(result.labels[0, 0]) for result in results] == list(range(7))
    assert counts == [2, 2, 2, 1]  # 2 * 1600 <= 4096 < 3 * 1600


def test_the_real_model_in_windows_agrees_away_from_their_borders(segmenter):
    whole = segmenter(block_image(64, 256))
    segmenter.max_pixels = 64 * 160
    try:
        parts = segmenter(block_image(64, 256))
    finally:
        segmenter.max_pixels = 1 << 22
    assert parts.scores.shape == whole.scores.shape
    assert (parts.scores.argmax(0) != parts.labels).mean() < 1e-3
