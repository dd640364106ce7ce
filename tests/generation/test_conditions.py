"""Images for the labels of a dataset: windows, prompts, ControlNets, folders, refused input."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import dataset_files
import numpy as np
import pytest
import tiny_pipelines
import torch
from PIL import Image

from clouds.cli import generate
from clouds.data.datasets import forget_listings, get_dataset
from clouds.data.label_space import CITYSCAPES_19, builtin_label_space
from clouds.generation.ade20k import ADE20K_COLORS, ade20k_colors
from clouds.generation.condition import Condition, LabelConditions, Window
from clouds.generation.generators import build_generator
from clouds.generation.generators.label_images import LabelImages, one_hot

NONE = 255
HERE = Path("here.png")
WHOLE = Window(0, 0, 64, 64, (64, 64))


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A dataset root with four images of gta5: 24x32 pixels."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    forget_listings()
    for number in range(4):
        dataset_files.write(tmp_path, "gta5", number)
    return tmp_path


# ---------------------------------------------------------------------- labels
def test_all_labels_are_used_before_one_is_used_again(root):
    conditions = LabelConditions(get_dataset("gta5"), (24, 32), seed=3)
    files = [conditions[number].file.name for number in range(12)]
    assert all(len(set(files[start : start + 4])) == 4 for start in (0, 4, 8))
    assert [conditions[5].file.name, conditions[0].file.name] == [files[5], files[0]]
    orders = {tuple(files[start : start + 4]) for start in (0, 4, 8)}
    assert len(orders) > 1


def test_a_window_has_the_shape_of_the_image_and_is_the_same_in_image_and_label(root):
    dataset = get_dataset("gta5")
    conditions = LabelConditions(dataset, (12, 12))
    records = {record.label: record for record in dataset.records()}
    lefts = set()
    for number in range(8):
        condition = conditions[number]
        window = condition.window
        assert (window.height, window.width) == (24, 24) and window.top == 0
        assert records[condition.file].image == condition.image
        whole = dataset.read_label(records[condition.file])
        # nearest: of every 2x2 pixels the first
        expected = whole[::2, window.left : window.left + 24 : 2]
        assert np.array_equal(condition.label, expected)
        lefts.add(window.left)
    assert len(lefts) > 2 and min(lefts) >= 0 and max(lefts) <= 8


def test_a_label_without_a_class_is_named(root, monkeypatch):
    for path in (root / "gta5/labels").rglob("*.png"):
        Image.fromarray(np.zeros((24, 32), np.uint8)).save(path)  # unlabelled in GTA5
    conditions = LabelConditions(get_dataset("gta5"), (24, 32))
    with pytest.raises(ValueError, match=r"labels/.*png: no pixel has a class.*Remove this label"):
        conditions[0]


def test_a_dataset_without_labels_is_refused(root):
    folder = root / "stable_diffusion/plain/images"
    folder.mkdir(parents=True)
    Image.fromarray(dataset_files.random_image(0)).save(folder / "0.png")
    with pytest.raises(ValueError, match="sd_plain, whose images have no labels"):
        LabelConditions(get_dataset("sd_plain"), (24, 32))


def test_the_prompt_names_the_classes_that_are_present_by_their_area():
    label = np.full((100, 100), NONE, np.uint8)
    label[:50], label[50:70], label[70:75], label[75] = 10, 0, 13, 8  # sky, road, car, vegetation
    label[76, :19] = 11  # a person, on 0.19 % of the pixels
    prompt = Condition(label, HERE, HERE, WHOLE).prompt("a street in fog", CITYSCAPES_19)
    assert prompt == "a street in fog, with sky, road, car, vegetation"
    label[76, :20] = 11
    prompt = Condition(label, HERE, HERE, WHOLE).prompt("a street in fog", CITYSCAPES_19)
    assert prompt.endswith("vegetation, person")


# ---------------------------------------------------------------------- inputs of ControlNets
def test_one_hot_labels():
    labels = [np.array([[0, 2], [NONE, 1]], np.uint8), np.array([[1, 1], [7, 0]], np.uint8)]
    expected = np.zeros((2, 4, 2, 2), np.float32)
    for n, label in enumerate(labels):
        for y in range(2):
            for x in range(2):
                expected[n, min(label[y, x], 3), y, x] = 1  # 7 is no class, either
    assert np.array_equal(one_hot(labels, 3).numpy(), expected)


def test_cityscapes_in_the_colors_of_ade20k():
    colors, missing = ade20k_colors(CITYSCAPES_19)
    assert missing == ()
    named = dict(zip(CITYSCAPES_19.names, map(tuple, colors.tolist()), strict=False))
    assert named["road"] == (140, 140, 140) and named["car"] == (0, 102, 200)  # of its own name
    assert named["rider"] == named["person"] == (150, 5, 61)  # the nearest
    assert named["motorcycle"] == (163, 0, 255) and named["traffic sign"] == (255, 5, 153)
    assert not colors[19:].any()
    assert len(set(ADE20K_COLORS.values())) == len(ADE20K_COLORS)


def test_classes_without_a_color_are_named():
    space = builtin_label_space("mapillary_65").label_space
    assert "fire hydrant" in ade20k_colors(space)[1]
    assert {"road", "ground animal", "bicyclist"}.isdisjoint(ade20k_colors(space)[1])


class FakeControlNet:
    def __init__(self, **config):
        self.config = config


def test_a_controlnet_of_other_classes_is_refused():
    with pytest.raises(ValueError, match=r"one-hot labels of 11 classes.*cityscapes_19.* has 19"):
        LabelImages(FakeControlNet(conditioning_channels=12)).check(CITYSCAPES_19)
    names = list(CITYSCAPES_19.names[::-1])
    other = FakeControlNet(conditioning_channels=20)
    with pytest.raises(ValueError, match="trained on the classes bicycle, motorcycle"):
        LabelImages(other, classes=names).check(CITYSCAPES_19)
    LabelImages(FakeControlNet(conditioning_channels=20)).check(CITYSCAPES_19)
    with pytest.raises(ValueError, match="'gray'; allowed are ade20k, dataset"):
        LabelImages(FakeControlNet(conditioning_channels=3), "gray")


# ---------------------------------------------------------------------- pipelines
@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("controlled")


@pytest.fixture(scope="module")
def tiny(folder) -> tuple[Path, Path]:
    """Stable Diffusion, and its ControlNet of 19 classes."""
    model = tiny_pipelines.save("stable_diffusion", folder)
    options = {"conditioning_channels": 20}
    return model, tiny_pipelines.save_controlnet(model, folder / "one_hot", **options)


def make(model: Path, controlnet: Path | str, **options):
    small = {"steps": 2, "height": 64, "width": 64, "batch_size": 2, "device": "cpu"}
    small |= {"model": str(model), "controlnet": str(controlnet), "scheduler": "own"}
    return build_generator("stable_diffusion", small | options)


class Conditions:
    label_space = CITYSCAPES_19


def a_label(seed: int) -> np.ndarray:
    """64x64 in blocks of 16 pixels, without the class 255."""
    blocks = np.random.default_rng(seed).integers(0, 19, (4, 4)).astype(np.uint8)
    return np.kron(blocks, np.ones((16, 16), np.uint8))


def run(generator, labels, prompt="a bus", seed=1):
    generator.check_conditions(Conditions())
    conditions = [Condition(label, HERE, HERE, WHOLE) for label in labels]
    count = len(labels)
    return generator.generate_for_labels([prompt] * count, [seed] * count, conditions)


def direct(model: Path, controlnet: Path, control, kind: str, **options) -> np.ndarray:
    import diffusers

    network = getattr(diffusers, tiny_pipelines.CONTROLNETS[model.name])
    pipeline = getattr(diffusers, kind).from_pretrained(
        model, controlnet=network.from_pretrained(controlnet), safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    if kind == "StableDiffusion3ControlNetPipeline":  # no variance: it samples without a seed
        pipeline.vae.encoder.conv_out.weight.data[16:] = 0
        pipeline.vae.encoder.conv_out.bias.data[16:] = -30
    noise = torch.Generator("cpu").manual_seed(1)
    size = {"height": 64, "width": 64, "num_inference_steps": 2}
    name = "image" if "XL" in kind or kind.startswith("StableDiffusionC") else "control_image"
    arguments = {name: control, "generator": noise, **size, **options}
    return np.array(pipeline(prompt="a bus", **arguments).images[0])


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def test_images_for_one_hot_labels_are_those_of_a_direct_call(tiny):
    generated = run(make(*tiny), [a_label(0), a_label(1)])
    hot = np.zeros((1, 20, 64, 64), np.float32)
    for y in range(64):
        for x in range(64):
            hot[0, a_label(0)[y, x], y, x] = 1
    kind = "StableDiffusionControlNetPipeline"
    assert difference(generated[0].image, direct(*tiny, torch.from_numpy(hot), kind)) <= 1
    assert difference(generated[0].image, generated[1].image) > 1
    assert np.array_equal(generated[1].label, a_label(1)) and generated[1].approximate
    strong = run(make(*tiny, control_scale=0.0), [a_label(0)])[0].image
    assert difference(strong, generated[0].image) > 1


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("stable_diffusion_xl", "StableDiffusionXLControlNetPipeline", {"guidance_scale": 7.5}),
        ("stable_diffusion_3", "StableDiffusion3ControlNetPipeline", {"guidance_scale": 7.0}),
        ("flux", "FluxControlNetPipeline", {"guidance_scale": 7.0}),
        ("sana", "SanaControlNetPipeline", {"use_resolution_binning": False}),
        ("qwen_image", "QwenImageControlNetPipeline", {"negative_prompt": " "}),
    ],
)
def test_controlnets_of_other_models_take_labels_in_colors(folder, name, kind, options):
    model = tiny_pipelines.save(name, folder)
    controlnet = tiny_pipelines.save_controlnet(model, folder)
    generator = make(model, controlnet)
    assert generator.settings["control_labels"] == "ade20k"
    generated = run(generator, [a_label(0), a_label(1)])
    colors = {c: ade20k_colors(CITYSCAPES_19)[0][c] for c in range(19)}
    image = np.array([[colors[c] for c in row] for row in a_label(0)], np.uint8)
    expected = direct(model, controlnet, Image.fromarray(image), kind, **options)
    assert difference(generated[0].image, expected) <= 1
    assert difference(generated[0].image, generated[1].image) > 1


def test_a_pipeline_that_cannot_be_conditioned_is_named(folder, tiny):
    with pytest.raises(ValueError, match="--condition needs a ControlNet"):
        make(tiny[0], "").check_conditions(Conditions())
    klein = tiny_pipelines.save("flux2_klein", folder)
    with pytest.raises(ValueError, match="is a Flux2KleinPipeline, which cannot be conditioned"):
        make(klein, tiny[1])
    flux = tiny_pipelines.save("flux", folder)
    with pytest.raises(ValueError, match=r"is a ControlNetModel, which does not fit .*FluxPipel"):
        make(flux, tiny[1])
    with pytest.raises(ValueError, match="UNet2DConditionModel; a ControlNet of diffusers"):
        make(tiny[0], tiny[0] / "unet")
    with pytest.raises(FileNotFoundError, match="--controlnet: there is no folder"):
        make(tiny[0], folder / "none")
    large = tiny_pipelines.save("stable_diffusion_xl", folder)
    with pytest.raises(ValueError, match=r"text embeddings of 16 channels, and .* has 32"):
        make(large, tiny[1])


# ---------------------------------------------------------------------- folders
def command(root: Path, tiny, *more: str) -> list[str]:
    model, controlnet = tiny
    return [
        "--output", str(root / "stable_diffusion/x"), "--condition", "gta5", "--model", str(model),
        "--controlnet", str(controlnet), "--count", "5", "--steps", "2", "--height", "64",
        "--width", "64", "--device", "cpu", "--batch-size", "2", *more,
    ]  # fmt: skip


def test_a_folder_of_images_for_labels_is_a_dataset_with_approximate_labels(root, tiny, capsys):
    generate.main(command(root, tiny))
    assert "MODEL.CLOUDS.GENERATED_LABELS given" in capsys.readouterr().out
    dataset, source = get_dataset("sd_x"), get_dataset("gta5")
    conditions = LabelConditions(source, (64, 64))
    lines = (root / "stable_diffusion/x/manifest.jsonl").read_text().splitlines()
    for number, (record, line) in enumerate(zip(dataset.records(), lines, strict=True)):
        entry = json.loads(line)
        assert entry["labels"] == "approximate" and record.approximate_label
        assert entry["condition"] == conditions[number].file.name
        expected = conditions[number].label
        assert np.array_equal(dataset.read_label(record), expected)
        present = [CITYSCAPES_19.names[c] for c in np.unique(expected[expected != NONE])]
        assert all(name in entry["prompt"] for name in present[:3])
    record = json.loads((root / "stable_diffusion/x/generation.json").read_text())
    assert (record["condition"], record["condition_labels"]) == ("gta5", 4)
    assert (root / "stable_diffusion/x/contact_sheet.png").is_file()
    images = sorted((root / "stable_diffusion/x/images").iterdir())
    before = [path.read_bytes() for path in images]
    images[3].unlink()
    generate.main(command(root, tiny))  # resumed: the same image
    assert [path.read_bytes() for path in images] == before
    with pytest.raises(SystemExit):
        generate.main(command(root, tiny, "--control-scale", "0.5"))
    assert "control_scale was 1.0 and is now 0.5" in capsys.readouterr().err


def test_labels_of_other_classes_bring_their_classes(root, tmp_path, folder):
    """Those of CamVid, of which a description says that one class is not labelled."""
    space = builtin_label_space("camvid_11").label_space
    for number in range(2):
        image = dataset_files.random_image(number, (64, 64))
        label = np.random.default_rng(number).integers(0, 10, (64, 64)).astype(np.uint8)
        for name, pixels in (("images", image), ("labels", label)):
            path = tmp_path / "own" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    text = "name: own\nlabel_space: camvid_11\nimages: images\nlabels: labels\nclasses_present: ["
    (tmp_path / "own/own.yaml").write_text(text + ", ".join(space.names[:10]) + "]\n")
    model = tiny_pipelines.save("stable_diffusion", folder)
    controlnet = tiny_pipelines.save_controlnet(
        model, folder / "camvid", conditioning_channels=space.num_classes + 1
    )
    more = ["--condition", "own", "--descriptions", str(tmp_path / "own/own.yaml")]
    generate.main(command(root, (model, controlnet), *more, "--count", "2"))
    dataset = get_dataset("sd_x")
    assert dataset.label_space == space and dataset.classes_present == tuple(range(10))
    assert dataset.label_space.colors == space.colors
    label = cv2.imread(str(root / "stable_diffusion/x/labels/000000.png"), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(dataset.read_label(dataset.records()[0]), label)
    (root / "stable_diffusion/x/classes.yaml").write_text("classes: 3\n")
    with pytest.raises(ValueError, match=r"classes\.yaml"):
        get_dataset("sd_x")


def test_bad_command_lines(root, tiny, capsys):
    for arguments, message in (
        (["--controlnet", "x"], "--controlnet and --descriptions need --condition"),
        (["--condition", "gta6"], "unknown dataset 'gta6'"),
        (["--condition", "gta5", "--generator", "procedural"], "not in"),
    ):
        with pytest.raises(SystemExit):
            generate.main(["--output", str(root / "x"), *arguments])
        assert message in capsys.readouterr().err
    assert not (root / "x").exists()


def test_a_generator_of_prompts_alone_is_refused(root, monkeypatch, tmp_path):
    from clouds.generation.job import GenerationJob

    class Plain:
        name, has_labels, size = "plain", False, (24, 32)

    conditions = LabelConditions(get_dataset("gta5"), (24, 32))
    with pytest.raises(ValueError, match="'plain' cannot generate images for labels"):
        GenerationJob(tmp_path, Plain(), ("a bus",), 1, conditions=conditions)
