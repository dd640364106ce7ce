"""torch.export and ONNX: equal to the model at every size, and errors that say what to do."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_adapter import move_adapter, vit_model_config
from tiny_checkpoint import block_image, save_checkpoint
from tiny_model import tiny_config
from torch import nn

from clouds import load
from clouds.config import load_config
from clouds.engine.checkpoint import Checkpointer
from clouds.export import export
from clouds.export.graphs import check, sample_images, trace, write_onnx
from clouds.export.network import SemanticNetwork
from clouds.modeling.build import build_seeded

DOCS = Path(__file__).parents[2] / "docs" / "export.md"

SIZES = ((64, 64), (90, 160), (33, 129))
"""64x64 is the size of the ViT's own table of positions."""


def scores_of(checkpoint, image):
    """From the code of evaluation and prediction, at the image's own size."""
    segmenter = load(checkpoint, overrides=["TEST.SHORT_SIDE", 0], merge_adapters=True)
    return segmenter(image).scores


def batch_of(image, dtype):
    return np.ascontiguousarray(image.transpose(2, 0, 1)[None]).astype(dtype)


def compare(run, checkpoint, dtype):
    for seed, size in enumerate(SIZES):
        image = block_image(*size, seed)
        expected = scores_of(checkpoint, image)
        found = run(batch_of(image, dtype))
        assert found.shape == (1, *expected.shape) and found.dtype == np.float32
        assert np.abs(found[0] - expected).max() < 1e-4
        assert (found[0].argmax(0) == expected.argmax(0)).mean() > 0.999


