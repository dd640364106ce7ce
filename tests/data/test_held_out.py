"""DATASETS.SOURCE_VAL_FRACTION: images that are not trained on, and their scores."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from color_model import ColorModel, blocks, write_cityscapes
from dataset_files import write

from clouds.config import get_cfg
from clouds.data.build import build_train_loader
from clouds.data.datasets import forget_listings
from clouds.data.held_out import split
from clouds.evaluation import evaluate_held_out


@pytest.fixture
def root(tmp_path, monkeypatch):
    forget_listings()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return tmp_path


def config(root, train, fraction):
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.OUTPUT_DIR = "cpu", str(root / "out")
    cfg.DATASETS.TRAIN, cfg.DATASETS.SOURCE_VAL_FRACTION = train, fraction
    cfg.INPUT.CROP.SIZE = (16, 20)
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.TEST.SHORT_SIDE = 0
    return cfg


@pytest.mark.parametrize(
    ("total", "fraction", "held_out"),
    [(10, 0.2, [2, 7]), (10, 0.01, [5]), (9, 0.34, [1, 4, 7]), (4, 0.5, [1, 3]), (3, 0, [])],
)
def test_split_at_equal_distances(total, fraction, held_out):
    train, rest = split(list(range(total)), fraction, "x")
    assert rest == held_out
    assert train == [i for i in range(total) if i not in held_out]


def test_a_dataset_that_is_too_small():
    with pytest.raises(ValueError, match="dataset x: 1 of its 1 images would be held out"):
        split([0], 0.1, "x")


def test_held_out_images_are_not_trained_on(root):
    for i in range(10):
        write(root, "gta5", i)
    for i in range(4):
        write(root, "synthia", i)

    def seen(fraction, start=0):
        loader = build_train_loader(config(root, ("gta5", "synthia"), fraction), start)
        return [s["file_name"] for batch in islice(loader, 12) for s in batch]

    everything, rest = set(seen(0)), set(seen(0.2))
    missing = {name.rsplit("/", 1)[1] for name in everything - rest}
    assert len(everything) == 14 and rest < everything
    names = sorted({n.rsplit("/", 1)[1] for n in everything if "gta5" in n})
    synthia = sorted({n.rsplit("/", 1)[1] for n in everything if "synthia" in n.lower()})
    assert missing == {names[2], names[7], synthia[2]}
    assert seen(0.2, 5)[:20] == seen(0.2)[20:40]  # a resumed run sees the same


def test_scores_are_those_of_the_held_out_images(root):
    truth = [blocks(i) for i in range(6)]
    predicted = [t if i in (1, 4) else np.roll(t, 1, 0) for i, t in enumerate(truth)]
    write_cityscapes(root, list(zip(predicted, truth, strict=True)), split="train")
    cfg = config(root, ("cityscapes_train",), 0.34)
    results = evaluate_held_out(cfg, ColorModel())
    assert results.mean_miou == 100 and results.datasets[0].images == 2
    assert not (root / "out").exists()
