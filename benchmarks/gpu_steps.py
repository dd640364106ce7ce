"""The steps of `gpu.py`: source pre-training and joint training, whole and by part."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from clouds.d2 import CfgNode
from clouds.device import autocast

sys.path.insert(0, str(Path(__file__).parent))
import floor
import step
from gpu_common import (
    OURS,
    OURS_BF16,
    PUBLISHED,
    Options,
    Way,
    dtype_of,
    in_bf16,
    measured,
    model_on_meta,
    step_arguments,
)
from gpu_figures import Figure, Section
from in_turns import in_turns
from part_clock import PartClock

FIRST, REPEATED = "joint step, embeddings not cached", "joint step, embeddings cached"
WARMUP = "step of source pre-training"


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
