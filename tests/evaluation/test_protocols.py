from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from color_model import ColorModel, blocks, to_image
from PIL import Image
from tiny_model import tiny_model

from clouds.config import get_cfg
from clouds.evaluation import protocols
from clouds.evaluation.protocols import (
    PROTOCOLS,
    Native,
    Slide,
    WithTTA,
    build_protocol,
    windows,
)


def protocol_of(name, **keys):
    cfg = get_cfg()
    cfg.TEST.PROTOCOL = name
    for key, value in keys.items():
        cfg.merge_from_list([f"TEST.{key.replace('__', '.')}", value])
    return build_protocol(cfg)


def pair(height, width):
    rng = np.random.default_rng(height)
    return (
        rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        rng.integers(0, 19, (height, width), dtype=np.uint8),
    )


# ------------------------------------------------------------------------ native


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1024, 2048), (1024, 2048)),
        ((720, 1280), (1024, 1820)),
        ((1080, 1920), (1024, 1820)),
        ((360, 480), (1024, 1365)),
        ((3000, 4000), (1024, 1365)),
        ((640, 480), (1365, 1024)),
    ],
)
def test_the_short_side_becomes_1024(size, expected):
    image = np.zeros((*size, 3), np.uint8)
    label = np.zeros(size, np.uint8)
    prepared, scored = protocol_of("native").prepare(image, label, "any_val")
    assert prepared.shape == (*expected, 3)
    assert scored is label


