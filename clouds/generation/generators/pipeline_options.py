"""Scheduler and arguments of diffusers' pipelines, whose classes differ in what they take."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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

_FLOW_MATCHING = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
_FLOW_SIGMAS = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
"""Schedulers of diffusion models that also integrate a flow, with `use_flow_sigmas`."""

UNET_GUIDANCE = 7.5
"""Default guidance scale of models with a U-Net; others have that of their pipeline."""


@dataclass(frozen=True)
class Sampling:
    """What is asked of a pipeline.

    Attributes:
        steps: of denoising.
        guidance: scale; None: the default.
        negative_prompt: content to avoid.
        true_cfg_scale: scale of the negative prompt for a model whose guidance is distilled; None:
            there is none.
        scheduler: see `set_scheduler`.
        size: (height, width) of an image, pixels.
    """

    steps: int
    guidance: float | None
    negative_prompt: str
    true_cfg_scale: float | None
    scheduler: str
    size: tuple[int, int]


def set_scheduler(pipeline: Any, name: str) -> str:
    """Set the scheduler of the pipeline and return the name of its class.

    Raises:
        ValueError: the pipeline does not support it; the message lists those that it does.
    """
    own = type(pipeline.scheduler)
    if name == OWN_SCHEDULER:
        return str(own.__name__)
    flow = _is_flow(pipeline.scheduler)
    supported = _flow_schedulers(pipeline) if flow else _diffusion_schedulers(pipeline)
    for class_name in SCHEDULERS.get(name, (name,)):
        if class_name in supported:
            if class_name != own.__name__:
                config = pipeline.scheduler.config
                changes = _flow_changes(config, class_name) if flow else {}
                pipeline.scheduler = supported[class_name].from_config(config, **changes)
            return class_name
    short = [short for short, names in SCHEDULERS.items() if set(names) & set(supported)]
    raise ValueError(
        f"--scheduler is {name!r}, which {type(pipeline).__name__} does not support. Use "
        f"{', '.join([OWN_SCHEDULER, *short])} or one of {', '.join(sorted(supported))}"
    )


def _is_flow(scheduler: Any) -> bool:
    """Whether the model predicts the velocity of a flow (SD 3, FLUX, Sana, Qwen-Image)."""
    config = scheduler.config
    return bool(
        type(scheduler).__name__.startswith("FlowMatch")
        or config.get("use_flow_sigmas")
        or config.get("prediction_type") == "flow_prediction"
    )


def _diffusion_schedulers(pipeline: Any) -> dict[str, Any]:
    own = type(pipeline.scheduler)
    return {kind.__name__: kind for kind in [own, *pipeline.scheduler.compatibles]}


def _flow_schedulers(pipeline: Any) -> dict[str, Any]:
    """Schedulers that integrate a flow and take the arguments that the pipeline passes."""
    import diffusers

    own = type(pipeline.scheduler)
    kinds = [own, *(getattr(diffusers, name) for name in (*_FLOW_MATCHING, *_FLOW_SIGMAS))]
    passed = {"mu"} if pipeline.scheduler.config.get("use_dynamic_shifting") else set()
    if hasattr(pipeline, "_pack_latents"):  # FLUX, Qwen-Image
        passed = {"mu", "sigmas"}
    return {
        kind.__name__: kind
        for kind in kinds
        if kind is own or passed <= set(inspect.signature(kind.set_timesteps).parameters)
    }


def _flow_changes(config: Mapping[str, Any], class_name: str) -> dict[str, Any]:
    """Settings of a scheduler with other names in the class `class_name`."""
    shift = config.get("flow_shift", config.get("shift", 1.0))
    if class_name in _FLOW_MATCHING:
        return {"shift": shift}
    return {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}


def call_arguments(pipeline: Any, sampling: Sampling) -> dict[str, Any]:
    """Arguments of each pipeline call, apart from prompts, random generators and labels.

    Raises:
        ValueError: an option that the pipeline does not support.
    """
    known = inspect.signature(pipeline.__call__).parameters
    arguments: dict[str, Any] = {"num_inference_steps": sampling.steps}
    if "true_cfg_scale" in known:
        arguments |= _true_guidance(pipeline, known, sampling)
    else:
        arguments |= _guidance(pipeline, known, sampling)
    if "use_resolution_binning" in known:  # it would generate another size and resize the image
        arguments["use_resolution_binning"] = False
    return arguments | _size_arguments(pipeline, known, sampling.size)


def _guidance(pipeline: Any, known: Mapping[str, Any], sampling: Sampling) -> dict[str, Any]:
    """Classifier-free guidance, or a distilled one."""
    kind = type(pipeline).__name__
    arguments: dict[str, Any] = {}
    if sampling.true_cfg_scale is not None:
        raise ValueError(f"{kind} does not support --true-cfg-scale; use --guidance")
    if sampling.negative_prompt:
        if "negative_prompt" not in known:
            raise ValueError(f"{kind} does not support --negative-prompt; leave it out")
        arguments["negative_prompt"] = sampling.negative_prompt
    if "guidance_scale" in known:
        unet = "unet" in pipeline.components
        default = UNET_GUIDANCE if unet else float(known["guidance_scale"].default)
        arguments["guidance_scale"] = default if sampling.guidance is None else sampling.guidance
    elif sampling.guidance is not None:
        raise ValueError(f"{kind} does not support --guidance; leave it out")
    return arguments


def _true_guidance(pipeline: Any, known: Mapping[str, Any], sampling: Sampling) -> dict[str, Any]:
    """Guidance of FLUX and Qwen-Image, whose pipelines have two scales.

    The guidance scale is an input of a distilled transformer. Classifier-free guidance with a
    negative prompt has the scale `true_cfg_scale`; without distillation it is the only one.
    """
    kind = type(pipeline).__name__
    negative, scale = sampling.negative_prompt, sampling.true_cfg_scale
    arguments: dict[str, Any] = {}
    if pipeline.transformer.config.get("guidance_embeds"):
        default = known["guidance_scale"].default
        guidance = default if sampling.guidance is None else sampling.guidance
        if guidance is not None:
            arguments["guidance_scale"] = guidance
        if bool(negative) != (scale is not None and scale > 1):
            raise ValueError(
                f"the guidance of {kind} is distilled, so that --negative-prompt needs a "
                f"--true-cfg-scale above 1, and the other way round; they are {negative!r} and "
                f"{scale}. Each step then takes twice as long."
            )
    elif scale is not None:
        raise ValueError(f"the guidance of {kind} is not distilled; use --guidance")
    else:
        default = float(known["true_cfg_scale"].default)
        scale = default if sampling.guidance is None else sampling.guidance
        if negative and scale <= 1:
            raise ValueError(
                f"{kind} uses --negative-prompt only with a --guidance above 1, and it is {scale}"
            )
    if scale is not None:
        arguments["true_cfg_scale"] = scale
        if scale > 1:
            arguments["negative_prompt"] = negative or " "  # without one, there is no guidance
    return arguments


def _size_arguments(
    pipeline: Any, known: Mapping[str, Any], size: tuple[int, int]
) -> dict[str, int]:
    if not {"height", "width"} <= set(known):
        raise ValueError(f"{type(pipeline).__name__} does not support --height and --width")
    step = int(getattr(pipeline, "vae_scale_factor", 8)) * _patch_size(pipeline)
    for name, value in zip(("height", "width"), size, strict=True):
        if value % step:
            raise ValueError(
                f"--{name} is {value}, but {type(pipeline).__name__} needs a multiple of {step}"
            )
    return dict(zip(("height", "width"), size, strict=True))


def _patch_size(pipeline: Any) -> int:
    """Side of the patches in which a transformer embeds the latent; 1 for a U-Net."""
    transformer = pipeline.components.get("transformer")
    if transformer is None:
        return 1
    if hasattr(pipeline, "_pack_latents"):
        return 2  # packed by the pipeline, whatever the config of the transformer says
    return int(transformer.config.get("patch_size") or 2)
