"""The sections of `gpu.py`: each measures one part of the training or of the evaluation.

A section builds what it measures and frees it, so that the peak memory of the next one is its own.
Implementations alternate (`in_turns`); the weights are random. Convolutions in float32 have torch's
default, which is TF32 on a GPU; matrix products in float32 do not use it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clouds.ops.deformable_attention import deformable_attention

sys.path.insert(0, str(Path(__file__).parent))
import backbone
import deformable_attention as attention
import floor
import head
import step
import whole_evaluation
from gpu_common import (
    OURS,
    OURS_BF16,
    PUBLISHED,
    Options,
    Way,
    dtype_of,
    in_bf16,
    in_dtype,
    measured,
    model_on_meta,
    step_arguments,
)
from gpu_figures import GIB, Figure, Section
from gpu_steps import measure_steps
from in_turns import without_tf32
from part_clock import PartClock

COMPILED = "ours, bf16, compiled"
EVALUATION = "evaluation of an image"
PUBLISHED_HEAD = "transformers"


# ------------------------------------------------------------- deformable attention


def measure_attention(options: Options) -> Section:
    """Six layers, forward and backward, of all images of a step."""
    figures = []
    for size in options.attention_sizes:
        for dtype in ("float32", "bfloat16"):
            inputs = attention.make_layers(
                argparse.Namespace(
                    size=size,
                    batch=options.images,
                    layers=6,
                    spread=2.0,
                    device=str(options.device),
                    dtype=dtype,
                )
            )
            ways: dict[str, Way] = {
                name: lambda call=call, inputs=inputs: attention.run(call, *inputs)
                for name, call in (
                    ("grid_sample", attention.grid_sample_attention),
                    (OURS, deformable_attention),
                )
            }
            traffic = attention_traffic(*inputs) / GIB
            for way, (seconds, peak) in measured(ways, options).items():
                name = f"{size}x{size}, {dtype}"
                figures.append(
                    Figure(
                        *(name, way, seconds, dtype, options.images),
                        traffic_gib=traffic,
                        peak_mib=peak,
                    )
                )
            del inputs, ways
    return Section("deformable attention", figures=figures)


def attention_traffic(
    sizes: Sequence[tuple[int, int]], layers: Sequence[Sequence[Tensor]], gradient: Tensor
) -> int:
    """Bytes read and written at least: forward each input and the output once; backward each input,
    the gradient of the output, and the gradients of the inputs.
    """
    inputs = sum(tensor.nbytes for layer in layers for tensor in layer)
    return 3 * inputs + 2 * len(layers) * gradient.nbytes


# ---------------------------------------------------------------- head and backbone


def measure_head(options: Options) -> Section:
    """Forward and backward of pixel decoder and mask decoder, against transformers'."""
    return _head_section("head", options, compiled=False)


def measure_compiled_head(options: Options) -> Section:
    """The same with torch.compile, whose first call takes minutes."""
    return _head_section("head, compiled", options, compiled=True)


def _head_section(name: str, options: Options, compiled: bool) -> Section:
    args = argparse.Namespace(images=options.images, size=options.size, width=192)
    cfg = step.config(step_arguments(options), Path())
    features = head.make_features(args, options.device)
    ours = head.our_head(args, cfg).to(options.device)
    theirs = head.Theirs(args, ours, cfg).to(options.device)
    queries = torch.arange(10, device=options.device)

    def our_logits() -> list[Tensor]:
        return head.matched_logits(ours(features), queries)

    gradients = [torch.randn_like(logits) / logits.numel() for logits in our_logits()]
    calls = {PUBLISHED_HEAD: lambda: theirs(features, queries), OURS: our_logits}
    notes = comparison(lambda: head.compare({PUBLISHED_HEAD: theirs, OURS: ours}, calls, gradients))
    calls[OURS_BF16] = our_logits
    if compiled:
        ours.compile()
        calls = {PUBLISHED_HEAD: calls[PUBLISHED_HEAD], COMPILED: our_logits}

    def both_passes(way: str, call: Callable[[], list[Tensor]]) -> None:
        for module in (ours, theirs):
            module.zero_grad()
        head.backward(in_dtype(way, call, options.device), gradients)

    ways: dict[str, Way] = {
        w: lambda w=w, call=call: both_passes(w, call) for w, call in calls.items()
    }
    tflop = 3 * head_tflop(head.our_head(args, cfg).to("meta").requires_grad_(False), features)
    figures = [
        Figure(
            "head, forward and backward",
            way,
            seconds,
            dtype_of(way),
            options.images,
            tflop,
            peak_mib=peak,
        )
        for way, (seconds, peak) in measured(ways, options).items()
    ]
    return Section(name, figures=figures, notes=notes)


