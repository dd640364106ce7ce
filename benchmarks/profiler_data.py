"""Data of the profiler: random images from memory, or images of datasets."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import cv2
import numpy as np
import numpy.typing as npt

from clouds.d2 import CfgNode
from clouds.data.build import build_train_loader
from clouds.data.dataset_mapper import EvaluationMapper, to_tensor
from clouds.data.datasets import Datasets, generated
from clouds.data.label_space import IGNORE
from clouds.data.structures import Domain, EvalSample, TrainInput, TrainSample
from clouds.evaluation import build_protocol

UInt8Array = npt.NDArray[np.uint8]

RANDOM_CLASSES = 12
"""Classes in a random label, or all if there are fewer: about as many as in a training crop of a
street scene."""
RANDOM_BLOCKS = 8
"""Blocks along the shorter side of a random image."""


def sample_maker(cfg: CfgNode) -> Callable[[], object]:
    """A function that creates the next training sample in this process, without workers.

    Raises:
        FileNotFoundError, ValueError: as `build_train_loader`.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 1
    samples = iter(build_train_loader(cfg))
    return lambda: next(samples)


def random_image(
    size: tuple[int, int], seed: int, num_classes: int = 19
) -> tuple[UInt8Array, UInt8Array]:
    """A random image (H, W, 3) and a label (H, W) of blocks: RANDOM_CLASSES classes and ignore.

    The classes are drawn from 0 to `num_classes` - 1.
    """
    rng = np.random.default_rng(seed)
    height, width = size
    side = max(1, min(size) // RANDOM_BLOCKS)
    classes = rng.choice(num_classes, min(RANDOM_CLASSES, num_classes), replace=False)
    grid = rng.choice([*classes, IGNORE], (-(-height // side), -(-width // side)))
    label = grid.astype(np.uint8).repeat(side, 0).repeat(side, 1)[:height, :width]
    coarse = rng.integers(0, 256, (*grid.shape, 3), np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(image, np.uint8), np.ascontiguousarray(label)


def random_sample(
    size: tuple[int, int], seed: int, domain: Domain, num_classes: int = 19
) -> TrainSample:
    """A training sample of a random image of this size; `domain` is SOURCE or GENERATED."""
    image, label = random_image(size, seed, num_classes)
    common: TrainInput = {
        "image": to_tensor(image),
        "height": size[0],
        "width": size[1],
        "file_name": f"(random image {seed})",
        "domain": domain,
        "dataset": "random",
        "seed": seed,
    }
    if domain is Domain.GENERATED:
        return {**common, "clean_image": to_tensor(image), "flipped": False}
    return {**common, "sem_seg": to_tensor(label)}


def random_batches(cfg: CfgNode, distinct: int = 2) -> Callable[[int], Iterable[list[TrainSample]]]:
    """A `Loader` that repeats `distinct` batches of random images of INPUT.CROP.SIZE from memory.

    If DATASETS.TRAIN has generated datasets, half of each batch (rounded down) is generated.
    """
    height, width = cfg.INPUT.CROP.SIZE
    size, num_classes = cfg.SOLVER.IMS_PER_BATCH, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    sources = size - size // 2 if generated(cfg.DATASETS.TRAIN) else size
    domains = [Domain.SOURCE] * sources + [Domain.GENERATED] * (size - sources)
    batches = [
        [
            random_sample((int(height), int(width)), i * size + k, domain, num_classes)
            for k, domain in enumerate(domains)
        ]
        for i in range(distinct)
    ]
    return lambda start: itertools.islice(itertools.cycle(batches), start % distinct, None)


def random_images(cfg: CfgNode, size: tuple[int, int]) -> Callable[[int], EvalSample]:
    """Number -> evaluation sample of a random image of `size`, prepared by TEST.PROTOCOL."""
    protocol = build_protocol(cfg)
    image, label = random_image(size, 0, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)

    def make(number: int) -> EvalSample:
        prepared, prepared_label = protocol.prepare(image, label, "random")
        assert prepared_label is not None
        return {
            "image": to_tensor(prepared),
            "height": prepared_label.shape[0],
            "width": prepared_label.shape[1],
            "file_name": "(random image)",
            "domain": Domain.TARGET,
            "dataset": "random",
            "label": to_tensor(prepared_label),
        }

    return make


def dataset_images(cfg: CfgNode, name: str) -> Callable[[int], EvalSample]:
    """Number -> evaluation sample of a dataset, in the training label space, from disk; cyclic.

    Raises:
        FileNotFoundError, ValueError: as `Datasets.get` and `DatasetSpec.records`.
    """
    records = Datasets.from_config(cfg).get(name).records()
    mapper = EvaluationMapper(build_protocol(cfg).prepare)
    return lambda number: mapper(records[number % len(records)])
