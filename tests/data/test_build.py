"""Training and test loader with labelled datasets."""

from __future__ import annotations

import logging
from collections import Counter
from functools import partial
from itertools import chain, islice

import cv2
import numpy as np
import pytest
import torch
from dataset_files import random_image, save, save_palette, train_ids, write

from clouds.config import get_cfg
from clouds.data import dataset_mapper
from clouds.data.augmentation import AugmentationList
from clouds.data.build import (
    build_test_loader,
    build_train_loader,
    check_training_data,
    partly_labelled,
    sample_seed,
)
from clouds.data.dataset_mapper import SourceMapper, build_source_augmentations
from clouds.data.datasets import forget_listings, get_dataset
from clouds.data.structures import Domain, Record

KEYS = {"image", "sem_seg", "height", "width", "file_name", "domain", "dataset", "seed"}
PARTLY = {"partly_labelled"}  # synthia lacks terrain, truck and train, which gta5 has


@pytest.fixture
def root(tmp_path, monkeypatch):
    forget_listings()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for i in range(5):
        write(tmp_path, "gta5", i)
    for i in range(2):
        write(tmp_path, "synthia", i)
    return tmp_path


@pytest.fixture
def cfg(root):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("gta5", "synthia")
    cfg.INPUT.CROP.SIZE = (16, 20)
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SEED = 3
    return cfg


def batches(cfg, count, **options):
    return list(islice(build_train_loader(cfg, **options), count))


def same(a, b) -> bool:
    assert a.keys() == b.keys() >= KEYS
    return all(
        torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key]
        for key in a
    )


def all_same(first, second) -> bool:
    assert [len(batch) for batch in first] == [len(batch) for batch in second]
    return all(
        same(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)
    )


# ---------------------------------------------------------------- training


def test_a_sample(cfg, root):
    (batch,) = batches(cfg, 1)
    assert len(batch) == 4
    for sample in batch:
        assert sample.keys() == (KEYS | PARTLY if sample["dataset"] == "synthia" else KEYS)
        assert sample["image"].shape == (3, 16, 20)
        assert sample["image"].dtype == torch.uint8
        assert sample["sem_seg"].shape == (16, 20)
        assert set(sample["sem_seg"].unique().tolist()) <= {*range(19), 255}
        assert (sample["height"], sample["width"]) == (24, 32)
        assert sample["domain"] is Domain.SOURCE
        assert sample["dataset"] in sample["file_name"]
        assert 0 <= sample["seed"] < 2**63


def test_without_augmentations_a_sample_equals_its_files(cfg, root):
    cfg.INPUT.SCALE_RANGE = (1.0, 1.0)
    cfg.INPUT.CROP.SIZE = (24, 32)
    cfg.INPUT.FLIP = False
    cfg.INPUT.COLOR_AUG_SSD = False
    image, ids = write(root, "gta5", 0)
    sample = SourceMapper.from_config(cfg)(get_dataset("gta5").records()[0], 5)
    assert np.array_equal(sample["image"].permute(1, 2, 0).numpy(), random_image(0))
    assert np.array_equal(sample["sem_seg"].numpy(), ids)
    assert sample["file_name"] == str(image)


@pytest.mark.parametrize(
    ("names", "partly"),
    [
        (("gta5",), set()),
        (("synthia",), set()),
        (("gta5", "cityscapes_train"), set()),
        (("synthia", "cityscapes_train"), {"synthia"}),
        (("camvid_train", "synthia"), {"camvid_train"}),  # 11 classes, all in synthia's 16
        (("camvid_train", "synthia", "gta5"), {"camvid_train", "synthia"}),
        (("sd_x", "synthia"), set()),  # generated images have no labels
    ],
)
def test_datasets_that_lack_classes_of_the_others(names, partly):
    assert partly_labelled([get_dataset(name) for name in names]) == partly


def test_samples_of_partly_labelled_datasets_say_so_also_with_another_mapper(cfg):
    loader = partial(batches, cfg, 7, mappers={Domain.SOURCE: SourceMapper(AugmentationList(()))})
    cfg.SOLVER.IMS_PER_BATCH = 1
    samples = [sample for batch in loader() for sample in batch]
    assert len(samples) == 7
    for sample in samples:
        assert sample.get("partly_labelled", False) is (sample["dataset"] == "synthia")
    cfg.DATASETS.TRAIN = ("synthia",)
    assert all("partly_labelled" not in sample for (sample,) in loader())


