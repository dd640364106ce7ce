"""Duration of each part of a training step and of an evaluation, and peak memory.

The library's own code is measured: a training step is a call of the trainer's `train_step` on
batches of its loader; an evaluation step is the protocol's `prepare` and `predict` and a confusion
matrix. Parts are delimited by forward hooks, by the optimizer's hooks and by the clipping function
that each step calls.

Each step is measured twice: without profiling, for the duration of the whole, and with profiling,
for the parts. On a GPU, profiling synchronizes at every border between two parts, so the sum of the
parts exceeds the whole by the time that asynchronous execution saves.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from clouds.d2 import CfgNode
from clouds.data.structures import Domain, EvalSample
from clouds.device import autocast
from clouds.engine import Trainer
from clouds.engine.train_loop import TrainStep
from clouds.evaluation import ConfusionMatrix, build_protocol
from clouds.self_training.pseudo_labeler import PseudoLabeler

sys.path.insert(0, str(Path(__file__).parent))
from part_clock import PartClock, PeakMemory, synchronizer

WAIT = "waiting for data"
NETWORK = {
    "backbone": "backbone",
    "pixel decoder": "sem_seg_head.pixel_decoder",
    "mask decoder": "sem_seg_head.predictor",
    "matcher and criterion": "criterion",
}
"""Parts of the model -> names of their modules."""
TEACHER = "teacher"
REFINER = "refiner"
BACKWARD = "backward"
OPTIMIZER = "clipping and optimizer"
PREPARE = "preparing the image"
INPUT = "normalizing and padding"
CLASS_MAP = "scores and class map"
CONFUSION = "confusion matrix"
REST = "everything else"

Progress = Callable[[range, str], Iterable[int]]
"""Iterates over the rounds of a measurement with the given name, and may show the progress."""


def no_progress(rounds: range, name: str) -> Iterable[int]:
    """Show nothing."""
    return rounds


@dataclasses.dataclass(frozen=True)
class Timing:
    """Repeated measurements of a duration, seconds."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "name": self.name,
            "median_s": self.median,
            "min_s": min(self.seconds),
            "max_s": max(self.seconds),
            "all_s": list(self.seconds),
        }


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Results of measuring training steps or evaluations.

    Attributes:
        name: what was measured.
        subject: description of the input.
        images: number per step.
        parts: durations of the parts of the profiled steps; their sum is that of the steps.
        whole: durations of the steps that were not profiled.
        peak_gib: peak memory from the first warm-up step on, see `PeakMemory`.
        on_gpu: `peak_gib` is memory of a GPU; else it is resident memory of the process.
        besides: durations that are not part of a step.
    """

    name: str
    subject: str
    images: int
    parts: tuple[Timing, ...]
    whole: Timing
    peak_gib: float
    on_gpu: bool
    besides: tuple[Timing, ...] = ()

    @property
    def total(self) -> Timing:
        """Sum of the parts of each profiled step."""
        sums = zip(*(part.seconds for part in self.parts), strict=True)
        return Timing("sum of the parts", tuple(map(sum, sums)))

    @property
    def images_per_second(self) -> float:
        """At the median duration of the whole."""
        return self.images / self.whole.median

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {
            "name": self.name,
            "subject": self.subject,
            "images": self.images,
            "parts": [part.to_dict() for part in self.parts],
            "sum_of_parts": self.total.to_dict(),
            "whole": self.whole.to_dict(),
            "sum_over_whole": self.total.median / self.whole.median,
            "images_per_second": self.images_per_second,
            "peak_memory_gib": self.peak_gib,
            "peak_memory_of": "gpu" if self.on_gpu else "process",
            "besides": [timing.to_dict() for timing in self.besides],
        }


def measure_training(
    trainer: Trainer,
    iterations: int,
    warmup: int = 1,
    make_sample: Callable[[], object] | None = None,
    progress: Progress = no_progress,
) -> Measurement:
    """Measure training steps.

    They change the weights; hooks are not called and no files are written.

    Args:
        trainer: after `resume_or_load`, in a single process.
        iterations: measured steps, each once without and once with profiling.
        warmup: steps before them.
        make_sample: creates a training sample in this process, see `sample_maker`.
        progress: shows the progress.

    Raises:
        NonFiniteLossError: a loss or gradient is not finite.
        FileNotFoundError, ValueError: from the data.
    """
    assert iterations > 0 and warmup >= 0
    memory = PeakMemory(trainer.device)
    synchronize = synchronizer(trainer.device)
    assert trainer.batches is not None, "resume_or_load precedes it"
    batches = iter(trainer.batches)
    steps = itertools.count()
    domains: list[Domain] = []
    memory.reset()

    def plain() -> float:
        started = perf_counter()
        batch = next(batches)
        trainer.train_step(next(steps), batch, started)
        synchronize()
        seconds = perf_counter() - started
        domains.extend(sample["domain"] for sample in batch)
        return seconds

    def profiled() -> dict[str, float]:
        clock = PartClock(synchronize)
        with profiled_step(trainer, clock) as train_step, clock.part(REST):
            started = perf_counter()
            with clock.part(WAIT):
                batch = next(batches)
            train_step(next(steps), batch, started)
        return clock.seconds

    for _ in progress(range(warmup), "training, warm-up"):
        plain()
    rounds = [(plain(), profiled()) for _ in progress(range(iterations), "training")]
    peak = memory.gib()
    besides: tuple[Timing, ...] = ()
    if make_sample is not None:
        besides = (time_samples(make_sample, trainer.batch_size * iterations, progress),)
    subject = describe_batch(trainer, domains)
    measured = measurement("training step", subject, trainer.batch_size, rounds, trainer.device)
    return dataclasses.replace(measured, peak_gib=peak, besides=besides)


def measurement(
    name: str,
    subject: str,
    images: int,
    rounds: Sequence[tuple[float, Mapping[str, float]]],
    device: torch.device,
) -> Measurement:
    """Of rounds of seconds without profiling, and seconds by part with it."""
    return Measurement(
        name=name,
        subject=subject,
        images=images,
        parts=by_part([seconds for _, seconds in rounds]),
        whole=Timing("whole, not profiled", tuple(seconds for seconds, _ in rounds)),
        peak_gib=0.0,
        on_gpu=device.type == "cuda",
    )


def describe_batch(trainer: Trainer, domains: Sequence[Domain]) -> str:
    """Size of a batch, share of generated images and size of the crop, as text."""
    height, width = trainer.cfg.INPUT.CROP.SIZE
    share = ""
    if trainer.pseudo_labeler is not None:
        share = f", {domains.count(Domain.GENERATED) / len(domains):.0%} of them generated"
    return f"batch of {trainer.batch_size}{share}, crop {height}x{width}"


@contextmanager
def profiled_step(trainer: Trainer, clock: PartClock) -> Iterator[TrainStep]:
    """The trainer's step, whose parts `clock` measures within the context."""

    def clip() -> Tensor:
        clock.leave()  # the backward pass, which was entered at the end of the forward pass
        with clock.part(OPTIMIZER):
            return trainer.train_step.clip()

    optimizer = trainer.optimizer
    with ExitStack() as stack:
        add_network_hooks(trainer.model, clock, stack)
        if trainer.pseudo_labeler is not None:
            add_pseudo_labeler_hooks(trainer.pseudo_labeler, clock, stack)
        for handle in (
            trainer.model.register_forward_hook(lambda *_: clock.enter(BACKWARD)),
            optimizer.register_step_pre_hook(lambda *_: clock.enter(OPTIMIZER)),
            optimizer.register_step_post_hook(lambda *_: clock.leave()),
        ):
            stack.callback(handle.remove)
        yield dataclasses.replace(trainer.train_step, clip=clip)


