"""How long each part of a training step and of an evaluation takes, and how much memory it needs.

Nothing is done again here that the library does: a training step is one call of the trainer's own
`Iteration` on batches of its own loader, an evaluation step is the protocol's `prepare` and
`predict` and a confusion matrix. Parts are told apart by forward hooks, by the optimizer's hooks
and by the clipping function that every step calls.

Each measured step is done twice: as it is, which gives the duration of the whole, and probed,
which gives the parts. On a GPU the probed one waits at every border between two parts, so there
the sum of the parts exceeds the whole by what a GPU gains from being fed ahead.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from clouds.d2 import CfgNode
from clouds.data.build import build_train_loader
from clouds.data.dataset_mapper import to_tensor
from clouds.data.datasets import generated
from clouds.data.label_space import CITYSCAPES_19, IGNORE
from clouds.data.structures import Domain, EvalSample, TrainInput, TrainSample
from clouds.device import autocast
from clouds.engine.metrics import memory_gib
from clouds.engine.train_loop import Batch
from clouds.engine.trainer import Trainer

if TYPE_CHECKING:
    from clouds.self_training.pseudo_labeler import SelfTraining

logger = logging.getLogger(__name__)

UInt8Array = npt.NDArray[np.uint8]

RESET_PEAK = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")

WAIT = "waiting for data"
NETWORK = {
    "backbone": "backbone",
    "pixel decoder": "sem_seg_head.pixel_decoder",
    "mask decoder": "sem_seg_head.predictor",
    "matcher and criterion": "criterion",
}
"""Parts of the model, and where in it they are."""
TEACHER = "teacher"
REFINER = "refiner"
BACKWARD = "backward"
OPTIMIZER = "clipping and optimizer"
PREPARE = "preparing the image"
INPUT = "normalizing and padding"
CLASS_MAP = "scores and class map"
CONFUSION = "confusion matrix"
REST = "everything else"

RANDOM_CLASSES = 12
"""Classes in a random label: about as many as in a training crop of a street scene."""
RANDOM_BLOCKS = 8
"""Blocks along the shorter side of a random picture."""

Progress = Callable[[range, str], Iterable[int]]
"""Goes over the rounds of a measurement that has the given name, and may show how far it is."""


def no_progress(rounds: range, name: str) -> Iterable[int]:
    """Shows nothing."""
    return rounds


class PartClock:
    """Gives every moment in which a part is open to exactly one part: the innermost open one.

    Args:
        synchronize: waits until what was started before has been computed.
        now: seconds from anywhere.

    Attributes:
        seconds: time of each part so far, in the order in which the parts were first open.
    """

    def __init__(
        self, synchronize: Callable[[], None], now: Callable[[], float] = perf_counter
    ) -> None:
        self.synchronize = synchronize
        self.now = now
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @property
    def current(self) -> str | None:
        """The innermost open part."""
        return self._open[-1] if self._open else None

    def enter(self, name: str) -> None:
        """Open a part inside of the current one."""
        self._account()
        self._open.append(name)
        self.seconds.setdefault(name, 0.0)

    def leave(self) -> None:
        """Close the current part."""
        self._account()
        self._open.pop()

    def switch(self, name: str) -> None:
        """Close the current part and open another in its place."""
        self.leave()
        self.enter(name)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is done inside belongs to the part."""
        self.enter(name)
        yield
        self.leave()

    def _account(self) -> None:
        self.synchronize()
        now = self.now()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


class PeakMemory:
    """Peak memory of this process since `restart`: allocated by torch on a GPU, else resident.

    Only Linux lets a process count its resident memory anew. Elsewhere, and where that is not
    permitted, which is logged, the peak is that since the process began.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def restart(self) -> None:
        """Forget the peak so far. On Linux the peak that `getrusage` tells is forgotten too."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            RESET_PEAK.write_text("5")  # man 5 proc: the peak becomes the present value
        except OSError as error:
            logger.warning("peak memory is that since the process began: %s", error)

    def gib(self) -> float:
        """The peak in GiB."""
        if self.device.type != "cuda" and STATUS.exists():
            # Not getrusage: a process that was just started has its parent's peak there.
            for line in STATUS.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 2**20
        return memory_gib(self.device)


