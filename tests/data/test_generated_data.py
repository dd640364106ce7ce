"""Generated images in training: their samples, the joint stream, and errors in their folders."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_files import random_image, save, train_ids, write, write_generated
from fvcore.transforms.transform import NoOpTransform, VFlipTransform

from clouds.config import get_cfg
from clouds.data import dataset_mapper as mapper_module
from clouds.data import reading
from clouds.data.augmentation import Augmentation, AugmentationList
from clouds.data.build import build_train_loader
from clouds.data.dataset_mapper import GeneratedMapper, SourceMapper
from clouds.data.datasets import forget_listings, get_dataset
from clouds.data.structures import Domain

COMMON = {"image", "height", "width", "file_name", "domain", "dataset", "seed"}
KEYS = {
    Domain.SOURCE: COMMON | {"sem_seg"},
    Domain.GENERATED: COMMON | {"clean_image"},
}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Five source images and four generated ones, numbers 100 to 103."""
    forget_listings()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for i in range(5):
        write(tmp_path, "gta5", i)
    for i in range(4):
        write_generated(tmp_path, f"{100 + i}.png")
    return tmp_path


@pytest.fixture
def images(root):
    return root / "stable_diffusion/x/images"


@pytest.fixture
def cfg(root):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("gta5", "sd_x")
    cfg.INPUT.CROP.SIZE = (16, 20)
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SEED = 3
    return cfg


def batches(cfg, count, **options):
    return list(islice(build_train_loader(cfg, **options), count))


def all_same(first, second) -> bool:
    assert [len(batch) for batch in first] == [len(batch) for batch in second]
    for a, b in zip(chain(*first), chain(*second), strict=True):
        assert a.keys() == b.keys() == KEYS[a["domain"]]
        for key, value in a.items():
            same = torch.equal(value, b[key]) if key in ARRAYS else value == b[key]
            if not same:
                return False
    return True


ARRAYS = ("image", "clean_image", "sem_seg")


def pixels(tensor) -> np.ndarray:
    assert tensor.dtype == torch.uint8
    return tensor.permute(1, 2, 0).numpy()


# ---------------------------------------------------------------- samples


def test_a_sample(cfg, root, images):
    # neither the size of the other images nor that of the crop
    write_generated(root, "104.png", size=(40, 21))
    mapper = GeneratedMapper.from_config(cfg)
    for record in get_dataset("sd_x").records():
        number = int(record.image.stem)
        size = (40, 21) if number == 104 else (24, 32)
        original = random_image(number, size)
        seen = set()
        for seed in range(20):
            sample = mapper(record, seed)
            assert sample.keys() == KEYS[Domain.GENERATED]
            clean = pixels(sample["clean_image"])
            flipped = not np.array_equal(clean, original)
            assert np.array_equal(clean, original[:, ::-1] if flipped else original)
            assert sample["clean_image"].is_contiguous()
            assert sample["image"].shape == (3, *size)
            assert sample["image"].dtype == torch.uint8
            assert (sample["height"], sample["width"]) == size
            assert sample["file_name"] == str(images / f"{number}.png")
            assert sample["domain"] is Domain.GENERATED
            assert (sample["dataset"], sample["seed"]) == ("sd_x", seed)
            seen.add((flipped, sample["image"].numpy().tobytes()))
        assert len(seen) > 15  # the student's view hardly ever repeats


def test_the_students_view_differs_in_colors_alone(cfg, images):
    # four areas of one color each, which any change of colors alone keeps
    colors = np.array([[[200, 40, 40], [40, 200, 40]], [[40, 40, 200], [90, 90, 90]]], np.uint8)
    save(images / "100.png", colors.repeat(12, 0).repeat(16, 1))
    mapper = GeneratedMapper.from_config(cfg)
    record = get_dataset("sd_x").records()[0]
    changed = 0
    for seed in range(30):
        sample = mapper(record, seed)
        view, clean = pixels(sample["image"]), pixels(sample["clean_image"])
        for rows in (slice(0, 12), slice(12, 24)):
            for columns in (slice(0, 16), slice(16, 32)):
                assert len(np.unique(view[rows, columns].reshape(-1, 3), axis=0)) == 1
        changed += not np.array_equal(view, clean)
    assert changed > 20


def test_half_are_flipped(cfg):
    mapper = GeneratedMapper.from_config(cfg)
    record = get_dataset("sd_x").records()[0]
    views = [pixels(mapper(record, seed)["clean_image"]) for seed in range(400)]
    flips = sum(np.array_equal(view, random_image(100)[:, ::-1]) for view in views)
    assert 160 <= flips <= 240  # four standard deviations


