"""Generators: the registry, plug-ins by entry points, and diffusers pipelines.

The pipelines are real ones, tiny and with random weights, saved to disk and loaded like any other.
The images are compared with a direct call of diffusers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines
import torch

from clouds.cli import generate
from clouds.generation.generators import (
    GENERATOR_REGISTRY,
    build_generator,
    generator_names,
)
from clouds.generation.generators import stable_diffusion as sd
from clouds.generation.generators.registry import get_generator, option_names

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["a tram at night in the rain", "a bus, a wall", "cars in the snow", "a quiet farm road"]


# ---------------------------------------------------------------------- registry and entry points
@pytest.fixture
def plugin(tmp_path, monkeypatch) -> Path:
    """A distribution `my-plugin` with the generator `gray` in the module `my_generator`."""
    info = tmp_path / "my_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[clouds.generators]\ngray = my_generator:gray\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("my_generator", None)


def test_generators_of_installed_packages_are_found(plugin):
    (plugin / "my_generator.py").write_text("def gray(*, height=768, width=512):\n    return width")
    assert "gray" in generator_names()
    assert option_names(get_generator("gray")) == ["height", "width"]
    assert build_generator("gray", {"width": 7}) == 7
    with pytest.raises(
        ValueError, match="'gray' has no option --steps; it takes --height, --width"
    ):
        build_generator("gray", {"steps": 7})
    assert "gray" in generate.known_generators()


@pytest.mark.parametrize(
    ("code", "missing"), [(None, "my_generator"), ("import no_such_library", "no_such_library")]
)
def test_a_generator_that_cannot_be_imported_names_the_package(plugin, code, missing):
    if code is not None:
        (plugin / "my_generator.py").write_text(code)
    with pytest.raises(
        ImportError, match=rf"'gray' .* needs the package '{missing}'.*pip install my-plugin"
    ):
        build_generator("gray")


def test_registered_generators_precede_entry_points(plugin, monkeypatch):
    text = (plugin / "my_plugin-1.0.dist-info/entry_points.txt").read_text()
    text += "stable_diffusion = my_generator:gray\n"
    (plugin / "my_plugin-1.0.dist-info/entry_points.txt").write_text(text)
    assert get_generator("stable_diffusion") is sd.stable_diffusion
    assert generator_names().count("stable_diffusion") == 1


def test_the_generators_of_this_repository_have_their_published_names():
    assert "stable_diffusion" in {name for name, _ in GENERATOR_REGISTRY}
    assert {"procedural", "stable_diffusion"} <= set(generator_names())


def test_unknown_generator_and_option_are_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown generator 'dalle'; known: procedural, stable"):
        build_generator("dalle")
    with pytest.raises(ValueError, match="no option --negative-prompt; it takes --height, --width"):
        build_generator("procedural", {"negative_prompt": "rain"})


def test_all_generators_have_a_size():
    for name in generator_names():
        assert {"height", "width"} <= set(option_names(get_generator(name))), name


# ---------------------------------------------------------------------- tiny pipelines
@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A Stable Diffusion of a few thousand parameters, on disk."""
    return tiny_pipelines.save("stable_diffusion", tmp_path_factory.mktemp("tiny"))


def make(model: Path, **options):
    small = {"steps": 3, "height": 64, "width": 64, "batch_size": 3, "device": "cpu"}
    return build_generator("stable_diffusion", small | {"model": str(model)} | options)


def generated_by_diffusers(model: Path, prompt: str, seed: int, **options) -> np.ndarray:
    import torch
    from diffusers import DiffusionPipeline, EulerDiscreteScheduler

    pipeline = DiffusionPipeline.from_pretrained(model, local_files_only=True)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator("cpu").manual_seed(seed)
    usual = {"num_inference_steps": 3, "guidance_scale": 7.5, "height": 64, "width": 64}
    return np.array(pipeline(prompt, generator=noise, **(usual | options)).images[0])


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return int(np.abs(a.astype(int) - b.astype(int)).max()) <= 1


def test_image_is_that_of_a_direct_call_of_diffusers(tiny):
    generator = make(tiny)
    generated = generator.generate(["a tram at night"], [11])[0]
    assert generated.label is None and generated.image.dtype == np.uint8
    assert close(generated.image, generated_by_diffusers(tiny, "a tram at night", 11))
    assert generator.settings["scheduler"] == "EulerDiscreteScheduler"
    assert generator.settings["guidance"] == 7.5


def test_options_reach_the_pipeline(tiny):
    options = {"steps": 5, "guidance": 3.0, "negative_prompt": "rain", "height": 72, "width": 56}
    generated = make(tiny, **options).generate(["a wall"], [4])[0]
    direct = generated_by_diffusers(
        tiny, "a wall", 4, num_inference_steps=5, guidance_scale=3.0, negative_prompt="rain",
        height=72, width=56,
    )  # fmt: skip
    assert close(generated.image, direct)
    plain = generated_by_diffusers(
        tiny, "a wall", 4, num_inference_steps=5, guidance_scale=3.0, height=72, width=56
    )
    assert not close(plain, direct)


def test_image_does_not_depend_on_the_rest_of_the_batch(tiny):
    generator = make(tiny)
    together = generator.generate(PROMPTS[:3], [1, 2, 3])
    moved = generator.generate([PROMPTS[2], PROMPTS[0]], [3, 1])
    # Same batch size: identical at any position of the batch.
    assert np.array_equal(moved[0].image, together[2].image)
    assert np.array_equal(moved[1].image, together[0].image)
    # Another batch size: equal up to rounding.
    for number, generated in enumerate(together):
        alone = make(tiny, batch_size=1).generate([PROMPTS[number]], [number + 1])[0]
        assert close(alone.image, generated.image)
    assert not close(together[0].image, together[1].image)
    assert not close(generator.generate(PROMPTS[:1], [2])[0].image, together[0].image)


