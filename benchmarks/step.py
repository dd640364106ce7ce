#!/usr/bin/env python
"""A step of source pre-training and a joint step: the published implementation and ours.

    OMP_NUM_THREADS=1 python benchmarks/step.py
    OMP_NUM_THREADS=1 python benchmarks/step.py --clip clouds_tiny --sam tiny --size 128
    python benchmarks/step.py --clip convnext_large_d_320 --sam vit_h --size 768 --source 4 \
        --generated 4 --device cuda --dtype bfloat16 --repeats 10

The published implementation (`published_step.py`) is composed of open_clip, transformers'
Mask2Former and segment_anything in float32. Ours is the trainer's step. A step of source
pre-training (phase "warmup") has labelled images only. Of the joint step, "cold" is ours when a
generated image is used for the first time, "warm" later, when SAM's embedding is in the cache. Both
implementations start from the same weights and get the same batch; the printed losses differ, since
they are computed at random points.

Weights are random, which does not change durations, but a random teacher predicts one region. So
both compute the teacher's label, and refine the rendered one instead, which has about as many
components as a street scene (--teacher-label teacher: the teacher's).

On a CPU, ratios are those of processor time, which other processes do not affect. --only measures
one implementation, for its memory. Further settings of the model follow as KEY VALUE.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from street_renderer import get_style, render
from street_renderer.generated_style import draw_style
from tabulate import tabulate
from torch import Tensor

import clouds.modeling  # noqa: F401 - registers what the config names
from clouds.config import get_cfg
from clouds.d2 import CfgNode
from clouds.data.augmentation import SSDColorJitter
from clouds.data.dataset_mapper import to_tensor
from clouds.data.label_space import IGNORE
from clouds.data.structures import Domain
from clouds.engine import Trainer
from clouds.modeling.build import build_seeded
from clouds.self_training.ema import EMATeacher
from clouds.self_training.pseudo_labeler import PseudoLabeler, PseudoLabelOptions
from clouds.self_training.refiners.base import PseudoLabel, RefinedLabel
from clouds.self_training.refiners.sam.backends import cached_embedder
from clouds.self_training.refiners.sam.model import build_sam
from clouds.self_training.refiners.sam.predictor import PointPredictor
from clouds.self_training.refiners.sam.prompts import find_components
from clouds.self_training.refiners.sam.refiner import SamOptions, SamRefiner

sys.path.insert(0, str(Path(__file__).parent))
from in_turns import Peak, Span, in_turns, machine, parser_of, silence_all_but_peaks
from part_clock import PartClock, synchronizer
from profiler import BACKWARD, OPTIMIZER, REFINER, REST, TEACHER, profiled_step
from published_step import BACKBONE, HEAD, LOSSES, Labels, PublishedStep, Sample

PARTS = (BACKBONE, TEACHER, REFINER, HEAD, LOSSES, BACKWARD, OPTIMIZER, REST)
SAME = {"pixel decoder": HEAD, "mask decoder": HEAD, "matcher and criterion": LOSSES}
"""Names of parts in `profiler` -> names in this script, where they differ."""
PUBLISHED, OURS, COLD, WARM = "published", "ours", "ours, cold", "ours, warm"
COMPONENTS = 15
"""Components of a rendered label of the batch; the nearest of CANDIDATES images are taken."""
CANDIDATES = 24

StepFunction = Callable[[PartClock], dict[str, float]]


def main(words: Sequence[str] | None = None) -> None:
    args = parse(words)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        cfg = config(args, Path(folder))
        parts = Parts(args, cfg, device)
        for phase in ("warmup", "joint") if args.phase == "both" else (args.phase,):
            ways = parts.ways(phase)
            untimed, args.untimed = args.untimed, 0  # those of the first phase are enough
            taken = measure(ways, untimed, args.repeats, device)
            print(subject(args, phase, parts))
            report(taken, device)


def parse(
    words: Sequence[str] | None = None, description: str | None = __doc__
) -> argparse.Namespace:
    """The command line of a script that has the options of this one."""
    parser = parser_of(description)
    add = parser.add_argument
    add("--clip", default="convnext_base", help="open_clip's name of a ConvNeXt")
    add("--size", type=int, default=384, help="of an image, pixels, a multiple of 32")
    add("--source", type=int, default=2, help="labelled images; all images in phase warmup")
    add("--generated", type=int, default=2, help="generated images")
    add("--sam", default="vit_b", choices=["tiny", "vit_b", "vit_l", "vit_h"])
    add("--larger-than", type=int, help="pixels of a component (5000 for a size of 768)")
    add("--repeats", type=int, default=1)
    add(
        "--untimed", type=int, default=1, help="additional rounds before, whose timings are dropped"
    )
    add("--threads", type=int, default=1)
    add("--phase", default="both", choices=["warmup", "joint", "both"])
    add("--device", default="cpu")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of ours, by autocast")
    add("--teacher-label", default="rendered", choices=["rendered", "teacher"])
    add("--only", choices=["ours", "published"], help="measure one only")
    add("settings", nargs="*", metavar="KEY VALUE", help="of the model, as for tools/train_net.py")
    args = parser.parse_args(words)
    if (
        args.size % 32
        or min(args.source, args.repeats) < 1
        or min(args.generated, args.untimed) < 0
    ):
        parser.error("--size is a multiple of 32, --source and --repeats are at least 1")
    if args.phase != "warmup" and not args.generated:
        parser.error("a joint step needs generated images")
    if args.larger_than is None:
        args.larger_than = round(5000 * (args.size / 768) ** 2)
    return args


def config(args: argparse.Namespace, folder: Path) -> CfgNode:
    cfg = get_cfg()
    cfg.MODEL.DEVICE = args.device
    cfg.MODEL.CLOUDS.CLIP_MODEL_NAME = args.clip
    cfg.MODEL.CLOUDS.CLIP_PRETRAINED_WEIGHTS = ""
    node = cfg.MODEL.CLOUDS.SAM
    node.MODEL, node.WEIGHTS, node.SIZE_THRESHOLD = args.sam, "", args.larger_than
    node.OVERLAP = "published"
    node.CACHE_DIR = str(folder / "embeddings")
    cfg.DATASETS.TEST = ()
    cfg.INPUT.CROP.SIZE = (args.size, args.size)
    cfg.SOLVER.IMS_PER_BATCH = args.source + args.generated
    cfg.SOLVER.AMP.ENABLED = args.dtype == "bfloat16"
    cfg.OUTPUT_DIR = str(folder / "output")
    cfg.merge_from_list(args.settings)
    return cfg


# ------------------------------------------------------------------------ images


def source_sample(seed: int, size: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    image, label = render(rng, get_style("gta5"), None, (size, size))
    sample = {"image": to_tensor(image), "sem_seg": to_tensor(label), "domain": Domain.SOURCE}
    return {**sample, "seed": seed}


def generated_samples(
    count: int, size: int, larger_than: int
) -> list[tuple[dict[str, Any], Labels]]:
    """Samples without a label, and their rendered labels."""
    candidates = []
    for seed in range(CANDIDATES):
        rng = np.random.default_rng(seed)
        image, label = render(rng, draw_style(rng), None, (size, size))
        label = without_ignore(label)
        far = abs(len(find_components(label, larger_than)) - COMPONENTS)
        candidates.append((far, seed, image, label))
    chosen = []
    for _, seed, image, label in sorted(candidates, key=lambda c: c[:2])[:count]:
        jitter = SSDColorJitter().get_transform(image, np.random.default_rng(seed))
        jittered = jitter.apply_image(image)
        views = {"image": to_tensor(jittered), "clean_image": to_tensor(image)}
        chosen.append(({**views, "domain": Domain.GENERATED, "seed": seed}, label))
    return chosen


def without_ignore(label: Labels) -> Labels:
    """The label with ignored pixels set to the nearest class: a teacher labels all pixels."""
    nearest = ndimage.distance_transform_edt(
        label == IGNORE, return_distances=False, return_indices=True
    )
    return label[tuple(nearest)]


# -------------------------------------------------------------------------- ours


class GivenLabels:
    """A refiner of given labels instead of the teacher's.

    Attributes:
        refiner: refines them.
        given: see `PublishedStep`.
    """

    needs_scores = False

    def __init__(self, refiner: SamRefiner, given: Sequence[Labels] | None) -> None:
        self.refiner = refiner
        self.given = given

    def refine(
        self, images: Sequence[Tensor], labels: Sequence[PseudoLabel], seeds: Sequence[int]
    ) -> list[RefinedLabel]:
        """See `clouds.self_training.refiners.Refiner`."""
        if self.given is not None:
            labels = [
                PseudoLabel(torch.from_numpy(given).to(label.classes.device), label.confidence)
                for given, label in zip(self.given, labels, strict=True)
            ]
        return self.refiner.refine(images, labels, seeds)


class OurStep:
    """The trainer's step.

    Args:
        cfg: the config.
        model: is trained; it gets a teacher if `sam` is given.
        sam: of `build_sam`; None: labelled images only.
        given: see `PublishedStep`.
    """

    def __init__(
        self, cfg: CfgNode, model: Any, sam: Any = None, given: Sequence[Labels] | None = None
    ) -> None:
        self.refiner: GivenLabels | None = None
        if sam is not None:
            embed = cached_embedder(cfg, sam)
            sam.image_encoder.to(sam.device)
            refiner = SamRefiner(embed, PointPredictor(sam), SamOptions.from_config(cfg))
            self.refiner = GivenLabels(refiner, given)
            teacher = EMATeacher.from_config(cfg, model.network)
            teacher.reset()
            model.pseudo_labeler = PseudoLabeler(
                teacher, lambda _: self.refiner, PseudoLabelOptions.from_config(cfg)
            )
        self.trainer = Trainer(cfg, model, loader=lambda _: itertools.repeat([]))
        self.numbers = itertools.count()

    def __call__(self, batch: Sequence[Sample], clock: PartClock) -> dict[str, float]:
        """Train on a batch; returns the weighted losses."""
        with profiled_step(self.trainer, clock) as train_step:
            step = train_step(next(self.numbers), batch, time.perf_counter())
        return dict(step.losses)


class Parts:
    """The batch, and both implementations with the same weights.

    Attributes:
        labelled, generated: samples.
        given: rendered labels of the generated images.
        published, ours: implementations; None if not measured.
    """

    def __init__(self, args: argparse.Namespace, cfg: CfgNode, device: torch.device) -> None:
        count = args.source + args.generated
        self.labelled = [source_sample(seed, args.size) for seed in range(count)]
        samples = generated_samples(args.generated, args.size, args.larger_than)
        self.generated = [sample for sample, _ in samples]
        self.given = [label for _, label in samples]
        given = self.given if args.teacher_label == "rendered" else None
        self.source = args.source
        self.cache = Path(cfg.MODEL.CLOUDS.SAM.CACHE_DIR)
        model = build_seeded(cfg).to(device)
        sam = None if args.phase == "warmup" else build_sam(cfg, device)
        self.published = self.ours = None
        if args.only != "ours":
            self.published = PublishedStep(cfg, model, sam, given)
        if args.only != "published":
            self.ours = OurStep(cfg, model, sam, given)

    def batch(self, phase: str) -> list[Sample]:
        """Labelled images first."""
        if phase == "warmup":
            return self.labelled
        return self.labelled[: self.source] + self.generated

    def ways(self, phase: str) -> dict[str, StepFunction]:
        """Name -> step function on the phase's batch, in the order of a round."""
        batch = self.batch(phase)
        ways: dict[str, StepFunction] = {}
        if self.published is not None:
            published, loaded = self.published, self.published.loaded(batch)
            ways[PUBLISHED] = lambda clock: published(loaded, clock)
        if self.ours is not None:
            ours = self.ours
            if phase == "joint":
                ways[COLD] = lambda clock: self.with_empty_cache(ours, batch, clock)
            ways[OURS if phase == "warmup" else WARM] = lambda clock: ours(batch, clock)
        return ways

    def with_empty_cache(
        self, ours: OurStep, batch: Sequence[Sample], clock: PartClock
    ) -> dict[str, float]:
        """Our step with an empty cache of SAM embeddings."""
        for entry in self.cache.iterdir():
            entry.unlink()
        return ours(batch, clock)


