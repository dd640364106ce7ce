#!/usr/bin/env python
"""The head, forward and backward: ours against transformers' Mask2Former, in one run.

    OMP_NUM_THREADS=1 python benchmarks/head.py
    OMP_NUM_THREADS=1 python benchmarks/head.py --images 4 --repeats 3 --amp

Pixel decoder and mask decoder of the published sizes, on the same features of a frozen backbone and
with the same weights; predictions and gradients are compared before the timing. The gradient of a
ReLU is not continuous at 0, nor is that of a sampling location at pixel centers; among millions of
both, rounding moves a few to the other side. So gradients are compared with softplus for every ReLU
and with the sampling locations held fixed (tests/ops/test_deformable_attention.py compares the
gradients of locations).

As in training, all class logits of the ten predictions get a gradient, and the logits of the
matched masks of each (--matched 100: of all). On a CPU the time is the CPU time of all threads of
this process. Needs transformers.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from in_turns import Span, in_turns, machine, parser_of, report, without_tf32
from torch import Tensor, nn
from torch.nn import functional as F

import clouds.modeling  # noqa: F401 - registers what the config names
from clouds.config import get_cfg
from clouds.d2 import SEM_SEG_HEADS_REGISTRY, CfgNode, ShapeSpec
from clouds.modeling.transformer_decoder.decoder import Predictions

sys.path.insert(0, str(Path(__file__).parent))
from published_step import sizes

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from transformers_weights import (
    mask2former,
    mask2former_config,
    mask_decoder_weights,
    pixel_decoder_weights,
    randomize,
)

STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
SEED = 0
TOLERANCE = 1e-5
"""Largest relative difference of logits and gradients, in root mean square."""

Logits = list[Tensor]
"""Class logits of every prediction, then the mask logits that have a loss."""

Variant = Callable[[], Logits]


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    features = make_features(args, device)
    ours = our_head(args).to(device)
    theirs = Theirs(args, ours).to(device)
    queries = torch.arange(args.matched, device=device)
    heads = {"transformers": theirs, "ours": ours}
    variants: dict[str, Variant] = {
        "transformers": lambda: theirs(features, queries),
        "ours": lambda: matched_logits(ours(features), queries),
    }
    gradients = [torch.randn_like(logits) / logits.numel() for logits in variants["ours"]()]
    with without_tf32():
        compare(heads, variants, gradients)
    if args.compile:
        ours.compile()

    def step(variant: Variant) -> float:
        for head in heads.values():
            head.zero_grad()
        return seconds(variant, gradients, device, args.amp)

    times = in_turns(variants, step, args.repeats, untimed=1)  # the first compiles both passes
    print(describe(args, device))
    print(report(times))


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--images", type=int, default=2)
    add("--size", type=int, default=384, help="of an image, a multiple of 32")
    add("--width", type=int, default=128, help="channels of res2: 128 base")
    add("--repeats", type=int, default=5)
    add("--device", default="cpu")
    add("--amp", action="store_true", help="bf16 autocast")
    add("--matched", type=int, default=10, help="matched masks of an image")
    add("--compile", action="store_true", help="ours with torch.compile")
    return parser.parse_args()


def make_features(args: argparse.Namespace, device: torch.device) -> dict[str, Tensor]:
    """Noise in the memory layout of a ConvNeXt's features, channels last."""
    torch.manual_seed(SEED)
    return {
        name: torch.randn(
            args.images, args.size // stride, args.size // stride, args.width * stride // 4
        )
        .to(device)
        .permute(0, 3, 1, 2)
        for name, stride in STRIDES.items()
    }