def comparison(compare: Callable[[], None]) -> dict[str, str]:
    """A note whether the results of both implementations agree in float32."""
    try:
        with without_tf32():
            compare()
    except AssertionError as error:
        return {"results in float32": f"DIFFER: {error}"}
    return {"results in float32": "agree"}


def head_tflop(module: nn.Module, features: Mapping[str, Tensor]) -> float:
    """TFLOP of the forward pass of a head on the meta device."""
    empty = {name: torch.empty_like(f, device="meta") for name, f in features.items()}
    with torch.no_grad():
        return floor.count(lambda: module(empty))


def measure_backbone(options: Options) -> Section:
    """Forward pass of the frozen backbone."""
    return _backbone_section("backbone", options, compiled=False)


def measure_compiled_backbone(options: Options) -> Section:
    """The same with torch.compile."""
    return _backbone_section("backbone, compiled", options, compiled=True)


def _backbone_section(name: str, options: Options, compiled: bool) -> Section:
    ours, plain = backbone.make(options.clip, options.device)
    images = torch.randn(options.images, 3, options.size, options.size, device=options.device)
    calls: dict[str, Callable[[], Any]] = {
        PUBLISHED: lambda: backbone.published(plain, images),
        OURS: lambda: ours(images),
        OURS_BF16: lambda: ours(images),
    }
    notes = comparison(lambda: backbone.compare(calls[PUBLISHED](), calls[OURS]()))
    if compiled:
        module = torch.compile(ours)
        calls = {PUBLISHED: calls[PUBLISHED], COMPILED: lambda: module(images)}
    ways: dict[str, Way] = {
        way: lambda way=way, call=call: in_dtype(way, call, options.device)
        for way, call in calls.items()
    }
    on_meta = model_on_meta(options)
    with torch.no_grad():
        tflop = floor.count(lambda: on_meta.backbone(images.to("meta")))
    figures = [
        Figure(
            "backbone, forward", way, seconds, dtype_of(way), options.images, tflop, peak_mib=peak
        )
        for way, (seconds, peak) in measured(ways, options).items()
    ]
    return Section(name, figures=figures, notes=notes)


# -------------------------------------------------------------------- evaluation


def measure_evaluation(options: Options) -> Section:
    """From the pixels of an image to the counts of its classes."""
    words = ["--clip", options.clip, "--device", str(options.device)]
    words += ["--image", *map(str, options.image)]
    args = whole_evaluation.parse([*words, *options.settings])
    sample, both = whole_evaluation.build(args)
    ours: Any = both[whole_evaluation.OURS]
    evaluations = {
        PUBLISHED: both[whole_evaluation.PUBLISHED],
        OURS: ours,
        OURS_BF16: whole_evaluation.OurEvaluation(in_bf16(ours.cfg), ours.model),
    }
    maps = {way: call(sample, PartClock(lambda: None))[0] for way, call in evaluations.items()}
    notes = {
        f"pixels of the same class as in the published code, {way}": float(
            (maps[way].cpu() == maps[PUBLISHED].cpu()).double().mean()
        )
        for way in (OURS, OURS_BF16)
    }
    ways: dict[str, Way] = {
        way: lambda call=call: call(sample, PartClock(lambda: None))
        for way, call in evaluations.items()
    }
    meta = model_on_meta(options)
    image = torch.empty(1, 3, *options.image, device="meta")
    with torch.no_grad():
        tflop = floor.count(lambda: meta.sem_seg_head(meta.backbone(image)))
    figures = [
        Figure(EVALUATION, way, seconds, dtype_of(way), 1, tflop, peak_mib=peak)
        for way, (seconds, peak) in measured(ways, options).items()
    ]
    return Section("evaluation", figures=figures, notes=notes)


SECTIONS: dict[str, Callable[[Options], Section]] = {
    "deformable attention": measure_attention,
    "training step": measure_steps,
    "evaluation": measure_evaluation,
    "head": measure_head,
    "backbone": measure_backbone,
    "backbone, compiled": measure_compiled_backbone,
    "head, compiled": measure_compiled_head,
}
"""In the order of a run: those with goals first, those that compile last."""
