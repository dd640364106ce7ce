"""Images of a prediction and their files, read by other libraries."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from PIL import Image

from clouds.data.label_space import CITYSCAPES_19
from clouds.inference import Segmentation

SKY, ROAD = (70, 130, 180), (128, 64, 128)


def segmentation(height=60, width=400):
    """Sky above road; the confidence grows from 0 to 1 from left to right."""
    labels = np.full((height, width), 10, np.uint8)
    labels[height // 2 :] = 0
    confidence = np.tile(np.linspace(0, 1, width, dtype=np.float32), (height, 1))
    image = np.full((height, width, 3), (100, 200, 30), np.uint8)
    return Segmentation(image, labels, confidence, CITYSCAPES_19, None)


def test_files_against_opencv(tmp_path):
    result = segmentation()
    for kind in ("color", "overlay", "labels", "confidence"):
        result.save(tmp_path / f"a_{kind}.png")
    read = {p.stem: cv2.imread(str(p), cv2.IMREAD_UNCHANGED) for p in tmp_path.iterdir()}
    assert read["a_labels"].dtype == np.uint8
    np.testing.assert_array_equal(read["a_labels"], result.labels)
    confidence = read["a_confidence"]
    assert confidence.dtype == np.uint16 and confidence.shape == (60, 400)
    assert (confidence[0, 0], confidence[0, -1]) == (0, 65535)
    np.testing.assert_allclose(confidence / 65535, result.confidence, atol=1e-5)
    assert tuple(read["a_color"][0, 0][::-1]) == SKY
    assert tuple(read["a_color"][-1, 0][::-1]) == ROAD
    # half the image, half the color
    np.testing.assert_allclose(read["a_overlay"][0, 0][::-1], (85, 165, 105), atol=1)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_overlay_is_a_weighted_mean(alpha):
    result = segmentation()
    drawn = np.asarray(result.overlay(alpha))[:60, :400].astype(float)
    colors = np.where((result.labels == 10)[..., None], SKY, ROAD)
    np.testing.assert_allclose(drawn, alpha * colors + (1 - alpha) * result.image, atol=0.51)


@pytest.mark.parametrize("size", [(16, 1600), (1600, 16), (24, 32), (1500, 2000)])
def test_the_legend_has_the_colors_of_the_classes_in_the_image(size):
    result = segmentation(*size)
    drawn = np.asarray(result.overlay())
    assert drawn.shape[1] == max(size[1], 240)
    legend = drawn[size[0] :]
    colors = {tuple(c) for c in legend.reshape(-1, 3).tolist()}
    assert {SKY, ROAD, (255, 255, 255)} <= colors and (220, 20, 60) not in colors
    swatch = (legend == ROAD).all(-1).any(0).sum()
    assert swatch >= max(12, (size[0] * size[1]) ** 0.5 / 50)  # grows with the image
    assert np.asarray(result.overlay(legend=())).shape[0] == size[0]
    everything = np.asarray(result.overlay(legend=range(19)))
    assert (everything[size[0] :] == (220, 20, 60)).all(-1).any()


def test_kinds_and_suffixes(tmp_path):
    result = segmentation()
    result.save(tmp_path / "a.jpg")  # an overlay
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "JPEG" and image.height > 60
    result.save(tmp_path / "new" / "b.png", "labels")
    with Image.open(tmp_path / "new" / "b.png") as image:
        np.testing.assert_array_equal(np.asarray(image), result.labels)
    with pytest.raises(ValueError, match=r"'\.jpg' is no suffix for the labels image"):
        result.save(tmp_path / "b_labels.jpg")
    with pytest.raises(ValueError, match=r"allowed are \.png, \.jpg"):
        result.save(tmp_path / "b.webm")
    with pytest.raises(ValueError, match="allowed are color, overlay"):
        result.save(tmp_path / "b.png", "depth")
    with pytest.raises(ValueError, match=r"alpha is 2"):
        result.overlay(2)
    assert "60x400 pixels: road, sky" in repr(result)
