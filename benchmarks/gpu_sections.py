"""The sections of `gpu.py`: each measures one part of the training or of the evaluation.

A section builds what it measures and frees it, so that the peak memory of the next one is its own.
Implementations alternate (`in_turns`); the weights are random. Convolutions in float32 have torch's
default, which is TF32 on a GPU; matrix products in float32 do not use it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import clouds.modeling  # noqa: F401 - registers what the config names
from clouds.d2 import CfgNode
from clouds.device import autocast
from clouds.modeling.build import build_on_meta
from clouds.ops.deformable_attention import deformable_attention

sys.path.insert(0, str(Path(__file__).parent))
import backbone
import deformable_attention as attention
import floor
import head
import step
import whole_evaluation
from gpu_figures import GIB, Figure, Section
from in_turns import Peak, in_turns, seconds_of, without_tf32
from part_clock import PartClock

PUBLISHED, OURS, OURS_BF16 = "published code", "ours", "ours, bf16"
COMPILED = "ours, bf16, compiled"
FIRST, REPEATED = "joint step, embeddings not cached", "joint step, embeddings cached"
WARMUP, EVALUATION = "step of source pre-training", "evaluation of an image"
PUBLISHED_HEAD = "transformers"


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        device: on which.
        repeats: rounds of each measurement; another one before is dropped.
        clip, sam: models, as in `step.py`.
        size: side of a training crop, pixels.
        source, generated: images of a joint step.
        image: height and width of an evaluated image.
        attention_sizes: sides of the images of deformable attention.
        settings: KEY VALUE of the config.
        out: folder of the results.
    """

    device: torch.device
    repeats: int
    clip: str
    sam: str
    size: int
    source: int
    generated: int
    image: tuple[int, int]
    attention_sizes: tuple[int, ...]
    settings: tuple[str, ...]
    out: Path
    images: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", self.source + self.generated)


Way = Callable[[], object]


def measured(
    ways: Mapping[str, Way], options: Options
) -> dict[str, tuple[tuple[float, ...], float]]:
    """Name -> seconds of the rounds, and peak memory of a round minus that before it, MiB."""
    peaks = {}
    for name, way in ways.items():  # the first call compiles kernels and allocates workspaces
        way()
        with Peak(options.device) as peak:
            way()
        peaks[name] = peak.more
    taken = in_turns(ways, lambda way: seconds_of(way, options.device), options.repeats)
    return {name: (tuple(seconds), peaks[name]) for name, seconds in taken.items()}


def dtype_of(way: str) -> str:
    """The type of a way's matrix products."""
    return "bfloat16" if "bf16" in way else "float32"


def in_dtype(way: str, call: Callable[[], Any], device: torch.device) -> Any:
    """The result of `call` under bf16 autocast if the way's name says so."""
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype_of(way) == "bfloat16"):
        return call()


def in_bf16(cfg: CfgNode) -> CfgNode:
    """A copy of the config with autocast to bf16."""
    half = cfg.clone()
    half.defrost()
    half.SOLVER.AMP.ENABLED, half.SOLVER.AMP.DTYPE = True, "bf16"
    return half


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
    return Section("head", figures=_head_figures(options, compiled=False))


def measure_compiled_head(options: Options) -> Section:
    """The same with torch.compile, whose first call takes minutes."""
    return Section("head, compiled", figures=_head_figures(options, compiled=True))