def synchronizer(device: torch.device) -> Callable[[], None]:
    """What waits until everything given to `device` has been computed."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


@dataclasses.dataclass(frozen=True)
class Timing:
    """Durations of the same thing, measured several times, in seconds."""

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
    """What became of measuring one kind of step.

    Attributes:
        name: of the kind.
        subject: what was done to how large a thing, in words.
        images: of a step.
        parts: of the probed steps, without overlap and without gaps.
        whole: the steps that were not probed.
        peak_gib: peak memory from the first warm-up step on, see `PeakMemory`.
        on_gpu: that it is a GPU's, else the process's resident memory.
        besides: durations that are no part of a step.
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
        """Sum of the parts, of each probed step."""
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
    per_sample: Callable[[], object] | None = None,
    progress: Progress = no_progress,
) -> Measurement:
    """Measure training steps.

    The weights change, as in training; hooks do not run and nothing is written.

    Args:
        trainer: prepared, of a single process.
        iterations: steps measured, each once as it is and once probed.
        warmup: steps before them.
        per_sample: makes one training sample in this process, see `sample_maker`.
        progress: shows how far it is.

    Raises:
        Diverged: a loss or gradient is not finite.
        FileNotFoundError, ValueError: from the data.
    """
    assert iterations > 0 and warmup >= 0
    memory = PeakMemory(trainer.device)
    synchronize = synchronizer(trainer.device)
    assert trainer.batches is not None, "the trainer is to be prepared"
    batches = iter(trainer.batches)
    steps = itertools.count()
    domains: list[Domain] = []
    memory.restart()

    def plain() -> float:
        started = perf_counter()
        batch = next(batches)
        trainer.iteration(next(steps), batch, started)
        synchronize()
        seconds = perf_counter() - started
        domains.extend(sample["domain"] for sample in batch)
        return seconds

    def probed() -> dict[str, float]:
        clock = PartClock(synchronize)
        with probes(trainer, clock) as iteration, clock.part(REST):
            started = perf_counter()
            with clock.part(WAIT):
                batch = next(batches)
            iteration(next(steps), batch, started)
        return clock.seconds

    for _ in progress(range(warmup), "training, warm-up"):
        plain()
    rounds = [(plain(), probed()) for _ in progress(range(iterations), "training")]
    peak = memory.gib()
    besides: tuple[Timing, ...] = ()
    if per_sample is not None:
        besides = (time_samples(per_sample, trainer.batch_size * iterations, progress),)
    height, width = trainer.cfg.INPUT.CROP.SIZE
    share = ""
    if trainer.self_training is not None:
        share = f", {domains.count(Domain.GENERATED) / len(domains):.0%} of them generated"
    return Measurement(
        name="training step",
        subject=f"batch of {trainer.batch_size}{share}, crop {height}x{width}",
        images=trainer.batch_size,
        parts=by_part([seconds for _, seconds in rounds]),
        whole=Timing("whole step, not probed", tuple(seconds for seconds, _ in rounds)),
        peak_gib=peak,
        on_gpu=trainer.device.type == "cuda",
        besides=besides,
    )


@contextmanager
def probes(trainer: Trainer, clock: PartClock) -> Iterator[Callable[[int, Batch, float], Any]]:
    """The trainer's iteration, which tells `clock` of its parts while the context is open."""

    def clip() -> Tensor:
        clock.leave()  # of the backward pass, which began at the end of the forward pass
        with clock.part(OPTIMIZER):
            return trainer.iteration.clip()

    optimizer = trainer.optimizer
    with ExitStack() as stack:
        probe_network(trainer.model, clock, stack)
        if trainer.self_training is not None:
            probe_teaching(trainer.self_training, clock, stack)
        for handle in (
            trainer.model.register_forward_hook(lambda *_: clock.enter(BACKWARD)),
            optimizer.register_step_pre_hook(lambda *_: clock.enter(OPTIMIZER)),
            optimizer.register_step_post_hook(lambda *_: clock.leave()),
        ):
            stack.callback(handle.remove)
        yield dataclasses.replace(trainer.iteration, clip=clip)


def probe_network(
    model: nn.Module, clock: PartClock, stack: ExitStack, parts: Mapping[str, str] = NETWORK
) -> None:
    """Tell `clock` when the model's parts begin and end, until `stack` is closed.

    A part that the model does not have counts as everything else.

    Args:
        parts: name -> where in the model it is; '' is the model itself.
    """
    modules = dict(model.named_modules())
    for name, path in parts.items():
        if path not in modules:
            continue
        before = modules[path].register_forward_pre_hook(lambda *_, name=name: clock.enter(name))
        after = modules[path].register_forward_hook(lambda *_: clock.leave())
        stack.callback(before.remove)
        stack.callback(after.remove)


