"""Generators: the procedural one follows the prompt's words; the other is diffusers' pipeline.

The pipelines are real ones, tiny and with random weights, saved to disk and loaded like any other.
What our class paints is compared with a direct call of diffusers.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import generate_images
import numpy as np
import pytest

from clouds.data.label_space import CITYSCAPES_19
from clouds.generation.generators import GENERATOR_REGISTRY, build_generator
from clouds.generation.generators import stable_diffusion as sd
from clouds.generation.generators.procedural import paint_prompt
from clouds.generation.generators.registry import option_names
from clouds.scenes import STYLES
from clouds.scenes.generated_style import draw_style

SIZE = (96, 192)
PROMPTS = ["a tram at night in the rain", "a bus, a wall", "cars in the snow", "a quiet farm road"]


def share(label: np.ndarray, name: str) -> float:
    return float((label == CITYSCAPES_19.names.index(name)).mean())


def paintings(prompt: str, seeds: range, size=SIZE):
    return [paint_prompt(prompt, seed, size) for seed in seeds]


# ---------------------------------------------------------------------- the registry
def test_both_generators_are_registered_under_their_published_names():
    assert {"procedural", "stable_diffusion"} <= {name for name, _ in GENERATOR_REGISTRY}


def test_unknown_generator_and_option_are_named_with_what_exists():
    with pytest.raises(ValueError, match=r"unknown generator 'dalle'; known: procedural, stable"):
        build_generator("dalle")
    with pytest.raises(ValueError, match="no option --negative-prompt; it takes --height, --width"):
        build_generator("procedural", {"negative_prompt": "rain"})


def test_both_take_a_size():
    for name, make in GENERATOR_REGISTRY:
        assert {"height", "width"} <= set(option_names(make)), name


# ---------------------------------------------------------------------- procedural
def test_procedural_picture_is_a_function_of_prompt_and_seed():
    generator = build_generator("procedural", {"height": 64, "width": 96})
    together = generator.generate(PROMPTS, [5, 6, 7, 8])
    for prompt, seed, picture in zip(PROMPTS, [5, 6, 7, 8], together, strict=True):
        alone = generator.generate([prompt], [seed])[0]
        assert np.array_equal(alone.image, picture.image)
        assert np.array_equal(alone.label, picture.label)
        assert picture.image.shape == (64, 96, 3) and picture.image.dtype == np.uint8
        assert picture.label.shape == (64, 96) and picture.label.dtype == np.uint8
        assert set(np.unique(picture.label)) <= {*range(19), 255}
    assert not np.array_equal(generator.generate(PROMPTS[:1], [9])[0].image, together[0].image)


@pytest.mark.parametrize(
    ("prompt", "names"),
    [
        ("a tram at night in the rain", ("train",)),
        ("two cyclists and a motorbike beside a brick wall", ("bicycle", "motorcycle", "wall")),
        ("a bus waits at the traffic lights of a busy crossing", ("bus", "traffic light")),
        ("a lorry on a motorway under a road sign", ("truck", "traffic sign")),
        ("pedestrians on the sidewalk, a wooden fence, trees", ("person", "fence", "vegetation")),
    ],
)
def test_what_the_prompt_names_is_seen(prompt, names):
    labels = [picture.label for picture in paintings(prompt, range(10))]
    for name in names:
        seen = [share(label, name) > 0.0005 for label in labels]
        assert sum(seen) >= 9, (name, seen)


def test_what_the_prompt_rules_out_is_never_seen():
    for picture in paintings("a downtown street without cars or trees, no people", range(8)):
        for name in ("car", "vegetation", "person"):
            assert share(picture.label, name) == 0


def test_weather_time_and_bustle_are_followed():
    def brightness(prompt):
        return np.mean([p.image.mean() for p in paintings(prompt, range(6))])

    day, night = (brightness(f"a residential street on a clear {t}") for t in ("day", "night"))
    assert night < 0.65 * day
    # snow lies on the ground; fog takes the contrast away
    road = CITYSCAPES_19.names.index("road")

    def road_light(prompt):
        return np.mean([p.image[p.label == road].mean() for p in paintings(prompt, range(6))])

    assert road_light("snow on a road at noon") > 1.15 * road_light("a road at noon, sunny")

    far = [CITYSCAPES_19.names.index(name) for name in ("building", "vegetation", "sky")]

    def contrast(prompt):
        pictures = paintings(prompt, range(6))
        return np.mean([p.image[np.isin(p.label, far)].std() for p in pictures])

    assert contrast("an avenue in thick fog at noon") < 0.75 * contrast("a sunny avenue at noon")

    def moving(prompt):
        return np.mean(
            [np.isin(p.label, range(11, 19)).mean() for p in paintings(prompt, range(16))]
        )

    assert moving("a busy avenue") > 1.3 * moving("a quiet avenue")


def test_viewpoint_is_followed():
    def sky(prompt):
        return np.mean([share(p.label, "sky") for p in paintings(prompt, range(8))])

    assert sky("a motorway, view from a footbridge") < sky("a motorway, low angle")


def test_every_picture_has_a_style_of_its_own_and_none_is_a_domain_of_the_evaluation():
    styles = [draw_style(np.random.default_rng(seed)) for seed in range(20)]
    asphalts = {style.palette["asphalt"] for style in styles}
    assert len(asphalts) == 20
    domains = [replace(style, name="") for style in STYLES.values()]
    assert not any(replace(style, name="") in domains for style in styles)
    # Façades vary more from picture to picture than from domain to domain.
    means = [np.mean(style.palette["facade"], axis=0) for style in styles]
    of_domains = [np.mean(style.palette["facade"], axis=0) for style in STYLES.values()
                  if "facade" in style.palette]  # fmt: skip
    assert np.std(means, axis=0).mean() > np.std(of_domains, axis=0).mean()


def test_style_keeps_to_the_weather_and_the_time_that_were_asked_for():
    rng = np.random.default_rng(0)
    assert list(draw_style(rng, "fog", "night").conditions) == [("fog", "night")]
    drawn = {next(iter(draw_style(rng, time="dusk").conditions)) for _ in range(60)}
    assert {time for _, time in drawn} == {"dusk"} and len(drawn) > 1


def test_procedural_remarks_on_prompts_without_a_known_word():
    generator = build_generator("procedural", {"height": 64, "width": 64})
    remarks = generator.remarks(["a bus", "quelque chose", "quelque chose"])
    assert len(remarks) == 1 and "quelque chose" in remarks[0]


def test_procedural_refuses_a_tiny_size():
    with pytest.raises(ValueError, match="at least 64"):
        build_generator("procedural", {"height": 32, "width": 64})


# ---------------------------------------------------------------------- tiny pipelines
def save_tokenizer(folder: Path, pad: str = "<|endoftext|>"):
    """CLIP's tokenizer with letters as its only tokens."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + [",", "."]
    words = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77, pad_token=pad
    )