def _head_figures(options: Options, compiled: bool) -> list[Figure]:
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
    with without_tf32():
        head.compare({PUBLISHED_HEAD: theirs, OURS: ours}, calls, gradients)
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
    return [
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


def head_tflop(module: nn.Module, features: Mapping[str, Tensor]) -> float:
    """TFLOP of the forward pass of a head on the meta device."""
    empty = {name: torch.empty_like(f, device="meta") for name, f in features.items()}
    with torch.no_grad():
        return floor.count(lambda: module(empty))


def measure_backbone(options: Options) -> Section:
    """Forward pass of the frozen backbone."""
    return Section("backbone", figures=_backbone_figures(options, compiled=False))


def measure_compiled_backbone(options: Options) -> Section:
    """The same with torch.compile."""
    return Section("backbone, compiled", figures=_backbone_figures(options, compiled=True))


def _backbone_figures(options: Options, compiled: bool) -> list[Figure]:
    ours, plain = backbone.make(options.clip, options.device)
    images = torch.randn(options.images, 3, options.size, options.size, device=options.device)
    calls: dict[str, Callable[[], Any]] = {
        PUBLISHED: lambda: backbone.published(plain, images),
        OURS: lambda: ours(images),
        OURS_BF16: lambda: ours(images),
    }
    with without_tf32():
        backbone.compare(calls[PUBLISHED](), calls[OURS]())
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
    return [
        Figure(
            "backbone, forward", way, seconds, dtype_of(way), options.images, tflop, peak_mib=peak
        )
        for way, (seconds, peak) in measured(ways, options).items()
    ]


# ------------------------------------------------------------------------- steps


def model_on_meta(options: Options) -> Any:
    """The model of the config of `step.py`, without values."""
    # torch's counter of operations fails in modules whose parameters require a gradient.
    model = build_on_meta(step.config(step_arguments(options), Path()))
    return model.eval().requires_grad_(False)


def step_arguments(options: Options) -> argparse.Namespace:
    """The options of `step.py`."""
    words = ["--clip", options.clip, "--sam", options.sam, "--size", str(options.size)]
    words += ["--source", str(options.source), "--generated", str(options.generated)]
    return step.parse([*words, "--device", str(options.device), *options.settings])


def measure_steps(options: Options) -> Section:
    """A step of source pre-training and a joint step, in float32 and bf16, and losses of both."""
    args = step_arguments(options)
    with tempfile.TemporaryDirectory() as folder:
        cfg = step.config(args, Path(folder))
        parts = step.Parts(args, cfg, options.device)
        steps = Steps(options, cfg, parts)
        notes = steps.losses()
        figures = [*steps.whole("warmup"), *steps.whole("joint"), *steps.by_part()]
        if options.device.type == "cuda":
            profile(lambda: steps.run(OURS_BF16), options.out / "profile_joint_step.txt")
    return Section("training step", figures=figures, notes=notes)


class Steps:
    """Steps of the published code and of ours in float32 and bf16, on the same images.

    Args:
        options: of the run.
        cfg: in float32.
        parts: of `step.py`.
    """

    def __init__(self, options: Options, cfg: CfgNode, parts: step.Parts) -> None:
        self.options, self.parts = options, parts
        self.configs = {OURS: cfg, OURS_BF16: in_bf16(cfg)}
        meta = model_on_meta(options)
        self.tflop = floor.step_parts(meta, options.size, options.source, options.generated)
        self.encoder_tflop = floor.sam_encoder(cfg, options.generated)

    def run(
        self,
        way: str,
        phase: str = "joint",
        cold: bool = False,
        clock: PartClock | None = None,
    ) -> dict[str, float]:
        """One step, with an empty cache of SAM's embeddings if `cold`; returns the losses."""
        clock = clock or PartClock(lambda: None)
        published, ours = self.parts.published, self.parts.ours
        assert published is not None and ours is not None, "step.py was not told --only"
        batch = self.parts.batch(phase)
        if way == PUBLISHED:
            return published(published.loaded(batch), clock)
        cfg = self.configs[way]
        ours.trainer.train_step.autocast = lambda: autocast(cfg, self.options.device)
        if cold:
            return self.parts.with_empty_cache(ours, batch, clock)
        return ours(batch, clock)

    def losses(self) -> dict[str, float]:
        """The total loss of the untrained model on labelled images, in float32 and bf16."""
        assert self.parts.ours is not None
        model, batch = self.parts.ours.trainer.model.train(), self.parts.batch("warmup")
        totals = {}
        for way, cfg in self.configs.items():
            with torch.no_grad(), autocast(cfg, self.options.device):
                totals[way] = float(sum(model(batch).values()))
        difference = abs(totals[OURS_BF16] - totals[OURS]) / totals[OURS]
        return {
            "loss in float32": totals[OURS],
            "loss in bf16": totals[OURS_BF16],
            "relative difference": difference,
        }

    def whole(self, phase: str) -> list[Figure]:
        """Durations of steps."""
        figures = []
        names = {WARMUP: False} if phase == "warmup" else {FIRST: True, REPEATED: False}
        for name, cold in names.items():
            ways: dict[str, Way] = {
                way: lambda way=way, cold=cold: self.run(way, phase, cold)
                for way in (PUBLISHED, OURS, OURS_BF16)
            }
            tflop = self._tflop(phase, cold)
            figures += [
                Figure(name, way, seconds, dtype_of(way), self.options.images, tflop, peak_mib=peak)
                for way, (seconds, peak) in measured(ways, self.options).items()
            ]
        return figures

    def _tflop(self, phase: str, cold: bool) -> float:
        if phase == "joint":
            return sum(self.tflop.values()) + cold * self.encoder_tflop
        # All images are labelled: neither clean views nor a teacher.
        names = ("backbone, student's views", "head, forward", "head, backward")
        return sum(self.tflop[name] for name in names)

    def by_part(self) -> list[Figure]:
        """Parts of a joint step with cached embeddings, with a synchronization after each."""
        device = self.options.device
        taken = in_turns(
            {way: way for way in (PUBLISHED, OURS_BF16)},
            lambda way: (
                step.take(lambda clock: self.run(way, clock=clock), device, profile=True).parts
            ),
            self.options.repeats,
            untimed=1,
        )
        counted = {
            step.BACKBONE: self.tflop["backbone, student's views"]
            + self.tflop["backbone, clean views"],
            step.TEACHER: self.tflop["teacher's head"],
            step.HEAD: self.tflop["head, forward"],
            step.BACKWARD: self.tflop["head, backward"],
        }
        return [
            Figure(
                *(f"joint step: {part}", way, tuple(one[part] for one in rounds), dtype_of(way)),
                tflop=counted.get(part, 0.0),
            )
            for part in step.PARTS
            for way, rounds in taken.items()
        ]


def profile(call: Way, path: Path) -> None:
    """Write the kernels of one call, sorted by the time that they take on the device."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        torch.cuda.synchronize()
    averages = profiler.key_averages()
    path.write_text(averages.table(sort_by="self_device_time_total", row_limit=60))


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
