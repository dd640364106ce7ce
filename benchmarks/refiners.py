#!/usr/bin/env python
"""Seconds per image of the refiners: cold, and with SAM's output for the image cached.

    OMP_NUM_THREADS=1 python benchmarks/refiners.py
    OMP_NUM_THREADS=1 python benchmarks/refiners.py --models edgetam sam_hq sam3_tracker
    OMP_NUM_THREADS=1 python benchmarks/refiners.py --models sam3 --refiners sam_text
    python benchmarks/refiners.py --models sam sam2 edgetam sam3_tracker --images 8 --device cuda

Models are those of transformers at their published sizes, see `sam_models.py`, and
segment-anything's vit_b. Weights are random, which does not change the time of `sam`. For `regions`
the masks are as many as random weights give, so the filters of automatic masks are open: of P²
points with three masks each all are resized and compared. For `sam_text`, too, all 200 instances of
each class are masks. On a CPU the time is the CPU time of all threads of this process.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from pathlib import Path

import torch
import transformers
from in_turns import machine, parser_of, seconds_of, silence_all_but_peaks
from sam_models import FAMILIES, save_random
from sam_refiner import count_components, make_inputs

from clouds.config import get_cfg
from clouds.d2 import CfgNode
from clouds.self_training.pseudo_labeler import PseudoLabel
from clouds.self_training.refiners import build_refiner

REFINERS = ["sam", "regions", "sam_text"]
NUM_CLASSES = 19


def main() -> None:
    args = parse()
    silence_all_but_peaks()
    transformers.utils.logging.disable_progress_bar()
    device = torch.device(args.device)
    images, labels, seeds = make_inputs(args, device)
    labels = [with_scores(label) for label in labels]
    print(
        f"{args.images} images {args.size}x{args.size}, components of more than "
        f"{args.larger_than} pixels: {count_components(labels, args.larger_than)}; "
        f"{machine(device)}"
    )
    print("| refiner | model | s per image, cold | cached |\n|---|---|---|---|")
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            model = save_random(name, Path(folder) / name) if name in FAMILIES else name
            for refiner in args.refiners:
                cfg = config_of(args, refiner, model, f"{folder}/cache_{refiner}")
                built = build_refiner(cfg, device)
                times = [
                    seconds_of(lambda r=built: r.refine(images, labels, seeds), device)
                    for _ in range(2)
                ]
                cold, cached = (seconds / args.images for seconds in times)
                print(f"| {refiner} | {name} | {cold:.2f} | {cached:.2f} |", flush=True)
                del built
                gc.collect()  # one network in memory at a time


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    models = [*FAMILIES, "vit_b", "vit_l", "vit_h", "tiny"]
    parser.add_argument("--models", nargs="+", default=["vit_b", "sam", "sam2"], choices=models)
    parser.add_argument("--refiners", nargs="+", default=["sam"], choices=REFINERS)
    parser.add_argument("--size", type=int, default=768)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--points-per-side", type=int, default=8, help="of refiner 'regions'")
    parser.add_argument("--larger-than", type=int, default=5000, help="pixels; not of 'regions'")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def with_scores(label: PseudoLabel) -> PseudoLabel:
    one_hot = torch.nn.functional.one_hot(label.classes.long(), NUM_CLASSES)
    return PseudoLabel(label.classes, label.confidence, 0.9 * one_hot.permute(2, 0, 1).float())


def config_of(args: argparse.Namespace, refiner: str, model: str, cache: str) -> CfgNode:
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("gta5", "sd_x")
    node = cfg.MODEL.CLOUDS
    node.REFINER = refiner
    node.SAM.MODEL, node.SAM.WEIGHTS, node.SAM.CACHE_DIR = model, "", cache
    node.SAM.SIZE_THRESHOLD, node.SAM.TEXT_SCORE_THRESHOLD = args.larger_than, 0.0
    node.REGIONS.POINTS_PER_SIDE = args.points_per_side
    node.REGIONS.PRED_IOU_THRESH, node.REGIONS.STABILITY_SCORE_THRESH = -100.0, 0.0
    return cfg


if __name__ == "__main__":
    main()
