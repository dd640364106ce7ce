"""Generated images on their way into training: mixing, views, and what is wrong with a folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from itertools import chain, islice
from pathlib import Path

import check_datasets
import numpy as np
import pytest
import torch
from dataset_files import picture, save, train_ids, write

from clouds.config import get_cfg
from clouds.data import dataset_mapper as mapper_module
from clouds.data import reading
from clouds.data.build import Mixture, Part, VisitSampler, build_train_loader, sample_seed
from clouds.data.dataset_mapper import GeneratedMapper, SourceMapper
from clouds.data.dataset_report import check_dataset
from clouds.data.datasets import forget_listings, generated, get_dataset, is_generated
from clouds.data.structures import Domain

REPOSITORY = Path(__file__).resolve().parents[2]
COMMON = {"image", "height", "width", "file_name", "domain", "dataset", "seed"}
KEYS = {
    Domain.SOURCE: COMMON | {"sem_seg"},
    Domain.GENERATED: COMMON | {"clean_image", "flipped"},
}


def paint(root: Path, name: str, size: tuple[int, int] = (24, 32), folder: str = "x") -> Path:
    """An image, number by its name, and its line in the manifest, typed here anew."""
    top = root / "stable_diffusion" / folder
    image = save(top / "images" / name, picture(int(Path(name).stem), size))
    line = {
        "file": name,
        "prompt": "a street",
        "seed": 0,
        "generator": "procedural",
        "model": "",
        "height": size[0],
        "width": size[1],
        "sha256": hashlib.sha256(image.read_bytes()).hexdigest(),
    }
    with (top / "manifest.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    return image


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Five source images and four generated ones, numbers 100 to 103."""
    forget_listings()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for i in range(5):
        write(tmp_path, "gta5", i)
    for i in range(4):
        paint(tmp_path, f"{100 + i}.png")
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


# ---------------------------------------------------------------- names


def test_names():
    names = ("gta5", "sd_a", "sd_", "synthia", "sd_b_c", "anything", "")
    assert generated(names) == ["sd_a", "sd_b_c"]
    assert [is_generated(name) for name in names] == [False, True, False, False, True, False, False]