def test_the_image_is_resized_as_pillow_does():
    image, label = pair(90, 160)
    prepared, _ = protocol_of("native", SHORT_SIDE=32).prepare(image, label, "bdd_val")
    expected = Image.fromarray(image).resize((57, 32), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(prepared, np.asarray(expected))


def test_short_side_0_does_not_resize_the_image():
    image, _ = pair(31, 50)
    prepared, scored = protocol_of("native", SHORT_SIDE=0).prepare(image, None, "x_val")
    assert prepared is image and scored is None


@pytest.mark.parametrize("name", ["native", "clouds"])
def test_the_prediction_is_the_class_map_at_the_size_of_the_label(name):
    classes = blocks(0, (32, 48), 8)
    sample = {
        "image": torch.from_numpy(to_image(classes)).permute(2, 0, 1),
        "height": 16,
        "width": 24,
    }
    prediction = protocol_of(name).predict(ColorModel().eval(), sample)
    assert prediction.dtype == torch.uint8
    np.testing.assert_array_equal(prediction.numpy(), classes[::2, ::2])


# ---------------------------------------------------------------------- long side


@pytest.mark.parametrize(
    ("size", "short_side", "long_side_max", "expected"),
    [
        ((16, 1600), 1024, 8192, (82, 8192)),  # 16 * 8192 / 1600 = 81.92
        ((1600, 16), 1024, 8192, (8192, 82)),
        ((16, 1600), 1024, 0, (1024, 102400)),
        ((1024, 8192), 1024, 8192, (1024, 8192)),
        ((1000, 8001), 1024, 8192, (1024, 8192)),  # 8193.02: limited, and 1023.9 is 1024
        ((375, 1242), 1024, 8192, (1024, 3391)),  # 1242 * 1024 / 375 = 3391.49
        ((2000, 30000), 1024, 8192, (546, 8192)),  # 546.13
        ((1, 65000), 1024, 8192, (1, 8192)),  # 0.126 of a pixel
        ((16, 1600), 0, 8192, (16, 1600)),
    ],
)
def test_the_long_side_is_limited_and_the_ratio_kept(size, short_side, long_side_max, expected):
    for protocol in (Native(short_side, long_side_max), Slide(short_side, long_side_max, 32, 1.0)):
        assert protocol.input_size(*size) == expected


@pytest.mark.parametrize("name", ["native", "clouds", "slide"])
def test_a_limited_input_is_told_once_and_predicted(name, caplog):
    protocols._warn_of_limit.cache_clear()
    keys = {"SHORT_SIDE": 32, "SLIDE__SHORT_SIDE": 32, "LONG_SIDE_MAX": 64}
    protocol = protocol_of(name, **keys, SLIDE__CROP_SIZE=32)
    image, label = pair(8, 80)
    prepared, scored = protocol.prepare(image, label, "bdd_val")
    assert prepared.shape == (6, 64, 3)  # 8 * 64 / 80 = 6.4
    size = (6, 64) if name == "clouds" else (8, 80)
    assert scored.shape == size
    sample = {"image": torch.tensor(prepared).permute(2, 0, 1)}
    sample |= {"height": size[0], "width": size[1]}
    for _ in range(3):
        assert protocol.predict(ColorModel().eval(), sample).shape == size
    assert len(caplog.records) == 1
    assert "a short side of 32 pixels" in caplog.text and "LONG_SIDE_MAX, 64" in caplog.text


@pytest.mark.parametrize("size", [(8, 80), (80, 8)])
@pytest.mark.parametrize("tta", [False, True])
@pytest.mark.parametrize("name", ["native", "slide"])
def test_a_limited_input_of_any_direction_is_told(name, tta, size, caplog):
    protocols._warn_of_limit.cache_clear()
    keys = {"SHORT_SIDE": 32, "SLIDE__SHORT_SIDE": 32, "LONG_SIDE_MAX": 64, "AUG__ENABLED": tta}
    protocol = protocol_of(name, **keys, SLIDE__CROP_SIZE=32, AUG__SCALES=(1.0,))
    prepared, _ = protocol.prepare(pair(*size)[0], None, "x")
    sample = {"image": torch.tensor(prepared).permute(2, 0, 1), "height": 8, "width": 8}
    protocol.predict(ColorModel().eval(), sample)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("size", [(32, 64), (1, 2), (31, 62), (480, 640)])
def test_nothing_is_told_of_an_input_within_the_limit(size, caplog):
    protocols._warn_of_limit.cache_clear()
    protocol = protocol_of("native", SHORT_SIDE=32, LONG_SIDE_MAX=64)
    prepared, _ = protocol.prepare(np.zeros((*size, 3), np.uint8), None, "")
    assert min(prepared.shape[:2]) == 32
    protocol.warn_if_limited(*prepared.shape[:2])
    assert caplog.text == ""


# ------------------------------------------------------------------------ clouds


@pytest.mark.parametrize(
    "name", ["bdd_val", "mapillary_val", "acdc_fog_val", "acdc_night_train", "bdd_train"]
)
def test_clouds_resizes_these_labels_with_the_image(name):
    image, label = pair(75, 100)
    prepared, scored = protocol_of("clouds", SHORT_SIDE=48).prepare(image, label, name)
    assert prepared.shape == (48, 64, 3)
    expected = Image.fromarray(label).resize((64, 48), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(scored, np.asarray(expected))


@pytest.mark.parametrize("name", ["cityscapes_val", "gta5", "synthia", "camvid_val", "sd_acdc"])
def test_clouds_does_not_resize_other_labels(name):
    image, label = pair(75, 100)
    prepared, scored = protocol_of("clouds", SHORT_SIDE=48).prepare(image, label, name)
    assert prepared.shape == (48, 64, 3)
    assert scored is label


def test_clouds_without_a_label():
    assert protocol_of("clouds").prepare(pair(20, 30)[0], None, "bdd_val")[1] is None


# ------------------------------------------------------------------------- slide


def columns(length, crop, stride):
    spans = list(windows(crop, length, crop, stride))
    assert all(rows == slice(0, crop) for rows, _ in spans)
    return [(columns.start, columns.stop) for _, columns in spans]


def test_windows_by_hand():
    assert columns(2048, 1024, 2 / 3) == [(0, 1024), (683, 1707), (1024, 2048)]
    assert [a for a, _ in columns(1024, 512, 2 / 3)] == [0, 341, 512]
    assert [a for a, _ in columns(2048, 512, 2 / 3)] == [0, 341, 682, 1023, 1364, 1536]
    assert columns(96, 32, 1.0) == [(0, 32), (32, 64), (64, 96)]
    assert columns(97, 32, 1.0) == [(0, 32), (32, 64), (64, 96), (65, 97)]
    assert columns(32, 32, 0.5) == [(0, 32)]


def test_windows_are_in_row_major_order():
    order = [(r.start, c.start) for r, c in windows(50, 60, 40, 0.5)]
    assert order == [(0, 0), (0, 20), (10, 0), (10, 20)]


@pytest.mark.parametrize("stride", [0.1, 0.34, 2 / 3, 1.0])
@pytest.mark.parametrize("size", [(32, 32), (33, 100), (64, 31), (20, 20), (127, 45)])
def test_windows_cover_every_pixel_of_the_image(size, stride):
    counts = np.zeros(size, int)
    for rows, cols in windows(*size, 32, stride):
        assert 0 <= rows.start < rows.stop <= size[0]
        assert 0 <= cols.start < cols.stop <= size[1]
        assert rows.stop - rows.start == min(32, size[0])
        assert cols.stop - cols.start == min(32, size[1])
        counts[rows, cols] += 1
    assert counts.min() >= 1
    spans = list(windows(*size, 32, stride))
    assert len(spans) == len({(r.start, c.start) for r, c in spans})


class Scripted:
    """Constant scores for each window, in the order of the calls."""

    def __init__(self, scores):
        self.scores = iter(scores)
        self.sizes = []

    def __call__(self, batch):
        (sample,) = batch
        height, width = sample["image"].shape[1:]
        assert (sample["height"], sample["width"]) == (height, width)
        self.sizes.append((height, width))
        return [
            {"sem_seg": torch.tensor(next(self.scores))[:, None, None].expand(-1, height, width)}
        ]


def sample_of(height, width, out=None):
    out = out or (height, width)
    return {
        "image": torch.zeros(3, height, width, dtype=torch.uint8),
        "height": out[0],
        "width": out[1],
    }


def test_scores_are_averaged_where_windows_overlap():
    # windows at columns 0-40, 20-60 and 40-80; sums would choose class 1 in the overlaps
    model = Scripted([[1.0, 0.9, 0.0], [0.0, 0.6, 0.5], [0.9, 0.0, 0.8]])
    result = Slide(0, 0, crop_size=40, stride=0.5).predict(model, sample_of(40, 80))
    assert model.sizes == [(40, 40)] * 3
    # means: 1.0 .9 0 | .5 .75 .25 | .45 .3 .65 | .9 0 .8
    expected = np.repeat([0, 1, 2, 0], 20)[None].repeat(40, 0)
    np.testing.assert_array_equal(result.numpy(), expected)


def test_the_mean_and_not_the_sum_is_resized():
    # The output columns are sampled at 19.5 and 59.5, between a pixel of one window and one of two
    model = Scripted([[1.0, 0.0], [0.0, 2.5], [0.0, 0.0]])
    result = Slide(0, 0, crop_size=40, stride=0.5).predict(model, sample_of(40, 80, (1, 2)))
    # left: means .75 and .625 -> class 0; sums 1 and 1.25 would give class 1
    assert result.tolist() == [[0, 1]]


def test_a_small_image_is_one_window():
    model = Scripted([[0.0, 1.0]])
    result = Slide(0, 0, crop_size=64, stride=0.5).predict(model, sample_of(20, 30))
    assert model.sizes == [(20, 30)]
    assert result.shape == (20, 30) and (result == 1).all()


def test_windows_do_not_change_predictions_of_a_pixelwise_model():
    classes = blocks(3, (56, 88), 4)
    image = torch.from_numpy(to_image(classes)).permute(2, 0, 1)
    sample = {"image": image, "height": 56, "width": 88}
    result = Slide(0, 0, crop_size=32, stride=2 / 3).predict(ColorModel().eval(), sample)
    np.testing.assert_array_equal(result.numpy(), classes)


def test_the_averaged_scores_are_resized_to_the_label():
    classes = blocks(4, (32, 48), 8)
    image = torch.from_numpy(to_image(classes)).permute(2, 0, 1)
    model = ColorModel().eval()
    sample = {"image": image, "height": 64, "width": 96}
    result = Slide(0, 0, crop_size=16, stride=1.0).predict(model, sample)
    expected = Native(0, 0).predict(model, sample)
    assert result.shape == (64, 96)
    assert torch.equal(result, expected)


class Noise:
    """Scores that are a linear function of the pixels minus the mean of the window."""

    def __init__(self):
        self.channels = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))

    def __call__(self, batch):
        image = batch[0]["image"].float()
        # with the mean, overlapping windows differ in their scores for a pixel
        image = image - image.mean((1, 2), keepdim=True)
        return [{"sem_seg": torch.einsum("ck,khw->chw", self.channels, image)}]