def probe_teaching(teaching: SelfTraining, clock: PartClock, stack: ExitStack) -> None:
    """Tell `clock` when the teacher labels and when its labels are refined.

    The clean views' share of the backbone counts as the backbone's.
    """
    refine = teaching.refine

    def timed(*args: Any, **kwargs: Any) -> Any:
        if clock.current == TEACHER:
            clock.leave()
        with clock.part(REFINER):
            return refine(*args, **kwargs)

    begin = teaching.teacher.head.register_forward_pre_hook(lambda *_: clock.enter(TEACHER))
    stack.callback(begin.remove)
    # It is no module that has hooks; what is set on the object goes before the class's method.
    setattr(teaching, "refine", timed)  # noqa: B010 - mypy refuses the plain assignment
    stack.callback(delattr, teaching, "refine")


def by_part(rounds: Sequence[dict[str, float]]) -> tuple[Timing, ...]:
    """Parts of the same step, measured several times; what is left over comes last."""
    names = [name for name in dict.fromkeys(itertools.chain(*rounds)) if name != REST]
    names += [REST] if REST in rounds[0] else []
    return tuple(Timing(name, tuple(r.get(name, 0.0) for r in rounds)) for name in names)


def sample_maker(cfg: CfgNode) -> Callable[[], object]:
    """Makes the next training sample in this process, without workers.

    Raises:
        FileNotFoundError, ValueError: as `build_train_loader`.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 1
    samples = iter(build_train_loader(cfg))
    return lambda: next(samples)


def time_samples(make: Callable[[], object], count: int, progress: Progress) -> Timing:
    """Time the making of single samples; the first one is not counted."""
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
        cfg: TEST and SOLVER.AMP count.
        model: on its device; it is put into evaluation mode.
        make: number of an image -> the sample that the protocol has prepared.
        iterations: images measured, each once as it is and once probed.
        warmup: images before them.
        progress: shows how far it is.
    """
    from clouds.evaluation import ConfusionMatrix, build_protocol

    assert iterations > 0 and warmup >= 0
    protocol = build_protocol(cfg)
    device = next(model.parameters()).device
    memory, synchronize = PeakMemory(device), synchronizer(device)
    confusion = ConfusionMatrix(CITYSCAPES_19.num_classes)
    model.eval()
    memory.restart()
    sizes: list[str] = []

    def one(number: int, clock: PartClock) -> None:
        with clock.part(PREPARE):
            sample = make(number)
        sizes.append(size_in_words(sample))
        seen = {key: value for key, value in sample.items() if key != "label"}
        with clock.part(INPUT):
            prediction = protocol.predict(model, seen)  # type: ignore[arg-type]
        if "label" in sample:
            with clock.part(CONFUSION):
                confusion.update(prediction, sample["label"])

    def plain(number: int) -> float:
        started = perf_counter()
        one(number, PartClock(lambda: None))
        synchronize()
        return perf_counter() - started

    def probed(number: int) -> dict[str, float]:
        clock = PartClock(synchronize)
        with probed_inference(model, clock), clock.part(REST):
            one(number, clock)
        return clock.seconds

    with torch.no_grad(), autocast(cfg, device):
        for number in progress(range(warmup), "evaluation, warm-up"):
            plain(number)
        sizes.clear()
        rounds = [(plain(i), probed(i)) for i in progress(range(iterations), "evaluation")]
    return Measurement(
        name="evaluation",
        subject=f"protocol '{cfg.TEST.PROTOCOL}', {sizes[0]}"
        + (f" and {len(set(sizes)) - 1} other sizes" if len(set(sizes)) > 1 else ""),
        images=1,
        parts=by_part([seconds for _, seconds in rounds]),
        whole=Timing("whole image, not probed", tuple(seconds for seconds, _ in rounds)),
        peak_gib=memory.gib(),
        on_gpu=device.type == "cuda",
    )


def size_in_words(sample: EvalSample) -> str:
    """Sizes of the model's input and of its class map."""
    height, width = sample["image"].shape[-2:]
    return f"input {height}x{width} scored at {sample['height']}x{sample['width']}"


