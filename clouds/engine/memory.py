"""Memory of a training step, counted on torch's meta device before anything is allocated.

`estimate` runs backbone, teacher's head, refiner, head, losses and backward pass on tensors without
values, and counts the bytes of those that exist at a time. `fit_to_memory` chooses how the step is
divided so that it fits SOLVER.MEMORY_GIB. It is an estimate: what CUDA's context, workspaces and
the fragmentation of the allocator take is covered by a margin only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clouds.config.config import with_value
from clouds.d2 import CfgNode
from clouds.data.datasets import generated as generated_datasets
from clouds.data.structures import Targets
from clouds.engine.live_memory import GpuKernels, LiveBytes
from clouds.engine.parallel import blocks_of
from clouds.modeling.backbone.adapters import adapter_of
from clouds.modeling.backbone.base import TextEncoder
from clouds.modeling.backbone.vit import ViTBackbone
from clouds.modeling.build import build_on_meta
from clouds.modeling.text_classifier import TextEmbeddings
from clouds.ops.sam import best_masks, encode
from clouds.self_training.refiners.sam.model import build_architecture
from clouds.self_training.refiners.sam.predictor import REGIONS_AT_ONCE
from clouds.self_training.refiners.sam.pretrained import is_pretrained

logger = logging.getLogger(__name__)

GIB = 2**30
USABLE = 0.9
"""Share of SOLVER.MEMORY_GIB that the estimate may take."""

CHECKPOINTING = "MODEL.BACKBONE.ACTIVATION_CHECKPOINTING"
ACCUMULATE = "SOLVER.ACCUMULATE"
META = torch.device("meta")


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step in one process.

    Attributes:
        resident: of what exists between the steps: weights, gradients, the optimizer's state, the
            averages (teacher and SOLVER.WEIGHT_AVERAGE) and the refiner's weights.
        phases: largest sum of all other tensors in each phase of a step.
        not_counted: parts that cannot be counted on the meta device.
        sharded: SOLVER.PARALLEL is fsdp; the gradients' parts are not counted in `phases`.
    """

    resident: dict[str, int]
    phases: dict[str, int]
    not_counted: tuple[str, ...] = ()
    sharded: bool = False

    @property
    def total(self) -> int:
        """The peak."""
        # The backward pass begins when the gradients of the step before have been freed.
        own = 0 if self.sharded else self.resident["gradients"]
        base = sum(self.resident.values())
        return max(base - own * (name == "backward") + size for name, size in self.phases.items())

    def __str__(self) -> str:
        parts = [f"{k} {v / GIB:.2f}" for k, v in (self.resident | self.phases).items() if v]
        others = f"; not counted: {', '.join(self.not_counted)}" if self.not_counted else ""
        return f"{self.total / GIB:.1f} GiB ({', '.join(parts)}{others})"