def test_factors_of_each_dataset(cfg, caplog):
    cfg.DATASETS.FACTORS = (0.6, 2.5)
    cfg.SOLVER.IMS_PER_BATCH = 8  # 0.6 * 5 + 2.5 * 2
    with caplog.at_level(logging.INFO, logger="clouds"):
        epochs = batches(cfg, 3)
    assert [Counter(s["dataset"] for s in e) for e in epochs] == [{"gta5": 3, "synthia": 5}] * 3
    shares = "gta5 3 (37.5%) from 5 images, synthia 5 (62.5%) from 2 images"
    assert f"an epoch has 8 samples: {shares}" in caplog.messages
    cfg.DATALOADER.SAMPLER_TRAIN, cfg.SOLVER.IMS_PER_BATCH = "TrainingSampler", 7
    (epoch,) = batches(cfg, 1)
    assert Counter(sample["dataset"] for sample in epoch) == {"gta5": 5, "synthia": 2}


def test_equal_factors_give_the_stream_of_factors_by_domain(cfg):
    cfg.DATASETS.SOURCE_FACTOR = 1.4
    expected = batches(cfg, 6)
    cfg.DATASETS.SOURCE_FACTOR = 3.0  # not used
    cfg.DATASETS.FACTORS = (1.4, 1.4)
    assert all_same(expected, batches(cfg, 6))


def test_working_sizes_of_each_dataset(cfg):
    """Without random scale and crop, a sample has the size into which the image fits."""
    cfg.INPUT.SCALE_RANGE, cfg.INPUT.CROP.SIZE = (1.0, 1.0), (64, 64)
    cfg.INPUT.FLIP = cfg.INPUT.COLOR_AUG_SSD = False
    cfg.INPUT.INITIAL_HEIGHT, cfg.INPUT.INITIAL_WIDTH = 12, 16
    sizes = {"gta5": (48, 64), "synthia": (24, 32)}  # 24x32 within 48x200, and their own size
    for initial_sizes in ((), ((48, 200), (0, 0))):
        cfg.INPUT.INITIAL_SIZES = initial_sizes
        for sample in batches(cfg, 2)[0]:
            height, width = sizes[sample["dataset"]] if initial_sizes else (12, 16)
            shown = sample["image"].any(0)
            assert shown.any(1).nonzero().max() == height - 1
            assert shown.any(0).nonzero().max() == width - 1
            assert (sample["sem_seg"][height:] == 255).all()


def test_equal_working_sizes_are_the_working_size(cfg):
    cfg.INPUT.INITIAL_HEIGHT, cfg.INPUT.INITIAL_WIDTH = 30, 40
    expected = batches(cfg, 6)
    cfg.INPUT.INITIAL_HEIGHT = cfg.INPUT.INITIAL_WIDTH = 0
    cfg.INPUT.INITIAL_SIZES = ((30, 40), (30, 40))
    assert all_same(expected, batches(cfg, 6))
    resumed = batches(cfg, 2, start_iteration=4)
    assert all_same(expected[4:], resumed)


def test_augmentations_need_the_dataset_where_sizes_differ(cfg):
    cfg.INPUT.INITIAL_SIZES = ((48, 64), (0, 0))
    (geometry, _) = build_source_augmentations(cfg, "gta5").augmentations
    assert geometry.working_size == (48, 64)
    for name in ("", "bdd_train"):
        with pytest.raises(ValueError, match=f"none for '{name}'; allowed are gta5, synthia: pass"):
            build_source_augmentations(cfg, name)


def test_color_jitter_does_not_change_the_geometry(cfg, root):
    cfg.INPUT.CROP.SIZE = (64, 90)  # larger than any image
    jittered = batches(cfg, 4)
    cfg.INPUT.COLOR_AUG_SSD = False
    plain = batches(cfg, 4)
    changed = 0
    for a, b in zip(chain(*jittered), chain(*plain), strict=True):
        assert torch.equal(a["sem_seg"], b["sem_seg"])
        changed += not torch.equal(a["image"], b["image"])
        assert not b["image"][:, 63].any()
    assert changed > 10


def test_every_image_once_per_epoch(cfg):
    cfg.SOLVER.IMS_PER_BATCH = 7
    first, second = ([sample["file_name"] for sample in batch] for batch in batches(cfg, 2))
    assert len(set(first)) == 7
    assert sorted(first) == sorted(second)
    assert first != second  # another order


def test_a_batch_may_contain_samples_of_two_epochs(cfg):
    names = [sample["file_name"] for batch in batches(cfg, 7) for sample in batch]
    assert set(Counter(names).values()) == {4}
    for epoch in range(4):
        assert len(set(names[epoch * 7 : epoch * 7 + 7])) == 7