def add_network_hooks(
    model: nn.Module, clock: PartClock, stack: ExitStack, parts: Mapping[str, str] = NETWORK
) -> None:
    """Let `clock` measure the model's parts until `stack` is closed.

    A part that the model does not have counts as everything else.

    Args:
        parts: name -> name of the submodule; '' is the model itself.
    """
    modules = dict(model.named_modules())
    for name, path in parts.items():
        if path not in modules:
            continue
        before = modules[path].register_forward_pre_hook(lambda *_, name=name: clock.enter(name))
        after = modules[path].register_forward_hook(lambda *_: clock.leave())
        stack.callback(before.remove)
        stack.callback(after.remove)


def add_pseudo_labeler_hooks(
    pseudo_labeler: PseudoLabeler, clock: PartClock, stack: ExitStack
) -> None:
    """Let `clock` measure the teacher and the refiner until `stack` is closed.

    The backbone's time on clean views counts as the backbone's.
    """
    refine = pseudo_labeler.refine

    def timed(*args: Any, **kwargs: Any) -> Any:
        if clock.current == TEACHER:
            clock.leave()
        with clock.part(REFINER):
            return refine(*args, **kwargs)

    begin = pseudo_labeler.teacher_parts["sem_seg_head"].register_forward_pre_hook(
        lambda *_: clock.enter(TEACHER)
    )
    stack.callback(begin.remove)
    # Not a module with hooks: an attribute of the object hides the method of the class.
    pseudo_labeler.refine = timed
    stack.callback(delattr, pseudo_labeler, "refine")


