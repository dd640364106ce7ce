"""A small model and data for tests of the engine; as a script, it trains the model.

python tests/engine_toy.py [--resume] [--num-gpus N] … OUTPUT_DIR [KEY VALUE …]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from clouds import comm
from clouds.config import get_cfg
from clouds.engine import Interrupted, NonFiniteLossError, Trainer
from clouds.engine.launch import launch
from clouds.environment import LOGGERS

BATCH = 4


def toy_config(output_dir, *overrides):
    cfg = get_cfg()
    settings = {
        "OUTPUT_DIR": str(output_dir),
        "LOG_PERIOD": 1,
        "MODEL.DEVICE": "cpu",
        "DATASETS.TEST": (),
        "SOLVER.IMS_PER_BATCH": BATCH,
        "SOLVER.MAX_ITER": 12,
        "SOLVER.BASE_LR": 0.1,
        "SOLVER.CHECKPOINT_PERIOD": 4,
        "SOLVER.LR_SCHEDULER_NAME": "WarmupPolyLR",
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0.5,
    }
    words = [word for pair in settings.items() for word in pair] + list(overrides)
    cfg.merge_from_list([str(word) if not isinstance(word, tuple) else word for word in words])
    return cfg


class Toy(nn.Module):
    """Two convolutions, a norm layer, an embedding and dropout.

    Losses are means over the samples, so their mean over processes is the loss of the global batch.
    """

    def __init__(self, dropout=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.backbone = nn.Conv2d(3, 4, 1).requires_grad_(False)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.dropout = nn.Dropout(dropout)
        self.query = nn.Embedding(2, 8)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        self.loss_factor = None  # number of a call -> factor of the loss
        self.calls = 0

    def forward(self, batch):
        image = torch.stack([sample["image"] for sample in batch])
        target = torch.stack([sample["target"] for sample in batch])
        features = self.dropout(torch.relu(self.norm(self.conv(self.backbone(image)))))
        maps = torch.einsum("qc,nchw->nqhw", self.query.weight, features)
        factor = self.loss_factor(self.calls) if self.loss_factor else 1.0
        self.calls += 1
        return {
            "loss_ce": (maps[:, 0] - target).square().mean() * factor,
            "loss_mask": (maps[:, 1] + target).abs().mean(),
            "loss_ce_0": features.square().mean() * 0.1,
        }


def toy_batches(start, rank=None, world_size=None, seconds=0.0, channels=3):
    """This process's share of the batches from `start` on; sample k is a function of k."""
    rank = comm.get_rank() if rank is None else rank
    world_size = comm.get_world_size() if world_size is None else world_size
    share = BATCH // world_size
    while True:
        first = start * BATCH + rank * share
        time.sleep(seconds)
        yield [toy_sample(number, channels) for number in range(first, first + share)]
        start += 1


def toy_sample(number, channels=3):
    generator = torch.Generator().manual_seed(1000 + number)
    image = torch.randn(channels, 6, 6, generator=generator)
    return {"image": image, "target": image.sum(0), "file_name": f"toy_{number:05d}.png"}


def script_environment(*folders):
    """Environment of a script that imports the project and modules of `folders`."""
    path = [Path(__file__).parents[1], *folders, os.environ.get("PYTHONPATH", "")]
    python_path = os.pathsep.join(str(folder) for folder in path if str(folder))
    return {**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}


def losses_of(output_dir):
    """Iteration -> (total, ce, mask, ce_0, grad norm, lr) of metrics.json, without duplicates."""
    losses = {}
    for line in Path(output_dir, "metrics.json").read_text().splitlines():
        record = json.loads(line)
        if record.get("evaluation"):
            continue
        assert record["iteration"] not in losses
        names = ("total_loss", "loss_ce", "loss_mask", "loss_ce_0", "grad_norm", "lr")
        losses[record["iteration"]] = tuple(record[name] for name in names)
    return losses


@contextmanager
def restored_loggers():
    """Undo the changes of `setup_logging`, after which pytest's caplog has no records."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    state = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for logger, (level, propagate, handlers) in zip(loggers, state, strict=True):
            for handler in set(logger.handlers) - set(handlers):
                handler.close()
            logger.level, logger.propagate, logger.handlers = level, propagate, handlers
        logging.Logger.manager._clear_cache()


def train_toy(output_dir, resume, dropout, seconds, overrides):
    trainer = Trainer(
        toy_config(output_dir, *overrides),
        model=Toy(dropout),
        loader=lambda start: toy_batches(start, seconds=seconds),
    )
    try:
        trainer.resume_or_load(resume)
        trainer.train()
    except Interrupted as request:
        sys.stderr.write(f"{request}\n")
        raise SystemExit(128 + request.signal_number) from None
    except NonFiniteLossError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(3) from None


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--num-gpus", type=int, default=1)
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("overrides", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    torch.set_num_threads(1)
    launch(
        train_toy,
        (args.output_dir, args.resume, args.dropout, args.slow, args.overrides),
        num_gpus=args.num_gpus,
        device="cpu",
    )
