"""Input sizes and windows of the papers' protocols, sizes per dataset, test-time augmentation."""

from __future__ import annotations

import json
import pickle
from fnmatch import fnmatchcase

import cv2
import numpy as np
import pytest
import torch
from color_model import ColorModel, blocks, to_image, write_cityscapes
from PIL import Image
from reference_files import REFERENCE
from torch.nn import functional as F

from clouds.config import ConfigError, get_cfg, load_config
from clouds.data.input_sizes import PUBLISHED, fitted_size, parse_sizes
from clouds.evaluation import check_test_data, evaluate
from clouds.evaluation.protocols import Native, Slide, WithTTA, build_protocol, windows


def protocol_of(name, **keys):
    cfg = get_cfg()
    cfg.TEST.PROTOCOL = name
    for key, value in keys.items():
        cfg.merge_from_list([f"TEST.{key.replace('__', '.')}", value])
    return build_protocol(cfg)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ------------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("size", "long_and_short", "expected"),
    [
        ((1024, 2048), (1024, 512), (512, 1024)),
        ((1500, 2000), (1024, 512), (512, 683)),  # 682.67: the short side decides
        ((1080, 1920), (1024, 512), (512, 910)),  # 910.2
        ((1080, 1920), (960, 540), (540, 960)),
        ((720, 1280), (2048, 1024), (1024, 1820)),  # 1820.4
        ((720, 1280), (1280, 720), (720, 1280)),
        ((2000, 1500), (2048, 1024), (1365, 1024)),  # portrait
        ((600, 3000), (1024, 512), (205, 1024)),  # 204.8: the long side decides
        ((1, 5000), (1024, 512), (1, 1024)),
    ],
)
def test_fitted_size_by_hand(size, long_and_short, expected):
    assert fitted_size(*size, long_and_short) == expected


NAMES = ("cityscapes_val", "bdd_val", "mapillary_val", "acdc_night_val")
C, B, M, A = (1024, 2048), (720, 1280), (3000, 4000), (1080, 1920)  # height, width of files


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rein512", [(512, 1024), (720, 1280), (512, 683), (540, 960)]),
        ("rein1024", [(1024, 2048), None, None, (1080, 1920)]),
        ("soma512", [(1024, 2048), (720, 1280), (1024, 1365), (1080, 1920)]),
        ("soma1024", [(1024, 2048), (1024, 1820), (1024, 1365), (1080, 1920)]),
        ("tqdm", [(1024, 2048), (720, 1280), (1024, 1365), None]),
        ("vltseg", [(512, 1024), (512, 910), (512, 683), (512, 910)]),
    ],
)
def test_inputs_of_each_dataset(name, expected):
    protocol = protocol_of(name)
    for dataset, size, wanted in zip(NAMES, (C, B, M, A), expected, strict=True):
        if wanted is None:
            with pytest.raises(ValueError, match=rf"no input size for the dataset '{dataset}'"):
                protocol.check_dataset(dataset)
            continue
        protocol.check_dataset(dataset)
        image = np.broadcast_to(np.uint8(0), (*size, 3)).copy()
        label = np.zeros(size, np.uint8)
        prepared, scored = protocol.prepare(image, label, dataset)
        assert prepared.shape == (*wanted, 3)
        halved = dataset == "mapillary_val" and name in ("rein512", "soma512", "soma1024")
        assert scored.shape == ((1500, 2000) if halved else size)


@pytest.mark.parametrize(
    ("name", "width", "starts"),
    [
        ("rein512", 1024, [0, 341, 512]),
        ("soma512", 2048, [0, 341, 682, 1023, 1364, 1536]),
        ("rein1024", 1920, [0, 683, 896]),
        ("vltseg", 1024, [0, 426, 512]),
        ("tqdm", 1280, [0, 341, 682, 768]),
    ],
)
def test_windows_by_hand(name, width, starts):
    protocol = protocol_of(name)
    assert isinstance(protocol, Slide)
    spans = list(windows(protocol.crop_size, width, protocol.crop_size, protocol.stride))
    assert [columns.start for _, columns in spans] == starts
    assert {columns.stop - columns.start for _, columns in spans} == {protocol.crop_size}
    small = list(windows(300, 400, protocol.crop_size, protocol.stride))
    assert small == [(slice(0, 300), slice(0, 400))]  # neither padded nor enlarged


needs_recipes = pytest.mark.skipif(
    not (REFERENCE / "peft" / "recipes.json").is_file(), reason="no recorded recipes"
)