def test_a_batch_larger_than_the_dataset(cfg):
    cfg.SOLVER.IMS_PER_BATCH = 20
    (batch,) = batches(cfg, 1)
    assert set(Counter(s["file_name"] for s in batch).values()) == {2, 3}


def test_samples_of_one_image_differ(cfg):
    samples = [s for batch in batches(cfg, 7) for s in batch]
    one = [s for s in samples if s["file_name"] == samples[0]["file_name"]]
    assert len({s["seed"] for s in one}) == 4
    assert not torch.equal(one[0]["image"], one[1]["image"])


def test_another_seed_gives_another_stream(cfg):
    first = batches(cfg, 3)
    assert all_same(first, batches(cfg, 3))
    cfg.SEED = 4
    second = batches(cfg, 3)
    assert [s["file_name"] for b in first for s in b] != [s["file_name"] for b in second for s in b]
    assert not {s["seed"] for b in first for s in b} & {s["seed"] for b in second for s in b}


def test_sample_seeds_with_equal_sums_differ():
    seeds = {
        sample_seed(seed, epoch, number)
        for seed in range(8)
        for epoch in range(8)
        for number in range(8)
    }
    assert len(seeds) == 512


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(cfg, workers):
    alone = batches(cfg, 6)
    cfg.DATALOADER.NUM_WORKERS = workers
    assert all_same(alone, batches(cfg, 6))


def test_workers_are_persistent_and_use_one_thread_each(cfg, root):
    cfg.DATALOADER.NUM_WORKERS = 2
    loader = build_train_loader(cfg)
    assert loader.persistent_workers
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(2)
        loader.worker_init_fn(0)
        assert cv2.getNumThreads() == 1
    finally:
        cv2.setNumThreads(before)
    assert build_test_loader(get_dataset("gta5"), halve, 2).worker_init_fn is loader.worker_init_fn


@pytest.mark.parametrize("device,pinned", [("cuda", True), ("cpu", False)])
def test_batches_for_a_gpu_are_pinned(cfg, monkeypatch, device, pinned):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg.MODEL.DEVICE = device
    assert build_train_loader(cfg).pin_memory is pinned


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batch_of_one_process(cfg, world_size):
    alone = batches(cfg, 6)
    shares = [batches(cfg, 6, rank=r, world_size=world_size) for r in range(world_size)]
    joined = [list(chain(*parts)) for parts in zip(*shares, strict=True)]
    assert all_same(alone, joined)


@pytest.mark.parametrize("start", [1, 4, 5])
def test_a_later_start_continues_the_uninterrupted_run(cfg, start):
    uninterrupted = batches(cfg, 8)
    assert all_same(uninterrupted[start:], batches(cfg, 8 - start, start_iteration=start))


def test_a_later_start_does_not_read_skipped_samples(cfg, monkeypatch):
    read = []
    plain = dataset_mapper.read_image
    monkeypatch.setattr(dataset_mapper, "read_image", lambda path: read.append(path) or plain(path))
    batches(cfg, 1, start_iteration=100_000)
    assert len(read) == 4


def test_the_global_random_state_is_neither_used_nor_changed(cfg):
    torch.manual_seed(1)
    np.random.seed(1)
    first = batches(cfg, 2)
    after = torch.rand(1), np.random.rand()
    torch.manual_seed(1)
    np.random.seed(1)
    assert after == (torch.rand(1), np.random.rand())
    torch.manual_seed(2)
    np.random.seed(2)
    assert all_same(first, batches(cfg, 2))


def test_label_with_only_ignored_pixels(cfg, root):
    save_palette(root / "gta5/labels/00000.png", np.zeros((24, 32), np.uint8))
    cfg.DATASETS.TRAIN = ("gta5",)
    samples = [s for batch in batches(cfg, 3) for s in batch]
    empty = [s for s in samples if s["file_name"].endswith("00000.png")]
    assert empty
    assert all((s["sem_seg"] == 255).all() for s in empty)


# ---------------------------------------------------------------- errors of training


def test_no_dataset(cfg):
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN is empty"):
        build_train_loader(cfg)


def test_unknown_dataset(cfg):
    cfg.DATASETS.TRAIN = ("gta5", "gta6")
    with pytest.raises(ValueError, match=r"unknown dataset 'gta6'.*synthia"):
        build_train_loader(cfg)


def test_a_target_dataset_in_training(cfg):
    cfg.DATASETS.TRAIN = ("gta5", "bdd_val")
    with pytest.raises(ValueError, match="bdd_val, a target dataset"):
        build_train_loader(cfg)


