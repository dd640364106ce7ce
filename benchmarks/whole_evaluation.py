#!/usr/bin/env python
"""The whole evaluation of an image, from pixels to counts: the published implementation and ours.

    OMP_NUM_THREADS=1 python benchmarks/whole_evaluation.py
    OMP_NUM_THREADS=1 python benchmarks/whole_evaluation.py --clip convnext_large_d_320
    OMP_NUM_THREADS=1 python benchmarks/whole_evaluation.py --dtype bfloat16

The published implementation is composed of library calls in float32: open_clip's timm trunk,
transformers' Mask2Former, which computes all ten predictions, all masks at full size, their sum
over the queries, and on the host numpy's count of the pixels of an int64 class map. Ours is the
evaluation of an image by tools/train_net.py --eval-only: the model in evaluation mode, the
protocol's `predict`, the evaluator's confusion matrix. `--dtype bfloat16` is SOLVER.AMP.ENABLED and
applies to ours only.

Both have the same random weights; those of the head are large enough for a class map of many
regions. Class maps are compared first. Then the timings of both alternate; on a CPU they are
processor time of all threads, which other processes do not affect. Memory is the peak of the first
call minus the memory before it. Further settings of the model follow as KEY VALUE.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F

import clouds.modeling  # noqa: F401 - registers what the config names
from clouds.config import get_cfg
from clouds.d2 import CfgNode
from clouds.data.label_space import IGNORE
from clouds.device import autocast
from clouds.evaluation import ConfusionMatrix, build_protocol
from clouds.modeling.build import build_seeded

sys.path.insert(0, str(Path(__file__).parent))
from in_turns import Peak, Span, in_turns, machine, parser_of, silence_all_but_peaks
from part_clock import PartClock, synchronizer
from profiler import CLASS_MAP, CONFUSION, INPUT, add_network_hooks, profiled_inference
from profiler_data import random_images
from published_step import BACKBONE, PublishedStep, Sample
from transformers_weights import randomize

PIXEL_DECODER, MASK_DECODER = "pixel decoder", "mask decoder"
PARTS = (INPUT, BACKBONE, PIXEL_DECODER, MASK_DECODER, CLASS_MAP, CONFUSION)
PUBLISHED, OURS = "published", "ours"
CALIBRATED = 256
"""Side of the part of the image over which the mean of the mask features is set to zero, pixels."""
GAINS = {"query": 10.0, "transformer": 0.1, "class_embed": 4.0}
"""Substring of a weight's name -> factor."""

Evaluated = tuple[Tensor, npt.NDArray[np.int64]]
"""Class map (H, W), and counts (num_classes, num_classes), row: label, column: prediction."""

Way = Callable[[Sample, PartClock], Evaluated]


class PublishedEvaluation:
    """The published evaluation, step by step.

    Args:
        cfg: of the model.
        model: ours, whose weights are copied. Its backbone must be a ConvNeXt.
    """

    def __init__(self, cfg: CfgNode, model: Any) -> None:
        self.step = PublishedStep(cfg, model)
        self.num_classes: int = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        self.counts = np.zeros((self.num_classes + 1, self.num_classes + 1), np.int64)

    @torch.no_grad()
    def __call__(self, sample: Sample, clock: PartClock) -> Evaluated:
        """Class map and counts of one image, whose sides are multiples of 32."""
        head = self.step.head
        with ExitStack() as stack:
            # The pixel decoder is part of the head; the rest of the head is the mask decoder.
            add_network_hooks(
                head, clock, stack, {PIXEL_DECODER: "pixel_decoder", MASK_DECODER: ""}
            )
            with clock.part(BACKBONE):
                features = self.step.features([sample["image"]])
            class_logits, mask_logits = head(features)
        with clock.part(CLASS_MAP):
            scores = self.scores(class_logits[-1], mask_logits[-1], sample)
            classes = scores.argmax(0).cpu()
        with clock.part(CONFUSION):
            self.counts[:] = 0
            self.count(classes.numpy(), sample["label"].numpy())
        return classes, self.counts[:-1, :-1].T

    @staticmethod
    def scores(class_logits: Tensor, mask_logits: Tensor, sample: Sample) -> Tensor:
        """(C, height, width) of a batch of one."""
        image, output = sample["image"].shape[-2:], (sample["height"], sample["width"])
        masks = F.interpolate(mask_logits, image, mode="bilinear", align_corners=False)[0]
        probabilities = class_logits[0].softmax(-1)[:, :-1]
        scores = torch.einsum("qc,qhw->chw", probabilities, masks.sigmoid())
        return F.interpolate(scores[None], output, mode="bilinear", align_corners=False)[0]

    def count(self, predicted: npt.NDArray[np.int64], label: npt.NDArray[np.uint8]) -> None:
        """Add the pixels of an image; row: prediction, column: label, the last one of IGNORE."""
        labelled = label.astype(np.int64)
        labelled[labelled == IGNORE] = self.num_classes
        cells = (self.num_classes + 1) * predicted.reshape(-1) + labelled.reshape(-1)
        self.counts += np.bincount(cells, minlength=self.counts.size).reshape(self.counts.shape)