@needs_recipes
def test_tables_are_those_of_the_recorded_recipes():
    recipes = json.loads((REFERENCE / "peft" / "recipes.json").read_text())
    compared = set()
    for key, recipe in recipes.items():
        if "test" not in recipe:
            continue
        name = f"{key.split(':')[0].lower()}{recipe['test']['crop_size'][0]}"
        protocol = PUBLISHED[name]
        assert recipe["test"]["crop_size"] == [protocol.window] * 2
        assert recipe["test"]["stride"] == [protocol.step] * 2
        for data in recipe["val_data"]:
            dataset = data["root"].split("/")[1].replace("100k", "") + "_val"
            (resize,) = data["pipeline"]
            assert protocol.sizes.of(dataset) == tuple(resize["scale"]), (key, dataset)
            assert protocol.sizes.is_halved(dataset) == data["images"].startswith("half")
            compared.add((name, dataset))
    assert len(compared) == 2 + 4 + 4 + 4  # rein1024, rein512, soma512, soma1024


def test_the_input_is_resized_without_antialiasing():
    image = noise(160, 320)
    prepared, _ = protocol_of("rein512", INPUT_SIZES=("x: 64x32",)).prepare(image, None, "x")
    expected = cv2.resize(image, (64, 32), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(prepared, expected)
    native, _ = protocol_of("native", INPUT_SIZES=("x: 64x32",)).prepare(image, None, "x")
    pillow = Image.fromarray(image).resize((64, 32), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(native, np.asarray(pillow))


def test_mapillary_is_halved_as_pillow_does_before_it_is_resized():
    image = noise(101, 203)
    label = np.random.default_rng(1).integers(0, 19, (101, 203), dtype=np.uint8)
    protocol = protocol_of("rein512", INPUT_SIZES=("mapillary_*: 50x25",))
    prepared, scored = protocol.prepare(image, label, "mapillary_val")
    half = Image.fromarray(image).resize((101, 50), Image.Resampling.BICUBIC)
    expected = cv2.resize(np.asarray(half), (50, 25), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(prepared, expected)
    nearest = Image.fromarray(label).resize((101, 50), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(scored, np.asarray(nearest))
    assert protocol.prepare(image, None, "mapillary_val")[1] is None


# ------------------------------------------------------------------------ TEST.INPUT_SIZES


def test_sizes_of_the_config_come_first():
    words = ("bdd_*: 960x540", " camvid_val :640x480 ", "bdd_val: 32x32")
    for name in ("rein512", "native", "slide", "clouds"):
        protocol = protocol_of(name, INPUT_SIZES=words)
        assert protocol.input_size(720, 1280, "bdd_val") == (540, 960)
        assert protocol.input_size(720, 960, "camvid_val") == (480, 640)
    assert protocol_of("rein512", INPUT_SIZES=words).input_size(*C, "cityscapes_val") == (512, 1024)
    assert protocol_of("native", INPUT_SIZES=words).input_size(512, 1024, "cityscapes_val") == C


def test_a_size_of_the_config_is_no_limited_long_side(caplog):
    protocol = protocol_of("native", INPUT_SIZES=("x: 64x32",))
    protocol.warn_if_limited(*protocol.input_size(100, 200, "x"))
    assert caplog.text == ""


@pytest.mark.parametrize("entry", ["bdd_val", "bdd_val: 720", "bdd_val: 0x5", ": 5x5", "a b: 5x5"])
def test_entries_of_another_form_are_refused(entry):
    with pytest.raises(ValueError, match="such as 'bdd_"):
        parse_sizes([entry])
    with pytest.raises(ConfigError, match=r"TEST\.INPUT_SIZES .* such as 'bdd_"):
        load_config(None, ["TEST.INPUT_SIZES", (entry,)])


def test_a_dataset_without_a_size_is_told_before_evaluation():
    cfg = load_config(None, ["TEST.PROTOCOL", "rein1024"])
    with pytest.raises(ValueError, match=r"'bdd_val', only for cityscapes\*, acdc\*.*INPUT_SIZES"):
        check_test_data(cfg, ["bdd_val"])


def test_images_of_no_dataset_have_the_size_of_cityscapes():
    for name, protocol in PUBLISHED.items():
        expected = protocol.sizes.of("cityscapes_val")
        assert protocol_of(name).input_size(*C) == expected[::-1], name
        assert all(fnmatchcase("mapillary_val", pattern) for pattern in protocol.sizes.halved)


# ------------------------------------------------------------------------ test-time augmentation


class Linear:
    """Scores that are a linear function of the pixels, and of the column."""

    def __init__(self, by_column=0.0):
        self.channels = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
        self.by_column = by_column
        self.sizes = []

    def __call__(self, batch):
        (sample,) = batch
        image = sample["image"].float()
        assert sample["image"].dtype == torch.uint8
        assert (sample["height"], sample["width"]) == tuple(image.shape[-2:])
        self.sizes.append(tuple(image.shape[-2:]))
        scores = torch.einsum("ck,khw->chw", self.channels, image)
        scores[0] += self.by_column * torch.arange(image.shape[-1])
        return [{"sem_seg": scores}]


def sample_of(height, width, out=None):
    image = torch.from_numpy(noise(height, width)).permute(2, 0, 1)
    size = out or (height, width)
    return {"image": image, "height": size[0], "width": size[1]}


def test_flips_are_averaged_by_hand():
    """The term of the column has the mean (width - 1) / 2 over an image and its mirror image."""
    sample = sample_of(6, 9)
    tta = WithTTA(Native(0, 0), (1.0,), flip=True)
    model = Linear(by_column=10.0)
    (scores,) = tta.mean_scores(model, sample)
    expected = Linear()([sample])[0]["sem_seg"]
    expected[0] += 10 * 4
    torch.testing.assert_close(scores, expected)
    assert model.sizes == [(6, 9)] * 2


def test_scales_are_averaged_at_the_size_of_the_input():
    sample = sample_of(20, 30)
    model = Linear()
    (scores,) = WithTTA(Native(0, 0), (0.5, 1.0, 1.55), flip=False).mean_scores(model, sample)
    assert model.sizes == [(10, 15), (20, 30), (31, 46)]
    expected = torch.zeros(7, 20, 30)
    for size in model.sizes:
        image = F.interpolate(
            sample["image"][None].float(), size, mode="bilinear", antialias=True
        ).round()
        one = torch.einsum("ck,khw->chw", model.channels, image[0].clamp(0, 255))
        expected += F.interpolate(one[None], (20, 30), mode="bilinear")[0] / 3
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=1e-5)


def test_windows_are_those_of_each_copy():
    model = Linear()
    tta = WithTTA(Slide(0, 0, 16, 1.0), (1.0, 2.0), flip=True)
    tta.predict(model, sample_of(16, 32))
    # 2 windows of the image and of its mirror image, 8 of each at the double size
    assert model.sizes == [(16, 16)] * (2 + 2 + 8 + 8)


def test_a_pixelwise_model_predicts_the_same_with_flips():
    classes = blocks(3, (32, 48), 8)
    image = torch.from_numpy(to_image(classes)).permute(2, 0, 1)
    sample = {"image": image, "height": 16, "width": 24}
    model = ColorModel().eval()
    for inner in (Native(0, 0), Slide(0, 0, 20, 0.5)):
        result = WithTTA(inner, (1.0,), flip=True).predict(model, sample)
        assert torch.equal(result, inner.predict(model, sample))
        assert result.dtype == torch.uint8 and result.shape == (16, 24)


def test_tta_by_config():
    tta = protocol_of("rein512", AUG__ENABLED=True, AUG__SCALES=(0.75, 1.0), AUG__FLIP=False)
    assert tta == WithTTA(protocol_of("rein512"), (0.75, 1.0), False)
    assert pickle.loads(pickle.dumps(tta)) == tta
    assert tta.input_size(*B, "bdd_val") == B
    with pytest.raises(ValueError, match="no input size"):
        tta.check_dataset("x_val")
    image = noise(30, 40)
    for ours, other in zip(
        tta.prepare(image, None, "bdd_val"),
        protocol_of("rein512").prepare(image, None, "bdd_val"),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, other)
    for value in ((), (0.0,), (1.0, -1.0)):
        with pytest.raises(ConfigError, match="one or more numbers greater than 0"):
            load_config(None, ["TEST.AUG.SCALES", value])


def test_results_name_the_protocol(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    classes = blocks(1, (24, 32), 4)
    write_cityscapes(tmp_path, [(classes, classes)])
    words = ["DATASETS.TEST", ("cityscapes_val",), "OUTPUT_DIR", str(tmp_path / "out")]
    words += ["DATALOADER.NUM_WORKERS", 0, "TEST.PROTOCOL", "vltseg", "MODEL.DEVICE", "cpu"]
    words += ["TEST.INPUT_SIZES", ("*: 32x24",)]
    cfg = load_config(None, words)
    results = evaluate(cfg, ColorModel())
    assert results.protocol == "vltseg" and results.mean_miou == 100
    cfg = load_config(None, [*words, "TEST.AUG.ENABLED", True])
    assert evaluate(cfg, ColorModel()).protocol == "vltseg+tta"
    assert json.loads((tmp_path / "out" / "results.json").read_text())["protocol"] == "vltseg+tta"