def test_zero_images(cfg, root):
    for path in (root / "gta5").rglob("*.png"):
        path.unlink()
    cfg.DATASETS.TRAIN = ("gta5",)
    with pytest.raises(ValueError, match="no usable image"):
        build_train_loader(cfg)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), r"DATASETS\.TRAIN is empty"),
        (("gta5", "bdd_val"), "bdd_val, a target dataset; training uses source and generated"),
        (("gta5", "cityscapes_train"), "cityscapes"),  # not there
    ],
)
def test_the_check_of_the_training_data_raises_as_the_loader_does(cfg, names, message):
    check_training_data(cfg)
    cfg.DATASETS.TRAIN = names
    for function in (check_training_data, build_train_loader):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            function(cfg)


def test_a_batch_that_cannot_be_shared_evenly(cfg):
    with pytest.raises(ValueError, match=r"IMS_PER_BATCH is 4.*3 processes.*multiple of 3"):
        build_train_loader(cfg, world_size=3)


def test_different_sizes_are_an_error_outside_gta(cfg, root):
    write(root, "cityscapes_train", 0)
    (label,) = root.rglob("*_labelIds.png")
    save(label, np.full((24, 33), 7, np.uint8))
    cfg.DATASETS.TRAIN = ("cityscapes_train",)
    with pytest.raises(ValueError) as error:
        batches(cfg, 1)
    for part in (str(label), "33x24", "32x24"):
        assert part in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("half", ["RGB", "GT/LABELS"])
def test_a_broken_file_is_reported(cfg, root, half, workers):
    cfg.DATASETS.TRAIN = ("synthia",)
    cfg.DATALOADER.NUM_WORKERS = workers
    path = root / "synthia" / half / "0000001.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"0000001\.png: cannot be read"):
        batches(cfg, 2)


def test_a_source_record_without_label(cfg, root):
    image = save(root / "a.png", random_image(0))
    record = Record(image, None, Domain.SOURCE, "gta5")
    with pytest.raises(ValueError, match=r"a\.png has no label"):
        SourceMapper.from_config(cfg)(record, 0)


def test_a_label_without_format_is_no_record(root):
    image = save(root / "a.png", random_image(0))
    with pytest.raises(ValueError, match=r"a\.png: .*label_format"):
        Record(image, image, Domain.SOURCE, "gta5")


# ---------------------------------------------------------------- evaluation


def halve(image, label, dataset):
    assert image.dtype == np.uint8
    assert dataset == "camvid_val"
    return image[::2, ::2], None if label is None else label[:, ::4]


@pytest.fixture
def camvid(root):
    for i in range(5):
        write(root, "camvid_val", i)
    return get_dataset("camvid_val")


@pytest.mark.parametrize("workers", [0, 2])
def test_test_samples_are_prepared_by_the_protocol(camvid, root, workers):
    loader = build_test_loader(camvid, halve, workers)
    assert len(loader) == 5
    samples = list(loader)
    assert [s["file_name"] for s in samples] == [str(r.image) for r in camvid.records()]
    for i, sample in enumerate(samples):
        _, ids = write(root, "camvid_val", i)
        assert np.array_equal(sample["image"].permute(1, 2, 0).numpy(), random_image(i)[::2, ::2])
        assert np.array_equal(sample["label"].numpy(), ids[:, ::4])
        assert sample["label"].dtype == sample["image"].dtype == torch.uint8
        assert (sample["height"], sample["width"]) == (24, 8)
        assert sample["domain"] is Domain.TARGET
        assert sample["dataset"] == "camvid_val"


def test_an_image_without_label_is_predicted_at_its_own_size(root):
    save(root / "stable_diffusion/x/images/a.png", random_image(0))
    (sample,) = build_test_loader(get_dataset("sd_x"), lambda i, label, n: (i[::2], label))
    assert "label" not in sample
    assert sample["image"].shape == (3, 12, 32)
    assert (sample["height"], sample["width"]) == (24, 32)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_every_test_image_goes_to_one_rank(camvid, world_size):
    names = [
        sample["file_name"]
        for rank in range(world_size)
        for sample in build_test_loader(camvid, halve, 1, rank, world_size)
    ]
    assert sorted(names) == [str(record.image) for record in camvid.records()]


def test_a_test_label_of_another_size(camvid, root):
    save(root / "camvid/valannot/0001TP_000002.png", train_ids(0, range(11), (24, 31)))
    with pytest.raises(ValueError, match=r"0001TP_000002\.png: the label is 31x24"):
        list(build_test_loader(camvid, halve))
