"""tools/train_controlnet.py on a tiny Stable Diffusion, up to images for labels."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import dataset_files
import numpy as np
import pytest
import tiny_pipelines
import torch

from clouds.cli import generate
from clouds.data.datasets import forget_listings, get_dataset
from clouds.data.label_space import CITYSCAPES_19
from clouds.generation.condition import LabelConditions
from clouds.generation.generators.label_images import trained_classes

TOOL = Path(__file__).resolve().parents[2] / "tools/train_controlnet.py"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOL.parent))
    spec = importlib.util.spec_from_file_location("train_controlnet", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_controlnet", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    forget_listings()
    for number in range(3):
        dataset_files.write(tmp_path, "gta5", number)
    return tmp_path


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_pipelines.save("stable_diffusion", tmp_path_factory.mktemp("base"))


def command(root, model, *more: str) -> list[str]:
    return [
        "--model", str(model), "--dataset", "gta5", "--output", str(root / "controlnet"),
        "--steps", "3", "--batch-size", "2", "--height", "64", "--width", "64", "--device", "cpu",
        "--offline", *more,
    ]  # fmt: skip


def test_a_trained_controlnet_generates_images_for_labels(tool, root, model):
    losses = tool.train(tool.parse(command(root, model)))
    assert len(losses) == 3 and np.isfinite(losses).all()
    config = json.loads((root / "controlnet/config.json").read_text())
    assert config["conditioning_channels"] == 20
    assert trained_classes(root / "controlnet") == CITYSCAPES_19.names
    generate.main([
        "--output", str(root / "stable_diffusion/x"), "--condition", "gta5", "--model", str(model),
        "--controlnet", str(root / "controlnet"), "--count", "2", "--steps", "2", "--height", "64",
        "--width", "64", "--device", "cpu", "--batch-size", "2", "--offline",
    ])  # fmt: skip
    assert all(record.approximate_label for record in get_dataset("sd_x").records())


def test_only_the_controlnet_trains_and_its_first_output_is_zero(tool, root, model):
    args = tool.parse(command(root, model))
    conditions = LabelConditions(get_dataset("gta5"), (64, 64))
    torch.manual_seed(0)
    trained = tool.Model(args, conditions, torch.device("cpu"))
    images, labels, prompts = next(tool.sample_batches(conditions, 2, seed=0))
    assert images.shape == (2, 3, 64, 64) and images.min() >= -1 and images.max() <= 1
    assert labels.shape == (2, 20, 64, 64) and torch.equal(labels.sum(1), torch.ones(2, 64, 64))
    assert prompts[0].startswith("a photo of a street, with ") or prompts[0] == ""
    torch.manual_seed(1)
    loss = trained.loss(images, labels, prompts)
    # the loss of the U-Net alone, by hand: the zero convolutions add nothing at the start
    part = trained.pipeline
    torch.manual_seed(1)
    with torch.no_grad():
        latents = part.vae.encode(images).latent_dist.sample() * part.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        steps = torch.randint(1000, (2,))
        alphas = trained.noise.alphas_cumprod[steps][:, None, None, None]
        noisy = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
        words = part.tokenizer(
            prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        )
        text = part.text_encoder(words.input_ids)[0]
        expected = ((part.unet(noisy, steps, text).sample - noise) ** 2).mean()
    assert torch.allclose(loss.detach(), expected, rtol=1e-4)
    loss.backward()
    assert all(p.grad is None for p in (*part.unet.parameters(), *part.vae.parameters()))
    assert any(p.grad is not None and p.grad.any() for p in trained.controlnet.parameters())


def test_the_loss_falls(tool, root, model):
    """Of one batch with the same noise, after some steps."""
    args = tool.parse(command(root, model))
    conditions = LabelConditions(get_dataset("gta5"), (64, 64))
    torch.manual_seed(0)
    trained = tool.Model(args, conditions, torch.device("cpu"))
    batch = next(tool.sample_batches(conditions, 2, seed=0))
    optimizer = torch.optim.AdamW(trained.controlnet.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        torch.manual_seed(5)
        loss = trained.loss(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--height", "72"], "must be multiples of 64"),
        (["--steps", "0"], "--steps must be above 0"),
        (["--dataset", "gta6"], "unknown dataset 'gta6'"),
    ],
)
def test_bad_options(tool, root, model, more, message, capsys):
    with pytest.raises(SystemExit):
        tool.main(command(root, model, *more))
    assert message in capsys.readouterr().err
    assert not (root / "controlnet").exists()


def test_other_models_and_used_folders_are_refused(tool, root, tmp_path, model, capsys):
    klein = tiny_pipelines.save("sana", tmp_path)
    with pytest.raises(SystemExit):
        tool.main(command(root, klein))
    assert "--model is a SanaPipeline; ControlNets are trained for" in capsys.readouterr().err
    (root / "controlnet").mkdir()
    (root / "controlnet/config.json").write_text("{}")
    with pytest.raises(SystemExit):
        tool.main(command(root, model))
    assert "exists; name a new folder" in capsys.readouterr().err