# --------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Taken:
    """Measurements of one step.

    Attributes:
        cpu: processor time of all threads, seconds.
        wall: wall-clock time, seconds.
        parts: seconds by part: processor time; on a GPU, wall-clock time.
        more: peak memory of the step minus memory before it, MiB, see `PeakMemory`.
        peak: peak memory of the step, MiB, including that of the other implementations.
        losses: weighted.
    """

    cpu: float
    wall: float
    parts: dict[str, float]
    more: float
    peak: float
    losses: dict[str, float]


def measure(
    ways: dict[str, StepFunction], untimed: int, repeats: int, device: torch.device
) -> dict[str, list[Taken]]:
    """Alternating steps of all implementations."""
    taken = in_turns(ways, lambda way: take(way, device, profile=False), repeats, untimed)
    if device.type == "cuda":  # synchronization takes time, so parts have an additional round
        for name, way in ways.items():
            parts = take(way, device, profile=True).parts
            taken[name] = [replace(one, parts=parts) for one in taken[name]]
    return taken


def take(way: StepFunction, device: torch.device, profile: bool) -> Taken:
    synchronize = synchronizer(device)
    on_cpu = device.type == "cpu"
    clock = PartClock(
        synchronize if profile else lambda: None, time.process_time if on_cpu else time.perf_counter
    )
    with Peak(device) as peak, Span(device) as span, clock.part(REST):
        losses = way(clock)
    parts = dict.fromkeys(PARTS, 0.0)
    for name, seconds in clock.seconds.items():
        parts[SAME.get(name, name)] += seconds
    return Taken(span.cpu, span.wall, parts, peak.more, peak.total, losses)


