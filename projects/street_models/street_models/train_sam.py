"""Train Street-SAM: point prompts in rendered scenes to masks, as SAM was trained.

Every prompt gets three masks, of which the one with the smallest loss is trained most (20 focal +
dice), and predicted IoUs, trained by their squared error (Kirillov et al., 2023). Besides, all
pixels of an image are assigned to its regions by the similarity of their features. Windows of the
scenes are drawn anew for each step. The same command continues an interrupted run, to the same
weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from clouds.cli.command_line import user_errors_in_one_line
from clouds.files import atomic_write
from clouds.self_training.refiners.sam.conv_encoder import FINE
from clouds.self_training.refiners.sam.frame import Frame
from clouds.self_training.refiners.sam.model import random_sam, read_weights
from clouds.weights_io import read_torch, write_safetensors
from street_models.sam_data import SamExample, SamExamples
from street_models.scenes import Scenes, SceneSet, render_scenes

FOCAL_WEIGHT, DICE_WEIGHT, IOU_WEIGHT = 20.0, 1.0, 1.0
MAX_POINTS, USUAL_POINTS = 8, 5
"""Half of the steps have the number of points that CLOUDS draws, the others 1 to 8."""
SECOND_PASS_SHARE = 0.2
"""Share of the steps with a second pass, prompted with the mask of the first, too."""
BOX_SHARE = 0.1
"""Share of the steps that are prompted with boxes, too."""
CONTRAST_WEIGHTS = (1.0, 0.5)
"""Of `region_contrast` of the fine and of the coarse features."""
TEMPERATURE = 0.1
"""Of `region_contrast`."""
ALL_MASKS_WEIGHT = 0.5
"""Weight of the mean loss of the three masks, beside that of the best."""
SINGLE_MASK_WEIGHT = 0.3
"""Weight of the loss of the mask that SAM predicts where one is asked for."""
DECAY_SHARE = 0.7
"""Share of the steps, the last, in which the learning rate falls."""


@dataclass(frozen=True)
class Options:
    """Of the training.

    Attributes:
        iterations: optimizer steps.
        batch: images per step.
        prompts: per image, at most.
        learning_rate: the largest; see `learning_rate`.
        warmup: steps until it is reached.
        momentum: of the average of the weights.
        seed: of weights, images and prompts.
        initial_weights: file or name of weights to start from; random ones if empty.
    """

    iterations: int = 3600
    batch: int = 4
    prompts: int = 8
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.01
    warmup: int = 50
    momentum: float = 0.998
    seed: int = 0
    initial_weights: str = ""


@dataclass
class Losses:
    """Of one step, means over its prompts.

    Attributes:
        total: weighted sum of all losses, shape (), with a gradient.
        mask: of the masks.
        contrast: `region_contrast`.
        iou_error: squared error of the predicted IoUs.
        iou: of the masks with the largest predicted IoU, for the log.
    """

    total: Tensor
    mask: float
    contrast: float
    iou_error: float
    iou: float


def mask_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """20 focal + dice of masks, (K, M): logits (K, M, h, w), targets (K, h, w) from 0 to 1.

    The focal loss has gamma 2 and does not weight foreground and background. Its minimum is at the
    target also where that is between 0 and 1.
    """
    target = targets[:, None].expand_as(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    probability = logits.sigmoid()
    error = (target - probability).abs()
    focal = (error.square() * entropy).mean((-2, -1))
    overlap = (probability * target).sum((-2, -1))
    dice = 1 - (2 * overlap + 1) / (probability.sum((-2, -1)) + target.sum((-2, -1)) + 1)
    return FOCAL_WEIGHT * focal + DICE_WEIGHT * dice


def mask_ious(logits: Tensor, targets: Tensor) -> Tensor:
    """IoU of masks, (K, M), of the same arguments as `mask_losses`."""
    predicted, true = logits > 0, (targets > 0.5)[:, None]
    intersection = (predicted & true).sum((-2, -1))
    union = (predicted | true).sum((-2, -1))
    return intersection / union.clamp(min=1)


class Step:
    """Losses of a SAM for examples; draws the kind of prompts of a step.

    Args:
        sam: a `segment_anything.modeling.Sam`.
    """

    def __init__(self, sam: Any) -> None:
        self.sam = sam

    def __call__(self, examples: Sequence[SamExample], boxes: bool, second_pass: bool) -> Losses:
        """The mean over all prompts of the examples."""
        embeddings = self.sam.image_encoder(torch.stack([e.pixels for e in examples]))
        parts = []
        for embedding, example in zip(embeddings, examples, strict=True):
            logits, ious = self._decode(embedding, example, boxes, None)
            parts.append(self._losses(logits, ious, example))
            if second_pass:
                best = ious[:, 1:].argmax(1) + 1
                mask = logits[torch.arange(len(best)), best][:, None].detach()
                logits, ious = self._decode(embedding, example, boxes, mask)
                parts.append(self._losses(logits, ious, example))
        mask_loss, iou_loss, iou = (torch.cat(part).mean() for part in zip(*parts, strict=True))
        contrasts = [self._contrast(*each) for each in zip(embeddings, examples, strict=True)]
        contrast = torch.stack(contrasts).mean()
        total = mask_loss + IOU_WEIGHT * iou_loss + contrast
        return Losses(total, mask_loss.item(), contrast.item(), iou_loss.item(), iou.item())

    def _contrast(self, embedding: Tensor, example: SamExample) -> Tensor:
        """Weighted sum of `region_contrast` of fine and coarse features, shape ()."""
        height, width = example.regions.shape
        num_coarse = self.sam.mask_decoder.num_coarse
        coarse = embedding[None, :num_coarse]
        levels = (
            F.pixel_shuffle(embedding[num_coarse:], FINE),
            F.interpolate(coarse, scale_factor=FINE, mode="bilinear", align_corners=False)[0],
        )
        losses = [region_contrast(each[:, :height, :width], example) for each in levels]
        return CONTRAST_WEIGHTS[0] * losses[0] + CONTRAST_WEIGHTS[1] * losses[1]

    def _decode(
        self, embedding: Tensor, example: SamExample, boxes: bool, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Logits (K, 4, 4s, 4s) and predicted IoUs (K, 4); the first are those of a single mask."""
        encoder = self.sam.prompt_encoder
        foreground = torch.ones(example.points.shape[:2], dtype=torch.int)
        sparse, dense = encoder(
            points=(example.points, foreground),
            boxes=example.boxes if boxes else None,
            masks=masks,
        )
        logits, ious = self.sam.mask_decoder.predict_masks(
            embedding[None], encoder.get_dense_pe(), sparse, dense
        )
        return logits, ious

    @staticmethod
    def _losses(logits: Tensor, ious: Tensor, example: SamExample) -> tuple[Tensor, ...]:
        """Per prompt: the mask loss, the error of the predicted IoUs, the chosen mask's IoU."""
        height, width = example.masks.shape[1:]
        visible = logits[..., :height, :width]
        losses = mask_losses(visible, example.masks)
        true = mask_ious(visible.detach(), example.masks)
        three = losses[:, 1:]
        mask_loss = (
            three.amin(1) + ALL_MASKS_WEIGHT * three.mean(1) + SINGLE_MASK_WEIGHT * losses[:, 0]
        )
        chosen = true[:, 1:].gather(1, ious[:, 1:].argmax(1, keepdim=True))[:, 0]
        return mask_loss, F.mse_loss(ious, true, reduction="none").mean(1), chosen


