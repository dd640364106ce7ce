"""Samples and faults of records, without reading a file; what loaders are built from a config."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_files import write, write_generated
from torch.utils.data import SequentialSampler

from clouds.config import get_cfg
from clouds.data.build import (
    DatasetWeight,
    RecordDataset,
    TrainingDataset,
    WeightedMixture,
    build_test_loader,
    build_train_loader,
    check_batch_size,
    check_training_data,
)
from clouds.data.datasets import forget_listings, get_dataset
from clouds.data.structures import Domain, Record

SOURCE = [Record(Path(f"/s/{i}.png"), None, Domain.SOURCE, "gta5") for i in range(6)]
GENERATED = [Record(Path(f"/g/{i}.png"), None, Domain.GENERATED, "sd_x") for i in range(4)]
OTHER = [Record(Path(f"/o/{i}.png"), None, Domain.SOURCE, "synthia") for i in range(4)]


def dataset_of(faulty=(), error=OSError, max_faulty=None):
    """Samples are (domain, name, seed); `faulty` raise `error`."""

    def mapper(domain):
        def sample(record, seed):
            if record.image.name in faulty:
                raise error(f"{record.image} is faulty")
            return domain, str(record.image), seed

        return sample

    mappers = {domain: mapper(domain) for domain in (Domain.SOURCE, Domain.GENERATED)}
    return TrainingDataset([*SOURCE, *GENERATED, *OTHER], mappers, max_faulty)


def test_a_record_goes_to_the_mapper_of_its_domain():
    dataset = dataset_of()
    assert dataset[2, 17].sample == (Domain.SOURCE, "/s/2.png", 17)
    assert dataset[7, 18].sample == (Domain.GENERATED, "/g/1.png", 18)
    assert dataset[7, 18].faults == ()
    assert dataset.file_of((7, 18)) == "/g/1.png"


def test_the_first_fault_is_returned_without_a_replacement():
    loaded = dataset_of(["2.png"])[2, 17]
    assert loaded.sample is None
    (fault,) = loaded.faults
    assert (fault.file, fault.dataset, str(fault.error)) == (
        "/s/2.png",
        "gta5",
        "/s/2.png is faulty",
    )


@pytest.mark.parametrize(("index", "records"), [(3, SOURCE), (8, GENERATED), (11, OTHER)])
def test_a_faulty_file_is_replaced_by_one_of_its_dataset_chosen_by_the_seed(index, records):
    dataset = dataset_of([f"{index - (0, 6, 10)[(index > 5) + (index > 9)]}.png"], max_faulty=2)
    record = dataset.records[index]
    others = [r for r in records if r != record]
    chosen = set()
    for seed in range(20):
        loaded = dataset[index, seed]
        # the documented rule: the first of a permutation by the seed with spawn key 1
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))
        expected = str(others[rng.permutation(len(others))[0]].image)
        assert loaded.sample == (record.domain, expected, seed)
        assert [fault.file for fault in loaded.faults] == [str(record.image)]
        chosen.add(expected)
    assert chosen == {str(r.image) for r in others}


@pytest.mark.parametrize("max_faulty", [0, 1, 3, 5, 9])
def test_one_file_more_than_allowed_is_tried(max_faulty):
    names = [record.image.name for record in SOURCE]
    loaded = dataset_of(names, max_faulty=max_faulty)[2, 17]
    assert loaded.sample is None
    files = [fault.file for fault in loaded.faults]
    assert len(files) == len(set(files)) == min(max_faulty + 1, 6)
    assert files[0] == "/s/2.png"


def test_after_an_error_of_the_program_no_other_file_is_tried():
    loaded = dataset_of([record.image.name for record in SOURCE], TypeError, 3)[2, 17]
    assert loaded.sample is None
    (fault,) = loaded.faults
    assert type(fault.error) is TypeError


def test_records_of_an_evaluation():
    def mapper(record):
        if record.image.name == "2.png":
            raise ValueError("torn")
        return str(record.image)

    dataset = RecordDataset(SOURCE, mapper)
    assert len(dataset) == 6
    assert dataset[1].sample == dataset.file_of(1) == "/s/1.png"
    assert dataset[1].faults == ()
    assert dataset[2].sample is None
    (fault,) = dataset[2].faults
    assert (fault.file, fault.dataset, str(fault.error)) == ("/s/2.png", "gta5", "torn")


def test_batches_that_can_be_shared():
    check_batch_size(4, 1)
    check_batch_size(4, 4)
    with pytest.raises(ValueError) as error:
        check_batch_size(4, 3)
    assert str(error.value) == (
        "SOLVER.IMS_PER_BATCH is 4, which 3 processes cannot share evenly; choose a multiple of 3"
    )


# ------------------------------------------------------------------------ from a config


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    """Five source images, two of another source, four generated ones."""
    forget_listings()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for i in range(5):
        write(tmp_path, "gta5", i)
    for i in range(2):
        write(tmp_path, "synthia", i)
    for i in range(4):
        write_generated(tmp_path, f"{100 + i}.png")
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("gta5", "sd_x", "synthia")
    cfg.SOLVER.IMS_PER_BATCH = 6
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    cfg.SEED = 3
    return cfg


def test_the_training_loader_has_the_settings_of_the_config(cfg):
    cfg.DATASETS.SOURCE_FACTOR, cfg.DATASETS.TARGET_FACTOR = 1.5, 3.0
    cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.TIMEOUT = 2, 7.0
    loader = build_train_loader(cfg, 5, rank=1, world_size=2)
    sampler = loader.batch_sampler
    assert (sampler.batch_size, sampler.start, sampler.rank, sampler.world_size) == (6, 5, 1, 2)
    weights = (DatasetWeight(5, 1.5), DatasetWeight(4, 3.0), DatasetWeight(2, 1.5))
    assert sampler.mixture == WeightedMixture(weights, 3)
    assert [r.dataset for r in loader.dataset.records] == ["gta5"] * 5 + ["sd_x"] * 4 + [
        "synthia"
    ] * 2
    assert (loader.num_workers, loader.timeout, loader.first_batch) == (2, 7, 5)
    assert loader.fault_log is None
    assert loader.dataset.max_faulty is None
    cfg.DATALOADER.SAMPLER_TRAIN = "TrainingSampler"
    mixture = build_train_loader(cfg).batch_sampler.mixture
    assert mixture.weights == (DatasetWeight(5), DatasetWeight(4), DatasetWeight(2))


def test_defaults_of_the_training_loader(cfg):
    loader = build_train_loader(cfg)
    sampler = loader.batch_sampler
    assert (sampler.start, sampler.rank, sampler.world_size) == (0, 0, 1)
    assert loader.first_batch == 0
    assert loader.num_workers == 0
    assert not loader.pin_memory


@pytest.mark.parametrize(
    ("gpu", "device", "pinned"),
    [(True, "cuda", True), (True, "cpu", False), (False, "auto", False)],
)
def test_pinned_memory_is_for_a_gpu(cfg, monkeypatch, gpu, device, pinned):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    cfg.MODEL.DEVICE = device
    assert build_train_loader(cfg).pin_memory is pinned


def test_skipped_files_are_counted_in_the_folder_of_the_run(cfg):
    cfg.DATALOADER.FAULTY, cfg.DATALOADER.MAX_FAULTY = "skip", 4
    path = Path(cfg.OUTPUT_DIR, "faulty_files.json")
    path.parent.mkdir()
    path.write_text('{"file": "a.png", "error": "torn"}\n')
    fresh, resumed = build_train_loader(cfg), build_train_loader(cfg, 1)
    assert fresh.fault_log.path == path
    assert fresh.fault_log.limit == fresh.dataset.max_faulty == 4
    assert (fresh.num_faulty, resumed.num_faulty) == (0, 1)


def test_mappers_replace_those_of_their_domain(cfg):
    loader = build_train_loader(cfg, mappers={Domain.GENERATED: lambda record, seed: seed})
    assert loader.dataset[6, 31].sample == 31
    assert loader.dataset[0, 31].sample["seed"] == 31
    assert loader.dataset[0, 31].sample["domain"] is Domain.SOURCE


def test_messages_of_generated_datasets(cfg, caplog):
    cfg.DATASETS.TRAIN = ("gta5", "sd_x")
    cfg.DATASETS.TARGET_FACTOR = 2.0
    root = get_dataset("sd_x").root.absolute()
    for path in root.rglob("manifest.jsonl"):
        path.unlink()
    forget_listings()
    with caplog.at_level(logging.INFO, logger="clouds.data.build"):
        build_train_loader(cfg)
    ours = [record for record in caplog.records if record.name == "clouds.data.build"]
    assert [record.getMessage() for record in ours] == [
        f"sd_x has no {root / get_dataset('sd_x').manifest}: its 4 images are used without checks",
        "an epoch has 13 samples: gta5 5 (38.5%) from 5 images, sd_x 8 (61.5%) from 4 images",
    ]
    caplog.clear()
    cfg.DATASETS.TRAIN = ("gta5", "synthia")
    with caplog.at_level(logging.INFO, logger="clouds.data.build"):
        build_train_loader(cfg)
    assert caplog.messages == [
        "an epoch has 7 samples: gta5 5 (71.4%) from 5 images, synthia 2 (28.6%) from 2 images"
    ]
    caplog.clear()
    cfg.DATASETS.TRAIN = ("gta5",)
    with caplog.at_level(logging.INFO, logger="clouds.data.build"):
        build_train_loader(cfg)
    assert caplog.messages == []


BUILDERS = pytest.mark.parametrize("build", [build_train_loader, check_training_data])


@BUILDERS
def test_datasets_that_cannot_be_trained_on(cfg, build):
    build(cfg)
    cfg.DATASETS.TRAIN = ("sd_x", "sd_x")
    with pytest.raises(ValueError) as error:
        build(cfg)
    assert str(error.value) == (
        "DATASETS.TRAIN contains generated images only: sd_x, sd_x. They have no labels; add the "
        "labelled source that the warm-up was trained on, such as gta5"
    )
    cfg.DATASETS.TRAIN = ("gta5", "bdd_val")
    with pytest.raises(ValueError) as error:
        build(cfg)
    assert str(error.value) == (
        "DATASETS.TRAIN contains bdd_val, a target dataset; training uses source and generated "
        "datasets"
    )
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(ValueError) as error:
        build(cfg)
    assert str(error.value) == ("DATASETS.TRAIN is empty: name at least one dataset to train on")


@BUILDERS
def test_records_that_cannot_be_trained_on(cfg, build, monkeypatch):
    kind = type(get_dataset("gta5"))
    monkeypatch.setattr(
        kind, "manifest_gaps", lambda self, listing: [f"{len(listing.records)}", "b"]
    )
    with pytest.raises(ValueError) as error:
        build(cfg)
    assert str(error.value) == "dataset gta5: 5\ndataset gta5: b"
    monkeypatch.setattr(kind, "records", lambda self: [])
    with pytest.raises(ValueError) as error:
        build(cfg)
    assert str(error.value) == "there is no image to train on in gta5"


def keep(image, label, dataset):
    return image, label


def test_the_test_loader_has_a_share_of_the_records(cfg):
    dataset = get_dataset("gta5")
    files = [str(record.image) for record in dataset.records()]
    loader = build_test_loader(dataset, keep, 8, 1, 3, timeout=7)
    assert [loader.dataset.file_of(i) for i in range(len(loader.dataset))] == files[1::3]
    assert (loader.num_workers, loader.timeout) == (2, 7)  # no more workers than images
    assert not loader.persistent_workers
    assert loader.batch_size is None
    assert isinstance(loader.sampler, SequentialSampler)
    assert build_test_loader(dataset, keep, 8, 5, 6).num_workers == 0  # an empty share
    plain = build_test_loader(dataset, keep)
    assert (len(plain), plain.num_workers, plain.timeout) == (5, 0, 0)
    assert [sample["file_name"] for sample in plain] == files