def report(taken: dict[str, list[Taken]], device: torch.device) -> None:
    """Print the tables of all implementations, the first of which ratios are relative to."""
    on_cpu = device.type == "cpu"
    seconds = {
        name: statistics.median(one.cpu if on_cpu else one.wall for one in steps)
        for name, steps in taken.items()
    }
    first = next(iter(seconds.values()))
    rows = [
        [
            name,
            statistics.median(one.cpu for one in steps),
            statistics.median(one.wall for one in steps),
            first / seconds[name],
            max(one.more for one in steps),
            max(one.peak for one in steps),
        ]
        for name, steps in taken.items()
    ]
    head = ["", "CPU s", "wall s", "ratio", "MiB more", "MiB"]
    print(tabulate(rows, head, floatfmt=("", ".2f", ".2f", ".2f", ".0f", ".0f")))
    losses = [
        f"{name} {sum(steps[0].losses.values()):.2f}"
        for name, steps in taken.items()
        if name != WARM  # one step after "cold"
    ]
    print(f"loss of the first timed step: {', '.join(losses)}\n")
    table = [
        [part, *(statistics.median(one.parts[part] for one in steps) for steps in taken.values())]
        for part in PARTS
    ]
    for row in table:
        row.append(row[1] / row[-1] if row[-1] and len(taken) > 1 else None)
    print(tabulate(table, ["seconds", *taken, "first / last"], floatfmt=".2f"), "\n")


def subject(args: argparse.Namespace, phase: str, parts: Parts) -> str:
    """Description of the measurement in one line."""
    images = f"{args.source + args.generated} labelled images"
    if phase == "joint":
        images = f"{args.source} labelled and {args.generated} generated images"
    words = [f"{phase} step, {images} of {args.size}x{args.size}, CLIP {args.clip}"]
    if phase == "joint":
        counts = [len(find_components(label, args.larger_than)) for label in parts.given]
        total = " + ".join(map(str, counts))
        words.append(f"SAM {args.sam}, {total} components of more than {args.larger_than} pixels")
        if args.teacher_label == "teacher":
            words[-1] = f"SAM {args.sam}, components of the teacher's label"
    words.append(f"ours {args.dtype}; {machine(torch.device(args.device))}")
    return ", ".join(words)


if __name__ == "__main__":
    silence_all_but_peaks()
    main()
