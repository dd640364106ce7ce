"""Outputs of a small model with weights that follow from their names, recorded on disk.

`tests/reference/recorded_outputs.npz` was written by this file, as a script, at a commit whose
model agreed with the published code (test_reference.py, test_reference_joint.py and
test_reference_refiners.py). So where the published outputs are not at hand, a change of any number
still shows.

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
"""Such that queries stay apart from one another, and several classes are seen."""


def fill(module):
    """Values from names: NumPy's legacy generator, whose numbers do not change."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            draw = np.random.RandomState(zlib.crc32(name.encode()))
            values = draw.standard_normal(tuple(tensor.shape))
            if name == "criterion.empty_weight" or not tensor.is_floating_point():
                continue
            if tensor.ndim >= 2:
                gain = next((g for part, g in GAINS.items() if part in name), 1.5)
                values *= gain / np.sqrt(values[0].size)
            else:
                values = 0.01 * values + (1.0 if name.endswith(("weight", "gamma")) else 0.0)
            tensor.copy_(torch.from_numpy(np.asarray(values)))


def picture(seed):
    """Blocks of color: a structure that labels can follow."""
    blocks = np.random.RandomState(seed).randint(0, 256, (3, SIZE[0] // 16, SIZE[1] // 16))
    return torch.from_numpy(np.kron(blocks, np.ones((1, 16, 16))).astype(np.uint8))


def batch():
    """Source, generated, source."""

    def source(seed):
        label = np.kron(np.random.RandomState(seed).randint(0, 6, (4, 6)), np.ones((16, 16)))
        label[:4] = 255
        return {
            "image": picture(seed),
            "sem_seg": torch.from_numpy(label.astype(np.uint8)),
            "domain": Domain.SOURCE,
            "seed": seed,
        }

    painted = {
        "image": picture(11) // 2 + 20,
        "clean_image": picture(11),
        "domain": Domain.GENERATED,
        "seed": 11,
    }
    return [source(10), painted, source(12)]


def build():
    """The model of joint training, refined by a tiny real SAM."""
    settings = {
        "DATASETS__TRAIN": ("gta5", "sd_a"),
        "MODEL__CLOUDS__SAM__MODEL": "tiny",
        "MODEL__CLOUDS__SAM__WEIGHTS": "",
        "MODEL__CLOUDS__SAM__SIZE_THRESHOLD": 20,
        "MODEL__CLOUDS__SAM__OVERLAP": "published",
    }
    model = tiny_model(**settings)
    fill(model)
    model.self_training.teacher.restart()
    return model


def inference(model):
    """Every stage of one image's way to its scores."""
    found = {}
    model.eval()
    with torch.no_grad():
        images = model._images([picture(1)]).tensor
        features = model.backbone(images)
        mask_features, maps = model.sem_seg_head.pixel_decoder(features)
        predictions = model.sem_seg_head.predictor(maps, mask_features)
        found["text classifier"] = model._text_rows().rows[:, ::8]
        found |= {f"backbone {name}": value[:, ::8] for name, value in features.items()}
        found["mask features"] = mask_features[:, ::8]
        found |= {f"scale {i}": value[:, ::8] for i, value in enumerate(maps)}
        for i, logits in enumerate(predictions.class_logits):
            found[f"class logits {i}"] = logits
            found[f"mask logits {i}"] = predictions.mask_logits[i][:, ::4]
        found["scores"] = model([{"image": picture(1)}])[0]["sem_seg"][:, ::4, ::4]
    return found


def training(model):
    """One joint step: pseudo-label, matched pairs, losses, gradients, weights after it."""
    found, matches = {}, []

    def record(*args):
        matches.extend(match(*args))
        return matches

    plain, criterion.match = criterion.match, record
    try:
        losses = model.train()(batch())
    finally:
        criterion.match = plain
    cfg = get_cfg()
    optimizer = build_optimizer(cfg, model)
    sum(losses.values()).backward()
    found |= losses
    for layer, images in enumerate(matches):
        found |= {f"matched {layer} {i}": torch.stack(pairs) for i, pairs in enumerate(images)}
    trained = {n: p for n, p in model.named_parameters() if p.grad is not None}
    found["gradient norms"] = torch.stack([p.grad.norm() for p in trained.values()])
    found["gradient norm"] = build_clipping(cfg, optimizer)()
    optimizer.step()
    for name in ("query_feat", "level_embed"):
        found[f"{name} after the step"] = trained[f"sem_seg_head.predictor.{name}.weight"]
    return found


def pseudo_labels(model):
    """Teacher's label of the clean picture, SAM's masks before and after overlap removal."""
    clean = picture(11)
    label = model.teach([clean])[0]
    found = {"teacher": label.classes, "confidence": label.confidence[::4, ::4]}
    teaching = model.self_training
    teaching.refine([clean], [label], [0])  # makes the refiner
    refiner = teaching._refiner
    fill(refiner.decode.sam)
    decode, masks = refiner.decode, []

    def recording(*args):
        decoded = list(decode(*args))
        masks.append(decoded[0][0])
        return decoded

    refiner.decode = recording
    refined = teaching.refine([clean], [label], [11])[0]
    refiner.decode = decode
    found |= {"masks": masks[0], "pseudo classes": refined.labels, "pseudo masks": refined.masks}
    return found | {"points": refined.points}


def outputs():
    """Everything, by name, as NumPy arrays."""
    model = build()
    found = inference(model) | pseudo_labels(model) | training(model)
    return {name: value.detach().numpy() for name, value in found.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(FILE, **outputs())