def text_config():
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=58, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=16, bos_token_id=56, eos_token_id=57, pad_token_id=57,
    )  # fmt: skip


def parts(**unet_options):
    """U-Net, autoencoder and scheduler: 64x64 pixels, latents of 8x8."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16),
        layers_per_block=1, norm_num_groups=4, down_block_types=("DownBlock2D",
        "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, **unet_options,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=64,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        steps_offset=1,
    )  # fmt: skip
    return {"unet": unet, "vae": vae, "scheduler": scheduler}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A Stable Diffusion of a few thousand parameters, on disk."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline(
        text_encoder=CLIPTextModel(text_config()), tokenizer=save_tokenizer(folder / "words"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        **parts(cross_attention_dim=16),
    )  # fmt: skip
    pipeline.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def tiny_xl(tmp_path_factory) -> Path:
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    folder = tmp_path_factory.mktemp("tiny_xl")
    torch.manual_seed(0)
    unet = {
        "cross_attention_dim": 32, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 16 + 6 * 8,
    }  # fmt: skip
    pipeline = StableDiffusionXLPipeline(
        text_encoder=CLIPTextModel(text_config()),
        text_encoder_2=CLIPTextModelWithProjection(text_config()),
        tokenizer=save_tokenizer(folder / "a"), tokenizer_2=save_tokenizer(folder / "b"),
        **parts(**unet),
    )  # fmt: skip
    pipeline.save_pretrained(folder / "model")
    return folder / "model"


def make(model: Path, **options):
    small = {"steps": 3, "height": 64, "width": 64, "batch_size": 3, "device": "cpu"}
    return build_generator("stable_diffusion", small | {"model": str(model)} | options)


def painted_by_diffusers(model: Path, prompt: str, seed: int, **options) -> np.ndarray:
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


@pytest.mark.parametrize("kind", ["tiny", "tiny_xl"])
def test_picture_is_that_of_a_direct_call_of_diffusers(kind, request):
    model = request.getfixturevalue(kind)
    generator = make(model)
    picture = generator.generate(["a tram at night"], [11])[0]
    assert picture.label is None and picture.image.dtype == np.uint8
    assert close(picture.image, painted_by_diffusers(model, "a tram at night", 11))
    assert generator.settings["scheduler"] == "EulerDiscreteScheduler"
    assert generator.settings["guidance"] == 7.5


def test_options_reach_the_pipeline(tiny):
    options = {"steps": 5, "guidance": 3.0, "negative_prompt": "rain", "height": 72, "width": 56}
    picture = make(tiny, **options).generate(["a wall"], [4])[0]
    direct = painted_by_diffusers(
        tiny, "a wall", 4, num_inference_steps=5, guidance_scale=3.0, negative_prompt="rain",
        height=72, width=56,
    )  # fmt: skip
    assert close(picture.image, direct)
    plain = painted_by_diffusers(
        tiny, "a wall", 4, num_inference_steps=5, guidance_scale=3.0, height=72, width=56
    )
    assert not close(plain, direct)


def test_picture_does_not_depend_on_its_neighbours(tiny):
    generator = make(tiny)
    together = generator.generate(PROMPTS[:3], [1, 2, 3])
    moved = generator.generate([PROMPTS[2], PROMPTS[0]], [3, 1])
    # The same batch size: the same bytes, at any place of the batch and beside anything.
    assert np.array_equal(moved[0].image, together[2].image)
    assert np.array_equal(moved[1].image, together[0].image)
    # Another batch size: equal up to rounding.
    for number, picture in enumerate(together):
        alone = make(tiny, batch_size=1).generate([PROMPTS[number]], [number + 1])[0]
        assert close(alone.image, picture.image)
    assert not close(together[0].image, together[1].image)
    assert not close(generator.generate(PROMPTS[:1], [2])[0].image, together[0].image)


def test_scheduler_by_class_name_and_the_models_own(tiny):
    assert make(tiny, scheduler="own").settings["scheduler"] == "DDIMScheduler"
    generator = make(tiny, scheduler="EulerAncestralDiscreteScheduler")
    first, again = (generator.generate(["a bus"], [1])[0].image for _ in range(2))
    assert np.array_equal(first, again)  # noise between steps comes from the picture's seed, too
    assert not close(first, make(tiny).generate(["a bus"], [1])[0].image)
    with pytest.raises(ValueError, match=r"'Eulr', which StableDiffusionPipeline.*EulerDiscrete"):
        make(tiny, scheduler="Eulr")


def test_flow_matching_models_keep_their_euler_steps():
    diffusers = pytest.importorskip("diffusers")
    pipeline = SimpleNamespace(scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    assert sd._set_scheduler(pipeline, "euler") == "FlowMatchEulerDiscreteScheduler"
    with pytest.raises(ValueError, match="FlowMatchEuler"):
        sd._set_scheduler(pipeline, "ddim")


def test_options_that_a_model_does_not_heed_are_refused():
    diffusers = pytest.importorskip("diffusers")
    flux = object.__new__(diffusers.FluxPipeline)
    object.__setattr__(flux, "vae_scale_factor", 8)
    object.__setattr__(flux, "_internal_dict", {})
    with pytest.raises(ValueError, match="FluxPipeline does not heed a --negative-prompt"):
        sd._call_arguments(flux, 4, None, "rain", (64, 64))

    class NoGuidance:
        components = ()

        def __call__(self, prompt, num_inference_steps, height, width, generator): ...

    assert sd._call_arguments(NoGuidance(), 4, None, "", (64, 64)) == {
        "num_inference_steps": 4, "height": 64, "width": 64,
    }  # fmt: skip
    with pytest.raises(ValueError, match="NoGuidance takes no --guidance"):
        sd._call_arguments(NoGuidance(), 4, 7.5, "", (64, 64))


def test_safety_checker_is_left_out(tiny, tmp_path):
    import shutil

    copy = tmp_path / "model"
    shutil.copytree(tiny, copy)
    index = json.loads((copy / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    (copy / "model_index.json").write_text(json.dumps(index | {"requires_safety_checker": True}))
    generator = make(copy)  # its folder is not even there
    assert generator.pipeline.safety_checker is None
    assert close(generator.generate(["x"], [1])[0].image, make(tiny).generate(["x"], [1])[0].image)


def test_numbers_that_are_none_are_an_error_that_says_what_to_do(tiny):
    import torch

    generator = make(tiny)
    torch.nn.init.constant_(generator.pipeline.vae.decoder.conv_out.weight, float("nan"))
    with pytest.raises(ValueError, match=r"NaN.*float32.*--dtype bfloat16"):
        generator.generate(["a bus"], [1])


def test_long_prompts_are_remarked_on(tiny):
    generator = make(tiny)
    short = "a bus"  # letters are tokens here: 4 of them
    remarks = generator.remarks([short, "a tram, " * 30])
    assert len(remarks) == 1 and "77" in remarks[0]


def test_command_paints_with_a_model_and_goes_on_in_other_batches(tiny, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    command = [
        "--output", str(tmp_path / "a"), "--prompts", str(tmp_path / "prompts.txt"), "--model",
        str(tiny), "--count", "5", "--batch-size", "3", "--steps", "2", "--height", "64",
        "--width", "64", "--device", "cpu", "--offline",
    ]  # fmt: skip
    generate_images.main(command)
    images = sorted((tmp_path / "a/images").iterdir())
    assert [path.name for path in images] == [f"{n:06d}.png" for n in range(5)]
    assert not (tmp_path / "a/labels").exists()
    before = [path.read_bytes() for path in images]
    for number in (1, 2, 4):
        images[number].unlink()
    generate_images.main(command)
    assert [path.read_bytes() for path in images] == before
    with pytest.raises(SystemExit):
        generate_images.main([*command, "--guidance", "5"])
    assert "guidance was 7.5 and is now 5.0" in capsys.readouterr().err


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


def test_model_that_is_not_there(tiny, tmp_path):
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


def test_model_that_does_not_paint_from_text(tmp_path):
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "DDPMPipeline", "_diffusers_version": "0.30.0"}'
    )
    with pytest.raises(ValueError, match="is a DDPMPipeline"):
        make(tmp_path)


def test_missing_package_says_how_to_install_it(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[generate\]'"):
        make(tmp_path)
