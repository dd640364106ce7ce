#!/usr/bin/env python
"""The head alone, forward and backward: ours beside transformers' Mask2Former, in one run.

    OMP_NUM_THREADS=1 python benchmarks/head.py
    OMP_NUM_THREADS=1 python benchmarks/head.py --images 4 --repeats 3 --amp

Pixel decoder and mask decoder of the published sizes, on the same features of a frozen backbone and
with the same weights; predictions and gradients are compared before anything is timed. A ReLU's
gradient jumps at zero, and that by a sampled place jumps where the place crosses from one pixel to
the next; of millions of both, rounding puts a few on the other side. So gradients are compared with
a smooth function for every ReLU and with the places held fixed (tests/test_deformable_attention.py
has the gradients by places).

As in training, all class logits of the ten predictions get a gradient, and the logits of a few
masks of each, those that are matched (--matched 100: of all). On a CPU the processor's time is
taken, of all threads: what other programs take of it does not count. Needs transformers.
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
from in_turns import Span, in_turns, machine, parser_of, report
from torch import Tensor, nn
from torch.nn import functional as F

import clouds.modeling  # noqa: F401 - registers what the config names
from clouds.config import get_cfg
from clouds.d2 import SEM_SEG_HEADS_REGISTRY, ShapeSpec
from clouds.modeling.transformer_decoder.decoder import Predictions

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
"""Of the root mean square of logits and gradients."""

Logits = list[Tensor]
"""Class logits of every prediction, then the mask logits that losses are taken on."""

Way = Callable[[], Logits]


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    features = made_features(args, device)
    ours = our_head(args).to(device)
    theirs = Theirs(args, ours).to(device)
    queries = torch.arange(args.matched, device=device)
    heads = {"transformers": theirs, "ours": ours}
    ways: dict[str, Way] = {
        "transformers": lambda: theirs(features, queries),
        "ours": lambda: chosen(ours(features), queries),
    }
    gradients = [torch.randn_like(logits) / logits.numel() for logits in ways["ours"]()]
    compare(heads, ways, gradients)
    if args.compile:
        ours.compile()

    def step(way: Way) -> float:
        for head in heads.values():
            head.zero_grad()
        return seconds(way, gradients, device, args.amp)

    times = in_turns(ways, step, args.repeats, untimed=1)  # which compiles both passes
    print(subject(args, device))
    print(report(times))


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--images", type=int, default=2)
    add("--size", type=int, default=384, help="of an image, a multiple of 32")
    add("--width", type=int, default=128, help="channels of res2: 128 base")
    add("--repeats", type=int, default=5)
    add("--device", default="cpu")
    add("--amp", action="store_true", help="under bf16 autocast")
    add("--matched", type=int, default=10, help="masks of an image with a loss")
    add("--compile", action="store_true", help="ours with torch.compile")
    return parser.parse_args()


def made_features(args: argparse.Namespace, device: torch.device) -> dict[str, Tensor]:
    """Noise, laid out in memory as a ConvNeXt's features are."""
    torch.manual_seed(SEED)
    return {
        name: torch.randn(
            args.images, args.size // stride, args.size // stride, args.width * stride // 4
        )
        .to(device)
        .permute(0, 3, 1, 2)
        for name, stride in STRIDES.items()
    }


def our_head(args: argparse.Namespace) -> Any:
    shapes = {
        name: ShapeSpec(channels=args.width * stride // 4, stride=stride)
        for name, stride in STRIDES.items()
    }
    cfg = get_cfg()
    return randomize(SEM_SEG_HEADS_REGISTRY.get(cfg.MODEL.SEM_SEG_HEAD.NAME)(cfg, shapes, 640))


class Theirs(nn.Module):
    """transformers' pixel decoder, transformer module and class predictor, with our weights."""

    def __init__(self, args: argparse.Namespace, ours: Any) -> None:
        super().__init__()
        config = mask2former_config()
        widths = [args.width * stride // 4 for stride in STRIDES.values()]
        self.pixel_decoder: Any = mask2former().Mask2FormerPixelDecoder(config, widths)
        self.predictor: Any = mask2former().Mask2FormerTransformerModule(256, config)
        self.class_embed = copy.deepcopy(ours.predictor.class_embed)
        weights = pixel_decoder_weights(ours.pixel_decoder.state_dict())
        self.pixel_decoder.load_state_dict(weights)
        self.predictor.load_state_dict(mask_decoder_weights(ours.predictor.state_dict()))
        for module in self.modules():  # some keep the function; `compare` puts another in its place
            if getattr(module, "activation_fn", None) is F.relu:
                module.activation_fn = lambda x: F.relu(x)

    def forward(self, features: dict[str, Tensor], queries: Tensor) -> Logits:
        pixel = self.pixel_decoder(list(features.values()), return_dict=True)
        out = self.predictor(pixel.multi_scale_features, pixel.mask_features)
        classes = [self.class_embed(s.transpose(0, 1)) for s in out.intermediate_hidden_states]
        return classes + [masks.index_select(1, queries) for masks in out.masks_queries_logits]


def chosen(predictions: Predictions, queries: Tensor) -> Logits:
    layers, images = len(predictions.class_logits), len(predictions.class_logits[0])
    index = queries.expand(layers, -1)
    masks = predictions.chosen_masks(range(layers), [index] * images)
    return predictions.class_logits + list(torch.stack(masks, dim=1))


def backward(logits: Logits, gradients: Logits) -> None:
    torch.autograd.backward(logits, [g.to(x.dtype) for x, g in zip(logits, gradients, strict=True)])


def subject(args: argparse.Namespace, device: torch.device) -> str:
    """What was measured, in a line."""
    words = [
        f"{args.images} images of {args.size}",
        f"features of {args.width} to {8 * args.width} channels",
        f"{args.matched} matched masks",
        "bf16 autocast" if args.amp else "float32",
    ]
    if args.compile:
        words.append("ours compiled")
    return f"{', '.join(words)}; {machine(device)}"


def seconds(way: Way, gradients: Logits, device: torch.device, amp: bool) -> float:
    autocast = torch.autocast(device.type, torch.bfloat16) if amp else contextlib.nullcontext()
    with Span(device) as span:
        with autocast:
            logits = way()
        backward(logits, gradients)
    return span.seconds


def compare(heads: dict[str, Any], ways: dict[str, Way], gradients: Logits) -> None:
    """In float32: the logits, and the gradients of two layers at the far end of the way back."""
    for expected, got in zip(ways["transformers"](), ways["ours"](), strict=True):
        close("logits", got, expected)
    with contextlib.ExitStack() as stack:
        smooth = mock.patch.object(F, "relu", lambda x, inplace=False: F.softplus(x))
        stack.enter_context(smooth)
        for name, way in ways.items():
            hold_places(heads[name], stack)
            backward(way(), gradients)
    reached = {
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
    for expected, got in zip(reached["transformers"], reached["ours"], strict=True):
        close("gradients", got, expected)


def hold_places(head: nn.Module, stack: contextlib.ExitStack) -> None:
    """Until `stack` is closed, no gradient flows through the places that attention samples."""
    for name, module in head.named_modules():
        if name.endswith("sampling_offsets"):
            handle = module.register_forward_hook(lambda *call: call[-1].detach())
            stack.callback(handle.remove)


def close(what: str, got: Tensor, expected: Tensor) -> None:
    error = (got - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < TOLERANCE, f"{what} differ by {error}"


if __name__ == "__main__":
    main()
