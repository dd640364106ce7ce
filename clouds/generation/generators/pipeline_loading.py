"""Loading of diffusers' text-to-image pipelines, from the hub or a local folder."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clouds.downloads import one_warning
from clouds.messages import install_extra

_VARIANT_FILE = re.compile(r"\.(?P<variant>[a-z]\w*)(?:-\d+-of-\d+)?\.(?:safetensors|bin)$")
"""Name of a weight file of a variant, such as model.fp16.safetensors."""


@dataclass(frozen=True)
class Source:
    """Where a model is loaded from.

    Attributes:
        model: id on the hub or a local folder.
        dtype: name of the data type of the weights.
        offline: use local files only.
        variant: of the weight files, such as 'fp16'; empty: the files without one.
        flag: of the command line, for messages.
    """

    model: str
    dtype: str
    offline: bool = False
    variant: str = ""
    flag: str = "--model"

    @property
    def local(self) -> bool:
        return self.offline or Path(self.model).is_dir()

    def options(self) -> dict[str, Any]:
        """Arguments of `from_pretrained`."""
        import torch

        options = {_dtype_argument(): getattr(torch, self.dtype), "local_files_only": self.local}
        return options | ({"variant": self.variant} if self.variant else {})


def load_pipeline(source: Source, controlnet: Any = None) -> Any:
    """The text-to-image pipeline, on the CPU, without a safety checker.

    Args:
        controlnet: by `load_controlnet`; the pipeline is one that takes it.

    Raises:
        ValueError: diffusers has no such pipeline for the model, or it does not fit the ControlNet.
        FileNotFoundError: the model is not available.
        ImportError: diffusers is not installed.
    """
    diffusers = _import_diffusers()
    _check_folder(source, "model_index.json", "a diffusers pipeline")
    with _explain_load_errors(source):
        parts = diffusers.DiffusionPipeline.load_config(source.model, local_files_only=source.local)
        kind = str(parts.get("_class_name"))
        options = source.options()
        if "safety_checker" in parts:
            options |= {"safety_checker": None, "requires_safety_checker": False}
        if controlnet is not None:
            return _load_with_controlnet(diffusers, kind, source, controlnet, options)
        try:
            return diffusers.AutoPipelineForText2Image.from_pretrained(source.model, **options)
        except ValueError as error:
            if "AutoPipeline can't find" not in str(error):
                raise
            raise ValueError(
                f"{source.model} is a {kind}, and diffusers knows no text-to-image pipeline for "
                "it. Use a text-to-image model, such as Stable Diffusion or FLUX."
            ) from error


def load_controlnet(source: Source) -> Any:
    """A ControlNet of any class of diffusers, on the CPU; raises as `load_pipeline`."""
    diffusers = _import_diffusers()
    _check_folder(source, "config.json", "a ControlNet")
    with _explain_load_errors(source):
        config = diffusers.ControlNetModel.load_config(source.model, local_files_only=source.local)
        kind = str(config.get("_class_name"))
        if "ControlNet" not in kind or not hasattr(diffusers, kind):
            raise ValueError(
                f"--controlnet {source.model} is a {kind}; a ControlNet of diffusers is expected, "
                "such as lllyasviel/sd-controlnet-seg"
            )
        return getattr(diffusers, kind).from_pretrained(source.model, **source.options())


def _load_with_controlnet(
    diffusers: Any, kind: str, source: Source, controlnet: Any, options: dict[str, Any]
) -> Any:
    own = type(controlnet).__name__
    pipeline_class = getattr(diffusers, kind.replace("Pipeline", "ControlNetPipeline"), None)
    if pipeline_class is None:
        raise ValueError(
            f"{source.model} is a {kind}, which cannot be conditioned: diffusers has no ControlNet "
            "pipeline for it. Use Stable Diffusion 1.5, 2, XL or 3, FLUX, Sana or Qwen-Image."
        )
    expected = str(inspect.signature(pipeline_class).parameters["controlnet"].annotation)
    if not re.search(rf"\b{own}\b", expected):
        raise ValueError(
            f"--controlnet is a {own}, which does not fit {source.model}, a {kind}; use a "
            "ControlNet that was trained for this model"
        )
    pipeline = pipeline_class.from_pretrained(source.model, controlnet=controlnet, **options)
    if own == "SD3ControlNetModel":
        _encode_without_noise(pipeline.vae)
    unet = pipeline.components.get("unet")
    if unet is not None:
        widths = controlnet.config.cross_attention_dim, unet.config.cross_attention_dim
        if widths[0] != widths[1]:
            raise ValueError(
                f"--controlnet takes text embeddings of {widths[0]} channels, and {source.model} "
                f"has {widths[1]}; use a ControlNet that was trained for this model"
            )
    return pipeline


def _encode_without_noise(vae: Any) -> None:
    """Let the autoencoder return the mode of its distribution in place of samples.

    Stable Diffusion 3's pipeline samples the encoded label from torch's global random numbers, so
    that an image would not be a function of its seed.
    """
    encode = vae.encode

    def encode_mode(*args: Any, **options: Any) -> Any:
        output = encode(*args, **options)
        output.latent_dist.sample = lambda generator=None: output.latent_dist.mode()
        return output

    vae.encode = encode_mode


def _import_diffusers() -> Any:
    try:
        import diffusers
        import transformers  # noqa: F401
        from diffusers import AutoPipelineForText2Image  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"the generator 'stable_diffusion' needs diffusers and transformers ({error}). Install "
            f"them with `{install_extra('generate')}`, or use --generator procedural"
        ) from error
    return diffusers


def _dtype_argument() -> str:
    """Name of the dtype argument in this version of diffusers: `torch_dtype`, later `dtype`."""
    from diffusers.utils import deprecation_utils

    return "dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype"


def _check_folder(source: Source, index: str, what: str) -> None:
    """Raise FileNotFoundError for a folder that does not exist or does not contain `index`."""
    path = Path(source.model)
    # A hub id has at most one slash.
    looks_local = path.is_absolute() or source.model.startswith((".", "~")) or len(path.parts) > 2
    convert = (
        "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        if index == "model_index.json"
        else "ControlNetModel.from_single_file(FILE).save_pretrained(FOLDER)"
    )
    if path.is_dir() and not (path / index).is_file():
        raise FileNotFoundError(
            f"{source.model} is a folder without {index}, so it is not {what}. A single "
            f".safetensors or .ckpt file becomes one with {convert}."
        )
    if path.is_file():
        raise FileNotFoundError(
            f"{source.model} is a file; {source.flag} needs a folder or an id of the hub. Convert "
            f"it with {convert}."
        )
    if looks_local and not path.is_dir():
        raise FileNotFoundError(f"{source.flag}: there is no folder {source.model}")


@contextmanager
def _explain_load_errors(source: Source) -> Iterator[None]:
    """Replace errors about a model that is not available by advice."""
    try:
        with one_warning() as attempts:
            yield
    except (OSError, ValueError) as error:
        model = source.model
        variants = _variants(Path(model))
        if isinstance(error, ValueError) and not (source.variant and "variant" in str(error)):
            raise
        if Path(model).is_dir() and variants != {source.variant} - {""}:
            raise FileNotFoundError(_variant_advice(source, variants)) from error
        if Path(model).is_dir():
            raise FileNotFoundError(
                f"the pipeline in {model} is not complete: {_first_line(error)}. Copy or download "
                "the whole folder again."
            ) from error
        raise FileNotFoundError(
            f"the model {model} cannot be loaded: {attempts.failure or _first_line(error)}. "
            f"{_download_advice(source)}."
        ) from error


def _variants(folder: Path) -> set[str]:
    """The variants of which a folder has weight files, such as 'fp16'."""
    files = [path.name for path in folder.rglob("*")] if folder.is_dir() else []
    return {found["variant"] for name in files if (found := _VARIANT_FILE.search(name))}


def _variant_advice(source: Source, variants: set[str]) -> str:
    wanted = f"of the variant {source.variant!r}" if source.variant else "without a variant"
    if not variants:
        return f"{source.model} has no weight files {wanted}; leave --variant out"
    known = " or ".join(f"--variant {variant}" for variant in sorted(variants))
    return (
        f"{source.model} does not have all weight files {wanted}. Use {known}, of which it has "
        "files, or download the missing ones."
    )


def _download_advice(source: Source) -> str:
    model = source.model
    advice = (
        f"Download it where there is a network, `hf download {shlex.quote(model)} "
        f"--local-dir FOLDER`, and name that folder with {source.flag}"
    )
    if source.offline:
        advice = f"It is not in the local cache, and --offline forbids a download. {advice}"
    else:
        advice += "; a gated model needs `hf auth login` first"
    if model.startswith("stabilityai/stable-diffusion-2"):
        copy = model.replace("stabilityai/", "sd2-community/", 1)
        advice += f". Its makers took it off the hub in November 2025; a copy is {copy}"
    return advice


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__