def our_head(args: argparse.Namespace, cfg: CfgNode | None = None) -> Any:
    """Ours with the sizes of the config; None: the published ones."""
    shapes = {
        name: ShapeSpec(channels=args.width * stride // 4, stride=stride)
        for name, stride in STRIDES.items()
    }
    cfg = cfg or get_cfg()
    return randomize(SEM_SEG_HEADS_REGISTRY.get(cfg.MODEL.SEM_SEG_HEAD.NAME)(cfg, shapes, None))


class Theirs(nn.Module):
    """transformers' pixel decoder, transformer module and class predictor, with our weights."""

    def __init__(self, args: argparse.Namespace, ours: Any, cfg: CfgNode | None = None) -> None:
        super().__init__()
        config = mask2former_config() if cfg is None else sizes(cfg)
        widths = [args.width * stride // 4 for stride in STRIDES.values()]
        self.pixel_decoder: Any = mask2former().Mask2FormerPixelDecoder(config, widths)
        self.predictor: Any = mask2former().Mask2FormerTransformerModule(
            config.feature_size, config
        )
        self.class_embed = copy.deepcopy(ours.predictor.class_embed)
        weights = pixel_decoder_weights(ours.pixel_decoder.state_dict())
        self.pixel_decoder.load_state_dict(weights)
        self.predictor.load_state_dict(mask_decoder_weights(ours.predictor.state_dict()))
        for module in self.modules():  # look F.relu up at each call, so that `compare` can patch it
            if getattr(module, "activation_fn", None) is F.relu:
                module.activation_fn = lambda x: F.relu(x)

    def forward(self, features: dict[str, Tensor], queries: Tensor) -> Logits:
        pixel = self.pixel_decoder(list(features.values()), return_dict=True)
        out = self.predictor(pixel.multi_scale_features, pixel.mask_features)
        classes = [self.class_embed(s.transpose(0, 1)) for s in out.intermediate_hidden_states]
        return classes + [masks.index_select(1, queries) for masks in out.masks_queries_logits]


def matched_logits(predictions: Predictions, queries: Tensor) -> Logits:
    layers, images = len(predictions.class_logits), len(predictions.class_logits[0])
    index = queries.expand(layers, -1)
    masks = predictions.matched_mask_logits(range(layers), [index] * images)
    return predictions.class_logits + list(torch.stack(masks, dim=1))


def backward(logits: Logits, gradients: Logits) -> None:
    torch.autograd.backward(logits, [g.to(x.dtype) for x, g in zip(logits, gradients, strict=True)])


def describe(args: argparse.Namespace, device: torch.device) -> str:
    """Sizes and device in one line."""
    parts = [
        f"{args.images} images of {args.size}",
        f"features of {args.width} to {8 * args.width} channels",
        f"{args.matched} matched masks",
        "bf16 autocast" if args.amp else "float32",
    ]
    if args.compile:
        parts.append("ours compiled")
    return f"{', '.join(parts)}; {machine(device)}"


def seconds(variant: Variant, gradients: Logits, device: torch.device, amp: bool) -> float:
    autocast = torch.autocast(device.type, torch.bfloat16) if amp else contextlib.nullcontext()
    with Span(device) as span:
        with autocast:
            logits = variant()
        backward(logits, gradients)
    return span.seconds


def compare(heads: dict[str, Any], variants: dict[str, Variant], gradients: Logits) -> None:
    """In float32: the logits, and the gradients of the two layers furthest from the losses."""
    for expected, actual in zip(variants["transformers"](), variants["ours"](), strict=True):
        assert_close("logits", actual, expected)
    with contextlib.ExitStack() as stack:
        smooth = mock.patch.object(F, "relu", lambda x, inplace=False: F.softplus(x))
        stack.enter_context(smooth)
        for name, variant in variants.items():
            detach_locations(heads[name], stack)
            backward(variant(), gradients)
    first_layers = {
        name: (
            head.pixel_decoder.get_submodule(projections)[0].weight.grad,
            head.predictor.query_feat.weight.grad
            if name == "ours"
            else head.predictor.queries_features.weight.grad,
        )
        for (name, head), projections in zip(
            heads.items(), ("input_projections.0", "input_proj.0"), strict=True
        )
    }
    for expected, actual in zip(first_layers["transformers"], first_layers["ours"], strict=True):
        assert_close("gradients", actual, expected)


def detach_locations(head: nn.Module, stack: contextlib.ExitStack) -> None:
    """Until `stack` is closed, no gradient flows through the sampling locations."""
    for name, module in head.named_modules():
        if name.endswith("sampling_offsets"):
            handle = module.register_forward_hook(lambda *call: call[-1].detach())
            stack.callback(handle.remove)


def assert_close(what: str, actual: Tensor, expected: Tensor) -> None:
    error = (actual - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < TOLERANCE, f"{what} differ by {error}"


if __name__ == "__main__":
    main()
