"""Class mixing: pixels of image and label, its classes, and its independence of the batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dataset_files import write, write_generated

from clouds.config import get_cfg
from clouds.data.build import build_train_loader
from clouds.data.class_mixing import draw_source, mix_classes, mix_targets
from clouds.data.structures import Domain, Record, Targets, class_map, masks_from_label


def random_tensor(seed, *shape, high=256):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(high, shape, generator=generator).to(torch.uint8)


def generated(seed, size=(20, 30)):
    clean = random_tensor(seed, 3, *size)
    return {"image": clean // 2, "clean_image": clean, "domain": Domain.GENERATED, "seed": seed}


def source(seed, size=(20, 30), classes=(0, 3, 5, 8, 11)):
    values = torch.tensor([*classes, 255], dtype=torch.uint8)
    label = values[random_tensor(seed + 1, *size, high=len(values)).long()]
    return {"image": random_tensor(seed + 2, 3, *size), "sem_seg": label, "seed": seed}


def agree(mixed, sample, other, chosen, top, left):
    """Whether each pixel of image and label is as it should be if `other` lies at (top, left)."""
    height, width = other["sem_seg"].shape
    for y in range(20):
        for x in range(30):
            pixel, label = sample["image"][:, y, x], 255
            if 0 <= y - top < height and 0 <= x - left < width:
                found = int(other["sem_seg"][y - top, x - left])
                if found in chosen:
                    pixel, label = other["image"][:, y - top, x - left], found
            if mixed["pasted_label"][y, x] != label or (mixed["image"][:, y, x] != pixel).any():
                return False
    return True


@pytest.mark.parametrize("size", [(20, 30), (16, 40), (28, 24)])
@pytest.mark.parametrize("seed", range(4))
def test_image_and_label_agree_pixel_for_pixel(seed, size):
    sample, other = generated(seed), source(seed, size)
    before = {key: value.clone() for key, value in sample.items() if key.endswith("image")}
    mixed = mix_classes(sample, other)
    chosen = set(mixed["pasted_label"].unique().tolist()) - {255}
    assert len(chosen) == 3 and chosen <= {0, 3, 5, 8, 11}  # half of 5, rounded up
    places = [
        (top, left)
        for top in range(max(0, 20 - size[0]) + 1)
        for left in range(max(0, 30 - size[1]) + 1)
    ]
    assert sum(agree(mixed, sample, other, chosen, *place) for place in places) == 1
    assert torch.equal(mixed["clean_image"], before["clean_image"])
    assert torch.equal(sample["image"], before["image"])


def test_the_classes_are_drawn_from_the_seed():
    other = source(0, classes=range(12))
    results = [mix_classes(generated(seed), other)["pasted_label"] for seed in (1, 2, 3)]
    assert torch.equal(results[0], mix_classes(generated(1), other)["pasted_label"])
    assert len({tuple(r.unique().tolist()) for r in results}) > 1


def test_a_label_without_classes_changes_nothing():
    other = source(0)
    other["sem_seg"] = torch.full_like(other["sem_seg"], 255)
    mixed = mix_classes(generated(1), other)
    assert torch.equal(mixed["image"], generated(1)["image"])
    assert (mixed["pasted_label"] == 255).all()


def test_targets_are_the_pasted_label_where_there_is_one():
    pseudo, pasted = source(1)["sem_seg"], source(5, classes=(3, 4))["sem_seg"]
    result = mix_targets(masks_from_label(pseudo), pasted)
    expected = torch.where(pasted == 255, pseudo, pasted)
    assert torch.equal(class_map(result.labels, result.masks), expected)
    assert result.labels.tolist() == sorted({*expected.unique().tolist()} - {255})
    assert (result.masks.sum(0) <= 1).all()
    assert result.weights is None and result.class_weight == result.no_object_weight == 1


def test_pasted_pixels_have_weight_1_and_the_others_keep_theirs():
    pseudo, pasted = source(1)["sem_seg"], source(5, classes=(3, 4))["sem_seg"]
    targets = replace(
        masks_from_label(pseudo),
        weights=torch.full((20, 30), 0.3),
        no_object_weight=0.0,
        class_weight=0.3,
        dice_weight=0.5,
    )
    result = mix_targets(targets, pasted)
    is_pasted = pasted != 255
    assert torch.equal(result.weights, torch.where(is_pasted, 1.0, 0.3))
    assert torch.equal(result.class_weight, torch.where(is_pasted, 1.0, 0.3))
    assert torch.equal(result.no_object_weight, is_pasted.float())
    assert result.dice_weight == 0.5


def test_a_covered_class_is_no_target_any_more():
    pseudo = torch.zeros(4, 6, dtype=torch.uint8)
    pseudo[:2] = 7
    pasted = torch.full((4, 6), 255, dtype=torch.uint8)
    pasted[:2] = 9
    result = mix_targets(masks_from_label(pseudo), pasted)
    assert result.labels.tolist() == [0, 9]
    nothing = Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4, 6, dtype=torch.bool))
    assert mix_targets(nothing, pasted).labels.tolist() == [9]


def test_sources_are_drawn_evenly_from_the_seed():
    sources = [Record(Path(f"{i}.png"), None, Domain.SOURCE, "gta5") for i in range(4)]
    drawn = [draw_source(sources, seed) for seed in range(400)]
    counts = [sum(record == one for record, _ in drawn) for one in sources]
    assert min(counts) > 60 and draw_source(sources, 7) == drawn[7]
    assert len({seed for _, seed in drawn}) == 400


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for i in range(5):
        write(tmp_path, "gta5", i)
        write_generated(tmp_path, f"{i}.png")
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.INPUT.CROP.SIZE = ("gta5", "sd_x"), (20, 28)
    cfg.INPUT.CLASS_MIXING, cfg.SOLVER.IMS_PER_BATCH = True, 4
    cfg.DATALOADER.NUM_WORKERS, cfg.OUTPUT_DIR = 0, str(tmp_path / "output")
    return cfg


def batches(loader, count):
    return [batch for batch, _ in zip(loader, range(count), strict=False)]


def test_batches_do_not_depend_on_ranks_workers_or_the_start(config):
    whole = batches(build_train_loader(config), 4)
    parts = [batches(build_train_loader(config, 2, rank, 2), 2) for rank in range(2)]
    config.DATALOADER.NUM_WORKERS = 2
    by_workers = batches(build_train_loader(config), 4)
    mixed = 0
    for number, batch in enumerate(whole):
        for i, sample in enumerate(batch):
            others = [by_workers[number][i]]
            if number >= 2:
                others.append(parts[i // 2][number - 2][i % 2])
            for other in others:
                assert sample.keys() == other.keys()
                tensors = [k for k, v in sample.items() if isinstance(v, torch.Tensor)]
                assert all(torch.equal(sample[k], other[k]) for k in tensors)
            mixed += "pasted_label" in sample
            assert ("pasted_label" in sample) == (sample["domain"] is Domain.GENERATED)
    assert mixed >= 4


def test_the_clean_view_and_the_other_pixels_are_those_without_mixing(config):
    mixed = [s for b in batches(build_train_loader(config), 3) for s in b]
    config.INPUT.CLASS_MIXING = False
    for sample, other in zip(
        mixed, [s for b in batches(build_train_loader(config), 3) for s in b], strict=True
    ):
        if "pasted_label" not in sample:
            assert torch.equal(sample["image"], other["image"])
            continue
        assert torch.equal(sample["clean_image"], other["clean_image"])
        kept = sample["pasted_label"] == 255
        assert torch.equal(sample["image"][:, kept], other["image"][:, kept])
        assert not kept.all()