class Average:
    """Moving average of a module's weights, with a momentum that starts low."""

    def __init__(self, module: torch.nn.Module, momentum: float) -> None:
        self.momentum = momentum
        self.weights = {n: p.detach().clone() for n, p in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: torch.nn.Module, iteration: int) -> None:
        """After step `iteration`, from 0."""
        momentum = min(self.momentum, (1 + iteration) / (10 + iteration))
        for name, value in module.state_dict().items():
            self.weights[name].lerp_(value, 1 - momentum)


def region_contrast(features: Tensor, example: SamExample) -> Tensor:
    """Cross-entropy of assigning each pixel to its region by cosine similarity, shape ().

    A region is represented by the mean feature of its samples. Other regions of the pixel's class
    do not count. The mean over pixels and the mean over regions have equal weights.

    Args:
        features: (C, h, w), h, w as of `example.regions`.
    """
    if not len(example.classes):
        return features.sum() * 0
    normalized = F.normalize(features, dim=0).flatten(1)
    centers = F.normalize(normalized[:, example.samples].mean(-1), dim=0)
    pixels = (example.regions.flatten() >= 0).nonzero()[:, 0]
    own = example.regions.flatten()[pixels]
    logits = normalized[:, pixels].T @ centers / TEMPERATURE
    same = example.classes[own, None] == example.classes
    same[torch.arange(len(own)), own] = False
    losses = F.cross_entropy(logits.masked_fill(same, -torch.inf), own, reduction="none")
    sums = losses.new_zeros(len(example.classes)).index_add(0, own, losses)
    return 0.5 * losses.mean() + 0.5 * (sums / own.bincount(minlength=len(sums))).mean()


def learning_rate(options: Options, iteration: int) -> float:
    """Of step `iteration`, from 0: it rises linearly, is constant, then falls linearly to 0."""
    rising = (iteration + 1) / options.warmup
    falling = (options.iterations - iteration) / (DECAY_SHARE * options.iterations)
    return options.learning_rate * min(1.0, rising, falling)


