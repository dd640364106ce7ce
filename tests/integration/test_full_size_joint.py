"""Joint training at its own size, with random weights: one step on this CPU, and SAM ViT-H once."""

from __future__ import annotations

import math
import subprocess
import sys
from time import perf_counter

import pytest
import torch
from test_full_size import ROOT, environment, paint

from clouds.config import get_cfg, load_config
from clouds.data.structures import Domain
from clouds.engine import Trainer
from clouds.self_training.refiners.sam.model import build_sam
from clouds.self_training.refiners.sam.predictor import ImageEmbedder

CONFIG = ROOT / "configs" / "joint" / "gta_convnext_large.yaml"

pytestmark = pytest.mark.slow


@pytest.fixture
def data(tmp_path):
    root = tmp_path / "datasets"
    paint(root, "gta5", (1052, 1914), "--train", 2)
    scenes = root / "stable_diffusion" / "street_scenes"
    tool = [sys.executable, str(ROOT / "tools" / "generate_images.py"), "--output", str(scenes)]
    words = [*tool, "--generator", "procedural", "--count", "2"]  # 768x768
    subprocess.run(words, check=True, capture_output=True, env=environment(root), cwd=ROOT)
    return root


def test_one_joint_step_of_the_published_recipe(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data))
    settings = {
        "OUTPUT_DIR": tmp_path / "output",
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": "",
        "MODEL.CLOUDS.CLIP_PRETRAINED_WEIGHTS": "",
        "MODEL.CLOUDS.SAM.MODEL": "vit_b",
        "MODEL.CLOUDS.SAM.WEIGHTS": "",
        "DATASETS.TEST": "()",
        "DATALOADER.NUM_WORKERS": 0,
        "SOLVER.IMS_PER_BATCH": 2,
    }
    cfg = load_config(CONFIG, [str(word) for pair in settings.items() for word in pair])
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    both = {Domain.SOURCE, Domain.GENERATED}
    batch = next(b for b in trainer.batches if {sample["domain"] for sample in b} == both)
    assert all(sample["image"].shape == (3, 768, 768) for sample in batch)

    seen = []
    teaching = trainer.model.pseudo_labeler
    refine = teaching.refine
    monkeypatch.setattr(teaching, "refine", lambda *a: seen.extend(refine(*a)) or seen)
    query = trainer.model.sem_seg_head.predictor.query_feat.weight
    before = query.detach().clone()
    started = perf_counter()
    step = trainer.train_step(0, batch, started)
    with capsys.disabled():
        print(f"\nfull-size joint step of 2 x 768x768, SAM ViT-B: {step.seconds:.0f} s")
    assert len(step.losses) == 30
    assert all(math.isfinite(loss) for loss in step.losses.values())
    assert step.grad_norm > 0 and not torch.equal(query, before)
    (refined,) = seen
    assert refined.masks.shape[1:] == (768, 768)
    assert refined.points is not None and refined.points.shape[1:] == (5, 2)  # SAM was asked
    # the teacher follows after a hundred iterations, not after one
    assert torch.equal(teaching.teacher_parts["sem_seg_head"].predictor.query_feat.weight, before)


def test_sam_vit_h_is_built_and_encodes():
    cfg = get_cfg()
    cfg.MODEL.CLOUDS.SAM.MODEL = "vit_h"
    cfg.MODEL.CLOUDS.SAM.WEIGHTS = ""
    sam = build_sam(cfg, torch.device("cpu"))
    assert sum(p.numel() for p in sam.parameters()) == pytest.approx(641e6, rel=0.01)
    image = torch.randint(0, 256, (3, 768, 768), dtype=torch.uint8)
    (embedding,) = ImageEmbedder(sam)([image])
    assert embedding.shape == (256, 64, 64) and embedding.isfinite().all()