def test_color_jitter_and_flip_can_be_switched_off(cfg):
    record = get_dataset("sd_x").records()[0]
    both = [GeneratedMapper.from_config(cfg)(record, seed) for seed in range(20)]
    cfg.INPUT.COLOR_AUG_SSD = False
    plain = [GeneratedMapper.from_config(cfg)(record, seed) for seed in range(20)]
    for a, b in zip(both, plain, strict=True):
        assert torch.equal(b["image"], b["clean_image"])
        # the clean view does not depend on the jitter
        assert torch.equal(a["clean_image"], b["clean_image"])
    cfg.INPUT.FLIP = False
    for seed in range(20):
        sample = GeneratedMapper.from_config(cfg)(record, seed)
        assert np.array_equal(pixels(sample["image"]), random_image(100))


class RandomVerticalFlip(Augmentation):
    def get_transform(self, image, rng):
        return VFlipTransform(image.shape[0]) if rng.integers(2) else NoOpTransform()


def test_an_appended_augmentation_changes_both_views(cfg):
    cfg.INPUT.COLOR_AUG_SSD = False
    mapper = GeneratedMapper.from_config(cfg)
    further = (*mapper.augmentations.augmentations, RandomVerticalFlip())
    changed = replace(mapper, augmentations=AugmentationList(further))
    record = get_dataset("sd_x").records()[0]
    vertical = 0
    for seed in range(40):
        before, after = mapper(record, seed), changed(record, seed)
        flipped = not torch.equal(before["clean_image"], after["clean_image"])
        for key in ("image", "clean_image"):
            assert torch.equal(after[key], before[key].flip(1) if flipped else before[key])
        vertical += flipped
    assert 5 <= vertical <= 35


def test_a_loader_with_other_mappers(cfg):
    mapper = SourceMapper(AugmentationList(()))
    samples = list(chain(*islice(build_train_loader(cfg, mappers={Domain.SOURCE: mapper}), 6)))
    source = [sample for sample in samples if sample["domain"] is Domain.SOURCE]
    assert 0 < len(source) < len(samples)
    for sample in source:
        number = int(Path(sample["file_name"]).stem)
        assert np.array_equal(pixels(sample["image"]), random_image(number))


def test_labels_are_never_read_in_training(cfg, root, monkeypatch):
    for i in range(4):
        save(root / f"stable_diffusion/x/labels/{100 + i}.png", train_ids(i, range(19)))
    without = batches(cfg, 6)
    dataset = get_dataset("sd_x")
    records = dataset.records()
    # evaluations of pseudo-labels read them
    assert np.array_equal(dataset.read_label(records[1]), train_ids(1, range(19)))

    opened = []
    plain = reading.open_image_file
    monkeypatch.setattr(
        reading, "open_image_file", lambda path, **k: opened.append(path) or plain(path, **k)
    )
    for label in (root / "stable_diffusion/x/labels").iterdir():
        label.write_text("no image")
    assert all_same(without, batches(cfg, 6))
    generated_samples = [s for batch in without for s in batch if s["dataset"] == "sd_x"]
    assert generated_samples
    assert all("sem_seg" not in sample for sample in generated_samples)
    assert {path.parent.name for path in opened if "stable_diffusion" in path.parts} == {"images"}


# ---------------------------------------------------------------- joint stream


def counts_per_epoch(cfg, epoch_length):
    cfg.SOLVER.IMS_PER_BATCH = epoch_length
    return [Counter(sample["dataset"] for sample in batch) for batch in batches(cfg, 3)]


def test_factors_of_the_config(cfg):
    cfg.DATASETS.TARGET_FACTOR = 2.0
    assert counts_per_epoch(cfg, 13) == [{"gta5": 5, "sd_x": 8}] * 3
    cfg.DATASETS.TARGET_FACTOR = 0.5
    cfg.DATASETS.SOURCE_FACTOR = 1.4
    assert counts_per_epoch(cfg, 9) == [{"gta5": 7, "sd_x": 2}] * 3
    cfg.DATALOADER.SAMPLER_TRAIN = "TrainingSampler"
    assert counts_per_epoch(cfg, 9) == [{"gta5": 5, "sd_x": 4}] * 3


def test_each_dataset_has_the_factor_of_its_domain(cfg, root):
    write(root, "synthia", 0)
    write(root, "synthia", 1)
    write_generated(root, "7.png", folder="y")
    cfg.DATASETS.TRAIN = ("sd_y", "gta5", "sd_x", "synthia")
    cfg.DATASETS.TARGET_FACTOR = 3.0
    cfg.DATASETS.SOURCE_FACTOR = 2.0
    expected = {"gta5": 10, "synthia": 4, "sd_x": 12, "sd_y": 3}
    assert counts_per_epoch(cfg, 29) == [expected] * 3


