"""One tiny pipeline of each class of diffusers: images equal a direct call; options per class."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_pipelines
import torch

from clouds.generation.generators import build_generator, pipeline_options

DIRECT = {
    "stable_diffusion": {"guidance_scale": 7.5},
    "stable_diffusion_xl": {"guidance_scale": 7.5},
    "stable_diffusion_3": {"guidance_scale": 7.0},
    "flux": {"guidance_scale": 3.5},
    "flux2_klein": {"guidance_scale": 4.0},
    "sana": {"guidance_scale": 4.5, "use_resolution_binning": False},
    "qwen_image": {"true_cfg_scale": 4.0, "negative_prompt": " "},
}
"""Pipeline -> arguments of a direct call of diffusers."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Name of a pipeline -> its folder, saved once."""
    folder, known = tmp_path_factory.mktemp("pipelines"), {}

    def get(name: str) -> Path:
        if name not in known:
            known[name] = tiny_pipelines.save(name, folder)
        return known[name]

    return get


def make(model: Path, **options):
    small = {"steps": 2, "height": 64, "width": 64, "batch_size": 2, "device": "cpu"}
    return build_generator("stable_diffusion", small | {"model": str(model)} | options)


@cache
def loaded(model: Path):
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(model, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def direct(model: Path, prompt: str, seed: int, **options) -> np.ndarray:
    pipeline = loaded(model)
    usual = {"num_inference_steps": 2, "height": 64, "width": 64}
    noise = torch.Generator("cpu").manual_seed(seed)
    return np.array(pipeline(prompt=prompt, generator=noise, **(usual | options)).images[0])


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize("name", list(tiny_pipelines.PIPELINES))
def test_images_are_those_of_a_direct_call(saved, name):
    generator = make(saved(name), scheduler="own")
    first, second = generator.generate(["a tram at night", "a bus"], [3, 4])
    assert difference(first.image, direct(saved(name), "a tram at night", 3, **DIRECT[name])) <= 1
    assert difference(second.image, direct(saved(name), "a bus", 4, **DIRECT[name])) <= 1
    assert difference(first.image, second.image) > 1


@pytest.mark.parametrize("name", ["flux2_klein", "sana", "qwen_image"])
def test_long_prompts_are_counted_with_the_tokens_of_the_pipeline(saved, name):
    limit = {"sana": 300}.get(name, 512)  # a letter is a token here
    generator = make(saved(name))
    assert generator.prompt_warnings(["a" * (limit - 20)]) == []
    (warning,) = generator.prompt_warnings(["a " * limit + "b " * limit])
    assert f"tokens beyond {limit} are cut" in warning


# ---------------------------------------------------------------------- schedulers
@pytest.mark.parametrize(
    ("name", "scheduler", "kind"),
    [
        ("stable_diffusion", "unipc", "UniPCMultistepScheduler"),
        ("stable_diffusion", "dpm++", "DPMSolverMultistepScheduler"),
        ("stable_diffusion_3", "euler", "FlowMatchEulerDiscreteScheduler"),
        ("stable_diffusion_3", "heun", "FlowMatchHeunDiscreteScheduler"),
        ("stable_diffusion_3", "dpm++", "DPMSolverMultistepScheduler"),
        ("flux", "unipc", "UniPCMultistepScheduler"),
        ("qwen_image", "unipc", "UniPCMultistepScheduler"),
        ("sana", "euler", "FlowMatchEulerDiscreteScheduler"),
        ("sana", "dpm++", "DPMSolverMultistepScheduler"),
    ],
)
def test_schedulers_by_name(saved, name, scheduler, kind):
    generator = make(saved(name), scheduler=scheduler)
    assert generator.settings["scheduler"] == kind == type(generator.pipeline.scheduler).__name__
    image = generator.generate(["a bus"], [1])[0].image
    assert image.std() > 1


@pytest.mark.parametrize(("name", "shift"), [("stable_diffusion_3", 3.0), ("sana", 3.0)])
@pytest.mark.parametrize("scheduler", ["euler", "heun", "dpm++", "unipc"])
def test_another_scheduler_of_a_flow_has_the_same_noise_levels(saved, name, shift, scheduler):
    """sigma' = s sigma / (1 + (s - 1) sigma), equally spaced in sigma, by hand.

    Schedulers differ in where the last step starts, 1 / 40 or 1 / 1000: 0.07 after the shift. With
    a shift of 1 the levels would differ by 0.27.
    """
    pipeline = SimpleNamespace(scheduler=loaded(saved(name)).scheduler, components={})
    pipeline_options.set_scheduler(pipeline, scheduler)
    pipeline.scheduler.set_timesteps(40)
    sigmas = np.unique(pipeline.scheduler.sigmas.numpy())[::-1]
    linear = np.linspace(1, 0, 41)
    expected = shift * linear / (1 + (shift - 1) * linear)
    assert len(sigmas) == 41
    assert np.abs(sigmas - expected).max() < 0.07


@pytest.mark.parametrize(
    ("name", "scheduler"), [("flux", "ddim"), ("qwen_image", "dpm++"), ("flux2_klein", "heun")]
)
def test_schedulers_that_a_pipeline_cannot_use_are_refused(saved, name, scheduler):
    with pytest.raises(ValueError, match=rf"'{re_escape(scheduler)}', which \w+Pipeline does not"):
        make(saved(name), scheduler=scheduler)


def re_escape(text: str) -> str:
    return text.replace("+", r"\+")


# ---------------------------------------------------------------------- negative prompts
def test_negative_prompt_of_a_distilled_model_needs_a_scale_of_its_own(saved):
    with pytest.raises(ValueError, match=r"FluxPipeline is distilled.*--true-cfg-scale above 1"):
        make(saved("flux"), negative_prompt="rain")
    with pytest.raises(ValueError, match="the other way round; they are '' and 3"):
        make(saved("flux"), true_cfg_scale=3.0)
    generator = make(saved("flux"), negative_prompt="rain", true_cfg_scale=3.0, scheduler="own")
    image = generator.generate(["a bus"], [1])[0].image
    arguments = {"negative_prompt": "rain", "true_cfg_scale": 3.0, "guidance_scale": 3.5}
    assert difference(image, direct(saved("flux"), "a bus", 1, **arguments)) <= 1
    assert difference(image, direct(saved("flux"), "a bus", 1, guidance_scale=3.5)) > 1
    assert generator.settings["true_cfg_scale"] == 3.0


def test_guidance_of_qwen_image_is_classifier_free(saved):
    options = {"guidance": 2.5, "negative_prompt": "rain", "scheduler": "own"}
    image = make(saved("qwen_image"), **options).generate(["a bus"], [1])[0].image
    arguments = {"negative_prompt": "rain", "true_cfg_scale": 2.5}
    assert difference(image, direct(saved("qwen_image"), "a bus", 1, **arguments)) <= 1
    assert difference(image, direct(saved("qwen_image"), "a bus", 1, **DIRECT["qwen_image"])) > 1
    with pytest.raises(ValueError, match="only with a --guidance above 1, and it is 1"):
        make(saved("qwen_image"), guidance=1.0, negative_prompt="rain")
    with pytest.raises(ValueError, match="not distilled; use --guidance"):
        make(saved("qwen_image"), true_cfg_scale=3.0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flux2_klein", {"negative_prompt": "rain"}, "does not support --negative-prompt"),
        ("sana", {"true_cfg_scale": 2.0}, "does not support --true-cfg-scale; use --guidance"),
        ("sana", {"height": 80}, "--height is 80, but SanaPipeline needs a multiple of 32"),
        ("flux", {"width": 72}, "--width is 72, but FluxPipeline needs a multiple of 16"),
        ("stable_diffusion", {"offload": "model"}, "'model', which saves memory of a GPU"),
        ("stable_diffusion", {"offload": "disk"}, "'disk'; allowed are none, model, sequential"),
    ],
)
def test_options_that_a_model_does_not_support(saved, name, options, message):
    with pytest.raises(ValueError, match=message):
        make(saved(name), **options)