def by_part(rounds: Sequence[dict[str, float]]) -> tuple[Timing, ...]:
    """Timings of the parts of repeated steps; `REST` is the last."""
    names = [name for name in dict.fromkeys(itertools.chain(*rounds)) if name != REST]
    names += [REST] if REST in rounds[0] else []
    return tuple(Timing(name, tuple(r.get(name, 0.0) for r in rounds)) for name in names)


def time_samples(make: Callable[[], object], count: int, progress: Progress) -> Timing:
    """Time the creation of single samples; the first one is not counted."""
    make()
    seconds = []
    for _ in progress(range(count), "training samples"):
        started = perf_counter()
        make()
        seconds.append(perf_counter() - started)
    return Timing("one sample, in one process", tuple(seconds))


def measure_evaluation(
    cfg: CfgNode,
    model: nn.Module,
    make: Callable[[int], EvalSample],
    iterations: int,
    warmup: int = 1,
    progress: Progress = no_progress,
) -> Measurement:
    """Measure the evaluation of single images, prepared in this process.

    Args:
        cfg: TEST, SOLVER.AMP and MODEL.SEM_SEG_HEAD.NUM_CLASSES are used.
        model: on its device; it is set to evaluation mode.
        make: number of an image -> the sample that the protocol has prepared.
        iterations: measured images, each once without and once with profiling.
        warmup: images before them.
        progress: shows the progress.
    """
    assert iterations > 0 and warmup >= 0
    protocol = build_protocol(cfg)
    device = next(model.parameters()).device
    memory, synchronize = PeakMemory(device), synchronizer(device)
    confusion = ConfusionMatrix(cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
    model.eval()
    memory.reset()
    sizes: list[str] = []

    def one(number: int, clock: PartClock) -> None:
        with clock.part(PREPARE):
            sample = make(number)
        sizes.append(describe_size(sample))
        unlabelled = {key: value for key, value in sample.items() if key != "label"}
        with clock.part(INPUT):
            prediction = protocol.predict(model, unlabelled)
        if "label" in sample:
            with clock.part(CONFUSION):
                confusion.update(prediction, sample["label"])

    def plain(number: int) -> float:
        started = perf_counter()
        one(number, PartClock(lambda: None))
        synchronize()
        return perf_counter() - started

    def profiled(number: int) -> dict[str, float]:
        clock = PartClock(synchronize)
        with profiled_inference(model, clock), clock.part(REST):
            one(number, clock)
        return clock.seconds

    with torch.no_grad(), autocast(cfg, device):
        for number in progress(range(warmup), "evaluation, warm-up"):
            plain(number)
        sizes.clear()
        rounds = [(plain(i), profiled(i)) for i in progress(range(iterations), "evaluation")]
    subject = f"protocol '{cfg.TEST.PROTOCOL}', {describe_sizes(sizes)}"
    measured = measurement("evaluation", subject, 1, rounds, device)
    return dataclasses.replace(measured, peak_gib=memory.gib())


def describe_sizes(sizes: Sequence[str]) -> str:
    """The first size, and how many others there are."""
    others = len(set(sizes)) - 1
    return sizes[0] + (f" and {others} other sizes" if others else "")


def describe_size(sample: EvalSample) -> str:
    """Sizes of the model's input and of its class map, as text."""
    height, width = sample["image"].shape[-2:]
    return f"input {height}x{width} scored at {sample['height']}x{sample['width']}"


@contextmanager
def profiled_inference(model: nn.Module, clock: PartClock) -> Iterator[None]:
    """Let `clock` measure the parts of a prediction; the class map follows the head.

    With sliding windows, the preparation of all windows but the first counts as class map, too.
    """

    def after_head(*_: object) -> None:
        if clock.current == INPUT:
            clock.switch(CLASS_MAP)

    with ExitStack() as stack:
        add_network_hooks(model, clock, stack)
        head = dict(model.named_modules()).get("sem_seg_head")
        if head is not None:
            stack.callback(head.register_forward_hook(after_head).remove)
        yield