def test_asking_for_names_does_not_need_torch():
    code = (
        "import sys; from clouds.data.datasets import generated, is_generated;"
        "assert generated(['sd_a']); assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


# ---------------------------------------------------------------- views


def test_a_sample(cfg, root, images):
    paint(root, "104.png", size=(40, 21))  # neither the size of the others nor that of the crop
    mapper = GeneratedMapper.from_config(cfg)
    for record in get_dataset("sd_x").records():
        number = int(record.image.stem)
        size = (40, 21) if number == 104 else (24, 32)
        original = picture(number, size)
        seen = set()
        for seed in range(20):
            sample = mapper(record, seed)
            assert sample.keys() == KEYS[Domain.GENERATED]
            assert type(sample["flipped"]) is bool
            expected = original[:, ::-1] if sample["flipped"] else original
            assert np.array_equal(pixels(sample["clean_image"]), expected)
            assert sample["clean_image"].is_contiguous()
            assert sample["image"].shape == (3, *size)
            assert sample["image"].dtype == torch.uint8
            assert (sample["height"], sample["width"]) == size
            assert sample["file_name"] == str(images / f"{number}.png")
            assert sample["domain"] is Domain.GENERATED
            assert (sample["dataset"], sample["seed"]) == ("sd_x", seed)
            seen.add((sample["flipped"], sample["image"].numpy().tobytes()))
        assert len(seen) > 15  # the student hardly sees anything twice


def test_the_students_view_has_other_colors_and_no_other_geometry(cfg, images):
    # four areas of one color: whatever is done to colors leaves them of one color, in place
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
    flips = sum(mapper(record, seed)["flipped"] for seed in range(400))
    assert 160 <= flips <= 240  # four standard deviations


def test_switches_of_the_views(cfg):
    record = get_dataset("sd_x").records()[0]
    both = [GeneratedMapper.from_config(cfg)(record, seed) for seed in range(20)]
    cfg.INPUT.COLOR_AUG_SSD = False
    plain = [GeneratedMapper.from_config(cfg)(record, seed) for seed in range(20)]
    for a, b in zip(both, plain, strict=True):
        assert torch.equal(b["image"], b["clean_image"])
        # the clean view does not depend on the jitter
        assert torch.equal(a["clean_image"], b["clean_image"])
        assert a["flipped"] == b["flipped"]
    cfg.INPUT.FLIP = False
    for seed in range(20):
        sample = GeneratedMapper.from_config(cfg)(record, seed)
        assert not sample["flipped"]
        assert np.array_equal(pixels(sample["image"]), picture(100))


def test_labels_are_never_read_in_training(cfg, root, monkeypatch):
    for i in range(4):
        save(root / f"stable_diffusion/x/labels/{100 + i}.png", train_ids(i, range(19)))
    without = batches(cfg, 6)
    dataset = get_dataset("sd_x")
    records = dataset.records()
    assert np.array_equal(dataset.read_label(records[1]), train_ids(1, range(19)))  # to measure by

    opened = []
    plain = reading._open
    monkeypatch.setattr(reading, "_open", lambda path: opened.append(path) or plain(path))
    for label in (root / "stable_diffusion/x/labels").iterdir():
        label.write_text("no image")
    assert all_same(without, batches(cfg, 6))
    painted = [sample for batch in without for sample in batch if sample["dataset"] == "sd_x"]
    assert painted
    assert all("sem_seg" not in sample for sample in painted)
    assert {path.parent.name for path in opened if "stable_diffusion" in path.parts} == {"images"}


# ---------------------------------------------------------------- mixing


def visits(mixture, batch_size, count, **options):
    return list(islice(VisitSampler(mixture, batch_size, **options), count))


@pytest.mark.parametrize("parts", [(Part(7),), (Part(5), Part(2, 1.0))])
def test_with_factors_of_one_order_and_seeds_are_those_of_earlier_versions(parts):
    # recorded with the version before datasets had factors
    stream = visits(Mixture(parts, 3), 4, 4000)
    assert stream[0] == [
        (5, 1374224419159112019),
        (6, 6062815274278709897),
        (2, 8688532937909049281),
        (1, 4854266099512449391),
    ]
    digest = hashlib.sha256(repr(stream).encode()).hexdigest()
    assert digest == "3a3845a9d7a84b0bcf3ddaedf775e2d7d1caa5743338ad5015ba4d9567d1ae15"
    assert stream[0] == [(i, sample_seed(3, 0, i)) for i in (5, 6, 2, 1)]


@pytest.mark.parametrize(
    "size,factor,places,least",
    [
        (10, 1.0, 10, 1),
        (10, 2.0, 20, 2),
        (10, 0.7, 7, 0),
        (10, 0.2, 2, 0),
        (10, 2.34, 23, 2),
        (3, 1.9, 6, 1),  # 5.7 places: all three come twice
        (10, 0.01, 1, 0),  # never less than one
        (1, 0.2, 1, 0),
        (9400, 0.7, 6580, 0),
    ],
)
def test_places_of_an_epoch(size, factor, places, least):
    part = Part(size, factor)
    assert part.places == places
    for epoch in range(5):
        _, pictures = Mixture((part,), 0).visits(epoch)
        counts = np.bincount(pictures, minlength=size)
        assert counts.sum() == places
        assert counts.min() >= least
        assert counts.max() <= least + 1


def test_each_picture_comes_up_factor_times_on_average():
    mixture = Mixture((Part(10, 2.34), Part(5, 0.5), Part(4, 1.0)), 11)
    assert mixture.places == 23 + 2 + 4  # 2.5 is rounded to even
    epochs = 3000
    counts = np.zeros(19)
    for epoch in range(epochs):
        order, pictures = mixture.visits(epoch)
        assert sorted(order) == list(range(29))
        counts += np.bincount(pictures, minlength=19)
    mean = counts / epochs
    # 3 of 10, and 2 of 5, are drawn: standard deviation of the mean below 0.009
    assert mean[:10] == pytest.approx(np.full(10, 2.3), abs=0.045)
    assert mean[10:15] == pytest.approx(np.full(5, 0.4), abs=0.045)
    assert mean[15:].tolist() == [1.0] * 4


def test_the_remainder_is_drawn_anew_in_every_epoch_and_for_every_dataset():
    mixture = Mixture((Part(20, 0.5), Part(20, 0.5)), 0)
    drawn = set()
    for epoch in range(10):
        _, pictures = mixture.visits(epoch)
        drawn.add(tuple(sorted(i for i in pictures if i < 20)))
        drawn.add(tuple(sorted(i - 20 for i in pictures if i >= 20)))
    assert len(drawn) == 20
    other = Mixture(mixture.parts, 1)
    assert sorted(other.visits(0)[1]) != sorted(mixture.visits(0)[1])


def test_visits_of_one_epoch_have_seeds_of_their_own():
    mixture = Mixture((Part(4, 3.5), Part(3, 2.0)), 5)
    stream = [visit for batch in visits(mixture, 5, 4 * 3) for visit in batch]  # three epochs
    assert len({seed for _, seed in stream}) == 60
    for epoch in range(3):
        counts = Counter(i for i, _ in stream[20 * epoch : 20 * epoch + 20])
        assert sorted(counts[i] for i in range(4)) == [3, 3, 4, 4]
        assert [counts[i] for i in range(4, 7)] == [2, 2, 2]


@pytest.mark.parametrize("start", [1, 7, 8, 123])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_stream_is_the_unbroken_one(start, world_size):
    mixture = Mixture((Part(5, 1.5), Part(4, 2.3), Part(3, 0.5)), 9)
    unbroken = visits(mixture, 6, 140)
    shares = [
        visits(mixture, 6, 140 - start, start=start, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    joined = [list(chain(*parts)) for parts in zip(*shares, strict=True)]
    assert joined == unbroken[start:]


def test_a_far_start_costs_no_more_than_an_epoch(monkeypatch):
    made = []
    plain = Mixture.visits
    monkeypatch.setattr(Mixture, "visits", lambda self, e: made.append(e) or plain(self, e))
    mixture = Mixture((Part(50, 1.5),), 0)  # 75 places
    visits(mixture, 5, 1, start=1_500_000)
    assert made == [100_000]


# ---------------------------------------------------------------- the stream


def counts_per_epoch(cfg, places):
    cfg.SOLVER.IMS_PER_BATCH = places
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
    paint(root, "7.png", folder="y")
    cfg.DATASETS.TRAIN = ("sd_y", "gta5", "sd_x", "synthia")
    cfg.DATASETS.TARGET_FACTOR = 3.0
    cfg.DATASETS.SOURCE_FACTOR = 2.0
    expected = {"gta5": 10, "synthia": 4, "sd_x": 12, "sd_y": 3}
    assert counts_per_epoch(cfg, 29) == [expected] * 3


def test_samples_of_both_kinds_are_those_of_their_mappers(cfg):
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


def test_two_visits_of_a_generated_picture_in_one_epoch_differ(cfg):
    cfg.DATASETS.TARGET_FACTOR = 6.0
    cfg.SOLVER.IMS_PER_BATCH = 29
    (epoch,) = batches(cfg, 1)
    one = [sample for sample in epoch if sample["file_name"].endswith("100.png")]
    assert len({sample["seed"] for sample in one}) == 6
    assert len({sample["image"].numpy().tobytes() for sample in one}) > 3
    assert len({sample["clean_image"].numpy().tobytes() for sample in one}) <= 2


def test_a_batch_may_be_of_one_kind(cfg):
    kinds = {frozenset(s["dataset"] for s in batch) for batch in batches(cfg, 60)}
    assert kinds == {frozenset({"gta5"}), frozenset({"sd_x"}), frozenset({"gta5", "sd_x"})}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_neither_workers_nor_ranks_nor_a_break_change_the_stream(cfg, workers, world_size):
    cfg.DATASETS.TARGET_FACTOR = 1.7
    unbroken = batches(cfg, 9)
    cfg.DATALOADER.NUM_WORKERS = workers
    shares = [
        batches(cfg, 6, start_iteration=3, rank=r, world_size=world_size) for r in range(world_size)
    ]
    joined = [list(chain(*parts)) for parts in zip(*shares, strict=True)]
    assert all_same(unbroken[3:], joined)


def test_source_alone_is_as_before(cfg):
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
    assert "an epoch has 13 places" in caplog.text
    assert "sd_x 8 (61.5%) from 4 images" in caplog.text
    caplog.clear()
    cfg.DATASETS.TRAIN = ("gta5",)
    with caplog.at_level(logging.INFO, logger="clouds.data.build"):
        build_train_loader(cfg)
    assert "places" not in caplog.text


# ---------------------------------------------------------------- what is wrong


def refused(cfg, kind=ValueError) -> str:
    with pytest.raises(kind) as error:
        build_train_loader(cfg)
    return str(error.value)


def test_no_source(cfg):
    cfg.DATASETS.TRAIN = ("sd_x",)
    message = refused(cfg)
    assert "generated images only: sd_x" in message
    assert "labelled source" in message


def test_a_folder_that_is_not_there(cfg, root):
    cfg.DATASETS.TRAIN = ("gta5", "sd_y")
    message = refused(cfg, FileNotFoundError)
    assert f"no folder {root / 'stable_diffusion/y/images'}" in message
    assert "python tools/generate_images.py" in message
    assert "Generated datasets that are there: sd_x." in message
    assert "label" not in message.lower()


def test_an_empty_folder(cfg, root):
    (root / "stable_diffusion/y/images").mkdir(parents=True)
    cfg.DATASETS.TRAIN = ("gta5", "sd_y")
    message = refused(cfg)
    assert "sd_y: no image" in message
    assert "python tools/generate_images.py" in message


def test_images_that_the_manifest_does_not_know(cfg, images):
    for i in range(7):
        save(images / f"20{i}.png", picture(i))
    message = refused(cfg)
    assert "dataset sd_x: 7 images have no entry" in message
    assert str(images / "200.png") in message
    assert "and 2 more" in message
    assert "Delete them, or run the generator again" in message
    # to measure by them is no training
    assert len(get_dataset("sd_x").records()) == 11


def test_an_image_whose_line_was_torn_is_not_known(cfg, images):
    manifest = images.parent / "manifest.jsonl"
    manifest.write_text(manifest.read_text()[:-20])
    message = refused(cfg)
    assert "1 images have no entry" in message
    assert "103.png" in message


def test_images_that_are_gone(cfg, images):
    (images / "102.png").unlink()
    message = refused(cfg)
    assert "1 images of" in message
    assert f"gone from {images}: 102.png" in message
    assert "run the generator again" in message


def test_a_broken_manifest(cfg, images):
    manifest = images.parent / "manifest.jsonl"
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join([lines[0], '{"file": 1}', *lines[1:]]) + "\n")
    assert f"{manifest}:2: " in refused(cfg)


def test_no_manifest_is_fine_and_said_once(cfg, images, caplog):
    with_manifest = batches(cfg, 5)
    (images.parent / "manifest.jsonl").unlink()
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="clouds"):
        assert all_same(with_manifest, batches(cfg, 5))
    said = [r.getMessage() for r in caplog.records if "manifest" in r.getMessage()]
    assert said == [
        f"sd_x has no {images.parent / 'manifest.jsonl'}: its 4 images are taken as they are"
    ]


def test_a_manifest_in_folders(cfg, root):
    (root / "stable_diffusion/x/images/part1").mkdir()
    paint(root, "part1/110.png")
    assert counts_per_epoch(cfg, 10)[0] == {"gta5": 5, "sd_x": 5}


def test_a_manifest_that_grows_is_read_again(cfg, root, images):
    build_train_loader(cfg)
    save(images / "104.png", picture(104))
    refused(cfg)
    paint(root, "104.png")  # the same image; only the manifest changes
    assert counts_per_epoch(cfg, 10)[0] == {"gta5": 5, "sd_x": 5}


@pytest.mark.parametrize("content,workers", [(b"", 0), (b"no image", 0), ("half", 0), ("half", 1)])
def test_an_unreadable_image_is_named(cfg, images, content, workers):
    path = images / "101.png"
    path.write_bytes(path.read_bytes()[:200] if content == "half" else content)
    cfg.DATALOADER.NUM_WORKERS = workers
    with pytest.raises(ValueError, match=r"101\.png: cannot be read as an image") as error:
        batches(cfg, 3)
    assert "Delete it and run tools/generate_images.py again" in str(error.value)


def test_an_image_of_another_size_than_painted(cfg, images):
    save(images / "101.png", picture(0, (24, 30)))
    with pytest.raises(ValueError) as error:
        batches(cfg, 3)
    for part in (str(images / "101.png"), "30x24 pixels", "manifest of sd_x says 32x24", "Delete"):
        assert part in str(error.value)


def test_an_image_that_goes_away_meanwhile(cfg, images):
    loader = build_train_loader(cfg)
    (images / "101.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"101\.png: this image of sd_x is gone.*--resume"):
        list(islice(loader, 3))


def test_a_later_line_counts_for_the_size(cfg, root):
    paint(root, "101.png", size=(8, 9))
    sizes = {s["clean_image"].shape for b in batches(cfg, 9) for s in b if s["dataset"] == "sd_x"}
    assert sizes == {(3, 24, 32), (3, 8, 9)}


def test_reading_is_done_once_per_sample(cfg, monkeypatch):
    read = []
    plain = mapper_module.read_image
    monkeypatch.setattr(mapper_module, "read_image", lambda p: read.append(p) or plain(p))
    (batch,) = batches(cfg, 1)
    assert sorted(map(str, read)) == sorted(sample["file_name"] for sample in batch)


# ---------------------------------------------------------------- tools/check_datasets.py


def check(capsys, root, *args) -> tuple[int, str]:
    code = check_datasets.main(["--root", str(root), *args])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def row(out: str, name: str) -> list[str]:
    (line,) = (line for line in out.splitlines() if line.startswith(f"{name} "))
    return line.split()


def test_sound_generated_datasets(root, capsys):
    paint(root, "1.png", folder="y")
    code, out = check(capsys, root, "--full")
    assert code == 0
    assert row(out, "sd_x") == ["sd_x", "ok", "4", "4", "0", "0", "4", "0", "0", "0"]
    assert row(out, "sd_y")[:3] == ["sd_y", "ok", "1"]


@pytest.mark.parametrize("full", [True, False])
def test_a_generated_dataset_with_every_defect(root, images, capsys, full):
    for i in range(4, 7):
        paint(root, f"{100 + i}.png")
    save(images / "200.png", picture(0))
    (images / "100.png").unlink()
    (images / "101.png").write_bytes(b"")
    save(images / "102.png", picture(102, (20, 32)))
    save(images / "103.png", picture(0))  # the size that it had, and another picture
    code, out = check(capsys, root, "--datasets", "sd_x", "--workers", "2", *["--full"] * full)
    assert code == 1
    assert row(out, "sd_x")[1] == "broken"
    assert f"1 images have no entry in {images.parent / 'manifest.jsonl'}" in out
    assert str(images / "200.png") in out
    assert f"gone from {images}: 100.png" in out
    if full:
        assert row(out, "sd_x")[7] == "1"
        assert "2 images are not as the manifest says" in out
        assert f"{images / '102.png'} (32x20, painted 32x24)" in out
        assert f"{images / '103.png'} (other contents than were painted)" in out
    else:
        assert "other contents" not in out


def test_hashes_are_compared_when_all_is_opened(root, images):
    path = images / "103.png"
    path.write_bytes(path.read_bytes() + b"\0")  # a picture still, the same pixels
    dataset = get_dataset("sd_x")
    assert check_dataset(dataset, 4, 1).state == "ok"
    assert check_dataset(dataset, None, 1).problems() == [
        f"1 images are not as the manifest says: {path} (other contents than were painted)"
    ]


def test_a_broken_manifest_is_shown(root, images, capsys):
    with (images.parent / "manifest.jsonl").open("a") as file:
        file.write("{}\n")
    code, out = check(capsys, root, "--datasets", "sd_x")
    assert code == 1
    assert "manifest.jsonl:5: this line is no entry" in out


def test_without_a_manifest_there_is_nothing_to_compare(root, images, capsys):
    (images.parent / "manifest.jsonl").unlink()
    code, out = check(capsys, root, "--datasets", "sd_x", "--full")
    assert code == 0
    assert row(out, "sd_x")[1] == "ok"