@pytest.mark.parametrize("out", [(75, 90), (40, 131), (150, 180), (40, 75), (90, 75)])
@pytest.mark.parametrize(("crop", "stride"), [(32, 2 / 3), (32, 0.25), (20, 1.0), (80, 0.5)])
def test_slide_equals_a_mean_over_the_whole_image(crop, stride, out):
    sample = sample_of(75, 90, out)
    sample["image"] = torch.randint(0, 256, (3, 75, 90), generator=torch.Generator().manual_seed(2))
    sums, counts = torch.zeros(7, 75, 90, dtype=torch.float64), torch.zeros(75, 90)
    for rows, cols in windows(75, 90, crop, stride):
        part = sample["image"][:, rows, cols]
        sums[:, rows, cols] += Noise()([{"image": part}])[0]["sem_seg"]
        counts[rows, cols] += 1
    expected = torch.nn.functional.interpolate((sums / counts)[None], out, mode="bilinear")[0]
    prediction = Slide(0, 0, crop_size=crop, stride=stride).predict(Noise(), sample)
    assert prediction.shape == out
    chosen = expected.gather(0, prediction.long()[None])[0]
    assert (expected.amax(0) - chosen).max() < 1e-3  # of scores in the hundreds


def test_slide_keeps_scores_of_one_row_of_windows():
    slide = Slide(0, 0, crop_size=32, stride=0.5)
    rows = [scores.shape for scores in slide.mean_scores(Noise(), sample_of(75, 90))]
    assert rows == [(7, 16, 90), (7, 16, 90), (7, 11, 90), (7, 32, 90)]


