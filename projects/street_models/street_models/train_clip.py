"""Trains Street-CLIP: an open_clip model, contrastively, on crops of rendered scenes and captions.

    python -m street_models.train_clip --output output/street_clip

renders the scenes into `--scenes` and trains. A run that is interrupted continues from its last
checkpoint when it is started again, with the same result as without interruption.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from clouds.cli.command_line import user_errors_in_one_line
from clouds.files import atomic_write
from clouds.modeling.backbone.open_clip_models import create_clip, get_tokenizer
from clouds.weights_io import read_torch, write_safetensors
from street_models.crops import Crop, CropSampler
from street_models.scenes import Scenes, SceneSet, render_scenes
from street_models.zero_shot import (
    MODEL_NAME,
    ObjectCrops,
    classify,
    confusion,
    mean_accuracy,
    normalized,
)

logger = logging.getLogger(__name__)

WEIGHTS = "street_clip.safetensors"
_CHECKPOINT = "checkpoint.pt"
_BETAS = (0.9, 0.98)
_WEIGHT_DECAY = 0.05
_WARMUP_STEPS = 100
_EMA_DECAY = 0.998
_MAX_SCALE = math.log(100)
_HELD_OUT = 200
"""Scenes of the held-out looks on which zero-shot accuracy is reported during training."""


@dataclass(frozen=True)
class Options:
    """What the weights depend on, besides the scenes.

    Attributes:
        init: weights to start from, a file; empty: random ones.
    """

    steps: int = 3000
    batch_size: int = 192
    lr: float = 1.5e-3
    seed: int = 0
    init: str = ""


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, groups: Sequence[str]) -> Tensor:
    """CLIP's loss with several positives: pairs of one group are all positives of each other.

    Args:
        images, texts: embeddings (N, D) of pairs, not normalized.
        scale: factor of the cosine similarities, shape ().
        groups: one name per pair.

    Returns:
        Mean of the cross entropies of images to texts and of texts to images, shape ().
    """
    numbers = torch.tensor([groups.index(name) for name in groups], device=images.device)
    targets = (numbers[:, None] == numbers).to(images.dtype)
    targets = targets / targets.sum(1, keepdim=True)  # symmetric, since groups are disjoint
    logits = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    return 0.5 * (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets))


def group_of(crop: Crop) -> str:
    """Captions of one noun are equal if they name the same class; others if they are the same."""
    return crop.caption if crop.class_id is None else f"class {crop.class_id}"


def learning_rate(step: int, options: Options) -> float:
    """Linear warm-up, then half a cosine down to 0."""
    if step < _WARMUP_STEPS:
        return options.lr * (step + 1) / _WARMUP_STEPS
    done = (step - _WARMUP_STEPS) / max(options.steps - _WARMUP_STEPS, 1)
    return options.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class Trainer:
    """Model, averaged weights and optimizer.

    Attributes:
        step: number of steps done.
        model: open_clip's model.
        averaged: the same with averaged weights (EMA), which are the result.
    """

    def __init__(self, options: Options) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.step = 0
        # open_clip's model, whose methods are no part of nn.Module
        self.model: Any = create_clip(MODEL_NAME, options.init)
        self.model.visual.to(memory_format=torch.channels_last)
        self.averaged: nn.Module = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.model.train()
        self._tokenizer = get_tokenizer(MODEL_NAME)
        self._optimizer = torch.optim.AdamW(_groups(self.model), betas=_BETAS, fused=True)

    def train_step(self, sampler: CropSampler) -> float:
        """One step on a batch, which depends on seed and step alone; returns the loss."""
        rng = np.random.default_rng((self.options.seed, self.step))
        crops = [sampler.draw(rng) for _ in range(self.options.batch_size)]
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.options)
        x = normalized(np.stack([crop.image for crop in crops]))
        tokens = self._tokenizer([crop.caption for crop in crops])
        # half precision for the images alone: the backward pass of attention is slower in it
        with torch.autocast("cpu", torch.bfloat16):
            images = self.model.encode_image(x)
        texts = self.model.encode_text(tokens)
        scale = self.model.logit_scale
        loss = contrastive_loss(
            images.float(), texts, scale.exp(), [group_of(crop) for crop in crops]
        )
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        with torch.no_grad():
            scale.clamp_(max=_MAX_SCALE)
            decay = min(_EMA_DECAY, (1 + self.step) / (10 + self.step))
            averaged: list[Tensor] = list(self.averaged.parameters())
            current: list[Tensor] = list(self.model.parameters())
            torch._foreach_lerp_(averaged, current, 1 - decay)
        self.step += 1
        return float(loss.detach())

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "options": asdict(self.options),
            "step": self.step,
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a `state`.

        Raises:
            ValueError: it is of a run with other options.
        """
        if state["options"] != asdict(self.options):
            raise ValueError(
                f"the checkpoint is of a run with {state['options']}, this one has "
                f"{asdict(self.options)}; name another --output or use those options"
            )
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.averaged.load_state_dict(state["averaged"])
        self._optimizer.load_state_dict(state["optimizer"])


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameters with weight decay, and those without: biases, norms, scales, embeddings."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim > 1 and "embedding" not in name
        (decayed if matrix else others).append(parameter)
    return [
        {"params": decayed, "weight_decay": _WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]


def write_weights(model: nn.Module, file: Path) -> None:
    """Write weights in half precision, as open_clip and `create_clip` read them."""
    weights = {
        name: value.half() if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    with atomic_write(file) as stream:
        write_safetensors({n: v.contiguous() for n, v in weights.items()}, stream)


def train(
    scenes: Scenes, held_out: Scenes, output: Path, options: Options, save_every: int
) -> nn.Module:
    """Train, or continue, and write checkpoints, weights and TensorBoard's files into `output`.

    Returns:
        The model with averaged weights.

    Raises:
        ValueError: the checkpoint is of a run with other options, or damaged.
    """
    output.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(options)
    checkpoint = output / _CHECKPOINT
    if checkpoint.is_file():
        trainer.load_state(read_torch(checkpoint))
    sampler = CropSampler(scenes)
    count = min(len(held_out), _HELD_OUT)
    triples = zip(held_out.images, held_out.labels, held_out.instances, strict=True)
    crops = ObjectCrops.of((t for t, _ in zip(triples, range(count), strict=False)), seed=0)
    with SummaryWriter(str(output), purge_step=trainer.step) as writer:
        bar = tqdm(total=options.steps, initial=trainer.step, desc="train", mininterval=5)
        while trainer.step < options.steps:
            loss = trainer.train_step(sampler)
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            writer.add_scalar("loss", loss, trainer.step)
            writer.add_scalar("lr", learning_rate(trainer.step - 1, options), trainer.step)
            if trainer.step % save_every == 0 or trainer.step == options.steps:
                with atomic_write(checkpoint) as stream:
                    torch.save(trainer.state(), stream)
                write_weights(trainer.averaged, output / WEIGHTS)
                predictions = classify(trainer.averaged, crops.images)
                accuracy = mean_accuracy(confusion(crops.classes, predictions))
                writer.add_scalar("zero_shot/held_out", accuracy, trainer.step)
                logger.info("step %d: loss %.3f, zero-shot top-1 on %d crops of held-out looks "
                            "%.1f %%", trainer.step, loss, len(predictions), accuracy)  # fmt: skip
    return trainer.averaged


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    default = Options()
    parser = argparse.ArgumentParser(
        prog="street_models.train_clip", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("output/street_clip"))
    parser.add_argument("--scenes", type=Path, default=Path("output/street_scenes"),
                        help="folder of the rendered scenes, 250 KB each")  # fmt: skip
    parser.add_argument("--count", type=int, default=12000, help="scenes to train on")
    parser.add_argument("--held-out", type=int, default=600, help="scenes of held-out looks")
    parser.add_argument("--size", type=int, nargs=2, default=(160, 320), metavar=("H", "W"))
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--batch-size", type=int, default=default.batch_size)
    parser.add_argument("--lr", type=float, default=default.lr)
    parser.add_argument("--seed", type=int, default=default.seed, help="of weights and batches")
    parser.add_argument("--scene-seed", type=int, default=0)
    parser.add_argument("--init", default=default.init, help="weights to start from, a file")
    parser.add_argument("--save-every", type=int, default=300, help="steps between checkpoints")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    args = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(1)
    height, width = args.size
    train_set = SceneSet(args.scene_seed, "train", args.count, height, width)
    val_set = SceneSet(args.scene_seed, "val", args.held_out, height, width)
    options = Options(args.steps, args.batch_size, args.lr, args.seed, args.init)
    with user_errors_in_one_line():
        for name, wanted in (("train", train_set), ("val", val_set)):
            render_scenes(args.scenes / name, wanted)
        scenes, held_out = (Scenes(args.scenes / name) for name in ("train", "val"))
        train(scenes, held_out, args.output, options, args.save_every)


if __name__ == "__main__":
    main()
