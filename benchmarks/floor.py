"""The operations of a training step by part, and their time at a machine's peak.

    python benchmarks/floor.py --config-file configs/joint/gta_convnext_large.yaml
    python benchmarks/floor.py --config-file … --source 4 --generated 4 --peak 989

Operations are those of convolutions and matrix products, as torch's FlopCounterMode counts them on
meta tensors: nothing is computed, so the largest sizes take seconds. Other operations (norms,
sampling, softmax) are bound by memory and not counted. Each product has two in the backward pass,
which therefore takes twice the operations of the forward pass.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from torch.utils.flop_counter import FlopCounterMode

import clouds.modeling  # noqa: F401 - registers what configs name
from clouds.config import load_config
from clouds.d2 import CfgNode
from clouds.modeling.build import build_model
from clouds.self_training.refiners.sam.model import build_sam


def count(run: Callable[[], object]) -> float:
    """TFLOP of a call of `run`."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e12


def peak_here(size: int = 2048, repeats: int = 5) -> float:
    """TFLOP/s of a float32 matrix product on this machine, with torch's threads."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times) / 1e12


def step_parts(model: Any, size: int, source: int, generated: int) -> dict[str, float]:
    """Part -> TFLOP of a joint step; SAM's embeddings come from its cache."""
    views = source + generated
    images = torch.empty(views, 3, size, size, device="meta")
    clean = torch.empty(max(generated, 1), 3, size, size, device="meta")
    parts = {}
    with torch.no_grad():
        parts["backbone, student's views"] = count(lambda: model.backbone(images))
        features = model.backbone(images)
        if generated:
            parts["backbone, clean views"] = count(lambda: model.backbone(clean))
            clean_features = model.backbone(clean)
            parts["teacher's head"] = count(lambda: model.sem_seg_head(clean_features))
        parts["head, forward"] = count(lambda: model.sem_seg_head(features))
    parts["head, backward"] = 2 * parts["head, forward"]
    return parts


def sam_encoder(cfg: CfgNode, generated: int) -> float:
    """TFLOP of SAM's image encoder, for images that are not in its cache."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.CLOUDS.SAM.WEIGHTS = ""
    with torch.device("meta"):
        sam = build_sam(cfg, torch.device("meta"))
    side = sam.image_encoder.img_size
    image = torch.empty(1, 3, side, side, device="meta")
    with torch.no_grad():
        return generated * count(lambda: sam.image_encoder(image))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--size", type=int, default=768, help="side of a crop, pixels")
    parser.add_argument("--source", type=int, default=4, help="source images of a step")
    parser.add_argument("--generated", type=int, default=4, help="generated images of a step")
    parser.add_argument("--peak", type=float, help="TFLOP/s; default: measured here in float32")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides")
    args = parser.parse_args()
    fixed = ["MODEL.DEVICE", "cpu", "MODEL.CLOUDS.CLIP_PRETRAINED_WEIGHTS", ""]
    cfg = load_config(args.config_file, [*fixed, *args.opts])
    model = build_model(cfg).to("meta").eval().requires_grad_(False)
    peak = args.peak or peak_here()
    parts = step_parts(model, args.size, args.source, args.generated)
    rows = [[name, tflop, 1000 * tflop / peak] for name, tflop in parts.items()]
    total = sum(parts.values())
    rows.append(["step, SAM's embeddings cached", total, 1000 * total / peak])
    if args.generated:
        sam = sam_encoder(cfg, args.generated)
        rows.append(
            [f"SAM {cfg.MODEL.CLOUDS.SAM.MODEL}'s encoder, not cached", sam, 1000 * sam / peak]
        )
    print(f"{args.source} + {args.generated} images of {args.size}x{args.size}, {peak:.3g} TFLOP/s")
    print(tabulate(rows, ["part", "TFLOP", "ms at peak"], floatfmt=".3f", tablefmt="github"))


if __name__ == "__main__":
    main()