@contextmanager
def probed_inference(model: nn.Module, clock: PartClock) -> Iterator[None]:
    """Tell `clock` of the parts of a prediction: what follows the head is the class map.

    Of an image that goes through the model in windows, preparing the second window and those after
    it counts there too.
    """

    def after_head(*_: object) -> None:
        if clock.current == INPUT:
            clock.switch(CLASS_MAP)

    with ExitStack() as stack:
        probe_network(model, clock, stack)
        head = dict(model.named_modules()).get("sem_seg_head")
        if head is not None:
            stack.callback(head.register_forward_hook(after_head).remove)
        yield


def random_picture(size: tuple[int, int], seed: int) -> tuple[UInt8Array, UInt8Array]:
    """A random image (H, W, 3) and a label (H, W) of blocks, RANDOM_CLASSES classes and ignore."""
    rng = np.random.default_rng(seed)
    height, width = size
    side = max(1, min(size) // RANDOM_BLOCKS)
    classes = rng.choice(CITYSCAPES_19.num_classes, RANDOM_CLASSES, replace=False)
    grid = rng.choice([*classes, IGNORE], (-(-height // side), -(-width // side)))
    label = grid.astype(np.uint8).repeat(side, 0).repeat(side, 1)[:height, :width]
    coarse = rng.integers(0, 256, (*grid.shape, 3), np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(image, np.uint8), np.ascontiguousarray(label)


def random_sample(size: tuple[int, int], seed: int, domain: Domain) -> TrainSample:
    """A training sample of a random picture of this size, of SOURCE or GENERATED."""
    image, label = random_picture(size, seed)
    common: TrainInput = {
        "image": to_tensor(image),
        "height": size[0],
        "width": size[1],
        "file_name": f"(random picture {seed})",
        "domain": domain,
        "dataset": "random",
        "seed": seed,
    }
    if domain is Domain.GENERATED:
        return {**common, "clean_image": to_tensor(image), "flipped": False}
    return {**common, "sem_seg": to_tensor(label)}


def random_batches(cfg: CfgNode, distinct: int = 2) -> Callable[[int], Iterable[list[TrainSample]]]:
    """A `Loader` of random pictures of INPUT.CROP.SIZE, in memory, `distinct` batches in turn.

    Where DATASETS.TRAIN has generated datasets, half of each batch (rounded down) is generated.
    """
    height, width = cfg.INPUT.CROP.SIZE
    share = cfg.SOLVER.IMS_PER_BATCH
    sources = share - share // 2 if generated(cfg.DATASETS.TRAIN) else share
    domains = [Domain.SOURCE] * sources + [Domain.GENERATED] * (share - sources)
    batches = [
        [
            random_sample((int(height), int(width)), i * share + k, domain)
            for k, domain in enumerate(domains)
        ]
        for i in range(distinct)
    ]
    return lambda start: itertools.islice(itertools.cycle(batches), start % distinct, None)


def random_images(cfg: CfgNode, size: tuple[int, int]) -> Callable[[int], EvalSample]:
    """Number -> evaluation sample of a random picture of `size`, as TEST.PROTOCOL prepares it."""
    from clouds.evaluation import build_protocol

    protocol = build_protocol(cfg)
    image, label = random_picture(size, 0)

    def make(number: int) -> EvalSample:
        fed, scored = protocol.prepare(image, label, "random")
        assert scored is not None, "a label stays a label"
        return {
            "image": to_tensor(fed),
            "height": scored.shape[0],
            "width": scored.shape[1],
            "file_name": "(random picture)",
            "domain": Domain.TARGET,
            "dataset": "random",
            "label": to_tensor(scored),
        }

    return make


def dataset_images(cfg: CfgNode, name: str) -> Callable[[int], EvalSample]:
    """Number -> evaluation sample of a dataset, read from disk; starts anew after the last one.

    Raises:
        FileNotFoundError, ValueError: as `DatasetSpec.records`.
    """
    from clouds.data.dataset_mapper import EvaluationMapper
    from clouds.data.datasets import get_dataset
    from clouds.evaluation import build_protocol

    records = get_dataset(name).records()
    mapper = EvaluationMapper(build_protocol(cfg).prepare)
    return lambda number: mapper(records[number % len(records)])