def test_slide_scores_are_means():
    model = Scripted([[0.25, -3.0]] * 15)
    parts = Slide(0, 0, crop_size=32, stride=0.5).mean_scores(model, sample_of(64, 90))
    scores = torch.cat(list(parts), dim=1)
    assert torch.equal(scores, torch.tensor([0.25, -3.0])[:, None, None].expand(2, 64, 90))


def test_slide_resizes_only_with_a_short_side():
    image, label = pair(90, 160)
    assert protocol_of("slide").prepare(image, label, "bdd_val")[0] is image
    prepared, scored = protocol_of("slide", SLIDE__SHORT_SIDE=45).prepare(image, label, "bdd_val")
    assert prepared.shape == (45, 80, 3) and scored is label


# ------------------------------------------------------------------------ by name


def test_an_unknown_protocol():
    with pytest.raises(
        ValueError, match=r"'natvie'; known: clouds, native, rein1024, rein512, slide"
    ):
        protocol_of("natvie")


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocols_can_be_pickled(name):
    protocol = protocol_of(name)
    assert pickle.loads(pickle.dumps(protocol)) == protocol


@pytest.mark.parametrize(
    "protocol",
    [Slide(0, 0, crop_size=100, stride=0.5), WithTTA(Native(0, 0), (1.0,), flip=False)],
    ids=["one window", "tta of one copy"],
)
def test_classes_and_confidence_are_those_of_the_whole_image(protocol):
    model = tiny_model().eval()
    sample = {**sample_of(64, 96, (50, 110)), "file_name": "x"}
    sample["image"] = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 64, 96), "u1"))
    with torch.no_grad():
        classes, confidence = Native(0, 0).classify(model, sample, with_confidence=True)
        scores = model([sample])[0]["sem_seg"]
        others = protocol.classify(model, sample, with_confidence=True)
        assert protocol.classify(model, sample, with_confidence=False)[1] is None
    expected = scores.amax(0) / scores.sum(0).clamp(min=1)
    assert confidence.shape == (50, 110) and confidence.std() > 0
    torch.testing.assert_close(confidence, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(others[1], confidence, rtol=1e-4, atol=1e-5)
    assert (others[0] == classes).double().mean() > 0.999
