#!/usr/bin/env python
"""Train a ControlNet that generates images for labels, on a labelled dataset.

    python tools/train_controlnet.py --model MODEL --dataset gta5 --output controlnet_gta5
    clouds generate --model MODEL --controlnet controlnet_gta5 --condition gta5 --output FOLDER

The ControlNet takes one-hot labels: a channel per class, and one for pixels without a class. It
starts as a copy of the model's U-Net, which is not trained. The loss is that of the model: the mean
squared error of the predicted noise, or velocity, at random noise levels. The prompts name the
classes of each label; one in ten is empty, as guidance needs. MODEL is Stable Diffusion 1.5 or 2.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from installed import import_module

if TYPE_CHECKING:
    import torch

    from clouds.generation.condition import LabelConditions

logger = logging.getLogger("train_controlnet")

SCENE = "a photo of a street"
EMPTY_PROMPTS = 0.1
"""Share of the samples whose prompt is empty."""
SIZE_STEP = 64
"""Sizes are multiples of it: a latent is 8 times smaller, and the U-Net halves it three times."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, metavar="ID", help="on the hub, or a local folder")
    add("--variant", default="", metavar="NAME", help="of the weight files, such as fp16")
    add("--dataset", required=True, metavar="NAME", help="with labels, such as gta5")
    add("--descriptions", nargs="+", default=[], metavar="FILE", help="of datasets, YAML files")
    add("--output", required=True, type=Path, metavar="DIR", help="folder of the ControlNet")
    add("--steps", type=int, default=20_000, help="of the optimizer (default: %(default)s)")
    add("--batch-size", type=int, default=4, help="images per step (default: %(default)s)")
    add("--learning-rate", type=float, default=1e-5, help="of AdamW (default: %(default)s)")
    add("--height", type=int, default=512, help="of an image, pixels (default: %(default)s)")
    add("--width", type=int, default=512, help="of an image, pixels (default: %(default)s)")
    add("--save-every", type=int, default=1000, metavar="N", help="steps (default: %(default)s)")
    add("--seed", type=int, default=0, help="of images, noise and weights (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<number>")
    add("--offline", action="store_true", help="use local files only")
    args = parser.parse_args(argv)
    for name in ("steps", "batch_size", "learning_rate", "save_every"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if args.height % SIZE_STEP or args.width % SIZE_STEP or min(args.height, args.width) < 1:
        parser.error(f"--height and --width must be multiples of {SIZE_STEP}")
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        parser.error(f"--output {args.output} exists; name a new folder")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    errors = import_module("clouds.cli.command_line").user_errors_in_one_line
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    with errors(MemoryError):
        train(args)


def train(args: argparse.Namespace) -> list[float]:
    """Train and save; returns the loss of each step."""
    import torch
    from tqdm import trange

    from clouds.data.datasets import Datasets
    from clouds.device import resolve_device
    from clouds.generation.condition import LabelConditions

    dataset = Datasets.of((), args.descriptions).own(args.dataset)
    conditions = LabelConditions(dataset, (args.height, args.width), args.seed)
    device = resolve_device(args.device, "--device")
    torch.manual_seed(args.seed)
    model = Model(args, conditions, device)
    optimizer = torch.optim.AdamW(model.controlnet.parameters(), lr=args.learning_rate)
    batches = sample_batches(conditions, args.batch_size, args.seed)
    losses = []
    with trange(args.steps, unit="step") as bar:
        for step in bar:
            loss = model.loss(*next(batches))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.controlnet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if not losses[-1] < float("inf"):
                raise ValueError(
                    f"the loss is {losses[-1]} in step {step + 1}; use a lower --learning-rate"
                )
            bar.set_postfix(loss=f"{losses[-1]:.4f}")
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                model.save(args.output)
    logger.info("%s: a ControlNet of %d classes", args.output, conditions.label_space.num_classes)
    return losses


def sample_batches(
    conditions: LabelConditions, batch_size: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[str]]]:
    """Images (N, 3, H, W) from -1 to 1, one-hot labels (N, C + 1, H, W), and prompts; endless."""
    import cv2
    import numpy as np
    import torch

    from clouds.data.reading import read_image
    from clouds.generation.generators.label_images import one_hot

    rng = np.random.default_rng(seed)
    number = 0
    while True:
        batch = [conditions[number + i] for i in range(batch_size)]
        number += batch_size
        images = [c.window.apply(read_image(c.image), cv2.INTER_AREA) for c in batch]
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        labels = one_hot([c.label for c in batch], conditions.label_space.num_classes)
        prompts = [c.prompt(SCENE, conditions.label_space) for c in batch]
        empty = rng.random(batch_size) < EMPTY_PROMPTS
        yield pixels, labels, ["" if e else p for e, p in zip(empty, prompts, strict=True)]


class Model:
    """A diffusion model with frozen weights, and the ControlNet that is trained."""

    def __init__(
        self, args: argparse.Namespace, conditions: LabelConditions, device: torch.device
    ) -> None:
        from clouds.data.datasets.builtin import classes_text
        from clouds.generation.generators.pipeline_loading import Source, load_pipeline

        space = conditions.label_space
        pipeline: Any = load_pipeline(Source(args.model, "float32", args.offline, args.variant))
        if type(pipeline).__name__ != "StableDiffusionPipeline":
            raise ValueError(
                f"--model is a {type(pipeline).__name__}; ControlNets are trained for Stable "
                "Diffusion 1.5 and 2 only. Use one of the hub for other models."
            )
        from diffusers import ControlNetModel, DDPMScheduler

        self.classes = classes_text(space, range(space.num_classes))
        self.pipeline = pipeline.to(device)
        self.noise: Any = DDPMScheduler.from_config(pipeline.scheduler.config)
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            part.requires_grad_(False)
        self.controlnet: Any = ControlNetModel.from_unet(
            pipeline.unet, conditioning_channels=space.num_classes + 1
        )
        self.controlnet.to(device).train()
        self.device = device

    def save(self, folder: Path) -> None:
        """Save the ControlNet, and the names of its classes."""
        from clouds.data.datasets.builtin import CLASSES_NAME

        self.controlnet.save_pretrained(folder)
        (folder / CLASSES_NAME).write_text(self.classes, encoding="utf-8")

    def loss(
        self, images: torch.Tensor, labels: torch.Tensor, prompts: Sequence[str]
    ) -> torch.Tensor:
        """Mean squared error of the prediction at random noise levels."""
        import torch

        part = self.pipeline
        with torch.no_grad():
            latents = part.vae.encode(images.to(self.device)).latent_dist.sample()
            latents = latents * part.vae.config.scaling_factor
            words = part.tokenizer(
                list(prompts), padding="max_length", truncation=True, return_tensors="pt",
                max_length=part.tokenizer.model_max_length,
            )  # fmt: skip
            text = part.text_encoder(words.input_ids.to(self.device))[0]
        noise = torch.randn_like(latents)
        levels = self.noise.config.num_train_timesteps
        steps = torch.randint(levels, (len(latents),), device=self.device)
        noisy = self.noise.add_noise(latents, noise, steps)
        down, middle = self.controlnet(
            noisy, steps, encoder_hidden_states=text, controlnet_cond=labels.to(self.device),
            return_dict=False,
        )  # fmt: skip
        predicted = part.unet(
            noisy, steps, encoder_hidden_states=text, down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample  # fmt: skip
        if self.noise.config.prediction_type == "v_prediction":
            noise = self.noise.get_velocity(latents, noise, steps)
        return torch.nn.functional.mse_loss(predicted, noise)


if __name__ == "__main__":
    sys.exit(main())
