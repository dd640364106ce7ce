#!/usr/bin/env python
"""Seconds per image of the refiners: cold, and with SAM's output for the image cached.

    OMP_NUM_THREADS=1 python benchmarks/refiners.py
    python benchmarks/refiners.py --models sam sam2 edgetam sam3_tracker --images 8 --device cuda

Models are those of transformers at their published sizes (sam: ViT-B; sam2: Hiera-tiny, as
sam2.1-hiera-tiny), and segment-anything's vit_b. Weights are random, which does not change the time
of `sam`. For `regions` the masks are as many as random weights give, so the filters of automatic
masks are open: of P² points with three masks each all are resized and compared. On a CPU the time
is the CPU time of all threads of this process.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from in_turns import machine, parser_of, seconds_of, silence_all_but_peaks
from sam_refiner import count_components, make_inputs

from clouds.config import get_cfg
from clouds.d2 import CfgNode
from clouds.self_training.pseudo_labeler import PseudoLabel
from clouds.self_training.refiners import build_refiner

MODELS = {
    "sam": ("SamConfig", "SamModel"),
    "sam_hq": ("SamHQConfig", "SamHQModel"),
    "sam2": ("Sam2Config", "Sam2Model"),
    "edgetam": ("EdgeTamConfig", "EdgeTamModel"),
    "sam3_tracker": ("Sam3TrackerConfig", "Sam3TrackerModel"),
}
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
            model = save_random(name, Path(folder)) if name in MODELS else name
            for refiner in args.refiners:
                cfg = config_of(args, refiner, model, f"{folder}/cache_{refiner}")
                built = build_refiner(cfg, device)
                times = [
                    seconds_of(lambda r=built: r.refine(images, labels, seeds), device)
                    for _ in range(2)
                ]
                cold, cached = (seconds / args.images for seconds in times)
                print(f"| {refiner} | {name} | {cold:.2f} | {cached:.2f} |", flush=True)


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    models = [*MODELS, "vit_b", "vit_l", "vit_h", "tiny"]
    parser.add_argument("--models", nargs="+", default=["vit_b", "sam", "sam2"], choices=models)
    parser.add_argument("--refiners", nargs="+", default=["sam"], choices=["sam", "regions"])
    parser.add_argument("--size", type=int, default=768)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--points-per-side", type=int, default=8, help="of refiner 'regions'")
    parser.add_argument("--larger-than", type=int, default=5000, help="pixels; of refiner 'sam'")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def save_random(name: str, folder: Path) -> str:
    """A folder with a model of published size and random weights."""
    config, model = (getattr(transformers, each) for each in MODELS[name])
    network: Any = model(config())
    network.save_pretrained(folder / name)
    return str(folder / name)


def with_scores(label: PseudoLabel) -> PseudoLabel:
    one_hot = torch.nn.functional.one_hot(label.classes.long(), NUM_CLASSES)
    return PseudoLabel(label.classes, label.confidence, 0.9 * one_hot.permute(2, 0, 1).float())


def config_of(args: argparse.Namespace, refiner: str, model: str, cache: str) -> CfgNode:
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("gta5", "sd_x")
    node = cfg.MODEL.CLOUDS
    node.REFINER = refiner
    node.SAM.MODEL, node.SAM.WEIGHTS, node.SAM.CACHE_DIR = model, "", cache
    node.SAM.SIZE_THRESHOLD = args.larger_than
    node.REGIONS.POINTS_PER_SIDE = args.points_per_side
    node.REGIONS.PRED_IOU_THRESH, node.REGIONS.STABILITY_SCORE_THRESH = -100.0, 0.0
    return cfg


if __name__ == "__main__":
    main()