def test_samples_of_both_domains_are_made_by_their_mappers(cfg):
    cfg.DATASETS.TARGET_FACTOR = 1.5
    records = {
        str(record.image): record
        for name in ("gta5", "sd_x")
        for record in get_dataset(name).records()
    }
    mappers = {
        Domain.SOURCE: SourceMapper.from_config(cfg),
        Domain.GENERATED: GeneratedMapper.from_config(cfg),
    }
    stream = batches(cfg, 11)
    again = [
        [mappers[s["domain"]](records[s["file_name"]], s["seed"]) for s in batch]
        for batch in stream
    ]
    assert all_same(stream, again)
    assert {s["domain"] for batch in stream for s in batch} == set(mappers)


def test_samples_of_one_generated_image_in_an_epoch_differ(cfg):
    cfg.DATASETS.TARGET_FACTOR = 6.0
    cfg.SOLVER.IMS_PER_BATCH = 29
    (epoch,) = batches(cfg, 1)
    one = [sample for sample in epoch if sample["file_name"].endswith("100.png")]
    assert len({sample["seed"] for sample in one}) == 6
    assert len({sample["image"].numpy().tobytes() for sample in one}) > 3
    assert len({sample["clean_image"].numpy().tobytes() for sample in one}) <= 2


def test_a_batch_may_be_of_one_domain(cfg):
    combinations = {frozenset(s["dataset"] for s in batch) for batch in batches(cfg, 60)}
    assert combinations == {frozenset({"gta5"}), frozenset({"sd_x"}), frozenset({"gta5", "sd_x"})}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_workers_ranks_and_a_resumed_start_do_not_change_the_stream(cfg, workers, world_size):
    cfg.DATASETS.TARGET_FACTOR = 1.7
    uninterrupted = batches(cfg, 9)
    cfg.DATALOADER.NUM_WORKERS = workers
    shares = [
        batches(cfg, 6, start_iteration=3, rank=r, world_size=world_size) for r in range(world_size)
    ]
    joined = [list(chain(*parts)) for parts in zip(*shares, strict=True)]
    assert all_same(uninterrupted[3:], joined)


def test_order_and_seeds_of_source_images_alone(cfg):
    cfg.DATASETS.TRAIN = ("gta5",)
    samples = [sample for batch in batches(cfg, 10) for sample in batch]
    expected = []
    for epoch in range(8):
        # the documented order: a permutation by SEED and epoch
        order = np.random.default_rng(np.random.SeedSequence([3, epoch])).permutation(5)
        for i in order:
            words = np.random.SeedSequence([3, epoch, int(i)]).generate_state(1, np.uint64)
            expected.append((f"{i:05}.png", int(words[0]) >> 1))
    assert [(Path(s["file_name"]).name, s["seed"]) for s in samples] == expected


def test_the_mixture_is_logged(cfg, caplog):
    cfg.DATASETS.TARGET_FACTOR = 2.0
    with caplog.at_level(logging.INFO, logger="clouds"):
        build_train_loader(cfg)
    shares = "gta5 5 (38.5%) from 5 images, sd_x 8 (61.5%) from 4 images"
    assert f"an epoch has 13 samples: {shares}" in caplog.messages
    caplog.clear()
    cfg.DATASETS.TRAIN = ("gta5",)
    with caplog.at_level(logging.INFO, logger="clouds.data.build"):
        build_train_loader(cfg)
    assert "an epoch has" not in caplog.text


# ---------------------------------------------------------------- errors


def error_message(cfg, error_type=ValueError) -> str:
    with pytest.raises(error_type) as error:
        build_train_loader(cfg)
    return str(error.value)


def test_generated_images_without_a_source(cfg):
    cfg.DATASETS.TRAIN = ("sd_x",)
    message = error_message(cfg)
    assert "generated images only: sd_x" in message
    assert "labelled source" in message


def test_a_missing_folder(cfg, root):
    cfg.DATASETS.TRAIN = ("gta5", "sd_y")
    message = error_message(cfg, FileNotFoundError)
    assert f"no folder {root / 'stable_diffusion/y/images'}" in message
    assert "`clouds generate`" in message
    assert "Available generated datasets: sd_x." in message
    assert "label" not in message.lower()


def test_an_empty_folder(cfg, root):
    (root / "stable_diffusion/y/images").mkdir(parents=True)
    cfg.DATASETS.TRAIN = ("gta5", "sd_y")
    message = error_message(cfg)
    assert "sd_y: no usable image" in message
    assert "`clouds generate`" in message


def test_images_without_a_manifest_entry(cfg, images):
    for i in range(7):
        save(images / f"20{i}.png", random_image(i))
    message = error_message(cfg)
    assert "dataset sd_x: 7 images have no entry" in message
    assert str(images / "200.png") in message
    assert "and 2 more" in message
    assert "Delete them, or run the generator again" in message
    # listing them for measurements is allowed
    assert len(get_dataset("sd_x").records()) == 11


