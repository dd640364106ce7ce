"""A dataset of one's own, from two folders to predictions, by commands alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from dataset_files import save
from PIL import Image

TINY = [
    *("DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2", "INPUT.CROP.SIZE", "(64,64)"),
    *("INPUT.SCALE_RANGE", "(1,1)", "TEST.SHORT_SIDE", "64", "SOLVER.WARMUP_ITERS", "0"),
    *("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "8", "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", "256"),
]
OWN = ["DATASETS.DESCRIPTIONS", "['mine.yaml']", "DATASETS.TEST", "['mine_val']"]


def run(folder, *words):
    environment = {**os.environ, "DETECTRON2_DATASETS": str(folder / "datasets")}
    done = subprocess.run(
        [sys.executable, "-m", "clouds", *words],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def scene(seed):
    """A dark lower half, of id 40, below a bright upper half, of id 300; a row of no class."""
    rng = np.random.default_rng(seed)
    horizon = int(rng.integers(24, 40))
    label = np.full((64, 96), 300, np.uint16)
    label[horizon:] = 40
    label[horizon] = 9
    image = np.where(label[..., None] == 300, 200, 60) + rng.integers(-20, 20, (64, 96, 3))
    return image.astype(np.uint8), label


@pytest.mark.slow
def test_from_two_folders_to_predictions(tmp_path):
    for split, seeds in (("train", range(8)), ("val", range(8, 11))):
        for seed in seeds:
            image, label = scene(seed)
            save(tmp_path / f"data/images/{split}/{seed}.jpg", image)
            save(tmp_path / f"data/masks/{split}/{seed}_m.png", label)
    for seed in range(20, 26):
        save(tmp_path / f"datasets/stable_diffusion/mine/images/{seed}.png", scene(seed)[0])

    out = run(tmp_path, "describe-dataset", "data/images", "data/masks", "--name", "mine")
    assert "11 pairs; without partner: 0 images, 0 labels" in out
    text = (tmp_path / "mine.yaml").read_text()
    assert "train: {images: data/images/train, labels: data/masks/train}" in text
    text = text.replace("name: '', ids: [40]", "name: ground, ids: [40], words: [ground, road]")
    text = text.replace("name: '', ids: [300]", "name: sky, ids: [300]")
    lines = [line for line in text.split("\n") if "name: ''" not in line]
    text = "\n".join(lines).replace("ignore_ids: [255]", "ignore_ids: [9]")
    (tmp_path / "mine.yaml").write_text(text)
    out = run(tmp_path, "check-data", "--descriptions", "mine.yaml", "--full")
    assert out.count(" ok ") == 2

    common = ["--config-file", "demo/warmup"]
    train = ["DATASETS.TRAIN", "['mine_train']", *OWN, *TINY]
    run(tmp_path, "train", *common, "OUTPUT_DIR", "out", "SOLVER.MAX_ITER", "60", *train)
    results = json.loads((tmp_path / "out/results.json").read_text())
    scores = results["datasets"]["mine_val"]
    assert list(scores["IoU"]) == ["ground", "sky"] and scores["mIoU"] > 80
    # the description is not needed by those who only have the checkpoint
    (tmp_path / "mine.yaml").rename(tmp_path / "elsewhere.yaml")
    photo = "datasets/stable_diffusion/mine/images/20.png"
    run(tmp_path, "predict", "--weights", "out/model_final.pth", "--input", photo, "--output", "p")
    labels = np.asarray(Image.open(tmp_path / "p/20_labels.png"))
    assert (labels == np.where(scene(20)[1] == 300, 1, 0)).mean() > 0.9
    (tmp_path / "elsewhere.yaml").rename(tmp_path / "mine.yaml")

    joint = ["DATASETS.TRAIN", "['mine_train','sd_mine']", *OWN, *TINY]
    weights = ["MODEL.WEIGHTS", "out/model_final.pth", "MODEL.CLOUDS.REFINER", "superpixel"]
    words = ["--config-file", "demo/joint", "OUTPUT_DIR", "joint", "SOLVER.MAX_ITER", "6"]
    run(tmp_path, "train", *words, *joint, *weights)
    results = json.loads((tmp_path / "joint/results.json").read_text())
    assert results["datasets"]["mine_val"]["mIoU"] > 60 and "sd_mine" in results["pseudo-labels"]


@pytest.mark.slow
@pytest.mark.parametrize("head", ["linear", "text", "pooled"])
def test_classes_of_ones_own_with_each_head(tmp_path, head):
    for seed in range(4):
        image, label = scene(seed)
        save(tmp_path / f"images/{seed}.png", image)
        save(tmp_path / f"masks/{seed}.png", label)
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nimages: images\nlabels: masks\nignore_ids: 9\n"
        "classes: [{name: ground, ids: 40}, {name: sky, ids: 300}, {name: tuk-tuk, ids: 7}]\n"
    )
    own = ["DATASETS.DESCRIPTIONS", "['mine.yaml']", "DATASETS.TRAIN", "['mine']"]
    words = ["DATASETS.TEST", "['mine']", "SOLVER.MAX_ITER", "2", "OUTPUT_DIR", "out"]
    heads = ["MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", head]
    out = run(tmp_path, "train", "--config-file", "demo/warmup", *own, *words, *heads, *TINY)
    assert "no image of mine has a label of: tuk-tuk" in out or "tuk-tuk" in out
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert list(results["datasets"]["mine"]["IoU"]) == ["ground", "sky", "tuk-tuk"]


@pytest.mark.slow
def test_joint_training_with_sam_and_ensembles(tmp_path):
    """Every part of the loop with a number of classes other than 19."""
    for seed in range(4):
        image, label = scene(seed)
        save(tmp_path / f"images/{seed}.png", image)
        save(tmp_path / f"masks/{seed}.png", label)
        save(tmp_path / f"datasets/stable_diffusion/mine/images/{seed}.png", scene(seed + 9)[0])
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nimages: images\nlabels: masks\nignore_ids: 9\n"
        "classes: [{name: ground, ids: 40, words: [ground, road]}, {name: sky, ids: 300}]\n"
    )
    data = ["DATASETS.DESCRIPTIONS", "['mine.yaml']", "DATASETS.TRAIN", "['mine','sd_mine']"]
    words = ["DATASETS.TEST", "['mine']", "SOLVER.MAX_ITER", "2", "OUTPUT_DIR", "out"]
    parts = [
        *("MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", "text", "MODEL.WEIGHTS", ""),
        *("MODEL.CLOUDS.REFINER", "sam", "MODEL.CLOUDS.SAM.MODEL", "tiny"),
        *("MODEL.CLOUDS.GEOMETRIC_ENSEMBLE", "True", "MODEL.CLOUDS.GEOMETRIC_ENSEMBLE_EMA", "True"),
        *("TEST.GENERATED_IMAGES", "2", "TEST.VISUALIZED_IMAGES", "1"),
    ]
    run(tmp_path, "train", "--config-file", "demo/joint", *data, *words, *parts, *TINY)
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert list(results["datasets"]["mine"]["IoU"]) == ["ground", "sky"]
    assert results["pseudo-labels"]["sd_mine"]["images"] == 1  # a panel; there are no labels