class Training:
    """A run that can be interrupted.

    Args:
        folder: of checkpoint and TensorBoard's events.
        scenes: to train on.
    """

    def __init__(self, folder: Path, scenes: Scenes, options: Options) -> None:
        self.folder, self.options = folder, options
        self.sam = random_sam("street", options.seed).to(memory_format=torch.channels_last)
        if options.initial_weights:
            self.sam.load_state_dict(read_weights(options.initial_weights, "street"))
        self.step = Step(self.sam)
        self.examples = SamExamples(scenes, Frame.of_segment_anything(self.sam), options.seed)
        self.optimizer = torch.optim.AdamW(
            self.sam.parameters(), options.learning_rate, weight_decay=options.weight_decay
        )
        self.average = Average(self.sam, options.momentum)
        self.iteration = 0

    @property
    def checkpoint(self) -> Path:
        """File of the newest state."""
        return self.folder / "checkpoint.pth"

    def run_step(self) -> Losses:
        """One optimizer step, a function of the weights and of the iteration."""
        rng = np.random.default_rng((self.options.seed, 1, self.iteration))
        usual = rng.random() < 0.5
        points = USUAL_POINTS if usual else int(rng.integers(1, MAX_POINTS + 1))
        boxes, second = rng.random() < BOX_SHARE, rng.random() < SECOND_PASS_SHARE
        first = self.iteration * self.options.batch
        prompts = self.options.prompts
        batch = [self.examples(first + i, prompts, points) for i in range(self.options.batch)]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.options, self.iteration)
        losses = self.step(batch, boxes, second)
        self.optimizer.zero_grad()
        losses.total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.sam.parameters(), 1.0)
        self.optimizer.step()
        self.average.update(self.sam, self.iteration)
        self.iteration += 1
        return losses

    def save(self) -> None:
        """Write the checkpoint."""
        state = {
            "model": self.sam.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.weights,
            "iteration": self.iteration,
            "options": vars(self.options),
        }
        with atomic_write(self.checkpoint) as file:
            torch.save(state, file)

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one.

        Raises:
            ValueError: it is of a run with other options, or damaged.
        """
        if not self.checkpoint.is_file():
            return
        state = read_torch(self.checkpoint)
        if not self._continues(state["options"], state["iteration"]):
            raise ValueError(
                f"{self.checkpoint} is of a run with {state['options']}, but this one has "
                f"{vars(self.options)}. Name another --output, or the options of that run."
            )
        self.sam.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.weights = state["average"]
        self.iteration = state["iteration"]

    def _continues(self, options: dict[str, Any], iteration: int) -> bool:
        """Whether a run with `options` has had the same steps as this one until `iteration`.

        So a run may get more or fewer steps as long as none of the steps done differs.
        """
        other, own = Options(**options), self.options
        return replace(other, iterations=own.iterations) == own and all(
            learning_rate(other, i) == learning_rate(own, i) for i in range(iteration)
        )

    def write_weights(self, path: Path) -> None:
        """Write the averaged weights in half precision, by the file's suffix as safetensors."""
        weights = {name: value.half().contiguous() for name, value in self.average.weights.items()}
        with atomic_write(path) as file:
            if path.suffix == ".safetensors":
                write_safetensors(weights, file)
            else:
                torch.save(weights, file)


def train(training: Training, weights: Path, save_every: float) -> None:
    """Run all steps that are left, writing checkpoint and weights every `save_every` seconds.

    They are written at the end, too, even if no step is left: `weights` may be another file.
    """
    total = training.options.iterations
    saved = time.monotonic()
    with (
        SummaryWriter(str(training.folder)) as board,
        tqdm(total=total, initial=training.iteration, unit="step", mininterval=10) as bar,
    ):
        mean: dict[str, float] = {}
        while training.iteration < total:
            losses = training.run_step()
            for name in ("mask", "contrast", "iou_error", "iou"):
                value = getattr(losses, name)
                board.add_scalar(f"train/{name}", value, training.iteration)
                mean[name] = 0.98 * mean.get(name, value) + 0.02 * value
            bar.set_postfix({n: f"{v:.3f}" for n, v in mean.items()}, refresh=False)
            bar.update()
            if time.monotonic() - saved > save_every:
                training.save()
                training.write_weights(weights)
                saved = time.monotonic()
        training.save()
        training.write_weights(weights)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add, default = parser.add_argument, Options()
    add("--output", type=Path, default=Path("output/street_sam"), help="folder of the run")
    add("--scenes", type=Path, default=Path("output/street_sam_scenes"), help="of rendered scenes")
    add("--count", type=int, default=8000, help="scenes (default: %(default)s)")
    add("--size", type=int, nargs=2, default=(160, 320), metavar=("H", "W"))
    add("--weights", type=Path, help="file for the weights (default: in the folder)")
    add("--save-every", type=float, default=240, metavar="SECONDS")
    for name, value in vars(default).items():
        flag = "--" + name.replace("_", "-")
        add(flag, type=type(value), default=value, help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, or continue; returns the exit code."""
    args = parse(argv)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    with user_errors_in_one_line():
        options = Options(**{name: getattr(args, name) for name in vars(Options())})
        folder = args.scenes / "train"
        render_scenes(folder, SceneSet(options.seed, "train", args.count, *args.size))
        training = Training(args.output, Scenes(folder), options)
        training.resume()
        train(training, args.weights or args.output / "street_sam.safetensors", args.save_every)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