# ---------------------------------------------------------------------- weight variants
@pytest.fixture
def half(tmp_path) -> Path:
    """A folder that holds only the files of the variant fp16."""
    return tiny_pipelines.save("stable_diffusion", tmp_path, variant="fp16")


def test_a_folder_of_one_variant_is_whole(half, saved):
    generator = make(half, variant="fp16")
    assert generator.settings["variant"] == "fp16"
    expected = make(saved("stable_diffusion")).generate(["a bus"], [1])[0].image
    assert difference(generator.generate(["a bus"], [1])[0].image, expected) <= 1


def test_a_missing_variant_names_those_of_the_folder(half, saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"without a variant\. Use --variant fp16"):
        make(half)
    with pytest.raises(FileNotFoundError, match=r"'bf16'\. Use --variant fp16"):
        make(half, variant="bf16")
    with pytest.raises(FileNotFoundError, match="no weight files of the variant 'fp16'; leave"):
        make(saved("stable_diffusion"), variant="fp16")
    (half / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"not complete.*whole folder again"):
        make(half, variant="fp16")


def test_files_of_a_variant_beside_the_others_are_not_looked_at(saved, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(saved("stable_diffusion"), copy)
    tiny_pipelines.save("stable_diffusion", tmp_path / "x", variant="fp16")
    for path in (tmp_path / "x/stable_diffusion").rglob("*.fp16.*"):
        shutil.copy(path, copy / path.relative_to(tmp_path / "x/stable_diffusion"))
    assert "variant" not in make(copy).settings
    assert make(copy, variant="fp16").settings["variant"] == "fp16"