def estimate(cfg: CfgNode, processes: int = 1) -> StepMemory:
    """Memory of a step of one process, whose images SOLVER.ACCUMULATE divides.

    Of the images, half are generated in joint training, at least one. Every image is counted with a
    mask of each class, which is the largest number.

    Args:
        cfg: a complete config.
        processes: over which SOLVER.IMS_PER_BATCH is divided.
    """
    model: Any = build_on_meta(cfg).train()
    num_images = cfg.SOLVER.IMS_PER_BATCH // processes // cfg.SOLVER.ACCUMULATE
    joint = bool(generated_datasets(cfg.DATASETS.TRAIN))
    num_generated = max(1, num_images // 2) if joint else 0
    sam, not_counted = _sam(cfg) if joint else (None, ())
    sharded = cfg.SOLVER.PARALLEL == "fsdp" and processes > 1
    if sharded:  # the gradient of a block is freed when the processes have its parts
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
    phases = dict(_Step(cfg, model, sam, num_images, num_generated).phases())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    resident = {
        "weights": _bytes_of(model),
        "gradients": trained,
        "optimizer": trained * (2 if cfg.SOLVER.OPTIMIZER == "ADAMW" else 1),
        "averages": trained * (joint + bool(cfg.SOLVER.WEIGHT_AVERAGE.ENABLED)),
    }
    if sharded:
        # the teacher has copies of frozen weights beside those that train
        parts = [p for p in model.network.values() if any(w.requires_grad for w in p.parameters())]
        teacher = joint * sum(map(_bytes_of, parts))
        resident["averages"] += max(teacher - trained, 0)
        resident = {name: size // processes for name, size in resident.items()}
        whole = _bytes_of(model) + teacher if joint or cfg.SOLVER.ACCUMULATE > 1 else 0
        resident["gathered"] = max(whole, _gathered(model))
    resident["refiner's weights"] = 0 if sam is None else _bytes_of(sam)
    return StepMemory(resident, phases, not_counted, sharded)


def _gathered(model: nn.Module) -> int:
    """Bytes of weights that a process has at a time in the passes of a sharded model: those of no
    block, and two blocks, one with its gradient.
    """
    sizes = [sum(_bytes_of(layer) for layer in block) for block in blocks_of(model)]
    return _bytes_of(model) - sum(sizes) + 3 * max(sizes, default=0)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _bytes_of(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _sam(cfg: CfgNode) -> tuple[Any, tuple[str, ...]]:
    """segment_anything's SAM on the meta device; None where the refiner is another."""
    node = cfg.MODEL.CLOUDS
    if node.REFINER == "none" or not node.SAM.ENABLED:
        return None, ()
    if node.REFINER != "sam" or is_pretrained(node.SAM.MODEL) or node.SAM.MODEL == "mobile":
        return None, (f"refiner {node.REFINER} {node.SAM.MODEL}",)
    with torch.random.fork_rng(devices=[]), META:
        return build_architecture(node.SAM.MODEL).requires_grad_(False).eval(), ()


class _Step:
    """A step on meta tensors, phase by phase, in the order of `CLOUDS.forward`.

    Args:
        cfg, model: the model on the meta device.
        sam: of the refiner; None: not counted.
        num_images: of the student; the last `num_generated` of them are generated.
    """

    def __init__(
        self, cfg: CfgNode, model: Any, sam: Any, num_images: int, num_generated: int
    ) -> None:
        self.cfg, self.model, self.sam = cfg, model, sam
        self.num_images, self.num_generated = num_images, num_generated
        height, width = cfg.INPUT.CROP.SIZE
        step = cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY
        self.size = (-(-height // step) * step, -(-width // step) * step)

    def phases(self) -> Iterator[tuple[str, int]]:
        """Name and peak of each phase."""
        live, kernels = LiveBytes(), GpuKernels(bool(self.cfg.SOLVER.AMP.ENABLED))
        head, criterion = self.model.sem_seg_head, self.model.criterion
        text, queries = self.text(), adapter_of(self.model.backbone).object_queries()
        if isinstance(self.model.backbone, ViTBackbone):
            for block in self.model.backbone.transformer.blocks:
                kernels.apply_to(block)
        with live:
            with kernels:
                features, clean = self.features()
            yield "backbone", live.take_peak()
            if clean is not None:
                with torch.no_grad(), kernels:
                    scores = self.scores(head(clean, text, final_only=True, queries=queries))
                yield "teacher", live.take_peak()
                del scores, clean
            if self.sam is not None:
                with torch.no_grad():
                    self.refine(kernels)
                yield "refiner", live.take_peak()
            targets = [self.targets() for _ in range(self.num_images)]
            with kernels:
                predictions = head(features, text, queries=queries)
            yield "head", live.take_peak()
            losses = criterion.losses(predictions, targets)
            yield "losses", live.take_peak()
            del predictions
            torch.autograd.backward(torch.stack(list(losses.values())).sum())
            yield "backward", live.take_peak()

    def features(self) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """Features of the student's images and of the clean views; None without these."""
        backbone, n = self.model.backbone, self.num_images
        images = torch.empty(n, 3, *self.size, device=META)
        clean = torch.empty(self.num_generated, 3, *self.size, device=META)
        if not self.num_generated:
            return backbone(images), None
        if any(p.requires_grad for p in backbone.parameters()):
            with torch.no_grad():
                clean_features = backbone(clean)
            return backbone(images), clean_features
        both = backbone(torch.cat((images, clean)))
        return {k: v[:n] for k, v in both.items()}, {k: v[n:] for k, v in both.items()}

    def text(self) -> TextEmbeddings | None:
        """Embeddings of the class names, where the head needs them."""
        encoder = self.model.backbone
        if not self.model.sem_seg_head.needs_text or not isinstance(encoder, TextEncoder):
            return None
        counts = tuple(len(names) for names in self.model.text_classifier.synonyms)
        return TextEmbeddings(torch.empty(sum(counts) + 1, encoder.embed_dim, device=META), counts)

    def scores(self, predictions: Any) -> Tensor:
        """The teacher's scores of one image, and the masks at its size that they are added from."""
        masks = torch.empty(self.cfg.TEST.MASKS_AT_ONCE, *self.size, device=META).sigmoid()
        num_classes = self.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        return torch.empty(num_classes, *self.size, device=META) + masks[0]

    def targets(self) -> Targets:
        """A mask of every class."""
        num_classes = self.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        masks = torch.empty(num_classes, *self.size, dtype=torch.bool, device=META)
        return Targets(torch.empty(num_classes, dtype=torch.int64, device=META), masks)

    def refine(self, kernels: GpuKernels) -> None:
        """SAM's encoder on one image, then its decoder, in float32, on as many regions as it takes
        at once.
        """
        encoder, prompt = self.sam.image_encoder, self.sam.prompt_encoder
        with kernels:
            encode(encoder, torch.empty(1, 3, encoder.img_size, encoder.img_size, device=META))
        size, dim = prompt.image_embedding_size, prompt.embed_dim
        pixels = torch.empty(REGIONS_AT_ONCE, size[0] * size[1], dim, device=META)
        points = self.cfg.MODEL.CLOUDS.SAM.NUM_POINTS + 1
        prompts = torch.empty(REGIONS_AT_ONCE, points, dim, device=META)
        with GpuKernels(half=False):
            best_masks(self.sam.mask_decoder, pixels, pixels[0], prompts, size)


def fit_to_memory(cfg: CfgNode, processes: int = 1) -> CfgNode:
    """The config with the division of a step that fits SOLVER.MEMORY_GIB, which is logged.

    Accumulation is preferred to activation checkpointing, since it computes nothing twice. The
    config's own values are the least. Without SOLVER.MEMORY_GIB the config is returned as it is.

    Raises:
        ValueError: no division fits.
    """
    limit = float(cfg.SOLVER.MEMORY_GIB)
    if not limit:
        return cfg
    smallest: StepMemory | None = None
    for candidate in _candidates(cfg, processes):
        memory = estimate(candidate, processes)
        if memory.total <= USABLE * limit * GIB:
            logger.info(
                "SOLVER.MEMORY_GIB %g: %s %d, %s %s; a step takes about %s",
                *(limit, ACCUMULATE, candidate.SOLVER.ACCUMULATE, CHECKPOINTING),
                *(candidate.MODEL.BACKBONE.ACTIVATION_CHECKPOINTING, memory),
            )
            return candidate
        smallest = min(filter(None, (smallest, memory)), key=lambda one: one.total)
    assert smallest is not None, "the config itself is a candidate"
    half = "" if cfg.SOLVER.AMP.ENABLED else "SOLVER.AMP.ENABLED True, "
    raise ValueError(
        f"SOLVER.MEMORY_GIB is {limit:g}, of which {USABLE:.0%} are used, but a step takes about "
        f"{smallest} with the smallest parts. Use a smaller INPUT.CROP.SIZE, {half}more processes, "
        "or a smaller model."
    )


def _candidates(cfg: CfgNode, processes: int) -> Iterator[CfgNode]:
    """The config with each possible number of parts, then the same with checkpointing."""
    images = cfg.SOLVER.IMS_PER_BATCH // processes
    parts = [n for n in range(cfg.SOLVER.ACCUMULATE, images + 1) if images % n == 0]
    enabled = bool(cfg.MODEL.BACKBONE.ACTIVATION_CHECKPOINTING)
    backbone: Any = build_on_meta(cfg).backbone
    trains = any(p.requires_grad for p in backbone.parameters())
    can_enable = not enabled and trains and isinstance(backbone, ViTBackbone)
    for checkpointing in (enabled, True) if can_enable else (enabled,):
        for number in parts:
            changed = with_value(cfg, ACCUMULATE, number)
            yield with_value(changed, CHECKPOINTING, checkpointing)