def test_an_image_with_an_incomplete_manifest_line(cfg, images):
    manifest = images.parent / "manifest.jsonl"
    manifest.write_text(manifest.read_text()[:-20])
    message = error_message(cfg)
    assert "1 images have no entry" in message
    assert "103.png" in message


def test_images_that_are_missing(cfg, images):
    (images / "102.png").unlink()
    message = error_message(cfg)
    assert "1 images of" in message
    assert f"missing in {images}: 102.png" in message
    assert "run the generator again" in message


def test_a_broken_manifest(cfg, images):
    manifest = images.parent / "manifest.jsonl"
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join([lines[0], '{"file": 1}', *lines[1:]]) + "\n")
    assert f"{manifest}:2: " in error_message(cfg)


def test_a_missing_manifest_is_allowed_and_logged_once(cfg, images, caplog):
    with_manifest = batches(cfg, 5)
    (images.parent / "manifest.jsonl").unlink()
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="clouds"):
        assert all_same(with_manifest, batches(cfg, 5))
    logged = [r.getMessage() for r in caplog.records if "manifest" in r.getMessage()]
    assert logged == [
        f"sd_x has no {images.parent / 'manifest.jsonl'}: its 4 images are used without checks"
    ]


def test_a_manifest_of_images_in_subfolders(cfg, root):
    (root / "stable_diffusion/x/images/part1").mkdir()
    write_generated(root, "part1/110.png")
    assert counts_per_epoch(cfg, 10)[0] == {"gta5": 5, "sd_x": 5}


def test_a_manifest_that_grows_is_read_again(cfg, root, images):
    build_train_loader(cfg)
    save(images / "104.png", random_image(104))
    error_message(cfg)
    write_generated(root, "104.png")  # the same image, only the manifest changes
    assert counts_per_epoch(cfg, 10)[0] == {"gta5": 5, "sd_x": 5}


@pytest.mark.parametrize("content,workers", [(b"", 0), (b"no image", 0), ("half", 0), ("half", 1)])
def test_an_unreadable_image_is_reported(cfg, images, content, workers):
    path = images / "101.png"
    path.write_bytes(path.read_bytes()[:200] if content == "half" else content)
    cfg.DATALOADER.NUM_WORKERS = workers
    with pytest.raises(ValueError, match=r"101\.png: cannot be read as an image") as error:
        batches(cfg, 3)
    assert "Delete it and run `clouds generate` again" in str(error.value)


def test_an_image_of_another_size_than_in_the_manifest(cfg, images):
    save(images / "101.png", random_image(0, (24, 30)))
    with pytest.raises(ValueError) as error:
        batches(cfg, 3)
    for part in (
        str(images / "101.png"),
        "30x24 pixels",
        "32x24 in the manifest of sd_x",
        "Delete",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("color", [(0, 0, 0), (255, 255, 255), (3, 200, 77)])
def test_an_image_of_one_color_is_a_faulty_file(cfg, images, color, tmp_path):
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    save(images / "101.png", np.full((24, 32, 3), color, np.uint8))
    with pytest.raises(ValueError, match=r"101\.png: all pixels of this generated image") as error:
        batches(cfg, 3)
    assert f"have the color {color} (RGB)" in str(error.value)
    assert "Delete it and run `clouds generate` again" in str(error.value)
    cfg.DATALOADER.FAULTY = "skip"
    used = {Path(s["file_name"]).name for b in batches(cfg, 9) for s in b if s["dataset"] == "sd_x"}
    assert used == {"100.png", "102.png", "103.png"}
    (line,) = Path(cfg.OUTPUT_DIR, "faulty_files.json").read_text().splitlines()
    assert "all pixels of this generated image" in line


def test_one_other_pixel_is_another_color(cfg, images):
    pixels = np.zeros((24, 32, 3), np.uint8)
    pixels[23, 31, 2] = 1
    save(images / "101.png", pixels)
    batches(cfg, 3)


def test_an_image_removed_during_training(cfg, images):
    loader = build_train_loader(cfg)
    (images / "101.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"101\.png: this image of sd_x was removed.*--resume"
    ):
        list(islice(loader, 3))


def test_the_later_of_two_manifest_lines_gives_the_size(cfg, root):
    write_generated(root, "101.png", size=(8, 9))
    sizes = {s["clean_image"].shape for b in batches(cfg, 9) for s in b if s["dataset"] == "sd_x"}
    assert sizes == {(3, 24, 32), (3, 8, 9)}


def test_an_image_is_read_once_per_sample(cfg, monkeypatch):
    read = []
    plain = mapper_module.read_image
    monkeypatch.setattr(mapper_module, "read_image", lambda p: read.append(p) or plain(p))
    (batch,) = batches(cfg, 1)
    assert sorted(map(str, read)) == sorted(sample["file_name"] for sample in batch)