class OurEvaluation:
    """Our evaluation of an image.

    Args:
        cfg: of the model, with TEST.PROTOCOL and SOLVER.AMP.
        model: is set to evaluation mode.
    """

    def __init__(self, cfg: CfgNode, model: Any) -> None:
        self.cfg, self.model = cfg, model.eval()
        self.protocol = build_protocol(cfg)

    @torch.no_grad()
    def __call__(self, sample: Sample, clock: PartClock) -> Evaluated:
        """Class map and counts of one image."""
        unlabelled = {key: value for key, value in sample.items() if key != "label"}
        confusion = ConfusionMatrix(self.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
        with autocast(self.cfg, self.model.device), profiled_inference(self.model, clock):
            with clock.part(INPUT):
                classes = self.protocol.predict(self.model, unlabelled)
            with clock.part(CONFUSION):
                confusion.update(classes, sample["label"])
        return classes, confusion.counts.cpu().numpy()


def main(words: Sequence[str] | None = None) -> None:
    args = parse(words)
    torch.set_num_threads(args.threads)
    sample, ways = build(args)
    device = torch.device(args.device)
    small = {**sample, "image": sample["image"][:, :64, :96].contiguous()}
    small |= {"label": sample["label"][:64, :96].contiguous(), "height": 64, "width": 96}
    results: dict[str, Evaluated] = {}
    memory: dict[str, float] = {}
    for name, way in ways.items():
        way(small, PartClock(lambda: None))  # libraries load code and allocate buffers
        with Peak(device) as peak:
            results[name] = way(sample, PartClock(lambda: None))
        memory[name] = peak.more
    (before, counts_before), (after, counts_after) = results[PUBLISHED], results[OURS]
    equal = (before == after.cpu()).double().mean().item()
    moved = int(np.abs(counts_before - counts_after).sum()) // 2
    taken = in_turns(ways, lambda way: seconds(way, sample, device), args.repeats)
    height, width = args.image
    print(f"{args.clip}, {height}x{width}, ours {args.dtype}; {machine(device)}")
    rows = [
        [part, *(statistics.median(parts.get(part, 0.0) for _, parts in taken[n]) for n in taken)]
        for part in PARTS
    ]
    rows.append(["whole", *(statistics.median(whole for whole, _ in taken[n]) for n in taken)])
    table = [[*row, row[1] / row[2] if row[1] and row[2] else None] for row in rows]
    print(tabulate(table, ["seconds", *taken, "ratio"], floatfmt=".2f"))
    for name, most in memory.items():
        print(f"{name}: peak memory {most:.0f} MiB")
    print(
        f"equal pixels: {equal:.5%} of a class map of {len(before.unique())} classes; "
        f"{moved} pixels are counted in another cell"
    )


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--clip", default="convnext_base", help="open_clip's name of a ConvNeXt")
    add("--image", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), default=[1024, 2048])
    add("--repeats", type=int, default=1)
    add("--threads", type=int, default=1)
    add("--device", default="cpu")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of ours, by autocast")
    add("settings", nargs="*", metavar="KEY VALUE", help="of the model, as for tools/train_net.py")
    args = parser.parse_args(words)
    if any(side % 32 for side in args.image) or args.repeats < 1:
        parser.error("the sides of --image are multiples of 32, --repeats is at least 1")
    return args


def build(args: argparse.Namespace) -> tuple[Sample, dict[str, Way]]:
    """The image and both implementations, with the same weights."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE = args.device
    cfg.MODEL.CLOUDS.CLIP_MODEL_NAME = args.clip
    cfg.MODEL.CLOUDS.CLIP_PRETRAINED_WEIGHTS = ""
    cfg.SOLVER.AMP.ENABLED = args.dtype == "bfloat16"
    cfg.TEST.SHORT_SIDE = min(args.image)
    cfg.merge_from_list(args.settings)
    model: Any = build_seeded(cfg)
    model.to(args.device).eval()
    sample = random_images(cfg, (args.image[0], args.image[1]))(0)
    spread_predictions(model, sample["image"][None, :, :CALIBRATED, :CALIBRATED])
    return sample, {PUBLISHED: PublishedEvaluation(cfg, model), OURS: OurEvaluation(cfg, model)}


@torch.no_grad()
def spread_predictions(model: Any, image: Tensor) -> None:
    """Set random weights of the head so that queries differ and masks cover parts of an image.

    Args:
        image: (1, 3, H, W), RGB, a part of the image.
    """
    head = randomize(model.sem_seg_head.cpu()).to(model.device)
    for name, parameter in head.predictor.named_parameters():
        if parameter.ndim > 1:
            parameter.mul_(next((gain for part, gain in GAINS.items() if part in name), 1.0))
        elif name.endswith("bias"):
            parameter.zero_()
    features = model.backbone((image.to(model.device) - model.pixel_mean) / model.pixel_std)
    mask_features, _ = head.pixel_decoder(features)
    head.pixel_decoder.mask_features.bias -= mask_features.mean((0, 2, 3))


def seconds(way: Way, sample: Sample, device: torch.device) -> tuple[float, dict[str, float]]:
    """Seconds of the whole and of the parts; on a GPU, with synchronization between parts."""
    now = time.process_time if device.type == "cpu" else time.perf_counter
    clock = PartClock(synchronizer(device), now)
    with Span(device) as span:
        way(sample, clock)
    return span.seconds, clock.seconds


if __name__ == "__main__":
    silence_all_but_peaks()
    main()
