"""CLOUDS inside Detectron2: its builder, loaders, trainer and evaluator run our model and data.

`test_both_sides.py` runs this file in a process of its own, with Detectron2 chosen.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg as detectron2_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import SemSegEvaluator
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from PIL import Image

import clouds.modeling  # noqa: F401 - registers the model
from clouds.config import add_clouds_config
from clouds.data.datasets import dataset_names, get_dataset, register_all
from clouds.modeling.meta_arch.clouds import CLOUDS

SIZE = (64, 96)


@pytest.fixture(scope="module", autouse=True)
def datasets():
    register_all()


@pytest.fixture
def bdd(tmp_path, monkeypatch):
    """BDD100K with four images; its labels hold train ids, which is what Detectron2 expects."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(4):
            image = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
            label = np.full(SIZE, 10, np.uint8)
            label[30:] = 0
            label[40:50, 20:60] = 13
            label[:4] = 255
            folder = tmp_path / "datasets" / "bdd100k"
            for path, array in (
                (folder / "images/10k" / split / f"{i}.jpg", image),
                (folder / "labels/sem_seg/masks" / split / f"{i}.png", label),
            ):
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)


@pytest.fixture
def cfg(tmp_path):
    cfg = detectron2_cfg()
    cfg.MODEL.DEVICE = "cpu"
    add_clouds_config(cfg)
    cfg.merge_from_list(
        [
            *("MODEL.CLOUDS.CLIP_MODEL_NAME", "clouds_tiny"),
            *("MODEL.CLOUDS.CLIP_PRETRAINED_WEIGHTS", ""),
            *("MODEL.SEM_SEG_HEAD.CONVS_DIM", 32),
            *("MODEL.SEM_SEG_HEAD.MASK_DIM", 32),
            *("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 1),
            *("MODEL.MASK_FORMER.HIDDEN_DIM", 32),
            *("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 20),
            *("MODEL.MASK_FORMER.DEC_LAYERS", 4),
            *("MODEL.MASK_FORMER.TRAIN_NUM_POINTS", 256),
            *("INPUT.FORMAT", "RGB"),
            *("INPUT.MIN_SIZE_TRAIN", (64,)),
            *("INPUT.MIN_SIZE_TEST", 64),
            *("DATASETS.TRAIN", ("bdd_train",)),
            *("DATASETS.TEST", ("bdd_val",)),
            *("DATALOADER.NUM_WORKERS", 0),
            *("SOLVER.IMS_PER_BATCH", 2),
            *("SOLVER.MAX_ITER", 40),
            # Its sampler of that name wants keys of its own.
            *("DATALOADER.SAMPLER_TRAIN", "TrainingSampler"),
            # Its trainer brings its own optimizer, SGD, and does not know our kind of clipping.
            *("SOLVER.BASE_LR", 0.01),
            *("SOLVER.CLIP_GRADIENTS.ENABLED", False),
            *("TEST.EVAL_PERIOD", 0),
            *("OUTPUT_DIR", str(tmp_path / "output")),
        ]
    )
    return cfg


class Trainer(DefaultTrainer):
    """Detectron2's trainer with Detectron2's evaluator, as its documentation tells to set it."""

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return SemSegEvaluator(dataset_name, distributed=False)


def test_our_datasets_stand_beside_detectron2s():
    names = DatasetCatalog.list()
    assert set(dataset_names()) - {"sd_<folder>"} <= set(names)
    assert "cityscapes_fine_sem_seg_train" in names
    assert MetadataCatalog.get("bdd_val").stuff_classes[13] == "car"
    register_all()
    assert len(DatasetCatalog.list()) == len(names)


def test_detectron2_builds_the_model(cfg):
    model = build_model(cfg)
    assert isinstance(model, CLOUDS)
    assert {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.usefixtures("bdd")
def test_default_trainer_trains_saves_and_evaluates(cfg, tmp_path):
    (tmp_path / "output").mkdir()
    seed_all_rng(0)
    trainer = Trainer(cfg)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.resume_or_load(resume=False)
    trainer.train()

    after = dict(trainer.model.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.partition(".")[0] for name in changed} == {"sem_seg_head"}
    assert len(changed) > 0.9 * sum(name.startswith("sem_seg_head") for name in before)

    lines = (tmp_path / "output/metrics.json").read_text().splitlines()
    last = [r for r in map(json.loads, lines) if "total_loss" in r][-1]
    parts = [last[f"loss_{p}{s}"] for p in ("ce", "mask", "dice") for s in ("", "_0", "_1", "_2")]
    assert np.isfinite(parts).all()
    assert (tmp_path / "output/model_final.pth").is_file()

    # Detectron2's evaluator found the labels that the files hold: road, sky and car.
    scores = Trainer.test(cfg, trainer.model)["sem_seg"]
    scored = {k for k, v in scores.items() if k.startswith("IoU-") and np.isfinite(v)}
    assert scored == {"IoU-road", "IoU-sky", "IoU-car"}
    # The best constant map is road everywhere: 17 % as the mean over the three.
    assert scores["mIoU"] > 25


@pytest.mark.usefixtures("bdd")
def test_a_checkpoint_of_detectron2_loads(cfg, tmp_path):
    (tmp_path / "output").mkdir()
    trainer = Trainer(cfg)
    trainer.checkpointer.save("saved")
    cfg.MODEL.WEIGHTS = str(tmp_path / "output/saved.pth")
    torch.manual_seed(1)
    other = Trainer(cfg)
    name = "sem_seg_head.predictor.query_feat.weight"
    assert not torch.equal(trainer.model.state_dict()[name], other.model.state_dict()[name])
    other.resume_or_load(resume=False)
    assert torch.equal(trainer.model.state_dict()[name], other.model.state_dict()[name])
    for hook in (*trainer._hooks, *other._hooks):
        for writer in getattr(hook, "_writers", ()):
            writer.close()  # Detectron2 does it after training alone


@pytest.mark.usefixtures("bdd")
def test_listing_is_what_detectron2_reads():
    entries = DatasetCatalog.get("bdd_val")
    records = get_dataset("bdd_val").records()
    assert [e["file_name"] for e in entries] == [str(r.image) for r in records]
    assert [e["sem_seg_file_name"] for e in entries] == [str(r.label) for r in records]
