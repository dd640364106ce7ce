"""Outputs of a small model whose weights are a function of their names, recorded on disk.

`tests/reference/recorded_outputs.npz` was written by this script at a commit whose model agreed
with the published code (test_reference.py, test_reference_joint.py and test_reference_refiners.py).
So changed numbers are detected where the published outputs are not available.

    PYTHONPATH=tests:. python tests/reference/recorded_outputs.py
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch
from tiny_model import tiny_model

from clouds.config import get_cfg
from clouds.data.structures import Domain
from clouds.engine.optimizer import build_clipping, build_optimizer
from clouds.modeling import criterion
from clouds.modeling.matcher import match

FILE = Path(__file__).with_name("recorded_outputs.npz")
SIZE = (64, 96)
GAINS = {"query": 15.0, "predictor.transformer": 0.1, "class_embed": 4.0, "mask_embed": 1.0}
"""Chosen so that queries differ and several classes are predicted."""


def fill(module):
    """Set values by name, with NumPy's legacy generator: its numbers never change."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            generator = np.random.RandomState(zlib.crc32(name.encode()))
            values = generator.standard_normal(tuple(tensor.shape))
            if name == "criterion.empty_weight" or not tensor.is_floating_point():
                continue
            if tensor.ndim >= 2:
                gain = next((g for part, g in GAINS.items() if part in name), 1.5)
                values *= gain / np.sqrt(values[0].size)
            else:
                values = 0.01 * values + (1.0 if name.endswith(("weight", "gamma")) else 0.0)
            tensor.copy_(torch.from_numpy(np.asarray(values)))


def image_of(seed):
    """Blocks of color, (3, H, W) uint8."""
    blocks = np.random.RandomState(seed).randint(0, 256, (3, SIZE[0] // 16, SIZE[1] // 16))
    return torch.from_numpy(np.kron(blocks, np.ones((1, 16, 16))).astype(np.uint8))


def batch():
    """Source, generated, source."""

    def source(seed):
        label = np.kron(np.random.RandomState(seed).randint(0, 6, (4, 6)), np.ones((16, 16)))
        label[:4] = 255
        return {
            "image": image_of(seed),
            "sem_seg": torch.from_numpy(label.astype(np.uint8)),
            "domain": Domain.SOURCE,
            "seed": seed,
        }

    generated = {
        "image": image_of(11) // 2 + 20,
        "clean_image": image_of(11),
        "domain": Domain.GENERATED,
        "seed": 11,
    }
    return [source(10), generated, source(12)]


def build():
    """The model of joint training, with a tiny SAM as refiner."""
    settings = {
        "DATASETS__TRAIN": ("gta5", "sd_a"),
        "MODEL__CLOUDS__SAM__MODEL": "tiny",
        "MODEL__CLOUDS__SAM__WEIGHTS": "",
        "MODEL__CLOUDS__SAM__SIZE_THRESHOLD": 20,
        "MODEL__CLOUDS__SAM__OVERLAP": "published",
    }
    model = tiny_model(**settings)
    fill(model)
    model.pseudo_labeler.teacher.reset()
    return model


def inference(model):
    """Outputs of every stage of inference on one image."""
    outputs = {}
    model.eval()
    with torch.no_grad():
        images = model._preprocess([image_of(1)]).tensor
        features = model.backbone(images)
        mask_features, maps = model.sem_seg_head.pixel_decoder(features)
        predictions = model.sem_seg_head.predictor(maps, mask_features)
        outputs["text classifier"] = model._text_embeddings(model.network).rows[:, ::8]
        outputs |= {f"backbone {name}": value[:, ::8] for name, value in features.items()}
        outputs["mask features"] = mask_features[:, ::8]
        outputs |= {f"scale {i}": value[:, ::8] for i, value in enumerate(maps)}
        for i, logits in enumerate(predictions.class_logits):
            outputs[f"class logits {i}"] = logits
            outputs[f"mask logits {i}"] = predictions.mask_logits[i][:, ::4]
        outputs["scores"] = model([{"image": image_of(1)}])[0]["sem_seg"][:, ::4, ::4]
    return outputs


def training(model):
    """One joint step: matched pairs, losses, gradients, and weights after it."""
    outputs, matches = {}, []

    def record(*args):
        matches.extend(match(*args))
        return matches

    original, criterion.match = criterion.match, record
    try:
        losses = model.train()(batch())
    finally:
        criterion.match = original
    cfg = get_cfg()
    optimizer = build_optimizer(cfg, model)
    sum(losses.values()).backward()
    outputs |= losses
    for layer, images in enumerate(matches):
        outputs |= {f"matched {layer} {i}": torch.stack(pairs) for i, pairs in enumerate(images)}
    trained = {n: p for n, p in model.named_parameters() if p.grad is not None}
    outputs["gradient norms"] = torch.stack([p.grad.norm() for p in trained.values()])
    outputs["gradient norm"] = build_clipping(cfg, optimizer)()
    optimizer.step()
    for name in ("query_feat", "level_embed"):
        outputs[f"{name} after the step"] = trained[f"sem_seg_head.predictor.{name}.weight"]
    return outputs


def pseudo_labels(model):
    """The teacher's label of the clean image, SAM's masks before and after overlap removal."""
    clean = image_of(11)
    label = model.predict_pseudo_labels([clean])[0]
    outputs = {"teacher": label.classes, "confidence": label.confidence[::4, ::4]}
    refiner = model.pseudo_labeler.prepare(label.classes.device)
    fill(refiner.predict_masks.sam)
    predict_masks, masks = refiner.predict_masks, []

    def record(*args):
        predicted = list(predict_masks(*args))
        masks.append(predicted[0][0])
        return predicted

    refiner.predict_masks = record
    refined = refiner.refine([clean], [label], [11])[0]
    refiner.predict_masks = predict_masks
    outputs |= {"masks": masks[0], "pseudo classes": refined.labels, "pseudo masks": refined.masks}
    return outputs | {"points": refined.points}


def compute_outputs():
    """All recorded outputs by name, as NumPy arrays."""
    model = build()
    outputs = inference(model) | pseudo_labels(model) | training(model)
    return {name: value.detach().numpy() for name, value in outputs.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(FILE, **compute_outputs())