def onnx_run(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def save(model, cfg, folder):
    checkpointer = Checkpointer(model, str(folder), provenance={"config": cfg.dump()})
    checkpointer.save("model_final", iteration=0)
    return folder / "model_final.pth"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's model in a checkpoint, and its export."""
    pytest.importorskip("onnxruntime")
    run = tmp_path_factory.mktemp("run")
    cfg = load_config("demo/warmup", ["OUTPUT_DIR", str(run), "DATASETS.TEST", "()"])
    model = build_seeded(cfg)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.sem_seg_head.predictor.named_parameters():
            if name.startswith(("query_feat", "class_embed")):  # images have several classes
                value.copy_(torch.randn(value.shape, generator=generator))
    checkpoint = save(model, cfg, run)
    folder = tmp_path_factory.mktemp("exports") / "exported"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # users see none
        done = export(checkpoint, folder)
    assert set(done.checks) == {"model.pt2", "model.onnx"}
    return checkpoint, folder


@pytest.mark.slow
def test_onnx_of_the_demo(demo):
    import onnx

    checkpoint, folder = demo
    compare(onnx_run(folder / "model.onnx"), checkpoint, np.uint8)
    graph = onnx.load(folder / "model.onnx").graph
    for value, dims in (
        (graph.input[0], ["batch", 3, "height", "width"]),
        (graph.output[0], ["batch", 19, "height", "width"]),
    ):
        shape = value.type.tensor_type.shape.dim
        assert [d.dim_param or d.dim_value for d in shape] == dims
    assert [v.name for v in (*graph.input, *graph.output)] == ["images", "scores"]
    assert not any("transformer.resblocks" in value.name for value in graph.initializer)


@pytest.mark.slow
def test_torch_export_of_the_demo(demo):
    checkpoint, folder = demo
    network = torch.export.load(folder / "model.pt2").module()
    compare(lambda images: network(torch.from_numpy(images)).numpy(), checkpoint, np.uint8)


@pytest.mark.slow
def test_a_batch_has_the_scores_of_its_images(demo):
    run = onnx_run(demo[1] / "model.onnx")
    images = np.concatenate([batch_of(block_image(40, 70, i), np.uint8) for i in range(3)])
    alone = np.concatenate([run(image[None]) for image in images])
    assert np.abs(run(images) - alone).max() < 1e-5


@pytest.mark.slow
def test_the_documented_code_runs(demo, tmp_path, monkeypatch):
    """Each Python block of docs/export.md, and of the card."""
    checkpoint, folder = demo
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exported").symlink_to(folder)
    image = block_image(90, 160)
    Image.fromarray(image).save("street.png")
    monkeypatch.setattr("PIL.Image.Image.show", lambda self: None)
    expected = scores_of(checkpoint, image).argmax(0)
    card = (folder / "README.md").read_text().replace("FOLDER", "exported")
    card = card.replace("street.jpg", "street.png")  # JPEG would change the pixels
    blocks = re.findall(r"^```python\n(.*?)^```", DOCS.read_text() + card, re.M | re.S)
    assert len(blocks) == 6
    with_labels = 0
    for block in blocks:
        names: dict[str, object] = {}
        exec(compile(block, "docs/export.md", "exec"), names)
        if "labels" in names:
            with_labels += 1
            agreement = (np.asarray(names["labels"]) == expected).mean()
            assert agreement > 0.999
    assert with_labels == 4


@pytest.mark.slow
def test_onnx_of_a_vision_transformer(tmp_path):
    pytest.importorskip("onnxruntime")
    settings = {"MODEL__BACKBONE__POSITIONS": "dinov2", "DATASETS__TEST": ()}
    cfg = vit_model_config("lora", OUTPUT_DIR=str(tmp_path), **settings)
    model = build_seeded(cfg)
    move_adapter(model.backbone)
    checkpoint = save(model, cfg, tmp_path)
    done = export(checkpoint, tmp_path / "x", ["onnx"], input_type="float32")
    assert done.merged == 24 and done.checks["model.onnx"].difference < 1e-4
    compare(onnx_run(tmp_path / "x" / "model.onnx"), checkpoint, np.float32)


def text_checkpoint(folder):
    """A text class head with the ensemble, whose text embeddings of classes differ clearly."""
    cfg = tiny_config(
        OUTPUT_DIR=str(folder),
        DATASETS__TEST=(),
        MODEL__MASK_FORMER__DEC_LAYERS=2,
        MODEL__MASK_FORMER__TRANSFORMER_DECODER_NAME="text",
        MODEL__CLOUDS__GEOMETRIC_ENSEMBLE=True,
    )
    model = build_seeded(cfg)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "token_embedding" in name or "query_feat" in name:
                value.copy_(torch.randn(value.shape, generator=generator))
    return save(model, cfg, folder)


@pytest.mark.slow
def test_text_head_and_ensemble(tmp_path):
    pytest.importorskip("onnxruntime")
    checkpoint = text_checkpoint(tmp_path)
    export(checkpoint, tmp_path / "x", ["onnx", "torch"])
    compare(onnx_run(tmp_path / "x" / "model.onnx"), checkpoint, np.uint8)
    weights = torch.export.load(tmp_path / "x" / "model.pt2").state_dict
    text_encoder = [n for n in weights if "clip_model.transformer" in n]
    assert text_encoder and all(weights[n].numel() == 0 for n in text_encoder)


class Spectrum(nn.Module):
    def forward(self, images):
        x = images.float().mean(1)
        return torch.linalg.eigvalsh(x @ x.transpose(1, 2)).sum(-1)[:, None, None, None] + images


@pytest.mark.slow
def test_an_operator_that_onnx_lacks_is_named(tmp_path):
    pytest.importorskip("onnxruntime")
    program = trace(Spectrum(), "float32")
    with pytest.raises(ValueError, match=r"no operator for aten\._linalg_eigh.*--format"):
        write_onnx(program, Spectrum(), tmp_path / "x.onnx", "float32")


class Branch(nn.Module):
    def forward(self, images):
        return images * 2 if images.sum() > 0 else images


@pytest.mark.slow
def test_a_model_that_cannot_be_traced():
    with pytest.raises(ValueError, match=r"torch\.export makes no graph.*--format"):
        trace(Branch(), "float32")


# ------------------------------------------------------------------------------- fast


@pytest.mark.parametrize(
    "make", [lambda folder: save_checkpoint(folder)[0], text_checkpoint], ids=["linear", "text"]
)
def test_the_network_has_the_scores_of_prediction(tmp_path, make):
    """Before it is exported, against the code of evaluation."""
    checkpoint = make(tmp_path)
    network = SemanticNetwork(load(checkpoint).model)
    image = block_image(70, 100)
    with torch.no_grad():
        found = network(torch.from_numpy(batch_of(image, np.uint8)))[0].numpy()
    expected = scores_of(checkpoint, image)
    # rounding of the kernels, which the masks of attention make larger
    assert found.shape == expected.shape and np.abs(found - expected).max() < 1e-3
    assert (found.argmax(0) == expected.argmax(0)).mean() > 0.999
    assert expected.std() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x, None),
        (lambda x: x + 0.01, "scores by 0.01"),
        (lambda x: np.where(np.arange(x.shape[-1]) < 2, x[:, ::-1], x), "have the same class"),
        (lambda x: x[..., :-1], "shape"),
        (lambda x: x * np.nan, "scores by nan"),
    ],
)
def test_a_graph_that_differs_is_refused(change, message):
    network = nn.Conv2d(3, 4, 1)
    with torch.no_grad():
        network.weight.mul_(1e-5)  # so that other classes differ by less than 1e-3

    def run(images):
        with torch.no_grad():
            return change(network(torch.from_numpy(images)).numpy())

    if message is None:
        assert check(run, network, Path("x"), "float32").agreement == 1
        return
    for name, without in (("x.onnx", "onnx"), ("x.pt2", "torch")):
        with pytest.raises(ValueError, match=f"{message}.* Leave {without} out of --format"):
            check(run, network, Path(name), "float32")


def test_sample_images_are_bytes():
    images = sample_images((2, 3, 20, 30), "uint8")
    assert images.dtype == torch.uint8 and images.shape == (2, 3, 20, 30)
    assert torch.equal(images.float(), sample_images((2, 3, 20, 30), "float32"))