def test_scheduler_by_class_name_and_the_models_own(tiny):
    assert make(tiny, scheduler="own").settings["scheduler"] == "DDIMScheduler"
    generator = make(tiny, scheduler="EulerAncestralDiscreteScheduler")
    first, again = (generator.generate(["a bus"], [1])[0].image for _ in range(2))
    assert np.array_equal(first, again)  # noise between steps comes from the image's seed, too
    assert not close(first, make(tiny).generate(["a bus"], [1])[0].image)
    with pytest.raises(ValueError, match=r"'Eulr', which StableDiffusionPipeline.*EulerDiscrete"):
        make(tiny, scheduler="Eulr")


def test_safety_checker_is_left_out(tiny, tmp_path):
    import shutil

    copy = tmp_path / "model"
    shutil.copytree(tiny, copy)
    index = json.loads((copy / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    (copy / "model_index.json").write_text(json.dumps(index | {"requires_safety_checker": True}))
    generator = make(copy)  # although its folder does not exist
    assert generator.pipeline.safety_checker is None
    assert close(generator.generate(["x"], [1])[0].image, make(tiny).generate(["x"], [1])[0].image)


def test_nan_is_an_error_with_advice(tiny):
    import torch

    generator = make(tiny)
    torch.nn.init.constant_(generator.pipeline.vae.decoder.conv_out.weight, float("nan"))
    with pytest.raises(ValueError, match=r"NaN.*float32.*--dtype bfloat16"):
        generator.generate(["a bus"], [1])


def test_long_prompts_give_a_warning(tiny):
    generator = make(tiny)
    short = "a bus"  # letters are tokens here: 4 of them
    warnings = generator.prompt_warnings([short, "a tram, " * 30])
    assert len(warnings) == 1 and "77" in warnings[0]


def test_command_generates_with_a_model_and_resumes_in_other_batches(tiny, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    command = [
        "--output", str(tmp_path / "a"), "--prompts", str(tmp_path / "prompts.txt"), "--model",
        str(tiny), "--count", "5", "--batch-size", "3", "--steps", "2", "--height", "64",
        "--width", "64", "--device", "cpu", "--offline",
    ]  # fmt: skip
    generate.main(command)
    images = sorted((tmp_path / "a/images").iterdir())
    assert [path.name for path in images] == [f"{n:06d}.png" for n in range(5)]
    assert not (tmp_path / "a/labels").exists()
    before = [path.read_bytes() for path in images]
    for number in (1, 2, 4):
        images[number].unlink()
    generate.main(command)
    assert [path.read_bytes() for path in images] == before
    with pytest.raises(SystemExit):
        generate.main([*command, "--guidance", "5"])
    assert "guidance was 7.5 and is now 5.0" in capsys.readouterr().err


@pytest.mark.slow  # starts torchrun
def test_two_processes_generate_with_a_model_what_one_does(tiny, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    options = [
        "--prompts", str(tmp_path / "prompts.txt"), "--model", str(tiny), "--count", "5",
        "--batch-size", "2", "--steps", "2", "--height", "64", "--width", "64", "--device", "cpu",
        "--offline",
    ]  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", str(ROOT / "tools/generate_images.py")]
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [*torchrun, "--output", str(tmp_path / "two"), *options],
        env=own | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the two processes: with more, sums are rounded otherwise
    try:
        generate.main(["--output", str(tmp_path / "one"), *options])
    finally:
        torch.set_num_threads(threads)
    # once each: a number that two processes had made would have two lines
    entries = [json.loads(x) for x in (tmp_path / "two/manifest.jsonl").read_text().splitlines()]
    names = [entry["file"] for entry in entries if "file" in entry]
    assert sorted(names) == [f"{number:06d}.png" for number in range(5)]
    for name in names:
        one, two = (tmp_path / folder / "images" / name for folder in ("one", "two"))
        # of other batches; these have the same size, and images do not depend on the others
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"height": 65}, ValueError, "--height is 65.*multiple of 8"),
        ({"steps": 0}, ValueError, "--steps is 0"),
        ({"batch_size": 0}, ValueError, "--batch-size is 0"),
        ({"dtype": "int8"}, ValueError, "--dtype is 'int8'"),
        ({"device": "tpu9"}, ValueError, "--device is 'tpu9'"),
    ],
)
def test_bad_options(tiny, options, error, message):
    with pytest.raises(error, match=message):
        make(tiny, **options)


def test_model_that_is_not_available(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        make(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"without model_index\.json"):
        make(tmp_path / "empty")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"is a file.*from_single_file"):
        make(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"--offline.*hf download.*sd2-community/"):
        make("stabilityai/stable-diffusion-2", offline=True)  # type: ignore[arg-type]


def test_incomplete_model(tiny, tmp_path):
    import shutil

    copy = tmp_path / "model"
    shutil.copytree(tiny, copy)
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"not complete.*whole folder again"):
        make(copy)


def test_model_that_is_not_text_to_image(tmp_path):
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "DDPMPipeline", "_diffusers_version": "0.30.0"}'
    )
    with pytest.raises(ValueError, match="is a DDPMPipeline"):
        make(tmp_path)


def test_missing_package_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r'pip install "clouds-dgss\[generate\]"'):
        make(tmp_path)
